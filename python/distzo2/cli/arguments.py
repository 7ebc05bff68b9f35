"""The command line of an options class: argparse reads names and values as text, and prints help.

Types and ranges are checked by `distzo2.run.options`, as for options from a file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from functools import partial
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from distzo2.option_types import Switch, groups_of, types_of


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # torchrun's other ranks have the same command line
            self.exit(2)
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


Formatter = partial(argparse.HelpFormatter, max_help_position=30, width=110)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds the options of an options class to `parser`, and `--config`."""
    types = types_of(kind)
    for title, group in groups_of(kind).items():
        section = parser if title is None else parser.add_argument_group(title)
        for option in group:
            _add(section, option, types[option.name])
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="TOML, YAML or JSON whose keys are the names of these options; the command line wins",
    )  # fmt: skip


def _add(parser: argparse._ActionsContainer, option: Field, kind: Any) -> None:
    default = option.default
    shown = {"short": None, "bare": None, "positional": False, "repeats": False} | option.metadata
    text = shown["help"]
    if default not in (MISSING, None, "") and default is not False and "default" not in text:
        text += f" (default: {default})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is Switch:
        settings["action"] = "store_true"
    else:
        settings["metavar"] = shown["metavar"] or _metavar(kind)
        if shown["repeats"]:
            settings["action"] = "append"
        if shown["bare"] is not None:
            settings |= {"nargs": "?", "const": shown["bare"]}
    if shown["positional"]:
        parser.add_argument(option.name, nargs="?", **settings)
    else:
        flags = [*filter(None, [shown["short"]]), "--" + option.name.replace("_", "-")]
        parser.add_argument(*flags, dest=option.name, **settings)


def _metavar(kind: Any) -> str | None:
    """`{a,b}` for a Literal, N for a whole number, X for another; None for other types."""
    names = [name for part in (kind, *get_args(kind)) if get_origin(part) is Literal for name in get_args(part)]
    if names and get_origin(kind) is not Annotated:
        return f"{{{','.join(names)}}}"
    types = [each for part in (kind, *get_args(kind)) for each in get_args(part)]
    return "N" if int in types else "X" if float in types else None


def refuse(
    parser: argparse.ArgumentParser, left: Mapping[str, str], others: Mapping[str, type], unknown: Sequence[str]
) -> NoReturn:
    """Ends the command for arguments that it does not know; `left` says what replaces those it once had, `others` are
    the options of all commands."""
    flags = [text.split("=")[0] for text in unknown if text.startswith("--")]
    for flag, name in ((flag, flag.removeprefix("--").replace("-", "_")) for flag in flags):
        if name in left:
            parser.error(f"{flag} is no longer an option: {left[name]}")
        if found := [command for command, kind in others.items() if name in types_of(kind)]:
            parser.error(f"{flag} is an option of distzo2 {', '.join(found)}")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")
