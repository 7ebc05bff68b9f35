"""`distzo2 report`: a run's directory as one picture. Also one step of any trace, a run's or a plan's: its figures, and
what ran when, lane by lane."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distzo2.errors import DistZO2Error
from distzo2.planning.schedule import Played, Task, wait_intervals
from distzo2.run.directory import read_record, saved_options
from distzo2.run.metrics import read_metrics
from distzo2.text import gib

# Lanes of a trace from top to bottom: kind, name, colour.
LANES = (
    ("compute", "compute", "#4477aa"),
    ("materialize", "noise and updates", "#ccbb44"),
    ("decode", "decoding", "#ddaa77"),
    ("wait", "waiting for transfers", "#ee6677"),
    ("stall", "device waits", "#ee6677"),
    ("update", "updates of slices", "#bbaa33"),
    ("upload", "upload", "#228833"),
    ("gather", "gather", "#66ccee"),
    ("download", "download", "#aa3377"),
)
COLOURS = {name: colour for _, name, colour in LANES} | {"other": "#bbbbbb"}

Lines = Sequence[dict[str, Any]]  # of metrics, or events of a trace


def run_report(options: Any, log: Callable[[str], None]) -> int:
    """Draws the run in `options.run_dir`, which may still be running: loss and held-out score, the split of step time,
    memory, transfers if there were any, and one step of the trace if the run has one.

    The picture is `options.out`, or `report.png` in the run's directory. Figures of the transfers are logged.

    Raises:
        UsageError: the directory holds no run.
        DistZO2Error: the run has no step yet.
    """
    run_dir = Path(options.run_dir)
    record, saved = read_record(run_dir), saved_options(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    steps, evals = ([line for line in lines if line["kind"] == kind] for kind in ("step", "eval"))
    if not steps:
        raise DistZO2Error(f"{run_dir}: the run has no step yet, so there is nothing to draw")
    trace = read_trace(saved["trace"] or run_dir / "trace.json")
    moved = any(s.get("up_bytes_per_s") or s.get("down_bytes_per_s") for s in steps)
    rows = 3 + moved + bool(trace)
    path = Path(options.out or run_dir / "report.png")
    with _figure(path, 11, 1 + 3 * rows) as figure:
        grid = figure.add_gridspec(rows, 2)
        _draw_loss(figure.add_subplot(grid[0, 0]), steps, evals)
        _draw_accuracy(figure.add_subplot(grid[0, 1]), steps, evals)
        _draw_time(figure.add_subplot(grid[1, 0]), steps)
        _draw_memory(figure.add_subplot(grid[1, 1]), steps, record.get("model_bytes"))
        _draw_signal(figure.add_subplot(grid[2, :]), steps, record.get("signal"))
        if moved:
            _draw_rates(figure.add_subplot(grid[3, :]), steps)
        for axes in figure.axes:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if trace:
            draw_step(figure.add_subplot(grid[rows - 1, :]), trace)
        figure.suptitle(
            f"{run_dir} · {len(steps)} steps\n{saved['estimator']}, {saved['noise']}, {saved['probes']} probes · lr "
            f"{saved['lr']:g}, eps {saved['eps']:g} · weights {saved['weights']}, device {saved['device']}"
        )
    if line := transfer_line(steps):
        log(line)
    if trace:
        log(f"trace: {step_figures(trace).text()}")
    log(f"wrote {path}")
    return 0


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of `width` x `height` inches, saved as a PNG at the end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(path, dpi=130, format="png")
        except OSError as error:  # a full disk's error has no file name
            if error.errno is None:  # the encoder's
                raise DistZO2Error(f"{path}: {error}") from error
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def hidden_share(transfer_s: float, exposed_wait_s: float) -> float | None:
    """The share of the transfers' time in which something else was done; None where nothing was transferred."""
    return max(0.0, 1.0 - exposed_wait_s / transfer_s) if transfer_s > 0 else None


