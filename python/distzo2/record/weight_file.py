"""A run's weights in one block file that survives a crash (docs/weight_file.md).

    weights.dzo2         a block for each unit (of a unit in slices, this rank's slice) and how many updates it holds
    weights.dzo2.json    which run the file belongs to; without it, its blocks are not used

With weights on disk, streamed blocks live in the file: the copy engine reads them there and writes them back. Every
other unit that is trained is copied into the file in the background, as it is let go of by a pass. Blocks hold
different numbers of updates; a resumed run applies to each the updates it misses. A block that cannot be used is
reported and filled from the base: base and journal always suffice.

Write-ahead rule: a block at version v is written after the journal's lines before v are durable.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distzo2.errors import DistZO2Error
from distzo2.files import sync_directory, write_whole
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import JournalError, decode_line, encode_line
from distzo2.weights.access import WeightAccess
from distzo2.weights.store import StoredCopy
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import Unit
from distzo2_core import BlockFile, HostPool, aligned_buffer

FORMAT = 1
MAX_RECORD_BYTES = 16 << 20
_NUM_READERS = 4
_STEPS_UNSEEN = 2  # after so many steps of a round, units that no forward enters are fetched
_FIRST_GUESS = 4e-9  # seconds to write a byte, before any was measured
_LONGEST_SLEEP = 1.0  # seconds; the thread looks this often whether its owner is gone

logger = logging.getLogger("distzo2")


@dataclass(frozen=True)
class WeightFile:
    """Where a run keeps weights that survive a crash, and how often units that do not live there are copied into it.

    path: of the file; each further rank that keeps one adds its number to the name.
    journal: path of the run's journal. If it exists, the file's blocks are used as far as the journal leads to them.
    every: steps between the beginnings of two rounds of copies; 0: none by steps.
    minutes: minutes between two; 0: none by time.
    pace: the most that copying may take of the steps' time, in (0, 1].
    log: is called with a line about each block that cannot be used, and about copies that could not be made.
    """

    path: str | os.PathLike[str]
    journal: str | os.PathLike[str]
    every: int = 100
    minutes: float = 0.0
    pace: float = 0.03
    log: Callable[[str], None] = field(default=logger.info)

    def __post_init__(self) -> None:
        if self.every < 0 or self.minutes < 0 or not 0 < self.pace <= 1:
            raise DistZO2Error(
                f"weight file: copies every {self.every} steps or {self.minutes} minutes at a pace of {self.pace}: "
                "expected 0 or more steps and minutes, and a pace above 0 and at most 1"
            )

    def path_of(self, rank: int) -> Path:
        """The file of one rank."""
        path = Path(self.path)
        return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


class RunSoFar(NamedTuple):
    """The run that a weight file may belong to: the digest of its journal's header, and how many steps it has."""

    digest: str
    num_steps: int

    @classmethod
    def of(cls, journal: str | os.PathLike[str]) -> RunSoFar | None:
        """Reads a journal; None if there is none yet."""
        if not os.path.lexists(journal):
            return None
        return cls(header_digest(journal), len(read_journal(journal).entries))


