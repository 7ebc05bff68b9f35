"""The reward of Countdown: make a target from some numbers, each used once, with +, - and *.

`distzo2 finetune --objective reward --reward reward.py:countdown` calls it. A row of data holds "numbers" and "target".
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from typing import Any

FORMAT = 0.1  # for an expression that uses the numbers and misses the target
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def countdown(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for an expression that makes the target, 0.1 for one that only uses the numbers, else 0."""
    return [reward_of(text, row["numbers"], row["target"]) for text, row in zip(completions, rows, strict=True)]


def reward_of(text: str, numbers: Sequence[int], target: int) -> float:
    try:
        value, used = evaluated(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return 0.0
    if sorted(used) != sorted(numbers):
        return 0.0
    return 1.0 if value == target else FORMAT


def evaluated(text: str) -> tuple[int, list[int]]:
    """The value of an arithmetic expression, and the numbers in it, by its syntax tree: no code is run.

    Raises:
        ValueError: it holds anything but whole numbers and the three operators, or is longer than 100 characters.
    """
    if len(text) > 100:  # products of more numbers than a task has are not worth computing
        raise ValueError("too long")
    used: list[int] = []

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return node.value
        raise ValueError(f"{type(node).__name__} is no arithmetic")

    return value(ast.parse(text, mode="eval").body), used
