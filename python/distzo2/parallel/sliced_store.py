"""Weights of which each rank of a node keeps a slice: the ranks gather a block when one of them wants it.

    this rank's slice, in its pool or its block file
      -> brought to the device; the updates that it has missed are applied, and written back
      -> gathered with the other ranks' slices into a buffer that holds the whole block

Slices are cut at 256-byte boundaries, never by tensor, so that every rank moves the same share of every block. Noise is
a function of the element, so a slice is updated as its part of the block is. Such cuts are between groups of codes; the
scales of a slice's codes, which are never written, are kept behind it, as are its weights at the start. A buffer holds
a block as it is after the last update: a pass perturbs from it, and never writes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.parallel.slice_rounds import WANTS, SliceExchange, Word
from distzo2.weights.store import Store, StoredCopy, num_slots_of, slot_bytes_of
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import ALIGNMENT, Unit
from distzo2_core import aligned_buffer

_abandoned: list[Any] = []  # buffers of gathers that never end, since a rank was lost


def cut(num_bytes: int, shares: Sequence[float]) -> list[int]:
    """Returns where the slices of a block begin, and where the last ends: multiples of 256 bytes, by `shares`.

    The end is at least `num_bytes`. Equal shares give equal slices, of at least 256 bytes each.
    """
    if len(set(shares)) == 1:
        one = max(-(-num_bytes // (ALIGNMENT * len(shares))), 1) * ALIGNMENT
        return [i * one for i in range(len(shares) + 1)]
    total = sum(shares)
    bounds = [round(num_bytes * s / total / ALIGNMENT) * ALIGNMENT for s in accumulate(shares)]
    bounds[-1] = -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return list(accumulate(bounds, lambda start, bound: max(bound, start + ALIGNMENT), initial=0))


def slices_of(units: Sequence[Unit], shares: Sequence[float], index: int) -> list[StoredCopy]:
    """Returns the slices that the rank at `index` of its node keeps of the units that stream."""
    spans = [(unit, *cut(unit.num_bytes, shares)[index : index + 2]) for unit in units]
    return [StoredCopy(*span, block=i) for i, span in enumerate(spans)]


@dataclass(eq=False)
class _Buffer:
    """A place for a gathered block."""

    data: torch.Tensor  # uint8
    unit: Unit | None = None
    stamp: int = -1  # of the weights that it was gathered from
    works: list[Any] = field(default_factory=list)  # what is still to be waited for
    readers: int = 0
    is_ahead: bool = False  # gathered because this rank wants it, and not read yet
    released: Any = None  # CUDA event: what read it has ended


class SlicedStore(Store):
    """A store of whole units, of which this rank keeps slices. Every rank of the node makes one of the same units."""

    gathers = True

    def __init__(
        self,
        source: Store,
        copies: Sequence[StoredCopy],
        device: torch.device,
        *,
        slots: int,
        node: SliceExchange,
        shares: Sequence[float],
        backend: str,
    ) -> None:
        """
        Args:
            source: the store of this rank's slices, which are `copies`, from `slices_of`.
            slots: how many whole blocks are on the device at once, at least 2.
            shares: of each rank of the node, as `cut` takes them.
            backend: what gathers go through, "gloo" or "nccl".
        """
        self._source, self._device, self._node, self._backend = source, device, node, backend
        self.set_durable, self.fail, self.flush = source.set_durable, source.fail, source.flush
        self.trace, self.events = source.trace, source.events
        self._copies = {copy.unit.index: copy for copy in copies}
        self._bounds = {copy.unit.index: cut(copy.unit.num_bytes, shares) for copy in copies}
        self.num_slots = num_slots_of(slots, len(copies))
        self.slot_bytes = slot_bytes_of(bounds[-1] for bounds in self._bounds.values())
        # Of high priority, since what makes a slice current must not wait for the matrix products of the lanes.
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._buffers = [self._new_buffer() for _ in range(self.num_slots)]  # the one filled last is last
        self._held: dict[int, _Buffer] = {}
        self._spare: torch.Tensor | None = None  # reused while units are written one after another, as in loading
        self._gather_wait_s, self._gathers_ahead = 0.0, 0

    def serve(self, weights: UnitWeights, number: int) -> None:
        """Lets the other ranks gather from now on. `weights` brings slices up to date; `number` is of `new_store`."""
        self._weights, self._number = weights, number
        self._node.stores[number] = self.begin

    @property
    def source(self) -> Store:
        return self._source

    def _new_buffer(self) -> _Buffer:
        if self._side is None:
            return _Buffer(aligned_buffer(self.slot_bytes))
        data = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self._device)
        released = torch.cuda.Event()
        released.record(torch.cuda.current_stream(self._device))  # where torch's allocator has used the memory before
        return _Buffer(data, released=released)

    # ---- gathers ------------------------------------------------------------------------------------------------

    def _want(self, unit: Unit) -> Word:
        return Word(WANTS, self._number, unit.index, self._weights.stamp_of(unit))

    def _find(self, unit: Unit) -> _Buffer | None:
        stamp = self._weights.stamp_of(unit)
        return next((b for b in self._buffers if b.unit is unit and b.stamp == stamp), None)

    def begin(self, index: int, stamp: int, ours: bool) -> None:
        """Begins the gather of a unit; called in the same order on all ranks of the node.

        Args:
            index: of the unit.
            stamp: of the weights that the unit must have, as of `UnitWeights.stamp_of`.
            ours: this rank wants it too.
        """
        copy = self._copies[index]
        if stamp != self._weights.stamp_of(copy.unit):
            raise DistZO2Error(
                f"unit {copy.unit.name!r} is wanted with other updates than this rank has made: weights are replaced, "
                "and updates applied, by all ranks together"
            )
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            self._drop(copy.unit)  # of two gathers of a unit the later one counts
            buffer = self._take_buffer()
            if buffer.released is not None:
                self._side.wait_event(buffer.released)
            parts = [buffer.data[a:b] for a, b in pairwise(self._bounds[index])]
            stored, changed = self._source.acquire(copy), False
            try:
                changed = self._weights.write_up_to_date(copy, stored, parts[self._node.index])
            finally:
                self._source.release(copy, changed)
            buffer.works = self._node.gather(parts, self._backend)
            buffer.unit, buffer.stamp, buffer.is_ahead = copy.unit, stamp, ours

    def _take_buffer(self) -> _Buffer:
        """Returns the buffer to gather into: the oldest that nobody reads, if possible one that nobody will read."""
        buffer = min((b for b in self._buffers if not b.readers), key=self._is_ahead, default=None)
        if buffer is None:  # nested windows hold more units than there are slots
            buffer = self._new_buffer()
        else:
            self._settle(buffer)
            self._buffers.remove(buffer)
        buffer.unit, buffer.is_ahead = None, False  # what it holds is about to be overwritten
        self._buffers.append(buffer)
        return buffer

    def _is_ahead(self, buffer: _Buffer) -> bool:
        """Whether the buffer holds a block that was gathered ahead, and that this rank has yet to read."""
        return buffer.is_ahead and buffer.stamp == self._weights.stamp_of(buffer.unit)

    def _has_room(self) -> bool:
        """Whether a gather can begin without waiting, and without giving up a block that was gathered ahead."""
        free = (b for b in self._buffers if not b.readers and not self._is_ahead(b))
        return any(all(work.is_completed() for work in buffer.works) for buffer in free)

    def _settle(self, buffer: _Buffer) -> None:
        """Waits until a gather has ended; on CUDA the current stream waits, and not the host."""
        for work in buffer.works:
            self._node.wait(work, self._backend)
        buffer.works = []

    # ---- as every store -----------------------------------------------------------------------------------------

    def acquire(self, copy: StoredCopy) -> torch.Tensor:
        """Returns the whole unit with every update made so far, uint8 [unit.num_bytes]. Not to be written."""
        self._spare = None
        unit = copy.unit
        self._node.bring(self._want(unit), lambda: self._find(unit) is not None)
        buffer = self._find(unit)
        start = time.perf_counter()
        self._settle(buffer)
        self._gather_wait_s += time.perf_counter() - start
        if buffer.released is not None:  # the last reader may have used another stream, and one event stands for all
            torch.cuda.current_stream(self._device).wait_event(buffer.released)
        buffer.readers, buffer.is_ahead = buffer.readers + 1, False
        self._held[unit.index] = buffer
        return buffer.data[: unit.num_bytes]

    def release(self, copy: StoredCopy, dirty: bool, stream: Any = None) -> None:
        buffer = self._held.pop(copy.unit.index)
        buffer.readers -= 1
        if buffer.released is not None:
            buffer.released.record(stream or torch.cuda.current_stream(self._device))

    def expect(self, following: Sequence[StoredCopy], num_current: int) -> None:
        """As in `Store`: the first `num_current`, and what no update reaches, are gathered ahead; of the others, slices
        are brought."""
        to_gather = [i < num_current or not copy.unit.trainable for i, copy in enumerate(following)]
        for gather, copy in zip(to_gather, following, strict=True):
            if not (gather and self._find(copy.unit) is not None) and not self._source.prefetch(copy):
                break
        for gather, copy in list(zip(to_gather, following, strict=True))[: self.num_slots - 1]:
            if gather and self._find(copy.unit) is None:
                self._node.say(self._want(copy.unit))
        self.poll()

    def poll(self) -> None:
        """Begins the gathers whose turn has come. Never waits for another rank."""
        while self._node.answered and self._has_room():
            self._node.act()
            self._gathers_ahead += 1

    def forget(self) -> None:
        self._drop(None)

    def _drop(self, unit: Unit | None) -> None:
        """Lets go of the gathered blocks of a unit, or of all units, that nobody reads."""
        for buffer in self._buffers:
            if not buffer.readers and unit in (None, buffer.unit):
                self._settle(buffer)
                buffer.unit, buffer.is_ahead = None, False

    @contextmanager
    def open(self, copy: StoredCopy, write: bool, keep: bool = True) -> Iterator[torch.Tensor]:
        """As in `Store`. Every rank of the node takes part in reading. What is written must be written on every rank,
        of which each keeps its slice; with `keep` that slice is what it was at first."""
        unit = copy.unit
        if not write:  # whoever reads one unit is likely to read the next ones
            whole = self.acquire(copy)
            try:
                following = [c for c in self._copies.values() if c.block > copy.block]
                self.expect(following[: self.num_slots - 1], len(following))
                yield whole.cpu()
            finally:
                self.release(copy, False)
            return
        host = self._spare if self._spare is not None else aligned_buffer(self.slot_bytes)
        self._spare = None
        with self._source.open(copy, write=True, keep=keep) as stored:
            for place, at in copy.places if keep else ():
                host[place.start : place.stop].copy_(stored[at : at + len(place)])
            yield host[: unit.num_bytes]
            for place, at in copy.places:
                stored[at : at + len(place)].copy_(host[place.start : place.stop])
            copy.take_start(stored)
        self.forget()
        self._spare = host

    # ---- figures and the end --------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        return {
            **self._source.stats(),
            "gathers_ahead": self._gathers_ahead,
            "stored_bytes": sum(copy.num_bytes for copy in self._copies.values()),
            "gather_wait_s": self._gather_wait_s,
        }

    def reset_stats(self) -> None:
        self._gather_wait_s, self._gathers_ahead = 0.0, 0
        self._source.reset_stats()

    def close(self) -> None:
        """Serves the other ranks of the node while they want slices of this one, and ends."""
        try:
            self._node.leave(ends=False)
            del self._node.stores[self._number]
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
