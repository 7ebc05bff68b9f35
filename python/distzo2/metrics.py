"""A run's metrics: one line of JSON a step, one an evaluation; and how much memory the process takes.

A step's line: {"kind": "step", "step", "loss", "coefs", "lr", "skipped", "clipped", "tokens", "seconds",
"tokens_per_second", "compute_s", "noise_s", "exposed_wait_s", "bytes_up", "bytes_down", "upload_s", "download_s",
"transfer_s", "up_bytes_per_s", "down_bytes_per_s", "rss", "peak"}. The seconds of transfers are sums over blocks, each
from its first byte to its last, and rates are bytes over them (null: nothing moved); `exposed_wait_s` is what compute
stood still for them.
An evaluation's line: {"kind": "eval", "step", "loss", "accuracy", "seconds"}, `step` being the updates made before it.
The journal is the truth; lines of steps are for people and plots, so only those of evaluations are synced to the disk.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distzo2.safetensors_io import sync_directory


class Metrics:
    """Appends lines to a metrics file, and knows the evaluations made so far. Without a file, on ranks that write none,
    it only knows them."""

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = Path(path or os.devnull)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self.evals: dict[int, dict[str, Any]] = {}  # updates made -> line

    def write(self, **line: Any) -> None:
        if line["kind"] == "eval":
            self.evals[line["step"]] = line
        try:
            self._file.write(json.dumps(finite(line)) + "\n")
            self._file.flush()
            if line["kind"] == "eval" and self.path != Path(os.devnull):
                os.fsync(self._file.fileno())  # before a step can follow: which step is best depends on it
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self.path)) from error

    def match(self, entries: Iterable[Any], num_steps: int) -> None:
        """Makes the file hold the journal's first `num_steps` steps, each once: later lines are dropped, missing ones
        are made from the journal's `entries`, a torn last line is cut."""
        steps: dict[int, dict[str, Any]] = {}
        for line in read_metrics(self.path):
            if line["kind"] == "step" and line["step"] < num_steps:
                steps[line["step"]] = line
            elif line["kind"] == "eval" and line["step"] <= num_steps:
                self.evals[line["step"]] = line
        for entry in entries:
            if entry.step < num_steps and entry.step not in steps:
                steps[entry.step] = _line_of(entry)
        lines = sorted([*steps.values(), *self.evals.values()], key=lambda s: (s["step"], s["kind"] == "step"))
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(finite(line)) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        os.replace(temporary, self.path)
        sync_directory(self.path.parent)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        self._file.close()


def _line_of(entry: Any) -> dict[str, Any]:
    losses = [value for row in entry.losses for value in row]
    return {
        "kind": "step",
        "step": entry.step,
        "loss": sum(losses) / len(losses) if losses else math.nan,
        "coefs": [term.c for term in entry.update.terms],
        "lr": entry.update.groups[0].lr if entry.update.groups else 0.0,
        "skipped": entry.skipped,
        "tokens": entry.tokens,
        "seconds": entry.seconds,
    }


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; a torn last line is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and line.get("kind") in ("step", "eval") and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    return [finite(child) for child in value] if isinstance(value, list | tuple) else value


def progress_bar(quiet: bool, **options: Any) -> tqdm:
    """A bar over steps on stderr; where that is a file, a line of it every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(unit="step", disable=quiet, dynamic_ncols=True, mininterval=interval, maxinterval=interval, **options)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    # Not getrusage: after fork and exec its figure includes what the parent had.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def device_peak_bytes(device: torch.device) -> int | None:
    """The most memory that torch has had allocated on a CUDA device; None on others."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
