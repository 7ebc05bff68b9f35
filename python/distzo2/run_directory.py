"""The directory of a run: what it holds, and that nothing in it is overwritten.

journal.jsonl   every step (docs/journal.md); with the base checkpoint it is the run
run.json        options, what the run was made of, how far it came
metrics.jsonl   a line a step and an evaluation (distzo2.metrics)
checkpoint/     the fine-tuned model
report.png      from `distzo2 report`
trace.json      transfers of some steps, if --trace
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from distzo2.errors import DistZO2Error, UsageError
from distzo2.metrics import finite
from distzo2.options import FIXED

_OURS = ("run.json", "journal.jsonl", "metrics.jsonl", "checkpoint")


class RunDirectory:
    """Paths and `run.json` of a run."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.journal = self.path / "journal.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.trace = self.path / "trace.json"
        self.record: dict[str, Any] = {}
        self._made: list[Path] = []

    @classmethod
    def new(cls, path: str | os.PathLike) -> RunDirectory:
        """A directory for a new run; nothing is created yet.

        Raises:
            UsageError: it holds a run, or is no directory.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise UsageError(f"{path}: a directory was expected")
        for name in _OURS:
            if os.path.lexists(run.path / name):
                raise UsageError(f"{path}: already holds a run ({name}): --resume it, or give another --out")
        return run

    @classmethod
    def resumed(cls, path: str | os.PathLike) -> RunDirectory:
        """The directory of a run to go on with.

        Raises:
            UsageError: it holds none.
        """
        run = cls(path)
        run.record = _read_record(run.path)
        if not run.journal.is_file():
            raise UsageError(f"{path}: nothing to resume: the run has no journal")
        return run

    def create(self) -> None:
        """Makes the directory and what is above it."""
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DistZO2Error(f"{self.path}: {error.strerror}") from error
        self._made = missing

    def withdraw(self) -> None:
        """Takes back what a new run put there before its first step."""
        for path in (self.metrics, self.journal, self.path / "run.json"):
            path.unlink(missing_ok=True)
        for path in self._made:
            with suppress(OSError):
                path.rmdir()

    def update(self, **values: Any) -> None:
        """Sets entries of run.json, whole or not at all."""
        self.record.update(values)
        temporary = self.path / "run.json.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(finite(self.record), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / "run.json")

    def check_same(self, options: dict[str, Any], train_sha256: str) -> list[str]:
        """Compares a resumed run's options with those so far; returns a line for each that changed and may.

        Raises:
            UsageError: one changed that the run's data or noise depend on, or the training file did.
        """
        before = self.record["options"]
        for name in FIXED:
            if before.get(name) != options.get(name):
                flag = "--" + name.replace("_", "-")
                change = f"{flag} was {before.get(name)!r} and is {options.get(name)!r}"
                raise UsageError(f"{self.path}: {change}: start a new run for that")
        if self.record["train_sha256"] != train_sha256:
            raise UsageError(
                f"{self.path}: the training file is not the one that the run began with: {options['train']}"
            )
        return [
            f"{name.replace('_', '-')} {before.get(name)} -> {value}"
            for name, value in options.items()
            if name not in ("resume", "config", "out") and before.get(name) != value
        ]

    def drop_checkpoint(self) -> None:
        """Removes the checkpoint that this run wrote when it had fewer steps."""
        if self.checkpoint.exists() and self.record.get("checkpoint_step") is not None:
            shutil.rmtree(self.checkpoint)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "run.json").read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: holds no run (run.json: {error.strerror})") from error
    except ValueError as error:
        raise DistZO2Error(f"{path / 'run.json'}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise DistZO2Error(f"{path / 'run.json'}: not the record of a run")
    return record


def saved_options(path: str | os.PathLike) -> dict[str, Any]:
    """The options of the run in a directory.

    Raises:
        UsageError: it holds none.
    """
    options = dict(_read_record(Path(path))["options"])
    for name in ("resume", "config", "out"):
        options.pop(name, None)
    return options
