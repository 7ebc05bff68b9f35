"""What happened when: intervals of compute, noise, waits and transfers, as a Chrome trace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

_ROWS = {"compute": 1, "materialize": 2, "wait": 3, "upload": 4, "download": 5}


class Trace:
    """Intervals of the orchestrator, on the clock of `time.perf_counter_ns` (the engine's steady clock)."""

    def __init__(self) -> None:
        self._enabled = False
        self._events: list[tuple[str, str, int, int]] = []

    def enable(self, enable: bool = True) -> None:
        self._enabled = enable
        self._events.clear()

    def add(self, kind: str, name: str, start_ns: int, end_ns: int) -> None:
        if self._enabled:
            self._events.append((kind, name, start_ns, end_ns))

    def save(self, path: str | os.PathLike, transfers: Iterable[tuple], block_names: dict[int, str]) -> None:
        """Writes the intervals and the engine's transfers (kind, block, slot, bytes, start_ns, end_ns) to `path`."""
        events = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": t, "args": {"name": k}} for k, t in _ROWS.items()]
        for kind, name, start, end in self._events:
            events.append(_event(kind, name, start, end, {}))
        for kind, block, slot, num_bytes, start, end in transfers:
            events.append(
                _event(kind, block_names.get(block, str(block)), start, end, {"bytes": num_bytes, "slot": slot})
            )
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def _event(kind: str, name: str, start: int, end: int, args: dict) -> dict:
    row = _ROWS.get(kind, max(_ROWS.values()) + 1)
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "ts": start / 1000,
        "dur": (end - start) / 1000,
        "pid": 0,
        "tid": row,
        "args": args,
    }
