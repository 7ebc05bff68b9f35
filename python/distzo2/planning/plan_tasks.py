"""Tasks on resources, played event by event: a resource runs its tasks one at a time, in the order of their issue."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Task:
    """`seconds` of work on `resource`, at full speed, once every task of `after` has ended."""

    resource: str
    kind: str
    name: str
    seconds: float
    after: tuple[Task, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)
    start: float = -1.0
    end: float = -1.0

    @property
    def done(self) -> bool:
        return self.end >= 0.0


@dataclass(frozen=True)
class Sharing:
    """How resources slow each other down.

    `pairs`: two resources, and the speed of each while both are busy (1: its own). `pools`: resources that share one
    processor: while k of them are busy, each runs at 1/k.
    """

    pairs: tuple[tuple[str, str, float, float], ...] = ()
    pools: tuple[frozenset[str], ...] = ()

    def speeds(self, busy: Collection[str]) -> dict[str, float]:
        result = dict.fromkeys(busy, 1.0)
        for first, second, a, b in self.pairs:
            if first in result and second in result:
                result[first], result[second] = a, b
        for pool in self.pools:
            inside = [r for r in result if r in pool]
            for resource in inside:
                result[resource] /= len(inside)
        return result


def play(tasks: Iterable[Task], sharing: Sharing) -> float:
    """Sets start and end of every task; returns when the last one ends.

    Raises:
        RuntimeError: tasks wait for one another in a circle.
    """
    queues: dict[str, deque[Task]] = {}
    waiting: dict[int, int] = {}
    behind: dict[int, list[Task]] = {}
    for task in tasks:
        queues.setdefault(task.resource, deque()).append(task)
        open_ones = [t for t in task.after if not t.done]
        waiting[id(task)] = len(open_ones)
        for before in open_ones:
            behind.setdefault(id(before), []).append(task)
    now = 0.0
    running: dict[str, tuple[Task, float]] = {}  # by resource: what runs there, seconds left at full speed

    def finish(task: Task) -> None:
        task.end = now
        for follower in behind.get(id(task), ()):
            waiting[id(follower)] -= 1

    while True:
        moved = True
        while moved:
            moved = False
            for resource, queue in queues.items():
                while queue and resource not in running and waiting[id(queue[0])] == 0:
                    task = queue.popleft()
                    task.start = now
                    moved = True
                    if task.seconds > 0:
                        running[resource] = task, task.seconds
                    else:
                        finish(task)
        if not running:
            left = [queue[0] for queue in queues.values() if queue]
            if left:
                names = ", ".join(f"{t.kind} {t.name}" for t in left)
                raise RuntimeError(f"a schedule that never ends: {names} wait for one another")
            return now
        speeds = sharing.speeds(running)
        step = min(left / speeds[r] for r, (_, left) in running.items())
        now += step
        for resource, (task, left) in list(running.items()):
            left -= step * speeds[resource]
            if left <= 1e-12 * max(1.0, task.seconds):
                del running[resource]
                finish(task)
            else:
                running[resource] = task, left


def busy_seconds(tasks: Iterable[Task], begin: float, end: float) -> Mapping[str, float]:
    """By resource, within [begin, end]."""
    result: dict[str, float] = {}
    for task in tasks:
        inside = min(task.end, end) - max(task.start, begin)
        if inside > 0:
            result[task.resource] = result.get(task.resource, 0.0) + inside
    return result
