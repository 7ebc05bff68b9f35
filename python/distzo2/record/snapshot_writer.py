"""Making snapshots while training goes on.

Weights change only where a unit is present, in the thread that trains. There, as a unit is let go of, its clean weights
are copied into one staging buffer, together with their version; a thread of the writer's own writes that buffer to a
file, syncs it, and is ready for another. So a snapshot takes units as they come by, in any order and over several
steps, reads none for its own sake, and needs memory for one unit. How many it takes is limited by what it costs: see
`Pace`. When all are written, and the journal is durable up to the newest of them, the manifest is, and the directory
gets its name.

A snapshot that cannot be written is given up and told; the run is in its journal, and goes on.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distzo2.checkpoint.weight_files import bytes_of
from distzo2.files import sync_directory
from distzo2.record.journal import Journal
from distzo2.record.snapshot import (
    CHUNK_BYTES,
    HIDDEN,
    MANIFEST,
    JournalDigest,
    Snapshots,
    UnitImage,
    UnitRecord,
    encode_manifest,
    snapshot_name,
    snapshots_in,
    unit_file,
)
from distzo2.weights.access import WeightAccess
from distzo2.weights.units import Unit
from distzo2_core import HostPool, aligned_buffer

_LONGEST_SLEEP = 1.0  # seconds; garbage may be collected, and end the thread, just before it waits
_STEPS_UNSEEN = 2  # after so many, a unit that no forward enters is fetched
_SLACK_BYTES = 64 << 20  # of the disk, left to others
_FIRST_GUESS = 4e-9  # seconds a byte, before any was measured


class Pace:
    """What making snapshots may take of the time of steps: a share of it, as an account. A unit's copy in the training
    thread and, where the CPU computes, the processor time of writing it are taken from the account, which may go below
    zero; nothing is taken while it is. What is not used in a step is lost."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._account = 0.0
        self._per_byte = _FIRST_GUESS

    def earn(self, seconds: float) -> None:
        """A step took so long."""
        self._account = min(self._account, 0.0) + self._share * seconds

    def allows(self) -> bool:
        return self._share >= 1 or self._account > 0

    def spend(self, seconds: float, num_bytes: int) -> float:
        """A copy took `seconds`, and `num_bytes` are to be written; returns what that is guessed to take."""
        guess = self._per_byte * num_bytes
        self._account -= seconds + guess
        return guess

    def correct(self, guess: float, seconds: float, num_bytes: int) -> None:
        """Writing took `seconds`, not `guess`."""
        self._account -= seconds - guess
        self._per_byte = seconds / num_bytes


@dataclass
class _Making:
    """A snapshot that is being made. `wanted`: units not copied yet, by index; `seen`: those that came by."""

    step: int
    directory: Path
    wanted: dict[int, Unit]
    records: dict[int, UnitRecord] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    num_steps: int = 0  # since it was begun
    seconds: float = 0.0  # that the training thread has given to it


@dataclass
class SnapshotFigures:
    """What snapshots have taken so far, for measurements."""

    num_made: int = 0
    num_bytes: int = 0
    num_steps: int = 0  # that they spanned
    copy_seconds: float = 0.0  # of the training thread
    write_seconds: float = 0.0  # processor time of the writer's thread


