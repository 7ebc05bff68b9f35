"""When things happened: intervals of compute, noise, waits and transfers, as a Chrome trace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

# Rows of the picture. Intervals of one row must not overlap, or viewers nest them: transfers have a row for each slot.
_KINDS = ("step", "compute", "materialize", "wait", "stall", "update", "gather")
_ROWS = {kind: row for row, kind in enumerate(_KINDS)} | {"upload": 16, "download": 32}


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
        events = [_event(kind, name, _ROWS[kind], start, end, {}) for kind, name, start, end in self._events]
        rows = {row: kind for kind, row in _ROWS.items() if kind not in ("upload", "download")}
        for kind, block, slot, num_bytes, start, end in transfers:
            row = _ROWS[kind]
            if kind in ("upload", "download"):
                row += slot
                rows[row] = f"{kind}, slot {slot}"
            args = {"bytes": num_bytes, "slot": slot}
            if end > start and kind != "stall":
                args["GB/s"] = round(num_bytes / (end - start), 3)
            events.append(_event(kind, block_names.get(block, str(block)), row, start, end, args))
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": rows[row]}}
            for row in sorted(rows)
        ]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": names + events, "displayTimeUnit": "ms"}, file)


def _event(kind: str, name: str, row: int, start: int, end: int, args: dict) -> dict:
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
