"""Interleaved timing: what is compared sees the same state of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
MAX_CALLS = 10_000


@dataclass(frozen=True)
class Effort:
    """How long to measure. A quick measurement says that all of it works; its figures are rough. A brief one is for
    figures of which there are many."""

    quick: bool = False
    brief: bool = False

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 3 if self.brief else 5

    @property
    def batch_s(self) -> float:
        """Seconds of calls timed together at least."""
        return 0.002 if self.quick else 0.02 if self.brief else 0.05

    def pick(self, quick: int, whole: int) -> int:
        return quick if self.quick else whole


def interleaved_seconds(
    contenders: Mapping[Key, Callable[[], Any]],
    effort: Effort,
    *,
    prepare: Callable[[Key], None] | None = None,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[Key, float]:
    """Median seconds of one call of each contender over the rounds, in each of which every contender has its turn.

    Args:
        contenders: what to call.
        effort: how many rounds, and how long a turn is at least.
        prepare: called with the contender's key before its turn, untimed.
        synchronize: waits for what a call has only started.
    """

    def turn(key: Key, num_calls: int) -> float:
        if prepare is not None:
            prepare(key)
        start = time.perf_counter()
        for _ in range(num_calls):
            contenders[key]()
        synchronize()
        return (time.perf_counter() - start) / num_calls

    num_calls = {}
    for key in contenders:
        turn(key, 1)  # pages, caches, threads and kernels are made at the first call
        num_calls[key] = max(1, min(MAX_CALLS, round(effort.batch_s / max(turn(key, 1), 1e-9))))
    samples: dict[Key, list[float]] = {key: [] for key in contenders}
    for number in range(effort.rounds):
        keys = list(contenders)
        for key in keys if number % 2 == 0 else reversed(keys):
            samples[key].append(turn(key, num_calls[key]))
    return {key: statistics.median(times) for key, times in samples.items()}
