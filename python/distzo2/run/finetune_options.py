"""The options of `distzo2 finetune`: names, units, defaults, and where they come from (command line, file, run)."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distzo2.errors import UsageError
from distzo2.run.options import (
    add_data,
    add_parallel,
    add_placement,
    limit_float,
    positive_float,
    positive_int,
    seed_int,
    share_float,
    whole_float,
    whole_int,
)

# What a resumed run must share with the run so far: data order, noise and losses are functions of these.
FIXED = ("seed", "batch_size", "micro_batches", "noise", "dtype", "objective", "truncate", "max_length", "train_mode")


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
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
        from distzo2.run.directory import saved_options

        parent = saved_options(given.branch_from)
        layers += to_arguments(parser, parent, f"{given.branch_from}/run.json")
    config = read_config(given.config) if given.config else {}
    if given.resume:
        from distzo2.run.directory import saved_options

        out = given.out or config.get("out")
        if not out or not isinstance(out, str):
            raise UsageError("--resume needs --out, the directory of the run")
        saved = saved_options(out)
        for name in ("branch_from", "at_step"):  # of a run that has not begun
            if (value := saved.pop(name, None)) is not None:
                layers.append(f"--{name.replace('_', '-')}={value}")
        layers += to_arguments(parser, saved, f"{out}/run.json")
    layers += to_arguments(parser, config, given.config)
    options = parser.parse_args([*layers, *arguments])
    _check(options)
    if options.branch_from:
        if not given.branch_from:  # of a run that has not begun
            from distzo2.run.directory import saved_options

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
    if not options.eval and (options.save == "best" or options.eval_every):
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
