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

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distzo2.errors import DistZO2Error
from distzo2.files import sync, write_whole
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import JournalError, decode_line, encode_line
from distzo2.record.lineage import digest_lines
from distzo2.weights.access import WeightAccess
from distzo2.weights.store import StoredCopy
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import Unit, ranges_of
from distzo2_core import BlockFile, HostPool, aligned_buffer

FORMAT = 1
MAX_RECORD_BYTES = 16 << 20
_NUM_READERS = 4
_STEPS_UNSEEN = 2  # steps of a round after which units that no forward enters are fetched

logger = logging.getLogger("distzo2")


@dataclass(frozen=True)
class WeightFile:
    """Where a run keeps weights that survive a crash, and how often units that do not live there are copied into it.

    Args:
        path: of the file; each further rank that keeps one adds its number to the name.
        journal: path of the run's journal. If it exists, blocks of the file are used as far as it leads to them.
        every: steps between the beginnings of two rounds of copies; 0: none by steps.
        minutes: minutes between two; 0: none by time.
        pace: the most that copying may take of the steps' time, in (0, 1].
        log: is called with a line about each block that cannot be used, and about copies that could not be made.

    Raises:
        DistZO2Error: `every` or `minutes` is negative, or `pace` out of range.
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
    """The run that a weight file may belong to."""

    digest: str  # SHA-256 of its journal's header: base, parameters, seed and options
    num_steps: int

    @classmethod
    def of(cls, journal: str | os.PathLike[str]) -> RunSoFar | None:
        """Reads a journal; None if there is none yet."""
        if not os.path.lexists(journal):
            return None
        return cls(digest_lines(journal, 1), len(read_journal(journal).entries))


class KeptWeights:
    """The weight file of one rank, while its model is handed over and trained.

    Attributes:
        versions: by the index of a unit, the updates that its usable block holds; other units come from the base.
        file: the open file; None on a rank that only reads another's.
    """

    def __init__(
        self,
        options: WeightFile,
        copies: Sequence[StoredCopy],
        num_streamed: int = 0,
        *,
        rank: int = 0,
        run: RunSoFar | None = None,
        owns: bool = True,
    ) -> None:
        """Opens the file of `run`, or makes a new one.

        Args:
            copies: what the file holds, a block each; the first `num_streamed` live in the file.
            rank: whose file it is.
            run: the run so far; None for a new one.
            owns: without it nothing is made or changed: only the blocks of an existing file are read.

        Raises:
            DistZO2Error: the file belongs to another run, is in use, or cannot be made.
        """
        self.options, self.copies, self.num_streamed, self.owns = options, list(copies), num_streamed, owns
        self.path = options.path_of(rank)
        self.versions: dict[int, int] = {}
        self._record = self.path.with_name(self.path.name + ".json")
        self._rows = [_row(copy) for copy in copies]
        self._blocks = dict(enumerate(self.copies))  # what each block of the open file holds
        self._copier: Copier | None = None
        self._has_begun = self._is_done = False
        self._run = run
        try:
            self.file = self._open()
        except RuntimeError as error:
            raise DistZO2Error(str(error)) from error

    # ---- opening --------------------------------------------------------------------------------------------------

    def _open(self) -> BlockFile | None:
        new, new_blocks, sizes = None, self._blocks, [copy.num_bytes for copy in self.copies]
        old_rows, old = self._open_earlier()
        if old_rows == self._rows or not self.owns:
            return old
        self.discard()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.versions:  # the weights lived elsewhere, or were cut for other ranks
            try:
                place = self.path.with_name(self.path.name + ".new")
                place.unlink(missing_ok=True)
                new = _make(place, sizes)
                for block, copy in self._blocks.items():
                    if copy.unit.index in self.versions:
                        buffer = _read(old, block, copy)
                        new.write(self.copies.index(copy), buffer.data_ptr(), copy.num_bytes, 0, old.version(block))
                os.replace(place, self.path)
            except RuntimeError as error:
                self.options.log(f"{error}: the weights are made from the base again")
                self.versions.clear()
                new = None
        if old is not None:
            old.close()
        self._blocks = new_blocks
        return _make(self.path, sizes) if new is None else new

    def _open_earlier(self) -> tuple[list[list[Any]], BlockFile | None]:
        """Opens the file that an earlier process of this run left, and finds its usable blocks. Returns its rows and
        the file, None if there is none that can be used."""
        run, none = self._run, ([], None)
        try:
            record = decode_line(self._record.read_bytes(), MAX_RECORD_BYTES)
            if run is None or record.get("journal") != run.digest:
                raise DistZO2Error(
                    f"{self.path}: holds the weights of another run: name another file, or remove this one"
                )
            if record.get("format") != FORMAT:
                raise JournalError(f"format {record.get('format')!r}, expected {FORMAT}")
        except FileNotFoundError:
            return none
        except (OSError, JournalError) as error:
            self.options.log(f"{self._record}: {error}: the weights are made from the base again")
            return none
        rows = record["rows"]
        try:
            file = BlockFile(str(self.path), [end - begin for _, begin, end, *_ in rows], create=False)
        except RuntimeError as error:
            if "is in use" in str(error):
                raise
            self.options.log(f"{error}: the weights are made from the base again")
            return none
        self._blocks = {rows.index(row): copy for row, copy in zip(self._rows, self.copies, strict=True) if row in rows}
        self._find_usable(file, record["streamed"], run.num_steps)
        return rows, file

    def _find_usable(self, file: BlockFile, num_streamed: int, num_steps: int) -> None:
        """Reads every block against its checksums and notes the versions of those that can be used."""
        unusable: list[int] = []

        def check(block: int) -> tuple[int, int] | None:
            copy, version = self._blocks[block], file.version(block)
            if version == 0 and block >= num_streamed:  # never copied
                return None
            try:
                if version > num_steps:
                    raise RuntimeError(f"{self.path}: it holds {version} updates, and the journal {num_steps}")
                _read(file, block, copy)
            except RuntimeError as error:
                self.options.log(f"unit {copy.unit.name}: {error}: made from the base again")
                unusable.append(block)
                return None
            return copy.unit.index, version

        present = self._blocks.values()
        missing = [copy.unit.name for copy in self.copies if copy not in present]
        if missing:
            what = f"{len(missing)} of {len(self.copies)} units as they are cut now, such as {missing[0]}"
            self.options.log(f"{self.path}: lacks {what}: made from the base again")
        with ThreadPoolExecutor(_NUM_READERS, "distzo2-weight-file") as pool:
            self.versions = dict(found for found in pool.map(check, self._blocks) if found is not None)
        if self.versions:
            held, units = sorted(self.versions.values()), f"{len(self.versions)} of {len(self.copies)} units"
            self.options.log(f"from {self.path.name}: {units}, with {held[0]} to {held[-1]} of {num_steps} updates")
        if not unusable or not self.owns:
            return
        self.discard()  # until all blocks are filled again
        for block in unusable:  # must not pass for a copy of later steps once the journal has as many
            zeros = torch.zeros(self._blocks[block].num_bytes, dtype=torch.uint8)
            file.write(block, zeros.data_ptr(), zeros.numel(), 0, 0)

    def load(self, weights: UnitWeights) -> None:
        """Fills the units that do not live in the file from their usable blocks. A rank that does not own the file
        closes it then."""
        streamed = {copy.unit.index for copy in self.copies[: self.num_streamed]}
        for block, copy in self._blocks.items():
            if copy.unit.index in self.versions.keys() - streamed:
                held = weights.copies[copy.unit.index]
                with weights.store_of(held).open(held, write=True, keep=False) as buffer:
                    self.file.read(block, buffer.data_ptr(), copy.num_bytes)
        if not self.owns:
            self.close()

    def gave_all(self, weights: UnitWeights) -> bool:
        """Whether every unit came from the file, so that the base was not read."""
        return len(self.versions) == len(weights.units)

    # ---- while the run continues ----------------------------------------------------------------------------------

    def begin(self, digest: str, journal: Journal | None, weights: UnitWeights) -> None:
        """Makes the file this run's: from here on, its blocks are what the journal leads to.

        Args:
            digest: of the journal's header.
            journal: is synced before a copy is written; None on ranks that do not write it, where the line of each
                update is durable before the update is made.
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
        line = {"format": FORMAT, "journal": digest, "streamed": self.num_streamed, "rows": self._rows}
        write_whole(self._record, encode_line(line, MAX_RECORD_BYTES))
        self._has_begun = True
        copied = {copy.unit.index: block for block, copy in self._blocks.items() if block >= self.num_streamed}
        if copied and (self.options.every or self.options.minutes):
            self._copier = Copier(self.options, self.file, copied, journal, weights)
            weights.tap = self._copier.offer

    def step_done(self, access: WeightAccess, step: int, seconds: float) -> None:
        """`step` steps are made, the last one in `seconds`."""
        if self._copier is not None:
            self._copier.step_done(access, step, seconds)

    def check_optimizer(self, journal: str | os.PathLike[str] | None, replaced: bool) -> None:
        """Raises DistZO2Error unless an optimizer's updates can be those of the file's run.

        Args:
            journal: of the optimizer; only weights that did not come from the file need none.
            replaced: whether the weights are no longer those that were handed over, which a journal begins with.
        """
        own = Path(self.options.journal).absolute()
        unjournaled = journal is None and self.versions and not self._has_begun
        if unjournaled or (journal is not None and Path(journal).absolute() != own):
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
            sync(self._record.parent)

    def done(self) -> None:
        """The run has finished: `close` removes the file."""
        self._is_done = True

    def stop_copying(self) -> None:
        """Ends the copier's thread, after the copy under way. Safe to call twice."""
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


