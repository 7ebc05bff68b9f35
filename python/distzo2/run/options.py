"""What commands share of their options: the parser, the kinds of values, and the groups that several of them have."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn


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
        has_default = action.default not in (None, argparse.SUPPRESS) and action.default is not False  # 0 is one
        if action.option_strings and has_default and "default" not in text:
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
    from distzo2.parallel.mesh import parse_mesh

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
