"""Weights of which each rank of a node keeps a slice: a block is the slices of all, gathered when it is wanted.

    this rank's slice, in its pool or its block file
      -> brought to the device; the updates that it has missed are applied, and written back
      -> gathered with the other ranks' slices into a buffer that holds the whole block

Slices are cut at 256-byte boundaries, never by tensor, so that every rank moves the same share of every block. The
noise is a function of the element, so that the update of a slice is that of its part of the block. A buffer holds a
block as it is after the last update: the pass perturbs from it, and never writes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.parallel.slice_rounds import WANTS, SliceExchange, Word
from distzo2.weights.residency import MemoryShare
from distzo2.weights.store import SLOT_ALIGNMENT, MemoryStore, StreamingStore
from distzo2.weights.units import ALIGNMENT, Unit
from distzo2_core import aligned_buffer

_abandoned: list[Any] = []  # buffers of gathers that never end, since a rank was lost


def cut(num_bytes: int, shares: Sequence[float]) -> list[int]:
    """Where the slices of a block begin, and the end of the last: multiples of 256 bytes, in proportion to `shares`.

    The end is at least `num_bytes`. Equal shares give equal slices, of at least 256 bytes each.
    """
    if len(set(shares)) == 1:
        one = max(-(-num_bytes // (ALIGNMENT * len(shares))), 1) * ALIGNMENT
        return [i * one for i in range(len(shares) + 1)]
    total = sum(shares)
    bounds = [round(num_bytes * s / total / ALIGNMENT) * ALIGNMENT for s in accumulate(shares)]
    bounds[-1] = -(-num_bytes // ALIGNMENT) * ALIGNMENT
    starts = [0]
    for bound in bounds:
        starts.append(max(bound, starts[-1] + ALIGNMENT))
    return starts


@dataclass(eq=False)
class Slice:
    """This rank's bytes [begin, begin + num_bytes) of a unit's packed buffer, padding at the end included."""

    unit: Unit
    bounds: list[int]  # of all ranks' slices
    begin: int
    num_bytes: int
    version: int = 0  # how many updates the stored copy holds
    block: int = -1

    @property
    def index(self) -> int:
        return self.unit.index


@dataclass(eq=False)
class _Buffer:
    """A block as it was gathered, or is being gathered."""

    data: torch.Tensor  # uint8
    unit: int = -1
    stamp: int = -1
    works: list[Any] = field(default_factory=list)  # what is still to be waited for
    readers: int = 0
    is_ahead: bool = False  # gathered because this rank wants it, and not read yet
    number: int = 0  # of the gather
    begun_ns: int = 0
    ended_ns: int = 0
    released: Any = None  # CUDA event: what read it has ended

    def note_the_end(self) -> None:
        """Called from another thread when a part of the gather has come."""
        self.ended_ns = time.perf_counter_ns()


# (slice, its bytes on the device, where its up-to-date bytes go) -> whether the stored copy was changed
UpdateSlice = Callable[[Slice, torch.Tensor, torch.Tensor], bool]


class SlicedStore:
    """A store of whole units, of which this rank keeps slices. Every rank of the node makes one of the same units."""

    def __init__(
        self,
        units: Sequence[Unit],
        device: torch.device,
        *,
        directory: str | os.PathLike | None,
        slots: int,
        node: SliceExchange,
        shares: Sequence[float],
        update: UpdateSlice,
        number: int,
        share: MemoryShare | None = None,
        stamp: Callable[[], int],
        on_gathered: Callable[[Unit, int, int], None],
    ) -> None:
        """
        Args:
            units: the streamed units; block ids are given in this order.
            device: where it computes.
            directory: of the block file of this rank's slices; None keeps them in host memory.
            slots: how many whole blocks are on the device at once, at least 2.
            node: the ranks that share the units.
            shares: of each rank of the node.
            update: brings a slice up to date, see `UpdateSlice`.
            number: from `node.new_store`.
            share: this rank's of its machine's memory; None: all of it.
            stamp: of the weights as they are now; it changes with every update and replacement.
            on_gathered: while traced, called with the unit and the times (ns) between which a gather was in flight.
        """
        self.parts: dict[int, Slice] = {}
        for block, unit in enumerate(units):
            unit.block = block
            bounds = cut(unit.num_bytes, shares)
            begin, end = bounds[node.index : node.index + 2]
            self.parts[unit.index] = Slice(unit, bounds, begin, end - begin)
        parts = list(self.parts.values())
        in_place = device.type == "cpu" and directory is None
        self._source = (
            MemoryStore(parts, device, share)
            if in_place
            else StreamingStore(parts, device, directory=directory, slots=slots, share=share)
        )
        self.num_slots = max(2, min(slots, len(units) + 1))
        self.slot_bytes = -(-max(p.bounds[-1] for p in parts) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        self._device, self._node = device, node
        self._update, self._stamp, self._on_gathered = update, stamp, on_gathered
        self._buffers = [self._new_buffer() for _ in range(self.num_slots)]
        self._held: dict[int, _Buffer] = {}
        self._num_begun = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: torch.Tensor | None = None
        self.gather_wait_ns = self.gathers_ahead = 0
        self._traced = False
        self._closed = False
        self._number = number
        node.register(number, self)

    def _new_buffer(self) -> _Buffer:
        if self._device.type == "cpu":
            return _Buffer(aligned_buffer(self.slot_bytes))
        data = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self._device)
        return _Buffer(data, released=torch.cuda.Event())

    # ---- gathers ------------------------------------------------------------------------------------------------

    def _want(self, unit: Unit) -> Word:
        return Word(WANTS, self._number, unit.index, self._stamp())

    def _find(self, unit: Unit) -> _Buffer | None:
        stamp = self._stamp()
        return next((b for b in self._buffers if b.unit == unit.index and b.stamp == stamp), None)

    def begin(self, index: int, stamp: int, ours: bool) -> None:
        """Begins the gather of a unit: called in the same order on all ranks of the node.

        Args:
            stamp: of the weights that the unit must have.
            ours: this rank wants it too.
        """
        part = self.parts[index]
        if stamp != self._stamp():
            raise DistZO2Error(
                f"unit {part.unit.name!r} is wanted with other updates than this rank has made: weights are replaced, "
                "and updates applied, by all ranks together"
            )
        if self._side is None:
            self._begin(part, stamp, ours)
            return
        with torch.cuda.stream(self._side):
            self._begin(part, stamp, ours)

    def _begin(self, part: Slice, stamp: int, ours: bool) -> None:
        for buffer in self._buffers:
            if buffer.unit == part.index and not buffer.readers:
                self._settle(buffer)
                buffer.unit = -1  # of two copies of a unit the later one counts
        buffer = self._free_buffer()
        if buffer.released is not None:
            self._side.wait_event(buffer.released)
        buffer.unit, buffer.stamp, buffer.number, buffer.is_ahead = part.index, stamp, self._num_begun, ours
        self._num_begun += 1
        buffer.begun_ns, buffer.ended_ns = time.perf_counter_ns(), 0
        parts = [buffer.data[a:b] for a, b in pairwise(part.bounds)]
        self._fill(part, parts[self._node.index])
        buffer.works = self._node.gather(parts)
        for work in buffer.works if self._traced else ():
            work.get_future().add_done_callback(lambda _: buffer.note_the_end())

    def _fill(self, part: Slice, own: torch.Tensor) -> None:
        """This rank's slice, up to date, into its place in a buffer."""
        stored, changed = self._source.acquire(part), False
        try:
            changed = self._update(part, stored, own)
        finally:
            self._source.release(part, changed)

    def _free_buffer(self) -> _Buffer:
        """The one that was gathered first, of those that nobody reads; rather one that nobody will."""
        idle = [b for b in self._buffers if not b.readers]
        if not idle:  # nested windows hold more units than there are slots
            self._buffers.append(self._new_buffer())
            return self._buffers[-1]
        buffer = min(idle, key=lambda b: (self._is_ahead(b), b.number))
        self._settle(buffer)
        buffer.unit = -1
        return buffer

    def _is_ahead(self, buffer: _Buffer) -> bool:
        """Whether it holds a block that was gathered ahead of time, and that this rank is yet to read."""
        return buffer.unit >= 0 and buffer.stamp == self._stamp() and buffer.is_ahead

    def _has_room(self) -> bool:
        """Whether a gather can begin without waiting, and without giving up a block that was gathered ahead of time."""
        return any(
            not b.readers and not self._is_ahead(b) and all(work.is_completed() for work in b.works)
            for b in self._buffers
        )

    def _settle(self, buffer: _Buffer) -> None:
        """Until a gather has ended; on CUDA what follows on the current stream waits, and not the host."""
        if not buffer.works:
            return
        for work in buffer.works:
            self._node.wait(work)
        buffer.works = []
        if self._traced:
            self._on_gathered(self.parts[buffer.unit].unit, buffer.begun_ns, buffer.ended_ns or time.perf_counter_ns())

    # ---- what a pass asks ---------------------------------------------------------------------------------------

    @property
    def in_host_memory(self) -> bool:
        return False

    def acquire(self, unit: Unit) -> torch.Tensor:
        """The whole unit with every update made so far; uint8 [unit.num_bytes]. Not to be written."""
        self._spare = None
        self._node.bring(self._want(unit), lambda: self._find(unit) is not None)
        buffer = self._find(unit)
        start = time.perf_counter_ns()
        self._settle(buffer)
        self.gather_wait_ns += time.perf_counter_ns() - start
        buffer.readers, buffer.is_ahead = buffer.readers + 1, False
        self._held[unit.index] = buffer
        return buffer.data[: unit.num_bytes]

    def release(self, unit: Unit, dirty: bool) -> None:
        """Its buffer may be used again."""
        buffer = self._held.pop(unit.index)
        buffer.readers -= 1
        if buffer.released is not None:
            buffer.released.record()

    def expect(self, following: Sequence[Unit], num_current: int) -> None:
        """Units that will be wanted next, in order. The first `num_current` are wanted before the next update is made,
        so that they can be gathered; of the others the slices are brought from where they are stored."""
        current = following[:num_current]
        for unit in following:
            if unit in current and self._find(unit) is not None:
                continue
            if not self._source.prefetch(self.parts[unit.index]):
                break
        for unit in current[: self.num_slots - 1]:
            want = self._want(unit)
            if self._find(unit) is None and not self._node.is_said(want):
                self._node.say(want)
        self.poll()

    def poll(self) -> None:
        """Begins the gathers whose turn has come. Never waits for another rank."""
        while self._node.answered and self._has_room():
            self._node.act()
            self.gathers_ahead += 1

    def set_durable(self, version: int) -> None:
        self._source.set_durable(version)

    def fail(self, reason: str) -> None:
        """As `StreamingStore.fail`."""
        if isinstance(self._source, StreamingStore):
            self._source.fail(reason)

    # ---- slices -------------------------------------------------------------------------------------------------

    def catch_up(self, unit: Unit, update: Callable[[Slice, torch.Tensor], bool]) -> None:
        """Calls `update(slice, its bytes)`, which changes them in place if it returns True."""
        part = self.parts[unit.index]
        stored, changed = self._source.acquire(part), False
        try:
            changed = update(part, stored)
        finally:
            self._source.release(part, changed)

    def flush(self) -> None:
        """Waits until every stored copy is where the weights live."""
        self._source.flush()

    def forget(self) -> None:
        """Stored copies were changed from outside: what was gathered of them is no longer true."""
        for buffer in self._buffers:
            if not buffer.readers:
                self._settle(buffer)
                buffer.unit = -1

    @contextmanager
    def open(
        self, unit: Unit, write: bool, keep: bool = True, following: Sequence[Unit] = ()
    ) -> Iterator[torch.Tensor]:
        """The unit's bytes in host memory. Every rank of the node takes part in reading them; `following` may be read
        next. What is written must be written on every rank, of which each keeps its slice; with `keep` that slice is
        what it was at first."""
        if not write:
            whole = self.acquire(unit)
            try:
                self.expect(following[: self.num_slots - 1], len(following))
                yield whole.cpu()
            finally:
                self.release(unit, False)
            return
        part = self.parts[unit.index]
        mine = slice(part.begin, max(part.begin, min(part.begin + part.num_bytes, unit.num_bytes)))
        host = self._spare if self._spare is not None else aligned_buffer(self.slot_bytes)
        self._spare = None
        if keep:
            with self._source.open(part, write=False) as stored:
                host[mine].copy_(stored[: mine.stop - mine.start])
        yield host[: unit.num_bytes]
        with self._source.open(part, write=True, keep=False) as stored:
            stored[: mine.stop - mine.start].copy_(host[mine])
        part.version = unit.version
        self.forget()
        self._spare = host

    # ---- figures and the end --------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        return {
            **self._source.stats(),
            "gathers_ahead": self.gathers_ahead,
            "stored_bytes": sum(part.num_bytes for part in self.parts.values()),
            "gather_wait_s": self.gather_wait_ns * 1e-9,
        }

    def reset_stats(self) -> None:
        self.gather_wait_ns = self.gathers_ahead = 0
        self._source.reset_stats()

    def trace(self, enable: bool) -> None:
        """Records transfers and, on a CPU, gathers."""
        self._traced = enable and self._side is None
        self._source.trace(enable)

    def events(self) -> list[tuple]:
        """Transfers of slices, as `CopyEngine.events`."""
        return self._source.events()

    def close(self) -> None:
        """Serves the other ranks of the node while they want slices of this one, and ends."""
        if self._closed:
            return
        self._closed = True
        try:
            self._node.leave(ends=False)
            self._node.register(self._number, None)
            for buffer in self._buffers:
                try:
                    self._settle(buffer)
                except DistZO2Error:  # a rank is lost, and its bytes may come when the memory is another's
                    _abandoned.append(buffer)
        finally:
            self._held.clear()
            self._buffers.clear()
            self._spare = None
            self._source.close()