def _row(copy: StoredCopy) -> list[Any]:
    """What a block holds, for the record: a part of a block that is trained in part names its parameters, and a slice
    with scales behind it where it ends."""
    params = [] if copy.unit.beside is None else [ranges_of(p.index for p in copy.unit.params)]
    end = copy.begin + copy.num_bytes
    return [copy.unit.name, copy.begin, end, *params, *([copy.end] if copy.end < end else [])]


def _make(path: Path, sizes: Sequence[int]) -> BlockFile:
    """A new durable file. Replaces what a process left that was killed while it made one: a file of zeros."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if not any(file.read(64)):
            path.unlink()
    return BlockFile(str(path), sizes, durable=True)


def _read(file: BlockFile, block: int, copy: StoredCopy) -> torch.Tensor:
    """The bytes of a block, checked. Raises RuntimeError if they are damaged."""
    buffer = aligned_buffer(copy.num_bytes)
    file.read(block, buffer.data_ptr(), copy.num_bytes)
    return buffer


class Copier:
    """Copies units into a weight file while training continues, in rounds: each unit once a round, as passes bring it.

    The training thread copies a unit that is let go of into one staging buffer; a thread writes that buffer to the
    file. What copying takes is bounded by an account: each step pays the share `pace` of its time into it, and what it
    leaves unused is lost. The copy and, where the CPU computes, the processor time of writing are taken from it, and
    nothing is copied while it is in debt. A GPU copies on its own stream, beside the lanes; the account pays for
    the seconds that the copy has the link. A copy that cannot be made is reported, and the run continues.
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
        num_bytes = max(weights.units[index].stored_bytes for index in block_of)
        self._stream: Any = None
        if weights.device.type == "cpu":
            self._staging = aligned_buffer(num_bytes)
        else:
            self._pool = HostPool([num_bytes], device=str(weights.device), host_memory=weights.host_memory)
            self._staging = self._pool.tensor(0)
            self._stream = torch.cuda.Stream(weights.device)
            # One copy is under way at a time. The thread that waits for its end sleeps.
            self._begun, self._ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self._wanted: set[int] = set()  # units of this round that are not copied yet
        self._seen: set[int] = set()  # units that passes brought in this round
        self._steps_of_round = self.num_rounds = 0
        self._last_begun = time.monotonic()
        self._account = 0.0  # seconds
        # An idle thread of it knows no owner: a copier that is dropped without close() is freed, and the thread ends.
        self._writer = ThreadPoolExecutor(1, "distzo2-weight-file")
        self._writing: Future[float] | None = None  # the copy under way; its result is taken from the account

    @property
    def in_round(self) -> bool:
        """Whether a round is under way."""
        return bool(self._wanted) or (self._writing is not None and not self._writing.done())

    def offer(self, unit: Unit, buffer: torch.Tensor, version: int) -> Any:
        """A pass lets go of `unit`, whose clean bytes at `version` are in `buffer`. Returns the stream that reads them
        from now on; None: they are not read any more."""
        if unit.index not in self._wanted:
            return None
        self._seen.add(unit.index)
        if not self._is_free():
            return None
        start, stream = time.perf_counter(), self._stream
        staging = self._staging[: buffer.numel()]
        if stream is None:
            staging.copy_(buffer)
        else:
            stream.wait_stream(torch.cuda.current_stream(self.weights.device))
            with torch.cuda.stream(stream):
                self._begun.record(stream)
                staging.copy_(buffer, non_blocking=True)
                self._ended.record(stream)
        self._wanted.discard(unit.index)
        self._account -= time.perf_counter() - start
        file, journal, block, num_bytes = self._file, self._journal, self._block_of[unit.index], buffer.numel()
        events = None if stream is None else (self._begun, self._ended)

        def write() -> float:
            if events is not None:
                events[1].synchronize()
            begun = time.thread_time()
            if journal is not None:
                journal.sync()
            file.write(block, staging.data_ptr(), num_bytes, 0, version)
            return time.thread_time() - begun if events is None else events[0].elapsed_time(events[1]) * 1e-3

        self._writing = self._writer.submit(write)
        return stream

    def _is_free(self) -> bool:
        """Whether a copy may begin now. Settles the last one."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            error = writing.exception()
            if error is not None:  # whatever it is, the run does not depend on the copy
                self._options.log(f"a copy of the weights was given up: {str(error) or type(error).__name__}")
                self._wanted.clear()
            else:
                self._account -= writing.result()
        return self._writing is None and (self._options.pace >= 1 or self._account > 0)

    def step_done(self, access: WeightAccess, step: int, seconds: float) -> None:
        """`step` steps are made, the last one in `seconds`."""
        options = self._options
        self._account = min(self._account, 0.0) + options.pace * seconds
        is_free = self._is_free()
        if self._wanted:
            self._steps_of_round += 1
            unseen = next(iter(self._wanted - self._seen), None)
            if unseen is not None and self._steps_of_round >= _STEPS_UNSEEN and is_free:
                access.touch(access.weights.units[unseen])
            return
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
        self._writer.shutdown()
        self._is_free()