def header_digest(journal: str | os.PathLike[str]) -> str:
    """SHA-256 of a journal's first line: its base, parameters, seed and options."""
    with open(journal, "rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()


class KeptWeights:
    """The weight file of one rank, while its model is handed over and trained.

    Attributes:
        versions: by the index of a unit, the updates that its usable block holds; other units come from the base.
        file: the open file; None on a rank that only reads another's.
    """

    def __init__(
        self,
        options: WeightFile,
        rows: Sequence[StoredCopy],
        num_streamed: int = 0,
        *,
        rank: int = 0,
        run: RunSoFar | None = None,
        owns: bool = True,
    ) -> None:
        """Opens the file of `run`, or makes a new one.

        Args:
            rows: what the file holds, a block each; the first `num_streamed` live in the file.
            rank: whose file it is.
            run: the run so far; None for a new one.
            owns: otherwise nothing is made or changed: only the blocks of a file that is there are read.

        Raises:
            DistZO2Error: the file belongs to another run, is in use, or cannot be made.
        """
        self.options, self.rows, self.num_streamed, self.owns = options, list(rows), num_streamed, owns
        self.path = options.path_of(rank)
        self.versions: dict[int, int] = {}
        self._record = self.path.with_name(self.path.name + ".json")
        self._block_of = {row: row for row in range(len(self.rows))}
        self._copier: Copier | None = None
        self._has_begun = self._is_done = False
        self._run, self._old_streamed = run, 0
        try:
            self.file = self._open(run)
        except RuntimeError as error:
            raise DistZO2Error(str(error)) from error

    # ---- opening --------------------------------------------------------------------------------------------------

    def _open(self, run: RunSoFar | None) -> BlockFile | None:
        rows, sizes = [_row(copy) for copy in self.rows], [copy.num_bytes for copy in self.rows]
        old_rows, old = self._earlier(run)
        if old is not None:
            self._block_of = {rows.index(row): block for block, row in enumerate(old_rows) if row in rows}
            self._find_usable(old, run)
            if old_rows == rows or not self.owns:
                return old
        elif not self.owns:
            return None
        self.discard()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if old is not None:
            try:
                return self._carry_over(old, sizes)
            except RuntimeError as error:
                self.options.log(f"{error}: the weights are made from the base again")
                old.close()
                self.versions.clear()
                self._block_of = {row: row for row in range(len(self.rows))}
        return _make(self.path, sizes)

    def _earlier(self, run: RunSoFar | None) -> tuple[list[list[Any]], BlockFile | None]:
        """The rows and the file that an earlier process of this run left; no file if there is none that can be used."""
        log = self.options.log
        try:
            record = decode_line(self._record.read_bytes(), MAX_RECORD_BYTES)
        except FileNotFoundError:
            return [], None
        except (OSError, JournalError) as error:
            log(f"{self._record}: {error}: the weights are made from the base again")
            return [], None
        if run is None or record.get("journal") != run.digest:
            raise DistZO2Error(f"{self.path}: holds the weights of another run: name another file, or remove this one")
        if record.get("format") != FORMAT:
            log(f"{self._record}: format {record.get('format')!r}, expected {FORMAT}: made from the base again")
            return [], None
        rows, self._old_streamed = record["rows"], record["streamed"]
        try:
            return rows, BlockFile(str(self.path), [end - begin for _, begin, end in rows], create=False)
        except RuntimeError as error:
            if "is in use" in str(error):
                raise
            log(f"{error}: the weights are made from the base again")
            return [], None

    def _find_usable(self, file: BlockFile, run: RunSoFar) -> None:
        """Reads every block against its checksums and notes the versions of those that can be used."""
        unusable: list[int] = []

        def check(row: int) -> tuple[int, int] | None:
            copy, block = self.rows[row], self._block_of[row]
            version = file.version(block)
            if version == 0 and block >= self._old_streamed:  # never copied
                return None
            try:
                if version > run.num_steps:
                    raise RuntimeError(f"{self.path}: it holds {version} updates, and the journal {run.num_steps}")
                buffer = aligned_buffer(copy.num_bytes)
                file.read(block, buffer.data_ptr(), copy.num_bytes)
            except RuntimeError as error:
                self.options.log(f"unit {copy.unit.name}: {error}: made from the base again")
                unusable.append(row)
                return None
            return copy.unit.index, version

        missing = [copy.unit.name for row, copy in enumerate(self.rows) if row not in self._block_of]
        if missing:
            what = f"{len(missing)} of {len(self.rows)} units as they are cut now, such as {missing[0]}"
            self.options.log(f"{self.path}: lacks {what}: made from the base again")
        with ThreadPoolExecutor(_NUM_READERS, "distzo2-weight-file") as pool:
            self.versions = dict(found for found in pool.map(check, self._block_of) if found is not None)
        if self.versions:
            held, units = sorted(self.versions.values()), f"{len(self.versions)} of {len(self.rows)} units"
            self.options.log(f"from {self.path.name}: {units}, with {held[0]} to {held[-1]} of {run.num_steps} updates")
        if not unusable or not self.owns:
            return
        self.discard()  # until all blocks are filled again
        for row in unusable:  # must not pass for a copy of later steps once the journal has as many
            zeros = torch.zeros(self.rows[row].num_bytes, dtype=torch.uint8)
            file.write(self._block_of[row], zeros.data_ptr(), zeros.numel(), 0, 0)

    def _carry_over(self, old: BlockFile, sizes: list[int]) -> BlockFile:
        """A new file with the usable blocks of the old one, which has other rows: the weights lived elsewhere, or were
        cut for other ranks."""
        place = self.path.with_name(self.path.name + ".new")
        place.unlink(missing_ok=True)
        new = _make(place, sizes)
        for row, block in self._block_of.items():
            copy = self.rows[row]
            if copy.unit.index in self.versions:
                buffer = aligned_buffer(copy.num_bytes)
                old.read(block, buffer.data_ptr(), copy.num_bytes)
                new.write(row, buffer.data_ptr(), copy.num_bytes, 0, old.version(block))
        os.replace(place, self.path)
        old.close()
        self._block_of = {row: row for row in range(len(self.rows))}
        return new

    def load(self, weights: UnitWeights) -> None:
        """Fills the units that do not live in the file from their usable blocks. A rank that does not own the file lets
        go of it then."""
        for row, copy in enumerate(self.rows):
            if row >= self.num_streamed and copy.unit.index in self.versions:
                held = weights.copies[copy.unit.index]
                with weights.store_of(held).open(held, write=True, keep=False) as buffer:
                    self.file.read(self._block_of[row], buffer.data_ptr(), copy.num_bytes)
        if not self.owns:
            self.close()

    def gave_all(self, weights: UnitWeights) -> bool:
        """Whether every unit came from the file, so that the base was not read."""
        return len(self.versions) == len(weights.units)

    # ---- while the run goes on ------------------------------------------------------------------------------------

    def begin(self, digest: str, journal: Journal | None, weights: UnitWeights) -> None:
        """Makes the file this run's: from here on, its blocks are what the journal leads to.

        Args:
            digest: of the journal's header.
            journal: is synced before a copy is written; None on ranks that do not write it, where the line of every
                update that is made is durable already.
            weights: whose units are copied.
        """
        if self.versions and digest != self._run.digest:
            raise DistZO2Error(
                f"{self.path}: its weights are of the run in {self.options.journal}: resume that journal"
            )
        for index, version in self.versions.items():
            weights.copies[index].version = version
        if not self.owns:
            return
        rows = [_row(copy) for copy in self.rows]
        line = {"format": FORMAT, "journal": digest, "streamed": self.num_streamed, "rows": rows}
        write_whole(self._record, encode_line(line, MAX_RECORD_BYTES))
        self._has_begun = True
        copied = {copy.unit.index: row for row, copy in enumerate(self.rows) if row >= self.num_streamed}
        if copied and (self.options.every or self.options.minutes):
            self._copier = Copier(self.options, self.file, copied, journal, weights)
            weights.tap = self._copier.offer

    def step_done(self, access: WeightAccess, step: int, seconds: float) -> None:
        """`step` steps are made, the last one in `seconds`."""
        if self._copier is not None:
            self._copier.step_done(access, step, seconds)

    def check_optimizer(self, journal: str | os.PathLike[str] | None, replaced: bool) -> None:
        """Checks that an optimizer's updates can be those of the file's run.

        Raises:
            DistZO2Error: the optimizer's journal is another, or it has none although the weights came from the file; or
                the weights are no longer those that were handed over, and its journal would begin with them.
        """
        own = Path(self.options.journal).absolute()
        if (journal is not None and Path(journal).absolute() != own) or (
            journal is None and self.versions and not self._has_begun
        ):
            raise DistZO2Error(f"{self.path}: its weights are of the run in {own}: resume that journal")
        if journal is not None and replaced:
            raise DistZO2Error(
                f"{self.path}: a weight file begins with the weights as they were handed over: to begin another run, "
                "save the model and hand it over again"
            )

    def replaced(self) -> None:
        """The weights are about to be replaced: the journal will not lead to them."""
        if self.owns:
            self.discard()

    def discard(self) -> None:
        """From here on no resumed run uses the file's blocks."""
        self._record.unlink(missing_ok=True)
        if self._record.parent.is_dir():
            sync_directory(self._record.parent)

    def done(self) -> None:
        """The run has finished: `close` removes the file."""
        self._is_done = True

    def stop_copying(self) -> None:
        """Ends the copier's thread, after the copy under way. No-op without one."""
        if self._copier is not None:
            self._copier.close()
            self._copier.weights.tap = None
            self._copier = None

    def close(self) -> None:
        """Ends copying and lets go of the file. Safe to call twice."""
        self.stop_copying()
        if self.file is not None:
            if self._is_done:
                self.discard()
                self.path.unlink(missing_ok=True)
                if self.path == self.options.path_of(0):  # the run may have had more ranks before
                    for left in self.path.parent.glob(f"{self.path.stem}.rank*{self.path.suffix}*"):
                        left.unlink(missing_ok=True)
            self.file.close()
            self.file = None


def _make(path: Path, sizes: Sequence[int]) -> BlockFile:
    """A new durable file; what a process that was killed while it made one left there goes."""
    with suppress(FileNotFoundError):
        with open(path, "rb") as file:
            is_unmade = not any(file.read(64))
        if is_unmade:
            path.unlink()
    return BlockFile(str(path), sizes, durable=True)


def _row(copy: StoredCopy) -> list[Any]:
    return [copy.unit.name, copy.begin, copy.begin + copy.num_bytes]


class Pace:
    """What copying may take of the time of steps: a share of it, as an account. The copy in the training thread and,
    where the CPU computes, the processor time of writing are taken from it; nothing is copied while it is in debt.
    What a step leaves unused is lost."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._account = 0.0
        self._per_byte = _FIRST_GUESS

    def earn(self, seconds: float) -> None:
        """A step took `seconds`."""
        self._account = min(self._account, 0.0) + self._share * seconds

    def allows(self) -> bool:
        return self._share >= 1 or self._account > 0

    def spend(self, seconds: float, num_bytes: int) -> float:
        """A copy took `seconds`, and `num_bytes` are to be written; returns how long that is guessed to take."""
        guess = self._per_byte * num_bytes
        self._account -= seconds + guess
        return guess

    def correct(self, guess: float, seconds: float, num_bytes: int) -> None:
        """Writing took `seconds`, not `guess`."""
        self._account -= seconds - guess
        self._per_byte = seconds / num_bytes


@dataclass
class _Errand:
    """What a copier and its thread share, under `changed`. An idle thread knows nothing else, so that a copier which
    is dropped without close() is freed with its model, and the thread ends."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    task: Callable[[], None] | None = None  # to do, or being done
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
                if self.task is None:
                    return
                task = self.task
            task()
            del task
            with self.changed:
                self.task = None


class Copier:
    """Copies units into a weight file while training goes on, in rounds: each unit once a round, as passes bring it.

    The training thread copies a unit that is let go of into one staging buffer; a thread writes that buffer to the
    file. A copy that cannot be made is reported, and the run continues: it is in its journal.
    """

    def __init__(
        self,
        options: WeightFile,
        file: BlockFile,
        block_of: Mapping[int, int],
        journal: Journal | None,
        weights: UnitWeights,
    ) -> None:
        """`block_of` maps the index of each unit that is copied to its block."""
        self._options, self._file, self._block_of, self._journal = options, file, dict(block_of), journal
        self.weights = weights
        units: list[Unit] = [weights.units[index] for index in block_of]
        self._pace = Pace(options.pace)
        self._charges_writing = weights.device.type == "cpu"
        num_bytes = max(unit.num_bytes for unit in units)
        if weights.device.type == "cpu":
            self._staging = aligned_buffer(num_bytes)
        else:
            self._pool = HostPool([num_bytes], device=str(weights.device))
            self._staging = self._pool.tensor(0)
        self._wanted: set[int] = set()  # units of this round that are not copied yet
        self._seen: set[int] = set()  # units that passes brought in this round
        self._steps_of_round = 0
        self._last_begun = time.monotonic()
        self.num_copies = self.num_rounds = 0
        self._errand = _Errand()
        self._outcome: tuple[float, float, int] | str | None = None  # what the thread's last task ended with
        weakref.finalize(self, self._errand.close).atexit = False
        self._thread = threading.Thread(target=self._errand.run, name="distzo2-weight-file", daemon=True)
        self._thread.start()

    @property
    def in_round(self) -> bool:
        """Whether a round is under way."""
        return bool(self._wanted) or self._errand.task is not None

    def offer(self, unit: Unit, buffer: torch.Tensor, version: int) -> None:
        """A pass lets go of `unit`, whose clean bytes at `version` are in `buffer`."""
        if unit.index not in self._wanted:
            return
        self._seen.add(unit.index)
        if self._errand.task is not None or not self._pace.allows():
            return
        self._settle()
        start, event = time.perf_counter(), None
        self._staging[: unit.num_bytes].copy_(buffer, non_blocking=True)
        if buffer.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._wanted.discard(unit.index)
        seconds = time.perf_counter() - start
        guess = self._pace.spend(seconds, unit.num_bytes if self._charges_writing else 0)
        file, journal, staging = self._file, self._journal, self._staging
        block, num_bytes, held = self._block_of[unit.index], unit.num_bytes, weakref.ref(self)

        def write() -> None:
            try:
                if event is not None:
                    event.synchronize()
                begun = time.thread_time()
                if journal is not None:
                    journal.sync()
                file.write(block, staging.data_ptr(), num_bytes, 0, version)
                outcome = guess, time.thread_time() - begun, num_bytes
            except Exception as error:  # whatever it is, the run does not depend on it
                outcome = str(error) or type(error).__name__
            if (alive := held()) is not None:
                alive._outcome = outcome

        self._errand.hand_over(write)

    def _settle(self) -> None:
        """Takes in what the thread's last task ended with."""
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, str):
            self._options.log(f"a copy of the weights was given up: {outcome}")
            self._wanted.clear()
        elif outcome is not None:
            self.num_copies += 1
            if self._charges_writing:
                self._pace.correct(*outcome)

    def step_done(self, access: WeightAccess, step: int, seconds: float) -> None:
        """`step` steps are made, the last one in `seconds`."""
        if self._errand.task is None:
            self._settle()
        self._pace.earn(seconds)
        if self._wanted:
            self._steps_of_round += 1
            unseen = next(iter(self._wanted - self._seen), None)
            is_free = self._errand.task is None and self._pace.allows()
            if unseen is not None and self._steps_of_round >= _STEPS_UNSEEN and is_free:
                access.touch(access.weights.units[unseen])
            return
        options = self._options
        due_by_time = options.minutes and time.monotonic() - self._last_begun >= 60 * options.minutes
        if due_by_time or (options.every and step % options.every == 0):
            self.begin_round()

    def begin_round(self) -> None:
        """Wants a copy of every unit from here on."""
        self._last_begun = time.monotonic()
        self._wanted, self._seen, self._steps_of_round = set(self._block_of), set(), 0
        self.num_rounds += 1

    def close(self) -> None:
        """Ends the thread, after the copy under way. Safe to call twice."""
        self._errand.close()
        self._thread.join()
        self._settle()