def transfer_line(steps: Lines) -> str | None:
    """The transfers of a step in one line, medians; None where nothing was transferred."""
    parts = []
    for way in ("up", "down"):
        if moving := [s for s in steps if s.get(f"{way}_bytes_per_s")]:
            keys = f"bytes_{way}", f"{way}_bytes_per_s"
            parts.append(_moved(way, *(statistics.median(_column(moving, key)) for key in keys)))
    if not parts:
        return None
    timed = [s for s in steps if s.get("exposed_wait_s") is not None]
    wait, whole = (statistics.median(_column(timed, key, 1e3)) for key in ("exposed_wait_s", "seconds"))
    return f"a step: {', '.join(parts)}, exposed wait {wait:.1f} ms of {whole:.1f} ms"


def _moved(way: str, num_bytes: float, bytes_per_s: float) -> str:
    return f"{gib(num_bytes)} {way} at {bytes_per_s / 1e9:.2f} GB/s"


# ---- a run's metrics ----------------------------------------------------------------------------------------------


def _column(lines: Lines, name: str, scale: float = 1.0) -> list[float]:
    return [math.nan if line.get(name) is None else scale * line[name] for line in lines]


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


def _draw_curve(axes: Any, steps: Lines, values: list[float], colour: str, label: str, raw: str | None = None) -> None:
    """Draws the value of each step faintly, with `raw` as its label, and all of them smoothed."""
    axes.plot(_column(steps, "step"), values, color=colour, alpha=0.3, linewidth=0.8, label=raw)
    axes.plot(_column(steps, "step"), _smooth(values), color=colour, label=label)


def _draw_loss(axes: Any, steps: Lines, evals: Lines) -> None:
    _draw_curve(axes, steps, _column(steps, "loss"), "#4477aa", "smoothed", "each step")
    if evals:
        axes.plot(_column(evals, "step"), _column(evals, "loss"), "o-", color="#ee6677", markersize=4, label="held out")
    if skipped := [s["step"] for s in steps if s.get("skipped")]:
        axes.plot(skipped, [axes.get_ylim()[0]] * len(skipped), "x", color="black", label="not applied")
    _finish(axes, "loss")


def _draw_accuracy(axes: Any, steps: Lines, evals: Lines) -> None:
    if not evals:
        axes.plot(_column(steps, "step"), _column(steps, "lr"), color="#4477aa")
        axes.set(title="learning rate", xlabel="step")
        return
    if "reward" in evals[-1]:
        axes.plot(_column(evals, "step"), _column(evals, "reward"), "o-", color="#ee6677", markersize=4)
        axes.set(title="held-out reward", xlabel="step")
        return
    x, y = _column(evals, "step"), _column(evals, "accuracy", 100)
    axes.plot(x, y, "o-", color="#ee6677", markersize=4)
    for place in dict.fromkeys((0, len(x) - 1)):
        axes.annotate(f"{y[place]:.1f}%", (x[place], y[place]), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(title="held-out accuracy", xlabel="step", ylabel="%")
    axes.margins(y=0.15)


def _draw_time(axes: Any, steps: Lines) -> None:
    timed = [s for s in steps if s.get("compute_s") is not None]
    if not timed:
        axes.plot(_column(steps, "step"), _column(steps, "seconds", 1e3), color=COLOURS["compute"])
        axes.set(title="time of a step", xlabel="step", ylabel="ms")
        return
    names = {"compute": "compute_s", "noise and updates": "noise_s", "waiting for transfers": "exposed_wait_s"}
    parts = {name: _column(timed, key) for name, key in names.items()}
    known = [sum(values) for values in zip(*parts.values(), strict=True)]
    parts["other"] = [max(0.0, total - k) for total, k in zip(_column(timed, "seconds"), known, strict=True)]
    axes.stackplot(
        _column(timed, "step"),
        [[1e3 * v for v in _smooth(values)] for values in parts.values()],
        labels=[f"{name} {1e3 * statistics.fmean(values):.1f} ms" for name, values in parts.items()],
        colors=[COLOURS[name] for name in parts],
    )
    hidden = hidden_share(sum(_column(timed, "transfer_s")), sum(parts["waiting for transfers"]))
    suffix = "" if hidden is None else f", {hidden:.0%} of the transfers hidden"
    axes.set(title=f"time of a step{suffix}", xlabel="step", ylabel="ms")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, loc="upper center", ncols=2)