@dataclass
class _Errand:
    """What a writer and its thread share, under `changed`. An idle thread knows no more than this, and so a writer that
    is dropped without close() is let go of, with the model that it writes, and its thread ends."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    task: Callable[[], None] | None = None  # to do, or being done; it sets this to None at its end
    closing: bool = False

    def hand_over(self, task: Callable[[], None]) -> None:
        with self.changed:
            self.task = task
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()

    def run(self) -> None:
        while True:
            with self.changed:
                while self.task is None and not self.closing:
                    self.changed.wait(_LONGEST_SLEEP)
                if self.closing:
                    return
                task = self.task
            task()
            del task


class SnapshotWriter:
    """Makes the snapshots of one run. The public functions are for the thread that trains, and raise nothing that a
    disk may be to blame for."""

    def __init__(
        self,
        options: Snapshots,
        access: WeightAccess,
        journal: Journal,
        first_version: int,
        invalid: Iterable[Path] = (),
    ) -> None:
        """
        Args:
            first_version: of the weights before the journal's first entry.
            invalid: snapshots that are known to be damaged: they go before any other.
        """
        self._options, self._journal = options, journal
        self._directory = Path(options.directory)
        self._first_version = first_version
        self._invalid = list(invalid)
        self._units = access.trained_units()
        self._seed = access.weights.seed
        self._images = {u.index: UnitImage.of(u) for u in self._units}
        self._digest = JournalDigest(journal.path)
        self._pace = Pace(options.pace)
        self._charges_writing = access.weights.device.type == "cpu"
        self._device = access.weights.device
        self._staging: torch.Tensor | None = None
        self._pool: HostPool | None = None
        self._making: _Making | None = None
        self._last_begun = time.monotonic()
        self.figures = SnapshotFigures()
        self._errand = _Errand()
        weakref.finalize(self, self._errand.close).atexit = False
        self._thread: threading.Thread | None = None
        # What the thread leaves, under the errand's lock:
        self._failure: str | None = None
        self._published = False
        self._corrections: list[tuple[float, float, int]] = []

    # ---- the thread that trains -------------------------------------------------------------------------------------

    def offer(self, unit: Unit, buffer: torch.Tensor, version: int) -> None:
        """`unit` is about to be let go of; `buffer` holds its clean weights at `version`."""
        making = self._making
        if making is None or unit.index not in making.wanted:
            return
        making.seen.add(unit.index)
        if self._errand.task or self._failure is not None or not self._pace.allows():
            return
        self._take(making, unit, buffer, version)

    def _take(self, making: _Making, unit: Unit, buffer: torch.Tensor, version: int) -> None:
        start = time.perf_counter()
        image = self._images[unit.index]
        staging, event = self._staging, None
        views = unit.views(buffer)
        for i, offset in image.places:
            if unit.params[i].numel:
                source = views[i].reshape(-1).view(torch.uint8)
                staging[offset : offset + source.numel()].copy_(source, non_blocking=True)
        if buffer.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        del making.wanted[unit.index]
        seconds = time.perf_counter() - start
        making.seconds += seconds
        guess = self._pace.spend(seconds, image.num_bytes if self._charges_writing else 0)
        version -= self._first_version
        self._errand.hand_over(partial(self._attempt, self._write_unit, making, unit, version, event, guess))

    def step_done(self, access: WeightAccess, step: int, seconds: float) -> None:
        """`step` steps are made, the last one in `seconds`."""
        with self._errand.changed:
            is_idle = not self._errand.task  # looked at together with what it ended with
            failure, published, corrections = self._failure, self._published, self._corrections
            self._failure, self._published, self._corrections = None, False, []
        making = self._making
        for guess, taken, num_bytes in corrections:
            self.figures.write_seconds += taken
            if self._charges_writing:
                self._pace.correct(guess, taken, num_bytes)
        if making is not None and (failure is not None or published):
            if failure is not None:
                self._options.log(f"the snapshot of step {making.step} was given up: {failure}")
            else:
                self._note(making)
            self._making = making = None
        if making is not None:
            making.num_steps += 1
            if not making.wanted and is_idle:
                self._errand.hand_over(partial(self._attempt, self._publish, making))
        self._pace.earn(seconds)
        options = self._options
        is_due = bool(options.every) and step % options.every == 0
        if making is not None:
            if is_due:
                options.log(f"no snapshot of step {step}: that of step {making.step} is still being made")
            self._fetch_unseen(access, making)
        elif is_due or (options.minutes and time.monotonic() - self._last_begun >= 60 * options.minutes):
            self._begin(step)

    def _fetch_unseen(self, access: WeightAccess, making: _Making) -> None:
        if making.num_steps < _STEPS_UNSEEN or self._errand.task or not self._pace.allows():
            return
        unseen = next((u for u in making.wanted.values() if u.index not in making.seen), None)
        if unseen is not None:
            access.touch(unseen)

    def _begin(self, step: int) -> None:
        self._last_begun = time.monotonic()
        path = self._directory / f"{HIDDEN}{snapshot_name(step)}-{secrets.token_hex(4)}"
        try:
            if not self._directory.is_dir():
                self._directory.mkdir()
                sync_directory(self._directory.parent)
            num_bytes = sum(image.num_bytes for image in self._images.values())
            free = shutil.disk_usage(self._directory).free
            if free < num_bytes + _SLACK_BYTES:
                self._options.log(f"no snapshot of step {step}: it needs {num_bytes} bytes, and {free} are free")
                return
            if self._staging is None:
                self._staging = self._make_staging(max(image.num_bytes for image in self._images.values()))
            path.mkdir()
        except (OSError, RuntimeError, MemoryError) as error:
            self._options.log(f"no snapshot of step {step}: {error}")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._errand.run, name="distzo2-snapshot", daemon=True)
            self._thread.start()
        self._making = _Making(step, path, {u.index: u for u in self._units})

    def _make_staging(self, num_bytes: int) -> torch.Tensor:
        if self._device.type == "cpu":
            return aligned_buffer(num_bytes)
        self._pool = HostPool([num_bytes], device=str(self._device))
        return self._pool.tensor(0)

    def _note(self, making: _Making) -> None:
        figures, num_bytes = self.figures, sum(r.num_bytes for r in making.records.values())
        figures.num_made += 1
        figures.num_bytes += num_bytes
        figures.num_steps += making.num_steps
        figures.copy_seconds += making.seconds

    def close(self) -> None:
        """Gives up a snapshot that is not whole, and ends the thread. Safe to call twice."""
        self._errand.close()
        if self._thread is not None:
            self._thread.join()
        making, self._making, self._staging, self._pool = self._making, None, None, None
        if making is not None and self._published:
            self._note(making)
        elif making is not None:
            shutil.rmtree(making.directory, ignore_errors=True)

    # ---- the writer's thread ----------------------------------------------------------------------------------------

    def _attempt(self, task: Callable[..., None], making: _Making, *arguments: Any) -> None:
        failure = None
        try:
            task(making, *arguments)
        except Exception as error:  # whatever it is, the run does not depend on it
            failure = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            shutil.rmtree(making.directory, ignore_errors=True)
        with self._errand.changed:
            self._errand.task = None
            self._failure = failure
            self._published = failure is None and task == self._publish

    def _write_unit(
        self, making: _Making, unit: Unit, version: int, event: torch.cuda.Event | None, guess: float
    ) -> None:
        if event is not None:
            event.synchronize()
        start = time.thread_time()
        image = self._images[unit.index]
        data = bytes_of(self._staging)[: image.num_bytes]
        data[: len(image.header)] = image.header
        path = making.directory / unit_file(unit)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        crc = 0
        try:
            for begin in range(0, len(data), CHUNK_BYTES):
                if self._errand.closing:
                    return
                chunk = data[begin : begin + CHUNK_BYTES]
                crc = zlib.crc32(chunk, crc)
                _write_all(descriptor, chunk, begin)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads it soon
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(descriptor)
        making.records[unit.index] = UnitRecord(unit.name, path.name, version, len(data), crc)
        with self._errand.changed:
            self._corrections.append((guess, time.thread_time() - start, len(data)))

    def _publish(self, making: _Making) -> None:
        records = [making.records[u.index] for u in self._units]
        num_steps = max(r.version for r in records)
        self._journal.sync()  # the write-ahead rule: no copy may be found that is ahead of the journal
        num_bytes, sha256 = self._digest.upto(num_steps)
        line = encode_manifest(
            step=making.step,
            seed=self._seed,
            journal_steps=num_steps,
            journal_bytes=num_bytes,
            journal_sha256=sha256,
            units=records,
        )
        write_file(making.directory / MANIFEST, line)
        sync_directory(making.directory)
        place = self._directory / snapshot_name(making.step)
        self._remove([*self._invalid, place])  # a damaged one may have the name
        os.rename(making.directory, place)
        sync_directory(self._directory)
        self._invalid.clear()
        self._remove(snapshots_in(self._directory)[self._options.keep :])

    def remove_surplus(self) -> None:
        """Before the first is made: of those not known to be damaged, all but the newest that are to be kept."""
        valid = [path for path in snapshots_in(self._directory) if path not in self._invalid]
        try:
            self._remove(valid[self._options.keep :])
        except OSError as error:
            self._options.log(f"a snapshot that is not kept could not be removed: {error}")

    def _remove(self, snapshots: Sequence[Path]) -> None:
        """Takes their names away first: a snapshot is whole or is none."""
        for path in snapshots:
            hidden = self._directory / f"{HIDDEN}old-{path.name}-{secrets.token_hex(4)}"
            with suppress(FileNotFoundError):
                os.rename(path, hidden)
                shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished(directory: str | os.PathLike[str]) -> None:
    """Removes what a killed run was writing; whoever calls it holds the run's lock."""
    for leftover in Path(directory).glob(f"{HIDDEN}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """A new file with these bytes, durable but for its name."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write_all(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
