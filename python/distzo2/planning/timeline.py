"""One step of a trace: what ran when, lane by lane, and the figures of its transfers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distzo2.errors import DistZO2Error
from distzo2.text import gib

# Lanes from top to bottom: kind in the trace, name, colour.
LANES = (
    ("compute", "compute", "#4477aa"),
    ("materialize", "noise and updates", "#ccbb44"),
    ("wait", "waiting for transfers", "#ee6677"),
    ("stall", "device waits", "#ee6677"),
    ("update", "updates of slices", "#bbaa33"),
    ("upload", "upload", "#228833"),
    ("gather", "gather", "#66ccee"),
    ("download", "download", "#aa3377"),
)
_WITHOUT_STEPS_US = 1e6  # drawn of a trace that does not say where its steps are

Interval = tuple[float, float]


@dataclass(frozen=True)
class StepFigures:
    """A step's transfers. Seconds are of the clock: intervals that overlap count once."""

    name: str
    seconds: float
    bytes_up: float
    bytes_down: float
    upload_s: float
    download_s: float
    transfer_s: float  # anything going up or down
    exposed_wait_s: float

    @property
    def hidden(self) -> float | None:
        """The share of the transfers' time in which something else was done; None where nothing was transferred."""
        return max(0.0, 1 - self.exposed_wait_s / self.transfer_s) if self.transfer_s > 0 else None

    def text(self) -> str:
        parts = [f"{self.name}, {1e3 * self.seconds:.1f} ms"]
        for way, num_bytes, seconds in (
            ("up", self.bytes_up, self.upload_s),
            ("down", self.bytes_down, self.download_s),
        ):
            if seconds > 0:
                parts.append(f"{gib(num_bytes)} {way} at {num_bytes / seconds / 1e9:.2f} GB/s")
        if self.hidden is not None:
            parts.append(f"exposed wait {1e3 * self.exposed_wait_s:.1f} ms, {self.hidden:.0%} of the transfers hidden")
        return "; ".join(parts)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The intervals of a Chrome trace, in order of time; empty if there is none."""
    if not path.is_file():
        return []
    try:
        events = json.loads(path.read_text())["traceEvents"]
        return sorted((e for e in events if e.get("ph") == "X" and "cat" in e), key=lambda e: e["ts"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DistZO2Error(f"{path}: not a trace: {error}") from error


def one_step(events: Sequence[dict[str, Any]]) -> tuple[str, float, float]:
    """Name, begin and end (µs) of the step in the middle of a trace; of one without steps, what it begins with."""
    steps = [e for e in events if e["cat"] == "step"]
    if steps:
        step = steps[len(steps) // 2]
        return step["name"], step["ts"], step["ts"] + step["dur"]
    begin = min(e["ts"] for e in events)
    return "the trace's first part", begin, min(begin + _WITHOUT_STEPS_US, max(e["ts"] + e["dur"] for e in events))


def step_figures(events: Sequence[dict[str, Any]]) -> StepFigures:
    """The figures of the step that `one_step` names; of a transfer that reaches beyond it, the part within."""
    name, begin, end = one_step(events)

    def within(*kinds: str) -> list[Interval]:
        return _clip(((e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] in kinds), begin, end)

    def num_bytes(kind: str) -> float:
        total = 0.0
        for e in events:
            if e["cat"] == kind:
                inside = min(e["ts"] + e["dur"], end) - max(e["ts"], begin)
                share = inside / e["dur"] if e["dur"] > 0 else float(begin <= e["ts"] < end)
                total += max(0.0, share) * e.get("args", {}).get("bytes", 0)
        return total

    return StepFigures(
        name,
        (end - begin) * 1e-6,
        num_bytes("upload"),
        num_bytes("download"),
        _length(within("upload")) * 1e-6,
        _length(within("download")) * 1e-6,
        _length(within("upload", "download")) * 1e-6,
        _length(within("wait", "stall")) * 1e-6,
    )


def _clip(intervals: Iterable[Interval], begin: float, end: float) -> list[Interval]:
    clipped = ((max(a, begin), min(b, end)) for a, b in intervals)
    return sorted((a, b) for a, b in clipped if b > a)


def _length(intervals: Sequence[Interval]) -> float:
    """Of the union of sorted intervals."""
    total, reached = 0.0, float("-inf")
    for a, b in intervals:
        total += max(0.0, b - max(a, reached))
        reached = max(reached, b)
    return total


def draw_step(axes: Any, events: Sequence[dict[str, Any]]) -> None:
    """The lanes of one step; transfers to different slots lie one above the other."""
    _, begin, end = one_step(events)
    seen = {e["cat"] for e in events}
    lanes = [lane for lane in LANES if lane[0] in seen]
    slots = 1 + max((e.get("args", {}).get("slot", 0) for e in events), default=0)
    for row, (kind, _, colour) in enumerate(reversed(lanes)):
        parts = slots if kind in ("upload", "download") else 1
        for part in range(parts):
            mine = [e for e in events if e["cat"] == kind and (parts == 1 or e.get("args", {}).get("slot", 0) == part)]
            bars = _clip(((e["ts"], e["ts"] + e["dur"]) for e in mine), begin, end)
            height = 0.8 / parts
            axes.broken_barh(
                [((a - begin) / 1e3, (b - a) / 1e3) for a, b in bars],
                (row - 0.4 + part * height, height),
                facecolor=colour,
                edgecolor="white" if kind == "compute" else colour,  # what is short must be seen
                linewidth=0.3,
            )
    axes.set_yticks(range(len(lanes)), [name for _, name, _ in reversed(lanes)])
    axes.set(title=step_figures(events).text(), xlabel="ms", xlim=(0, (end - begin) / 1e3))
