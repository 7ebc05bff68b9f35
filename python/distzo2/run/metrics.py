"""A run's metrics: one line of JSON a step, one an evaluation; and how much memory the process takes.

A step's line: {"kind": "step", "step", "loss", "coefs", "lr", "skipped", "clipped", "tokens", "seconds",
"tokens_per_second", "compute_s", "noise_s", "exposed_wait_s", "bytes_up", "bytes_down", "upload_s", "download_s",
"transfer_s", "up_bytes_per_s", "down_bytes_per_s", "rss", "peak"}. The seconds of transfers are sums over blocks, each
from its first byte to its last, and rates are bytes over them (null: nothing moved); `exposed_wait_s` is what compute
stood still for them.
An evaluation's line: {"kind": "eval", "step", "loss", "accuracy", "examples", "tokens", "seconds", "data",
"crc"}, where `step` is the updates made before it and `data` the beginning of the SHA-256 of what was evaluated on.
The journal is the truth; lines of steps are for people and plots. Which step is best depends on those of evaluations,
so they are synced to the disk, and have a CRC-32 as the journal's lines have. `open_report` gives the same figures to
TensorBoard or Weights & Biases.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from tqdm import tqdm

from distzo2.errors import UsageError, blaming, one_line
from distzo2.files import write_whole
from distzo2.record.line import decode_line, encode_line

MAX_LINE_BYTES = 1 << 16
_KEYS = {"step": {"step"}, "eval": {"step", "loss", "examples", "tokens", "data"}}


class Metrics:
    """Appends lines to a metrics file, and knows the evaluations made so far.

    Args:
        path: the file; None on ranks that write none.
        data: names what is evaluated on; only evaluations on it count.
        log: gets a line about what is left out.
    """

    def __init__(
        self, path: str | os.PathLike | None, data: str | None = None, log: Callable[[str], None] = lambda text: None
    ) -> None:
        self.path = Path(path or os.devnull)
        self._file = self.path.open("a", encoding="utf-8")
        self._data, self._log = data, log
        self._report: Report | None = None
        self.evals: dict[int, dict[str, Any]] = {}  # updates made -> line

    def write(self, **line: Any) -> None:
        """Appends a line.

        Raises:
            OSError: it cannot be written.
        """
        if line["kind"] == "eval":
            line["data"] = self._data
            self.evals[line["step"]] = line
        try:
            self._file.write(_text(line))
            self._file.flush()
            if line["kind"] == "eval" and self.path != Path(os.devnull):
                os.fsync(self._file.fileno())  # before a step can follow: which step is best depends on it
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self.path)) from error
        self._tell(line)

    def report_to(self, report: Report | None) -> None:
        """Gives `report` the lines of the file that it lacks, and every later one. No-op for None."""
        self._report = report
        for line in read_metrics(self.path) if report is not None else ():
            self._tell(line)

    def _tell(self, line: dict[str, Any]) -> None:
        """A report that fails does not end a run: it gets no more lines of this process, which is logged."""
        try:
            if self._report is not None:
                self._report.write(line)
        except Exception as error:
            self._log(f"--report-to: {type(error).__name__}: {one_line(error)}; nothing more is reported from here")
            self._report = None

    def match(self, entries: Iterable[Any], num_steps: int) -> None:
        """Makes the file hold the first `num_steps` steps of the journal, each once: drops later lines and a torn last
        one, and makes missing ones from the journal's `entries`."""
        steps = {entry.step: _line_of(entry) for entry in entries if entry.step < num_steps}
        others = []
        for line in read_metrics(self.path, self._log):
            if line["kind"] == "step" and line["step"] < num_steps:
                steps[line["step"]] = line
            elif line["kind"] == "eval" and line["step"] <= num_steps:
                if line["data"] == self._data:
                    self.evals[line["step"]] = line
                else:
                    others.append(line)
        if others:
            numbers = ", ".join(str(line["step"]) for line in others)
            self._log(f"evaluations on other examples, of steps {numbers}, do not count in the choice of the best step")
        lines = sorted([*steps.values(), *others, *self.evals.values()], key=lambda s: (s["step"], s["kind"] == "step"))
        self._file.close()
        write_whole(self.path, "".join(_text(line) for line in lines).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file and the report. Errors are suppressed: the write that failed has raised."""
        with suppress(OSError):
            self._file.close()
        with suppress(Exception):
            if self._report is not None:
                self._report.close()


def _line_of(entry: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": entry.step,
        "loss": entry.mean_loss,
        "coefs": entry.coefs,
        "lr": entry.update.groups[0].lr if entry.update.groups else 0.0,
        "skipped": entry.skipped,
        "tokens": entry.tokens,
        "seconds": entry.seconds,
    }


def read_metrics(path: str | os.PathLike, log: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order, without a torn last line and without damaged ones, which are
    logged."""
    lines = []
    *texts, _torn = Path(path).read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            line = from_json(text)
            kind = line.get("kind") if isinstance(line, dict) else None
            if kind == "eval":
                line = decode_line(text + b"\n", MAX_LINE_BYTES)
            if kind not in ("step", "eval") or not _KEYS[kind] <= line.keys() or not isinstance(line["step"], int):
                raise ValueError("not a line of metrics")
            lines.append(line)
        except ValueError as error:
            log(f"{path}: line {number} is left out: {error}")
    return lines


def _text(line: dict[str, Any]) -> str:
    if line["kind"] == "eval":
        return encode_line({k: v for k, v in finite(line).items() if k != "crc"}, MAX_LINE_BYTES).decode("ascii")
    return json.dumps(finite(line)) + "\n"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    return [finite(child) for child in value] if isinstance(value, list | tuple) else value


# ---- reports ------------------------------------------------------------------------------------------------------

_REPORTED = ("loss", "lr", "difference", "tokens_per_second", "seconds", "exposed_wait_s", "rss", "device_peak")
_EACH_COEF = 8  # a curve for each coefficient of at most this many probes
_INSTALL = {"tensorboard": "pip install --no-build-isolation '.[report]'", "wandb": "pip install wandb"}


def check_report(kind: str) -> None:
    """
    Raises:
        UsageError: the package that reports of this kind need is not there.
    """
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise UsageError(f"--report-to {kind}: the package {kind} is not installed: {_INSTALL[kind]}")


def open_report(kind: str, directory: Path, name: str | None, options: dict[str, Any]) -> tuple[Report, str]:
    """A report of a run, and the name under which a resumed run continues it.

    Args:
        kind: "tensorboard" or "wandb".
        directory: of the run.
        name: of the report that an earlier process began; None: begin one.
        options: shown beside the curves.

    Raises:
        DistZO2Error: it cannot be opened.
    """
    with blaming(f"--report-to {kind}"):
        begins, name = name is None, name or f"distzo2-{os.urandom(4).hex()}"
        return (TensorBoard if kind == "tensorboard" else Wandb)(directory, name, begins, options), name


def scalars_of(line: dict[str, Any]) -> dict[str, float]:
    """What is shown of a line, by the names of the curves. A loss that is not finite is nan."""
    if line["kind"] == "eval":
        left_out = ("kind", "step", "data", "crc", "examples", "tokens")
        values = {f"eval/{key}": value for key, value in line.items() if key not in left_out}
    else:
        coefs = line["coefs"] or [0.0]  # of a skipped step
        values = {f"train/{key}": line.get(key) for key in _REPORTED}
        values["train/loss"] = math.nan if line["loss"] is None else line["loss"]
        values["train/coef_rms"] = math.sqrt(sum(c * c for c in coefs) / len(coefs))
        values |= {f"train/coef_{k}": c for k, c in enumerate(coefs) if len(coefs) <= _EACH_COEF}
        values |= {f"train/{key}": float(bool(line.get(key))) for key in ("skipped", "clipped")}
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, directory: Path, name: str, begins: bool, options: dict[str, Any]) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        path, self._first = directory / "tensorboard", 0
        if not begins and path.is_dir():
            known = EventAccumulator(os.fspath(path), size_guidance={"scalars": 0}).Reload()
            steps = {e.step for e in known.Scalars("train/loss")} if "train/loss" in known.Tags()["scalars"] else set()
            self._first = next(step for step in range(len(steps) + 1) if step not in steps)
        # Hides what others left there, or a crash of this run, from that step on.
        self._writer = SummaryWriter(os.fspath(path), purge_step=self._first, flush_secs=10)
        if begins:
            self._writer.add_text("options", "\n".join(f"    {key}: {value}" for key, value in options.items()))

    def write(self, line: dict[str, Any]) -> None:
        if line["step"] >= self._first:
            for key, value in scalars_of(line).items():
                self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; its axes are train/step and eval/step."""

    def __init__(self, directory: Path, name: str, begins: bool, options: dict[str, Any]) -> None:
        import wandb

        more = {"name": directory.name, "dir": os.fspath(directory), "config": options}
        self._run = wandb.init(project="distzo2", id=name, resume="allow", **more)
        self._last = {}
        for kind in ("train", "eval"):
            self._run.define_metric(f"{kind}/step")
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
            self._last[kind] = self._run.summary.get(f"{kind}/step", -1)

    def write(self, line: dict[str, Any]) -> None:
        kind = "eval" if line["kind"] == "eval" else "train"
        if line["step"] > self._last[kind]:
            self._run.log({**scalars_of(line), f"{kind}/step": line["step"]})

    def close(self) -> None:
        self._run.finish()


Report = TensorBoard | Wandb  # shows lines of metrics as curves; a line that it has already is left out


# ---- memory and progress ------------------------------------------------------------------------------------------


def progress_bar(quiet: bool, **options: Any) -> tqdm:
    """A bar over steps on stderr; where that is a file, a line of it every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(unit="step", disable=quiet, dynamic_ncols=True, mininterval=interval, maxinterval=interval, **options)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    # Not getrusage: after fork and exec its figure includes what the parent had.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
