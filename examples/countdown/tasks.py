"""Countdown tasks: three numbers, and a target that an expression of them makes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, permutations, product

from reward import evaluated


@dataclass(frozen=True)
class Task:
    """Numbers in the order in which they are shown, a target, and the expressions that make it."""

    numbers: tuple[int, ...]
    target: int
    solutions: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} = {self.target}:"


@cache
def expressions(numbers: tuple[int, ...]) -> dict[str, int]:
    """Every expression of the numbers, each used once, with its value."""
    texts = set()
    for first, *rest in permutations(numbers):
        for operators in product("+-*", repeat=len(rest)):
            texts.add(str(first) + "".join(f"{sign}{number}" for sign, number in zip(operators, rest, strict=True)))
    return {text: evaluated(text)[0] for text in sorted(texts)}


def all_tasks(seed: int, largest: int = 9) -> list[Task]:
    """Every task of three numbers from 1 to `largest` with a target from 1 to 99, in an order drawn by `seed`. No two
    have the same numbers and target, so parts of the list share none."""
    draw, tasks = random.Random(seed), []
    for numbers in combinations_with_replacement(range(1, largest + 1), 3):
        shown = tuple(draw.sample(numbers, 3))
        makes: dict[int, list[str]] = {}
        for text, value in expressions(shown).items():
            makes.setdefault(value, []).append(text)
        tasks += [Task(shown, target, tuple(texts)) for target, texts in sorted(makes.items()) if 0 < target < 100]
    draw.shuffle(tasks)
    return tasks
