"""The timeline of a plan: as a Chrome trace, and one step of it as a picture. It is drawn as a run's own trace is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from distzo2.planning.plan_steady import Played, wait_intervals
from distzo2.planning.timeline import draw_step, read_trace
from distzo2.weights.trace import Trace


def save_plan_trace(played: Played, path: str | os.PathLike) -> None:
    """Writes the steps of the steady state."""
    trace = Trace()
    trace.enable()
    begin = played.steps[0][0]

    def add(kind: str, name: str, start: float, end: float) -> None:
        if end > start >= begin or (end > begin > start):
            trace.add(kind, name, _ns(max(start, begin)), _ns(end))

    for number, (start, end) in enumerate(played.steps):
        add("step", f"step {number}", start, end)
    for start, end, name in wait_intervals(played.tasks):
        add("wait", name, start, end)
    transfers, names = [], {}
    for task in played.tasks:
        if task.kind in ("compute", "materialize", "update", "gather"):
            add(task.kind, task.name, task.start, task.end)
        elif task.kind in ("upload", "download") and task.end > begin:
            block = names.setdefault(task.name, len(names))
            args = task.args
            transfers.append((task.kind, block, args["slot"], round(args["bytes"]), _ns(task.start), _ns(task.end)))
    trace.save(path, transfers, {block: name for name, block in names.items()})


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def draw_plan(played: Played, path: str | os.PathLike, title: str) -> None:
    """Draws one step as a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with tempfile.TemporaryDirectory(prefix="distzo2-plan-") as directory:
        save_plan_trace(played, f"{directory}/trace.json")
        events = read_trace(Path(directory) / "trace.json")
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4), layout="constrained")
        FigureCanvasAgg(figure)
        draw_step(figure.add_subplot(), events)
        figure.suptitle(title)
        figure.savefig(path, dpi=130, format="png")
