"""`distzo2 report`: a run's directory as one picture."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distzo2.errors import DistZO2Error, UsageError
from distzo2.planning.timeline import LANES, draw_step, read_trace
from distzo2.run.directory import trace_of
from distzo2.run.metrics import read_metrics
from distzo2.text import gib

# One colour for each kind of time, wherever it is drawn.
COLOURS = {name: colour for _, name, colour in LANES} | {"other": "#bbbbbb"}


def write_report(run_dir: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Draws loss and held-out score, the split of step time, memory, transfers if there were any, and one step of the
    trace if the run has one.

    Args:
        run_dir: a run's directory; the run may still go on.
        out: the PNG; None: `report.png` in the run's directory.

    Raises:
        UsageError: the directory holds no run.
        DistZO2Error: the run has no step yet.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "metrics.jsonl").is_file():
        raise UsageError(f"{run_dir}: holds no run (no metrics.jsonl)")
    lines = read_metrics(run_dir / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]
    if not steps:
        raise DistZO2Error(f"{run_dir}: the run has no step yet, so there is nothing to draw")
    record = json.loads((run_dir / "run.json").read_text()) if (run_dir / "run.json").is_file() else {}
    trace = read_trace(trace_of(run_dir))

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        moved = any(s.get("up_bytes_per_s") or s.get("down_bytes_per_s") for s in steps)
        rows = 2 + moved + bool(trace)
        figure = Figure(figsize=(11, 1 + 3 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, 2)
        _draw_loss(figure.add_subplot(grid[0, 0]), steps, evals)
        _draw_accuracy(figure.add_subplot(grid[0, 1]), steps, evals)
        _draw_time(figure.add_subplot(grid[1, 0]), steps)
        _draw_memory(figure.add_subplot(grid[1, 1]), steps, record)
        if moved:
            _draw_rates(figure.add_subplot(grid[2, 0]), steps)
            _draw_exposed(figure.add_subplot(grid[2, 1]), steps)
        for axes in figure.axes:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if trace:
            draw_step(figure.add_subplot(grid[rows - 1, :]), trace)
        figure.suptitle(_title(run_dir, record, steps))
        path = Path(out) if out is not None else run_dir / "report.png"
        try:
            figure.savefig(path, dpi=130, format="png")
        except OSError as error:  # a full disk's has no name in it
            if error.errno is None:  # the encoder's
                raise DistZO2Error(f"{path}: {error}") from error
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    return path


def hidden_share(transfer_s: float, exposed_wait_s: float) -> float | None:
    """The share of the transfers' time in which something else was done; None where nothing was transferred."""
    return max(0.0, 1.0 - exposed_wait_s / transfer_s) if transfer_s > 0 else None


def transfer_line(steps: Sequence[dict[str, Any]]) -> str | None:
    """The transfers of a step in one line, medians; None where nothing was transferred."""
    parts = []
    for way in ("up", "down"):
        moving = [s for s in steps if s.get(f"{way}_bytes_per_s")]
        if moving:
            num_bytes = statistics.median(s[f"bytes_{way}"] for s in moving)
            rate = statistics.median(s[f"{way}_bytes_per_s"] for s in moving)
            parts.append(f"{gib(num_bytes)} {way} at {rate / 1e9:.2f} GB/s")
    if not parts:
        return None
    waits = [s["exposed_wait_s"] for s in steps if s.get("exposed_wait_s") is not None]
    seconds = [s["seconds"] for s in steps if s.get("exposed_wait_s") is not None]
    wait, whole = 1e3 * statistics.median(waits), 1e3 * statistics.median(seconds)
    return f"a step: {', '.join(parts)}, exposed wait {wait:.1f} ms of {whole:.1f} ms"


def _title(run_dir: Path, record: dict[str, Any], steps: Sequence[dict[str, Any]]) -> str:
    options = record.get("options", {})
    parts = [str(run_dir), f"{len(steps)} steps"]
    if options:
        parts.append(f"{options['estimator']}, {options['noise']}, {options['probes']} probes")
        parts.append(f"lr {options['lr']:g}, eps {options['eps']:g}")
        parts.append(f"weights {options['weights']}, device {options['device']}")
    return "\n".join([" · ".join(parts[:2]), " · ".join(parts[2:])]).strip()


def _column(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if line.get(name) is None else float(line[name]) for line in lines]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, without the bias of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else math.nan)
    return result


