"""The directory of a run: what it holds, and that nothing of another run or program in it is overwritten.

journal.jsonl   every step (docs/journal.md); with the base checkpoint it is the run
run.json        options, what the run was made of, how far it came
metrics.jsonl   a line a step and an evaluation (distzo2.run.metrics)
weights.dzo2    weights that survive a crash (docs/weight_file.md); weights.dzo2.json says what is in it
checkpoint/     the fine-tuned model
adapter_start/  of a run that trains an adapter, the one that it began with: a part of its base
adapter/        and the one that it has made
report.png      from `distzo2 report`
trace.json      transfers of some steps, if --trace named no other file
task.json       with --task: the checkpoint's score on the rows for evaluation
run.lock        locked (flock) by the process that uses the directory, and removed when it ends; one that a killed
                process left behind is not locked
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from distzo2.checkpoint.writing import holds_checkpoint
from distzo2.errors import DistZO2Error, UsageError
from distzo2.files import lock, sync, write_whole
from distzo2.run.metrics import finite
from distzo2.run.options import LEFT

_RUN = ("run.json", "journal.jsonl", "metrics.jsonl", "snapshots", "checkpoint", "adapter", "adapter_start")
_LEFTOVERS = (
    "weights.*dzo2.new weights.*json.tmp .journal.jsonl.*.tmp run.json.tmp metrics.jsonl.tmp"  # of a killed run
)


class RunDirectory:
    """Paths and `run.json` of a run."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.journal = self.path / "journal.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.adapter = self.path / "adapter"
        self.adapter_start = self.path / "adapter_start"
        self.trace = self.path / "trace.json"
        self.lock = self.path / "run.lock"
        self.record: dict[str, Any] = {}  # what run.json says
        self.continues = False  # whether a run with a journal is in it, which is resumed
        self.resumes = False  # whether to continue the run that is in it
        self._descriptor: int | None = None  # of the lock, while it is held
        self._made: list[Path] = []  # directories that this process made, innermost first

    def check(self, resume: bool) -> bool:
        """Checks, and reads run.json, before a run starts in the directory; nothing is created.

        Args:
            resume: whether to continue the run in it. One that was killed before it had a journal begins again.

        Returns:
            `continues`.

        Raises:
            UsageError: it holds a run, or with `resume` none, or is no directory.
        """
        self.resumes, self.continues = resume, False
        if resume:
            self.record = read_record(self.path)
            self.continues = _has_begun(self.path, self.record)
            if self.continues and not self.journal.is_file():
                raise UsageError(f"{self.path}: nothing to resume: the run has no journal")
            return self.continues
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: a directory was expected")
        for name in _RUN:
            if os.path.lexists(self.path / name):
                raise UsageError(f"{self.path}: already holds a run ({name}): --resume it, or give another --out")
        return False

    def is_of_launch(self, launch: str | None) -> bool:
        """Whether a launch of torchrun began the run in the directory."""
        with suppress(DistZO2Error):
            return read_record(self.path).get("launch") == launch
        return False

    def claim(self) -> None:
        """Makes the directory and its parents, and keeps other processes out of it until `release`.

        Raises:
            UsageError: another process uses it, or has used it since `check`.
            DistZO2Error: the directory cannot be made, or not be locked.
        """
        try:
            self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self._made:
                sync(path.parent)
            self._descriptor = lock(self.lock)
        except BlockingIOError:
            raise UsageError(f"{self.path}: another distzo2 process is using this directory") from None
        except OSError as error:
            raise DistZO2Error(f"{error.filename or self.path}: {error.strerror}") from error
        before = self.continues
        try:  # what was there before the lock may have changed
            if self.check(self.resumes) != before:
                raise UsageError(f"{self.path}: another distzo2 process began this run: --resume it")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets other processes in again. Safe to call twice."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        self.lock.unlink(missing_ok=True)  # while it is locked, the name is this file's
        os.close(descriptor)

    def withdraw(self, with_journal: bool = True) -> None:
        """Removes what a new run put there before its first step, and releases the directory. No-op unless it was
        claimed for a new run."""
        if self._descriptor is None or self.continues:
            return
        shutil.rmtree(self.adapter_start, ignore_errors=True)
        for path in (self.metrics, *([self.journal] if with_journal else []), self.path / "run.json"):
            path.unlink(missing_ok=True)
        for path in self.path.glob("weights.*dzo2"):
            if not path.with_name(f"{path.name}.json").exists():  # made by a start that failed
                path.unlink()
        self.release()
        for path in self._made:
            with suppress(OSError):
                path.rmdir()

    def remove_leftovers(self) -> None:
        """Removes files without their final name, which a killed process left."""
        for pattern in _LEFTOVERS.split():
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)
        for directory in (self.path, self.checkpoint):  # earlier versions wrote beside the checkpoint
            for hidden in directory.glob(".distzo2-checkpoint*"):
                shutil.rmtree(hidden)

    def weight_file(self, directory: str | os.PathLike | None) -> Path:
        """Where the run keeps weights that survive a crash; in `directory`, a name that no other run's has."""
        if directory is None:
            return self.path / "weights.dzo2"
        return Path(directory).absolute() / f"weights-{zlib.crc32(os.fspath(self.path.absolute()).encode()):08x}.dzo2"

    def update(self, **values: Any) -> None:
        """Sets entries of run.json, whole or not at all, and durable when this returns."""
        record = self.record | values
        write_whole(self.path / "run.json", (json.dumps(finite(record), indent=1) + "\n").encode())
        self.record = record

    # ---- the checkpoint -----------------------------------------------------------------------------------------

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint that this run wrote, or was writing when it was killed."""
        steps = (self.record.get("checkpoint_step"), self.record.get("saving_step"))
        return self.checkpoint.exists() and steps != (None, None)

    def check_checkpoint(self) -> None:
        """Checks that the run's checkpoint overwrites nothing but its own files.

        Raises:
            DistZO2Error: `checkpoint/` holds a checkpoint of others.
        """
        held = holds_checkpoint(self.checkpoint)
        ours = (self.record.get("checkpoint_files") or held) if self.has_checkpoint else []  # None while it is written
        if foreign := [name for name in held if name not in ours]:
            advice = "move it away, or give --save none"
            raise DistZO2Error(f"{self.checkpoint / foreign[0]}: not written by this run: {advice}")

    def drop_checkpoint(self) -> None:
        """Removes the weights and the configuration of a checkpoint of fewer steps; other files stay."""
        if self.has_checkpoint:
            for name in holds_checkpoint(self.checkpoint):
                (self.checkpoint / name).unlink()
            sync(self.checkpoint)


def read_record(path: Path) -> dict[str, Any]:
    """The run.json of the run in a directory.

    Raises:
        UsageError: there is none. DistZO2Error: it is damaged.
    """
    try:
        record = json.loads((path / "run.json").read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: holds no run (run.json: {error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DistZO2Error(f"{path / 'run.json'}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise DistZO2Error(f"{path / 'run.json'}: not the record of a run")
    record["options"].setdefault("compute_dtype", "stored")  # of runs begun before there was a choice
    return record


def _has_begun(path: Path, record: dict[str, Any]) -> bool:
    """Whether a run has come so far that it has had a journal."""
    return record.get("status") != "starting" or os.path.lexists(path / "journal.jsonl")


def saved_options(path: str | os.PathLike) -> dict[str, Any]:
    """The options of the run in a directory that a resumed run or a branch of it takes over, as run.json holds them.

    Raises:
        UsageError: it holds none.
    """
    record = read_record(Path(path))
    options = dict(record["options"])
    # A run may continue on other ranks; it is branched once, when it begins.
    begun = ("branch_from", "at_step") if _has_begun(Path(path), record) else ()
    for name in ("resume", "config", "out", "parallel", "slice", *begun, *LEFT):
        options.pop(name, None)
    if not isinstance(options.get("trace"), str):
        options["trace"] = None  # earlier versions stored a number of steps
    return options
