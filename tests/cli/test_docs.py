"""The documentation names options and quotes messages that the code has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from distzo2.cli.main import build_parser

ROOT = Path(__file__).parents[2]
QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_command_line_exists(page: Path) -> None:
    """Of `distzo2 COMMAND ...`, in a line of code or between backticks."""
    commands = build_parser()[1]
    for name, rest in re.findall(r"\bdistzo2 ([a-z]+)\b([^`\n|#]*)", page.read_text()):
        if name in commands and name != "journal":
            known = {flag for action in commands[name]._actions for flag in action.option_strings}
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= known, f"distzo2 {name}{rest}"


def text_of(node: ast.AST) -> str:
    """A string, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@cache
def messages() -> str:
    """Every string of the code, one a line."""
    python = [path for folder in ("python", "distzo2_core") for path in (ROOT / folder).rglob("*.py")]
    nodes = (node for path in python for node in ast.walk(ast.parse(path.read_text())))
    texts = [text_of(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    for path in (ROOT / "csrc/runtime").rglob("*.cpp"):  # arguments of fail(): texts with values between
        texts += [
            "…".join(re.findall(r'"([^"\n]*)"', call))
            for call in re.findall(r"fail\((.*?);\n", path.read_text(), re.DOTALL)
        ]
    return "\n".join(text.replace("\n", " ") for text in texts)


@pytest.mark.parametrize("message", QUOTED)
def test_the_code_has_the_message(message: str) -> None:
    parts = [part for part in re.split("…", message) if part.strip(" :")]
    assert max(map(len, parts)) > 9, "too little to recognize it by"
    is_there = re.search(".*".join(map(re.escape, parts)), messages()) is not None
    assert is_there


def test_enough_is_quoted() -> None:
    assert len(QUOTED) > 40 and len(set(QUOTED)) == len(QUOTED)