def _draw_loss(axes: Any, steps: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> None:
    x, losses = [s["step"] for s in steps], _column(steps, "loss")
    axes.plot(x, losses, color="#4477aa", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(x, _smooth(losses), color="#4477aa", linewidth=1.6, label="smoothed")
    if evals:
        axes.plot(
            [e["step"] for e in evals], _column(evals, "loss"), "o-", color="#ee6677", markersize=4, label="held out"
        )
    skipped = [s["step"] for s in steps if s.get("skipped")]
    if skipped:
        axes.plot(skipped, [axes.get_ylim()[0]] * len(skipped), "x", color="black", label="not applied")
    axes.set(title="loss", xlabel="step")
    axes.legend(frameon=False)


def _draw_accuracy(axes: Any, steps: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> None:
    if not evals:
        axes.plot([s["step"] for s in steps], _column(steps, "lr"), color="#4477aa")
        axes.set(title="learning rate", xlabel="step")
        return
    x, y = [e["step"] for e in evals], [100 * a for a in _column(evals, "accuracy")]
    axes.plot(x, y, "o-", color="#ee6677", markersize=4)
    for place in dict.fromkeys((0, len(x) - 1)):
        axes.annotate(f"{y[place]:.1f}%", (x[place], y[place]), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(title="held-out accuracy", xlabel="step", ylabel="%")
    axes.margins(y=0.15)


def _draw_time(axes: Any, steps: Sequence[dict[str, Any]]) -> None:
    timed = [s for s in steps if s.get("compute_s") is not None]
    if not timed:
        axes.plot([s["step"] for s in steps], [1e3 * v for v in _column(steps, "seconds")], color=COLOURS["compute"])
        axes.set(title="time of a step", xlabel="step", ylabel="ms")
        return
    parts = {
        "compute": _column(timed, "compute_s"),
        "noise and updates": _column(timed, "noise_s"),
        "waiting for transfers": _column(timed, "exposed_wait_s"),
    }
    known = [sum(values) for values in zip(*parts.values(), strict=True)]
    parts["other"] = [max(0.0, total - k) for total, k in zip(_column(timed, "seconds"), known, strict=True)]
    x = [s["step"] for s in timed]
    means = {name: 1e3 * sum(values) / len(values) for name, values in parts.items()}
    axes.stackplot(
        x,
        [[1e3 * v for v in _smooth(values)] for values in parts.values()],
        labels=[f"{name} {means[name]:.1f} ms" for name in parts],
        colors=[COLOURS[name] for name in parts],
    )
    hidden = hidden_share(sum(_column(timed, "transfer_s")), sum(parts["waiting for transfers"]))
    suffix = "" if hidden is None else f", {hidden:.0%} of the transfers hidden"
    axes.set(title=f"time of a step{suffix}", xlabel="step", ylabel="ms")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, loc="upper center", ncols=2)


def _draw_rates(axes: Any, steps: Sequence[dict[str, Any]]) -> None:
    x = [s["step"] for s in steps]
    for way, kind in (("up", "upload"), ("down", "download")):
        rates = [v / 1e9 for v in _column(steps, f"{way}_bytes_per_s")]
        moved = [v for v in _column(steps, f"bytes_{way}") if v > 0]
        if moved:
            label = f"{kind}, {gib(statistics.median(moved))} a step"
            axes.plot(x, _smooth(rates), color=COLOURS[kind], label=label)
            axes.plot(x, rates, color=COLOURS[kind], alpha=0.3, linewidth=0.8)
    axes.set(title="rate of the transfers", xlabel="step", ylabel="GB/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_exposed(axes: Any, steps: Sequence[dict[str, Any]]) -> None:
    x = [s["step"] for s in steps]
    for name, label, colour in (
        ("transfer_s", "time of its transfers", COLOURS["upload"]),
        ("exposed_wait_s", "exposed wait", COLOURS["waiting for transfers"]),
    ):
        axes.plot(x, _smooth([1e3 * v for v in _column(steps, name)]), color=colour, label=label)
    axes.set(title="transfers of a step, and what was waited for them", xlabel="step", ylabel="ms")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_memory(axes: Any, steps: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
    x = [s["step"] for s in steps]
    axes.plot(x, [v / 2**20 for v in _column(steps, "rss")], color="#4477aa", label="process, now")
    axes.plot(x, [v / 2**20 for v in _column(steps, "peak")], color="#4477aa", linestyle=":", label="process, peak")
    if any(s.get("device_peak") for s in steps):
        axes.plot(x, [v / 2**20 for v in _column(steps, "device_peak")], color="#228833", label="device, peak")
    if record.get("model_bytes"):
        size = record["model_bytes"]
        axes.axhline(size / 2**20, color="#ee6677", linewidth=1, label=f"weights of the model, {gib(size)}")
    axes.set(title="memory", xlabel="step", ylabel="MiB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