def _draw_rates(axes: Any, steps: Lines) -> None:
    for way, kind in (("up", "upload"), ("down", "download")):
        if moved := [v for v in _column(steps, f"bytes_{way}") if v > 0]:
            rates, label = _column(steps, f"{way}_bytes_per_s", 1e-9), f"{kind}, {gib(statistics.median(moved))} a step"
            _draw_curve(axes, steps, rates, COLOURS[kind], label)
    _finish(axes, "rate of the transfers", "GB/s", bottom=0)


def _draw_signal(axes: Any, steps: Lines, signal: dict[str, Any] | None) -> None:
    differences = _column(steps, "difference")
    _draw_curve(axes, steps, differences, "#4477aa", "difference of two losses")
    if signal is not None and signal["floor"]:
        label = f"error of one loss in {signal['compute_dtype']}, before the first step"
        axes.axhline(signal["floor"], color="#ee6677", linewidth=1, label=label)
    if any(value > 0 for value in differences):
        axes.set_yscale("log")
    _finish(axes, "what a step is made of")


def _draw_memory(axes: Any, steps: Lines, model_bytes: int | None) -> None:
    x, mib = _column(steps, "step"), 2**-20
    for key, colour, style, label in (
        ("rss", "#4477aa", "-", "process, now"),
        ("peak", "#4477aa", ":", "process, peak"),
        ("device_peak", "#228833", "-", "device, peak"),
    ):
        if any(s.get(key) for s in steps):
            axes.plot(x, _column(steps, key, mib), color=colour, linestyle=style, label=label)
    if model_bytes:
        axes.axhline(model_bytes * mib, color="#ee6677", linewidth=1, label=f"weights of the model, {gib(model_bytes)}")
    _finish(axes, "memory", "MiB", bottom=0)


def _finish(axes: Any, title: str, ylabel: str = "", **limits: float) -> None:
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.set_ylim(**limits)
    axes.legend(frameon=False)


# ---- one step of a trace ------------------------------------------------------------------------------------------


class StepFigures(NamedTuple):
    """A step's transfers. Seconds are of the clock: intervals that overlap count once."""

    name: str
    seconds: float
    bytes_up: float
    bytes_down: float
    upload_s: float
    download_s: float
    transfer_s: float  # anything going up or down
    exposed_wait_s: float

    def text(self) -> str:
        parts = [f"{self.name}, {1e3 * self.seconds:.1f} ms"]
        ways = (("up", self.bytes_up, self.upload_s), ("down", self.bytes_down, self.download_s))
        parts += [_moved(way, size, size / seconds) for way, size, seconds in ways if seconds > 0]
        hidden = hidden_share(self.transfer_s, self.exposed_wait_s)
        if hidden is not None:
            parts.append(f"exposed wait {1e3 * self.exposed_wait_s:.1f} ms, {hidden:.0%} of the transfers hidden")
        return "; ".join(parts)


