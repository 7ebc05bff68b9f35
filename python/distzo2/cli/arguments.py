"""The command line of an options class: argparse reads names and values as text, and prints help.

Types and ranges are checked by `distzo2.run.options`, as for options from a file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, Field
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from distzo2.run.options import LEFT, FinetuneOptions, Switch, groups_of, types_of


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


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds the options of an options class to `parser`, and `--config`."""
    types = types_of(kind)
    titles = {title: parser if title is None else parser.add_argument_group(title) for title in groups_of(kind)}
    for title, group in groups_of(kind).items():
        for option in group:
            _add(titles[title], option, types[option.name])
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="TOML, YAML or JSON whose keys are the names of these options; the command line wins",
    )  # fmt: skip


def _add(parser: argparse._ActionsContainer, option: Field, kind: Any) -> None:
    shown, default = option.metadata, option.default
    text = shown["help"]
    if default not in (MISSING, None) and default is not False and "default" not in text:
        text += f" (default: {default})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is Switch:
        settings["action"] = "store_true"
    else:
        settings["metavar"] = shown["metavar"] or _choices(kind)
        if shown["bare"] is not None:
            settings |= {"nargs": "?", "const": shown["bare"]}
    if shown["positional"]:
        parser.add_argument(option.name, nargs="?", **settings)
    else:
        flags = [*filter(None, [shown["short"]]), "--" + option.name.replace("_", "-")]
        parser.add_argument(*flags, dest=option.name, **settings)


def _choices(kind: Any) -> str | None:
    """`{a,b}` for a Literal, which may be optional; None for other types."""
    names = [name for part in (kind, *get_args(kind)) if get_origin(part) is Literal for name in get_args(part)]
    return f"{{{','.join(names)}}}" if names and get_origin(kind) is not Annotated else None


def refuse(parser: argparse.ArgumentParser, kind: type | None, unknown: Sequence[str]) -> NoReturn:
    """Ends the command for arguments that it does not know."""
    names = [text.split("=")[0].removeprefix("--").replace("-", "_") for text in unknown]
    left = [name for name in names if kind is FinetuneOptions and name in LEFT]
    if left:
        parser.error(f"--{left[0].replace('_', '-')} is no longer an option: {LEFT[left[0]]}")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")
