"""The options of `distzo2 finetune`: names, units, defaults, and where they come from (command line, file, run)."""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distzo2.errors import UsageError

# What a resumed run must share with the run so far: data order, noise and losses are functions of these.
FIXED = ("seed", "batch_size", "micro_batches", "noise", "dtype", "objective", "truncate", "max_length", "train_mode")


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # torchrun's other ranks have the same command line
            self.exit(2)
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.HelpFormatter):
    """Adds each option's default to its help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = (
            action.default is None or action.default is False or action.default == argparse.SUPPRESS
        )  # 0 is a default
        if action.option_strings and not told and "default" not in text:
            text += " (default: %(default)s)"
        return text


def num_bytes(text: str) -> int | str:
    """A number of bytes, with a suffix of KiB, MiB or GiB or without; or "auto"."""
    if text == "auto":
        return text
    for suffix, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("", 1)):
        if text.endswith(suffix):
            value = float(text.removesuffix(suffix)) * scale
            break
    if not 1 <= value < 2**63:
        raise ValueError
    return int(value)


def positive_int(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**32:  # as many as there are steps
        raise argparse.ArgumentTypeError(f"{text}: {'at least 1' if value < 1 else 'less than 2^32'} was expected")
    return value


def whole_int(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: {'0 or more' if value < 0 else 'less than 2^32'} was expected")
    return value


def mesh_shape(text: str) -> str:
    from distzo2.mesh import parse_mesh

    parse_mesh(text)
    return text


def seed_int(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text}: 0 to 2^64 - 1 was expected")
    return value


def _is_float32(value: float) -> bool:
    """Whether it is in the range of float32, in which steps are computed: 0, or neither too large nor too small."""
    return value == 0 or 2.0**-149 <= abs(value) < 2.0**128


def positive_float(text: str) -> float:
    value = float(text)
    if not (value > 0 and _is_float32(value)):
        raise argparse.ArgumentTypeError(f"{text}: a positive number was expected, in the range of float32")
    return value


def whole_float(text: str) -> float:
    value = float(text)
    if not (value >= 0 and _is_float32(value)):
        raise argparse.ArgumentTypeError(f"{text}: 0 or a positive number was expected, in the range of float32")
    return value


def share_float(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 and at most 1 was expected")
    return value


def limit_float(text: str) -> float | None:
    """A number above 1, or "none"."""
    if text.lower() == "none":
        return None
    value = float(text)
    if not value > 1:
        raise argparse.ArgumentTypeError(f"{text}: a number above 1 was expected, or none")
    return value


for _type, _text in (
    (num_bytes, "number of bytes (such as 12GiB), or auto"),
    (positive_int, "integer"), (whole_int, "integer"), (seed_int, "integer"),
    (positive_float, "number"), (whole_float, "number"), (share_float, "number"), (limit_float, "number"),
    (mesh_shape, "mesh (such as pert=2,data=2)"),
):  # fmt: skip
    _type.__name__ = _text  # what argparse calls it in "invalid ... value"


def add_placement(parser: argparse.ArgumentParser, weights: str = "host") -> None:
    """Options of every command that loads a model."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", default="cpu", metavar="cpu|cuda|cuda:N", help="where it computes")
    group.add_argument(
        "--weights", choices=("device", "host", "disk"), default=weights,
        help="where the streamed weights live: on the device, in pinned host memory, or in a file that needs as much "
        "room on the disk as the model",
    )  # fmt: skip
    group.add_argument(
        "--weights-dir", metavar="DIR", help="directory of that file (default: the output directory, or /tmp)"
    )
    group.add_argument(
        "--memory-budget", type=num_bytes, metavar="BYTES|auto",
        help="bytes of the device for weights, such as 12GiB: blocks that fit stay there, the others stream; auto: "
        "70%% of what is free (default: all blocks stream)",
    )  # fmt: skip
    group.add_argument(
        "--write-every", type=positive_int, default=1, metavar="N",
        help="write a streamed block back at every N-th step, blocks in turn, and make the updates in between again at "
        "each visit: spares a disk, costs noise",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="dtype of the weights; auto: the checkpoint's",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads for computing (default: torch's choice)"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options of every command that reads data files."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--objective", choices=("lm", "choices", "error"),
        help="lm: cross-entropy of the completion's tokens; choices: cross-entropy over the choices, each scored by "
        "the mean log-likelihood of its tokens; error: 1 - accuracy, which has no gradient (default: choices where "
        "lines have choices, else lm)",
    )  # fmt: skip
    group.add_argument(
        "--truncate", choices=("error", "left", "right"), default="error",
        help="what to do with a line that is longer than --max-length: stop with file and line number, or drop tokens "
        "of its beginning or its end (of a line with choices: of its prompt)",
    )  # fmt: skip
    group.add_argument(
        "--max-length", type=positive_int, metavar="TOKENS", help="longest sequence (default: the model's)"
    )


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """The options of `finetune`."""
    group = parser.add_argument_group("what")
    group.add_argument("--model", metavar="DIR", help="directory of a Hugging Face checkpoint (safetensors, tokenizer)")
    group.add_argument(
        "--train",
        metavar="FILE",
        help="JSONL: prompt and completion, or prompt, choices and label, or messages, or text",
    )
    group.add_argument("--eval", metavar="FILE", help="JSONL of held-out lines of the same kind")
    group.add_argument("--out", metavar="DIR", help="directory of the run: journal, metrics, checkpoint")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out from its last durable step; options not given are the run's",
    )
    group.add_argument(
        "--branch-from",
        metavar="RUN",
        help="begin with the first steps of the run in that directory, and go on in --out with other options; options "
        "not given are that run's, and --seed, --model and --dtype must be",
    )
    group.add_argument(
        "--at-step", type=whole_int, metavar="N", help="how many of its steps --branch-from takes over (default: all)"
    )
    group.add_argument(
        "--config", metavar="FILE", help="TOML or JSON whose keys are the names of these options; the command line wins"
    )

    group = parser.add_argument_group("how it learns")
    group.add_argument("--steps", type=positive_int, metavar="N", help="steps in all, one update each")
    group.add_argument("--lr", type=whole_float, default=1e-6, help="learning rate, per unit of the estimated gradient")
    group.add_argument("--eps", type=positive_float, default=1e-3, help="size of a perturbation, in units of a weight")
    group.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="examples a step")
    group.add_argument(
        "--micro-batches",
        type=positive_int,
        default=1,
        metavar="N",
        help="parts that a step's batch is cut into, to save memory for long sequences; must divide --batch-size",
    )
    group.add_argument(
        "--probes",
        type=positive_int,
        default=1,
        metavar="K",
        help="perturbations a step; spsa takes 2K forward passes of the batch, fzoo K + 1",
    )
    group.add_argument(
        "--noise", choices=("normal", "rademacher"), default="normal", help="distribution of a perturbation's elements"
    )
    group.add_argument(
        "--estimator",
        choices=("spsa", "fzoo"),
        default="spsa",
        help="spsa: two-sided differences; fzoo: one-sided, divided by the spread of the losses (needs 2 probes or "
        "more, and takes a far larger --lr)",
    )
    group.add_argument(
        "--weight-decay",
        type=whole_float,
        default=0.0,
        metavar="LAMBDA",
        help="pull towards 0, times --lr, a step; biases and norms are left out",
    )
    group.add_argument(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="of the learning rate, down to 0 at --steps",
    )
    group.add_argument(
        "--warmup", type=whole_int, default=0, metavar="STEPS", help="steps in which the learning rate rises from 0"
    )
    group.add_argument("--seed", type=seed_int, default=0, help="of perturbations, data order and dropout")
    group.add_argument(
        "--train-mode", action="store_true", help="leave dropout on; it adds noise to the difference of two losses"
    )

    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--eval-every",
        type=whole_int,
        default=0,
        metavar="N",
        help="steps between evaluations, besides the one before and the one after; 0: none",
    )
    group.add_argument(
        "--eval-batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="examples in a micro-batch of an evaluation",
    )
    group.add_argument(
        "--score",
        choices=("accuracy", "loss"),
        help="held-out figure that tells the best step (default: accuracy where lines have choices, else loss)",
    )
    group.add_argument(
        "--save",
        choices=("last", "best", "none"),
        default="last",
        help="checkpoint written at the end to OUT/checkpoint: of the last step, of the best (rebuilt from the "
        "journal), or none; any step can be rebuilt later with distzo2 replay",
    )
    group.add_argument(
        "--snapshot-every",
        type=whole_int,
        default=0,
        metavar="STEPS",
        help="steps between snapshots: copies of the weights, made in the background in OUT/snapshots, from which "
        "--resume goes on instead of from the model; 0: none",
    )
    group.add_argument(
        "--snapshot-minutes",
        type=whole_float,
        default=0.0,
        metavar="MINUTES",
        help="minutes between snapshots; 0: none by time",
    )
    group.add_argument(
        "--keep",
        type=positive_int,
        default=1,
        metavar="K",
        help="snapshots that are kept; an older one goes when a newer one is whole",
    )
    group.add_argument(
        "--snapshot-pace",
        type=share_float,
        default=0.03,
        metavar="SHARE",
        help="the most that a snapshot may take of the time of the steps that it spans; with more it is whole sooner",
    )
    group.add_argument(
        "--journal-chain",
        action="store_true",
        help="each line of the journal holds a hash over all lines so far, so that none can be changed, removed or "
        "reordered unnoticed; the last hash, which is printed at the end, stands for the whole run",
    )
    group.add_argument(
        "--fsync-every",
        type=positive_int,
        default=1,
        metavar="N",
        help="sync the journal to the disk after so many steps, behind the steps that follow; a power cut may cost the "
        "steps since, a kill does not",
    )
    group.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FILE",
        help="record compute, waits and transfers of some steps as a Chrome trace, which opens in Perfetto (without a "
        "name: OUT/trace.json)",
    )
    group.add_argument(
        "--trace-steps", type=positive_int, default=3, metavar="N", help="how many steps --trace records"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")

    group = parser.add_argument_group("when it goes wrong")
    group.add_argument(
        "--max-coef",
        type=limit_float,
        default=10.0,
        metavar="X",
        help="clip a step's coefficients to this multiple of their running median; none: never",
    )
    group.add_argument(
        "--max-clipped",
        type=whole_int,
        default=10,
        metavar="N",
        help="stop after so many clipped steps in a row; 0: never",
    )
    group.add_argument(
        "--no-check",
        action="store_true",
        help="do not check, before the first step, that two equal forward passes agree to the bit",
    )
    group.add_argument(
        "--max-skipped",
        type=positive_int,
        default=5,
        metavar="N",
        help="stop after so many steps in a row whose loss is not finite; such steps are not applied",
    )
    group.add_argument(
        "--max-lanes",
        type=positive_int,
        metavar="N",
        help="evaluations (perturbation x micro-batch) that share a pass over the weights; fewer need less "
        "memory, same bits (default: all)",
    )
    add_data(parser)
    add_placement(parser)
    add_parallel(parser)


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """Options of a command that torchrun may start on several ranks."""
    group = parser.add_argument_group("many ranks (torchrun --nproc-per-node N -m distzo2 finetune ...)")
    group.add_argument(
        "--parallel", type=mesh_shape, metavar="pert=P,data=D",
        help="ranks that share the perturbations of a step, and ranks that share its micro-batches; P x D is the "
        "number of ranks (default: the mesh whose busiest rank has the least to do)",
    )  # fmt: skip
    group.add_argument(
        "--slice", choices=("on", "off"),
        help="each rank keeps a slice of every streamed block, and the ranks of a machine gather the blocks together "
        "(default: what is faster, as measured at the start)",
    )  # fmt: skip
    group.add_argument(
        "--verify-every", type=whole_int, default=0, metavar="N",
        help="steps between comparisons of the ranks' weights, besides the one before the first step; 0: none",
    )  # fmt: skip
    group.add_argument(
        "--heartbeat-limit", type=positive_float, default=30.0, metavar="SECONDS",
        help="a rank that is not heard of for so long is given up, and the run ends",
    )  # fmt: skip


def parse_finetune(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a run: defaults, then the run's own where it is resumed, then the file's, then the command line's.

    Raises:
        UsageError: a file of options cannot be used, an option is missing or out of range, options do not go together.
    """
    given = parser.parse_args(arguments)
    layers: list[str] = []
    if given.resume and given.branch_from:
        raise UsageError("--resume goes on with the run in --out, --branch-from begins another: give one of them")
    if given.branch_from:
        from distzo2.run_directory import saved_options

        parent = saved_options(given.branch_from)
        layers += to_arguments(parser, parent, f"{given.branch_from}/run.json")
    if given.resume and not given.out:
        raise UsageError("--resume needs --out, the directory of the run")
    if given.resume:
        from distzo2.run_directory import saved_options

        saved = saved_options(given.out)
        for name in ("branch_from", "at_step"):  # of a run that has not begun
            if (value := saved.pop(name, None)) is not None:
                layers.append(f"--{name.replace('_', '-')}={value}")
        layers += to_arguments(parser, saved, f"{given.out}/run.json")
    if given.config:
        layers += to_arguments(parser, read_config(given.config), given.config)
    options = parser.parse_args([*layers, *arguments])
    _check(options)
    if options.branch_from:
        if not given.branch_from:  # of a run that has not begun
            from distzo2.run_directory import saved_options

            parent = saved_options(options.branch_from)
        for name in ("seed", "dtype"):
            if getattr(options, name) != parent.get(name, getattr(options, name)):
                change = f"was {parent[name]!r} in {options.branch_from} and is {getattr(options, name)!r}"
                raise UsageError(f"--{name} {change}: a branch keeps it")
    return options


def _check(options: argparse.Namespace) -> None:
    for name in ("model", "train", "out", "steps"):
        if getattr(options, name) in (None, ""):
            raise UsageError(f"--{name} is {'missing' if getattr(options, name) is None else 'empty'}")
    if options.batch_size % options.micro_batches:
        raise UsageError(f"--micro-batches {options.micro_batches} does not divide --batch-size {options.batch_size}")
    if options.estimator == "fzoo" and options.probes < 2:
        raise UsageError("--estimator fzoo needs --probes 2 or more, to see a spread of losses")
    if options.warmup > options.steps:
        raise UsageError(f"--warmup {options.warmup} is more than --steps {options.steps}")
    if options.fsync_every > 1 and options.weights == "disk":
        raise UsageError(
            f"--fsync-every {options.fsync_every} with --weights disk: a block is written back only after its step's "
            "line is on the disk, so every step is synced"
        )
    if options.at_step is not None and not options.branch_from:
        raise UsageError("--at-step needs --branch-from")
    if options.eval is None and (options.save == "best" or options.eval_every):
        raise UsageError(f"--{'save best' if options.save == 'best' else 'eval-every'} needs --eval")


def read_config(path: str) -> dict[str, Any]:
    """The options in a TOML or JSON file, keys with - or _.

    Raises:
        UsageError: it cannot be read, or is neither.
    """
    try:
        content = Path(path).read_bytes()
        values = json.loads(content) if path.endswith(".json") else tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (ValueError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: an object whose keys are option names was expected")
    return values


def to_arguments(parser: argparse.ArgumentParser, values: dict[str, Any], source: str) -> list[str]:
    """Options from a mapping as command-line arguments.

    Raises:
        UsageError: a key is no option, or a value is not of its kind.
    """
    once = ("help", "config", "resume", "branch_from", "at_step")
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in once}
    arguments: list[str] = []
    for key, value in values.items():
        action = actions.get(key.replace("-", "_"))
        if action is None:
            raise UsageError(f"{source}: {key!r} is not an option of finetune")
        flag = action.option_strings[-1]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UsageError(f"{source}: {key}: true or false was expected, got {value!r}")
            arguments += [flag] if value else []
        elif value is None:
            if action.type is limit_float:
                arguments.append(f"{flag}=none")
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UsageError(f"{source}: {key}: a string or a number was expected, got {value!r}")
        else:
            text = f"{flag}={value}"
            try:
                parser._get_value(action, str(value))
                parser._check_value(action, value if action.choices is None else str(value))
            except argparse.ArgumentError as error:
                raise UsageError(f"{source}: {key}: {error.message}") from error
            arguments.append(text)
    return arguments