def read_trace(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The intervals of a Chrome trace, in order of time; empty if there is no such file."""
    if not Path(path).is_file():
        return []
    try:
        events = json.loads(Path(path).read_text())["traceEvents"]
        return sorted((e for e in events if e.get("ph") == "X" and "cat" in e), key=lambda e: e["ts"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DistZO2Error(f"{path}: not a trace: {error}") from error


def one_step(events: Lines) -> tuple[str, float, float]:
    """Name, begin and end (µs) of the step in the middle of a trace; of one without steps, all of it."""
    steps = [e for e in events if e["cat"] == "step"]
    if steps:
        step = steps[len(steps) // 2]
        return step["name"], step["ts"], step["ts"] + step["dur"]
    begin, end = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
    return "the trace", begin, end


def step_figures(events: Lines) -> StepFigures:
    """The figures of the step that `one_step` names; of a transfer that reaches beyond it, the part within."""
    name, begin, end = one_step(events)

    def seconds(*kinds: str) -> float:
        """Length of the union of the intervals within the step."""
        total, reached = 0.0, begin
        for a, b, _ in _clip((e for e in events if e["cat"] in kinds), begin, end):
            total += max(0.0, b - max(a, reached))
            reached = max(reached, b)
        return total * 1e-6

    def num_bytes(kind: str) -> float:
        parts = _clip((e for e in events if e["cat"] == kind), begin, end)
        return sum((b - a) / e["dur"] * e["args"]["bytes"] for a, b, e in parts)

    moved, ways = (num_bytes("upload"), num_bytes("download")), (seconds("upload"), seconds("download"))
    return StepFigures(
        name, (end - begin) * 1e-6, *moved, *ways, seconds("upload", "download"), seconds("wait", "stall")
    )


def _clip(events: Iterable[dict[str, Any]], begin: float, end: float) -> list[tuple[float, float, dict[str, Any]]]:
    """The events' intervals as far as they lie in [begin, end], in order, each with its event."""
    clipped = ((max(e["ts"], begin), min(e["ts"] + e["dur"], end), e) for e in events)
    return sorted(((a, b, e) for a, b, e in clipped if b > a), key=lambda part: part[:2])


def draw_step(axes: Any, events: Lines) -> None:
    """Draws the lanes of one step; transfers to different slots lie one above the other."""
    _, begin, end = one_step(events)
    rows: dict[str, dict[int, list]] = {}  # by kind and slot
    for e in events:
        slot = e["args"].get("slot", 0) if e["cat"] in ("upload", "download") else 0
        rows.setdefault(e["cat"], {}).setdefault(slot, []).append(e)
    lanes = [lane for lane in LANES if lane[0] in rows]
    for row, (kind, _, colour) in enumerate(reversed(lanes)):
        height = 0.8 / (1 + max(rows[kind]))
        for slot, mine in rows[kind].items():
            axes.broken_barh(
                [((a - begin) / 1e3, (b - a) / 1e3) for a, b, _ in _clip(mine, begin, end)],
                (row - 0.4 + slot * height, height),
                facecolor=colour,
                edgecolor="white" if kind == "compute" else colour,  # keeps short bars visible
                linewidth=0.3,
            )
    axes.set_yticks(range(len(lanes)), [name for _, name, _ in reversed(lanes)])
    axes.set(title=step_figures(events).text(), xlabel="ms", xlim=(0, (end - begin) / 1e3))


# ---- a plan -------------------------------------------------------------------------------------------------------


def plan_events(played: Played) -> list[dict[str, Any]]:
    """The steps of the steady state as events of a Chrome trace, with rows as in a run's."""
    begin = played.steps[0][0]
    kinds = ["step", "wait", "compute", "materialize", "update", "gather", "decode"]
    rows = {kind: row for row, kind in enumerate(kinds)} | {"upload": 16, "download": 32}
    parts = [Task("", "step", f"step {i}", 0.0, start=a, end=b) for i, (a, b) in enumerate(played.steps)]
    parts += [Task("", "wait", name, 0.0, start=a, end=b) for a, b, name in wait_intervals(played.tasks)]
    parts += [task for task in played.tasks if task.kind in rows and task.kind != "wait"]
    return [
        {
            "ph": "X", "cat": t.kind, "name": t.name, "ts": 1e6 * max(t.start, begin),
            "dur": 1e6 * (t.end - max(t.start, begin)), "args": {"bytes": round(t.num_bytes), "slot": t.slot},
            "pid": 0, "tid": rows[t.kind] + t.slot,
        }
        for t in parts if t.end > max(t.start, begin)
    ]  # fmt: skip


def draw_plan(played: Played, path: str | os.PathLike, title: str) -> None:
    """Draws one step as a PNG, as a run's own trace is drawn."""
    with _figure(Path(path), 12, 4) as figure:
        draw_step(figure.add_subplot(), plan_events(played))
        figure.suptitle(title)
