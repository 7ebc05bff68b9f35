"""The directory of a run: what it holds, and that nothing in it is overwritten.

journal.jsonl   every step (docs/journal.md); with the base checkpoint it is the run
run.json        options, what the run was made of, how far it came
metrics.jsonl   a line a step and an evaluation (distzo2.run.metrics)
snapshots/      copies of the weights on the way (docs/snapshots.md)
checkpoint/     the fine-tuned model
report.png      from `distzo2 report`
trace.json      transfers of some steps, if --trace named no other file
run.lock        locked (flock) by the process that is at work here, and removed when it ends; one that a killed
                process left behind is not locked, and hinders nobody
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distzo2.errors import DistZO2Error, UsageError
from distzo2.files import sync_directory
from distzo2.run.finetune_options import FIXED
from distzo2.run.metrics import finite

_OURS = ("run.json", "journal.jsonl", "metrics.jsonl", "snapshots", "checkpoint")
NAMES = (*_OURS, "report.png", "trace.json", "run.lock")
LEFTOVERS = ("weights-*.dzo2", ".journal.jsonl.*.tmp", "run.json.tmp", "metrics.tmp")  # of a killed run

_PATIENCE = 0.5  # seconds: who looks whether a directory is in use locks it for an instant


class RunDirectory:
    """Paths and `run.json` of a run."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.journal = self.path / "journal.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.snapshots = self.path / "snapshots"
        self.trace = self.path / "trace.json"
        self.lock = self.path / "run.lock"
        self.record: dict[str, Any] = {}
        self._resumed = False
        self._unbegun = False
        self._descriptor: int | None = None  # of the lock, while it is held
        self._made: list[Path] = []  # directories that this process made, innermost first

    @classmethod
    def new(cls, path: str | os.PathLike) -> RunDirectory:
        """A directory for a new run; nothing is created yet.

        Raises:
            UsageError: it holds a run, or is no directory.
        """
        run = cls(path)
        run._look()
        return run

    @classmethod
    def resumed(cls, path: str | os.PathLike) -> RunDirectory:
        """The directory of a run to go on with.

        Raises:
            UsageError: it holds none.
        """
        run = cls(path)
        run._resumed = True
        run._look()
        return run

    @classmethod
    def unbegun(cls, path: str | os.PathLike) -> RunDirectory | None:
        """The directory of a run that was killed before its journal was there, so that it begins again; None if it is
        not one."""
        run = cls(path)
        run._unbegun = True
        try:
            run._look()
        except (UsageError, DistZO2Error):
            return None
        return run

    @classmethod
    def restarted(cls, path: str | os.PathLike, launch: str) -> RunDirectory | None:
        """The directory of a run that this launch of torchrun began and that has steps; None if it holds none. What was
        there of a run of this launch without steps is removed."""
        run = cls(path)
        try:
            run.record = _read_record(run.path)
        except (UsageError, DistZO2Error):
            return None
        if run.record.get("launch") != launch:
            return None
        if run.journal.is_file() and run.journal.read_bytes().count(b"\n") > 1:
            return cls.resumed(path)
        for leftover in (run.metrics, run.journal, run.path / "run.json"):
            leftover.unlink(missing_ok=True)
        run.remove_leftovers()
        return None

    def _look(self) -> None:
        if self._resumed:
            self.record = _read_record(self.path)
            if not self.journal.is_file():
                raise UsageError(f"{self.path}: nothing to resume: the run has no journal")
            return
        if self._unbegun:
            if _read_record(self.path).get("status") != "starting" or os.path.lexists(self.journal):
                raise UsageError(f"{self.path}: another distzo2 finetune has been at work there: --resume it")
            return
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: a directory was expected")
        for name in _OURS:
            if os.path.lexists(self.path / name):
                if self._descriptor is None and _is_locked(self.lock):
                    raise UsageError(f"{self.path}: another distzo2 finetune is at work there")
                raise UsageError(f"{self.path}: already holds a run ({name}): --resume it, or give another --out")

    def claim(self) -> None:
        """Makes the directory and what is above it, and keeps every other process from working in it until `release`.

        Raises:
            UsageError: another process is at work there, or has been since this was made.
            DistZO2Error: the directory cannot be made, or not be locked.
        """
        deadline = time.monotonic() + _PATIENCE
        try:
            while self._descriptor is None:
                missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
                self.path.mkdir(parents=True, exist_ok=True)
                self._made = missing or self._made
                for path in missing:
                    sync_directory(path.parent)
                try:
                    self._descriptor = _lock(self.lock)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        except BlockingIOError:
            raise UsageError(f"{self.path}: another distzo2 finetune is at work there") from None
        except OSError as error:
            raise DistZO2Error(f"{error.filename or self.path}: {error.strerror}") from error
        try:
            self._look()  # what was there before the lock may have changed
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets others in again. Safe to call twice."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        self.lock.unlink(missing_ok=True)  # while it is locked, the name is this file's
        os.close(descriptor)

    def withdraw(self, with_journal: bool = True) -> None:
        """Takes back what a new run put there before its first step, and releases the directory. Does nothing where it
        was not claimed for a new run: what is there then is someone else's."""
        if self._descriptor is None or self._resumed:
            return
        for path in (self.metrics, *([self.journal] if with_journal else []), self.path / "run.json"):
            path.unlink(missing_ok=True)
        self.release()
        for path in self._made:
            with suppress(OSError):
                path.rmdir()

    def remove_leftovers(self) -> None:
        """Removes the weights that a killed run streamed from here, and files that it had not named yet."""
        for pattern in LEFTOVERS:
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)

    def update(self, **values: Any) -> None:
        """Sets entries of run.json, whole or not at all, and durable when this returns."""
        record = self.record | values
        temporary = self.path / "run.json.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(finite(record), file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(temporary)) from error
        os.replace(temporary, self.path / "run.json")
        self.record = record
        sync_directory(self.path)

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
        if self.record.get("train_sha256") != train_sha256:
            raise UsageError(
                f"{self.path}: the training file is not the one that the run began with: {options['train']}"
            )
        return [
            f"{name.replace('_', '-')} {before.get(name)} -> {value}"
            for name, value in options.items()
            if name not in ("resume", "config", "out", "branch_from", "at_step") and before.get(name) != value
        ]

    @property
    def is_in_use(self) -> bool:
        """Whether a process is at work there."""
        return self._descriptor is not None or _is_locked(self.lock)

    @property
    def begins_again(self) -> bool:
        """Whether it holds a run that was killed before its journal was there."""
        return self._unbegun

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint that this run wrote, or had begun to write when it was killed."""
        steps = (self.record.get("checkpoint_step"), self.record.get("saving_step"))
        return self.checkpoint.exists() and steps != (None, None)

    def check_checkpoint(self) -> None:
        """Looks whether what is in the checkpoint's place, if anything is, may be replaced.

        Raises:
            DistZO2Error: it is not, or not all, this run's.
        """
        if not os.path.lexists(self.checkpoint):
            return
        advice = "move it away, or give --save none"
        if self.checkpoint.is_symlink() or not self.checkpoint.is_dir():
            raise DistZO2Error(f"{self.checkpoint}: the checkpoint's directory was expected, or nothing: {advice}")
        if not self.has_checkpoint:
            raise DistZO2Error(f"{self.checkpoint}: not written by this run, so it is not replaced: {advice}")
        known = self.record.get("checkpoint_files")
        if self.record.get("checkpoint_step") is not None and isinstance(known, list):
            others = [name for name in tree_of(self.checkpoint) if name not in known]
            if others:
                raise DistZO2Error(f"{self.checkpoint / others[0]}: not written by this run: {advice}")

    def describe_checkpoint(self) -> dict[str, Any]:
        """What run.json says of a checkpoint that was just written: the names of all that is in it."""
        return {"checkpoint_files": tree_of(self.checkpoint)}

    def drop_checkpoint(self) -> None:
        """Removes the checkpoint that this run wrote when it had fewer steps, or did not end writing."""
        if self.has_checkpoint:
            shutil.rmtree(self.checkpoint)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file, which is made where there is none; None if the file or its directory
    was removed meanwhile, as a run does that ends.

    Raises:
        BlockingIOError: another process, or another descriptor of this one, holds it.
        OSError: it cannot be made or locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        raise OSError(error.errno, f"cannot be locked: {error.strerror}", os.fspath(path)) from error
    os.close(descriptor)
    return None


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "run.json").read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: holds no run (run.json: {error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DistZO2Error(f"{path / 'run.json'}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise DistZO2Error(f"{path / 'run.json'}: not the record of a run")
    return record


def tree_of(directory: Path) -> list[str]:
    """The names of everything below a directory, relative to it. No link is followed."""
    names = []
    for parent, directories, others in os.walk(directory):
        names += [os.path.relpath(os.path.join(parent, name), directory) for name in (*directories, *others)]
    return sorted(names)


def trace_of(path: str | os.PathLike) -> Path:
    """Where the trace of the run in a directory is, if there is one."""
    try:
        named = saved_options(path).get("trace")
    except UsageError:
        named = None
    return Path(named) if named else Path(path) / "trace.json"


def saved_options(path: str | os.PathLike) -> dict[str, Any]:
    """The options of the run in a directory.

    Raises:
        UsageError: it holds none.
    """
    options = dict(_read_record(Path(path))["options"])
    # A run may go on on other ranks, and is branched once: when it begins.
    begun = () if RunDirectory.unbegun(path) is not None else ("branch_from", "at_step")
    for name in ("resume", "config", "out", "parallel", "slice", *begun):
        options.pop(name, None)
    if not isinstance(options.get("trace"), str):
        options["trace"] = None  # a number of steps, once
    return options
