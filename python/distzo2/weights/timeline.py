"""When things happened: intervals of compute, noise, waits and transfers, as a Chrome trace."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Rows of the picture. Intervals of one row must not overlap, or viewers nest them: transfers have a row for each slot.
_KINDS = ("step", "compute", "materialize", "wait", "stall", "update", "gather", "decode")
_TRANSFERS = {"upload": 16, "download": 32}


class Timeline:
    """Intervals of the orchestrator, on the clock of `time.perf_counter_ns` (the engine's steady clock).

    Attributes:
        total_ns: how long those of each kind took together, recorded or not; whoever reads it may clear it.
    """

    def __init__(self) -> None:
        self.total_ns: Counter[str] = Counter()
        self._enabled = False
        self._events: list[tuple[str, str, int, int]] = []

    def enable(self, enable: bool = True) -> None:
        self._enabled = enable
        self._events.clear()

    def add(self, kind: str, name: str, start_ns: int, end_ns: int) -> None:
        self.total_ns[kind] += end_ns - start_ns
        if self._enabled:
            self._events.append((kind, name, start_ns, end_ns))

    @contextmanager
    def timing(self, kind: str, name: str) -> Iterator[None]:
        """Adds the interval in which its body runs, unless that raises."""
        start = time.perf_counter_ns()
        yield
        self.add(kind, name, start, time.perf_counter_ns())

    def save(self, path: str | os.PathLike, transfers: Iterable[tuple], block_names: dict[int, str]) -> None:
        """Writes the intervals and the engine's transfers (kind, block, slot, bytes, start_ns, end_ns) to `path`."""
        events, rows = [], dict(enumerate(_KINDS))

        def add(kind: str, name: str, row: int, start: int, end: int, **args: float) -> None:
            times = {"ts": start / 1000, "dur": (end - start) / 1000}
            events.append({"name": name, "cat": kind, "ph": "X", **times, "pid": 0, "tid": row, "args": args})

        for kind, name, start, end in self._events:
            add(kind, name, _KINDS.index(kind), start, end)
        for kind, block, slot, num_bytes, start, end in transfers:
            if kind in _TRANSFERS:
                row = _TRANSFERS[kind] + slot
                rows[row] = f"{kind}, slot {slot}"
            else:
                row = _KINDS.index(kind)
            rate = {"GB/s": round(num_bytes / (end - start), 3)} if end > start and kind != "stall" else {}
            add(kind, block_names.get(block, str(block)), row, start, end, bytes=num_bytes, slot=slot, **rate)
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": name}}
            for row, name in sorted(rows.items())
        ]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": names + events, "displayTimeUnit": "ms"}, file)
