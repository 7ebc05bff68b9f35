"""docs/troubleshooting.md quotes messages that the code still has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


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
