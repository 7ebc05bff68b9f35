"""The weights of a model in units: where each is stored, how many updates it holds, and making it present.

`UnitWeights` owns the stored copies and their versions, the updates that some of them have missed, and the scratch
where perturbed copies are made. A unit that is made present catches up: the updates it has missed are applied in the
same pass over memory that makes the perturbed copies. Everything acts on the current stream of the compute device.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.parallel.exchange import is_known
from distzo2.parallel.group import joined
from distzo2.parallel.node import Slicing, memory_share
from distzo2.parallel.sliced_store import Slice, SlicedStore
from distzo2.streaming.lanes import Emission
from distzo2.weights.residency import MemoryBudget, free_memory, keep_blocks
from distzo2.weights.scratch import Scratch
from distzo2.weights.store import MemoryStore, StreamingStore
from distzo2.weights.trace import Trace
from distzo2.weights.units import ParamInfo, Unit, collect_params, find_units
from distzo2.weights.updates import Updates
from distzo2_core import Program, SegmentTable, Update, materialize


@dataclass(eq=False)
class Present:
    """A unit whose weights are on the compute device now. `dirty`: they are newer than the stored copy."""

    unit: Unit
    buffer: torch.Tensor  # uint8 [unit.num_bytes]
    views: list[torch.Tensor]
    dirty: bool = False


class UnitWeights:
    """See the module."""

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        weights: str,
        units: Iterable[str] | None,
        directory: str | os.PathLike | None,
        slots: int,
        memory_budget: MemoryBudget = None,
        write_every: int = 1,
        choose_slices: Callable[[Sequence[Unit]], Slicing | None] = lambda units: None,
    ) -> None:
        """`choose_slices` says who shares those of all units that stream in slices; None: they are whole here. The
        rest is as for `distzo2.offload`."""
        self.device, self.where = device, weights
        self.params: list[ParamInfo] = collect_params(model)
        if not self.params:
            raise DistZO2Error(f"{type(model).__name__} has no parameters: there is nothing to stream")
        self.units: list[Unit] = find_units(model, self.params, units)
        sharing = choose_slices(self.units)
        streams = weights == "disk" or (weights == "host" and (device.type != "cpu" or sharing is not None))
        self._exchange = sharing.node.exchange if sharing is not None else None  # of what must be done by all ranks
        self.epoch = 0  # how often the weights were replaced from outside
        self._updates = Updates()
        self._memory: MemoryStore | None = None
        self._ring: StreamingStore | SlicedStore | None = None
        with self._all_ranks("handing over a model") as agreed:
            share = memory_share(joined())
            if streams:
                keep_blocks(self.units, device, memory_budget, slots, lambda: self._least(free_memory(device, share)))
            streamed = [u for u in self.units if streams and not u.resident and not u.kept]
            on_ring = {u.index for u in streamed}
            agreed["the blocks that stream (memory_budget=)"] = [u.name for u in streamed]
            self._memory = MemoryStore([u for u in self.units if u.index not in on_ring], device, share)
            if streamed and sharing is not None:
                self._ring = SlicedStore(
                    streamed,
                    device,
                    directory=directory,
                    slots=slots,
                    node=sharing.node,
                    shares=sharing.shares,
                    number=sharing.number,
                    share=share,
                    update=self._update_slice,
                    stamp=lambda: (self.epoch << 32) + self.version,
                    on_gathered=lambda unit, begun, ended: self.trace.add("gather", unit.name, begun, ended),
                )
            elif streamed:
                self._ring = StreamingStore(streamed, device, directory=directory, slots=slots, share=share)
        self._write_every = write_every
        self._scratch = Scratch([u for u in self.units if u.trainable], device)
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}

        self._owner: weakref.ref | None = None
        self._present: dict[int, Present] = {}
        self._next = {u.index: streamed[(i + 1) % len(streamed)] for i, u in enumerate(streamed)}  # as seen last
        self._last_streamed: Unit | None = None
        self._last_of_pass: Unit | None = streamed[-1] if streamed else None  # as seen last
        self._busy = False  # a window is open, or a pass under way
        self._closed = False
        # Called with each unit that is let go of and its clean weights at `unit.version`, not to be changed or kept.
        self.tap: Callable[[Unit, torch.Tensor], None] | None = None
        self.trace = Trace()
        self.reset_stats()

    def _least(self, num_bytes: int) -> int:
        """With slices, the least of all ranks'."""
        if self._exchange is None:
            return num_bytes
        return min(row[0] for row in self._exchange.agree("memory_budget", numbers=(num_bytes,)))

    @contextmanager
    def _all_ranks(self, what: str) -> Iterator[dict[str, Any]]:
        """With slices, what all ranks do together: an exception of one rank is an error of all at the end, and so are
        entries that differ in the dict that is given."""
        agreed: dict[str, Any] = {}
        if self._exchange is None:
            yield agreed
            return
        failure: BaseException | None = None
        since = self._exchange.number
        try:
            yield agreed
        except BaseException as error:
            failure = error
            if is_known(error, since) or self._exchange.broken:
                raise
        self._exchange.agree(what, {} if failure is not None else agreed, error=failure)

    # ---- what the optimizer tells -----------------------------------------------------------------------------

    def bind(self, owner: object, group_of: dict[int, int], num_groups: int, seed: int) -> None:
        """Sets which parameter belongs to which group, and the run's seed; updates made before are applied first.

        `owner` is the optimizer that makes updates from now on.
        """
        self.flush()
        self._owner = weakref.ref(owner)
        self._updates.bind(group_of, num_groups, seed)
        self._scratch.forget()

    @property
    def version(self) -> int:
        """Updates made so far."""
        return self._updates.version

    @property
    def seed(self) -> int:
        """Of the run."""
        return self._updates.seed

    @property
    def owner(self) -> object | None:
        """Who called `bind` last; None if it is gone."""
        return self._owner() if self._owner is not None else None

    @property
    def replaced(self) -> bool:
        """Whether the weights are no longer those that the model was handed over with."""
        return self.epoch > 0 or self.version > 0

    def set_perturb_scales(self, scales: Sequence[float]) -> None:
        """One factor on eps for each group, for the perturbations to come."""
        self._updates.set_perturb_scales(scales)

    def push(self, updates: Iterable[Update]) -> None:
        """Adds updates; each unit applies them at its next visit."""
        self._updates.push(updates)

    @property
    def pending(self) -> list[Update]:
        """The updates that some stored copy has not got yet, oldest first."""
        stored = (self._stored_version(u) for u in self.units if self._updates.table(u) is not None)
        return self._updates.missed_at(min(stored, default=self.version))

    def _stored_version(self, unit: Unit) -> int:
        """How many updates the stored copy holds; of a sliced unit, this rank's slice."""
        part = self._slice_of(unit)
        return unit.version if part is None else part.version

    def _slice_of(self, unit: Unit) -> Slice | None:
        return self._ring.parts[unit.index] if isinstance(self._ring, SlicedStore) and unit.block >= 0 else None

    def trim(self) -> None:
        """Forgets the updates that every stored copy holds."""
        self._updates.forget_but(len(self.pending))

    def set_durable(self, version: int) -> None:
        """Write-ahead rule: journal lines before `version` are on disk, so stored copies up to it may be."""
        if self._ring is not None:
            self._ring.set_durable(version)

    def fail(self, error: BaseException) -> None:
        """The journal cannot be written, so stored copies may not be either: whatever waits for that ends."""
        if self._ring is not None:
            self._ring.fail(str(error))

    # ---- making a unit present ----------------------------------------------------------------------------------

    def _store(self, unit: Unit) -> MemoryStore | StreamingStore | SlicedStore:
        return self._memory if unit.block < 0 else self._ring

    def _bring(self, unit: Unit) -> None:
        if unit.index in self._present:
            return
        start = time.perf_counter_ns()
        buffer = self._store(unit).acquire(unit)
        if unit.block >= 0:
            end = time.perf_counter_ns()
            self._wait_ns += end - start
            self.trace.add("wait", unit.name, start, end)
            if self._slice_of(unit) is not None:
                unit.version = self.version
        self._present[unit.index] = Present(unit, buffer, self._views_of(unit, buffer))
        if unit.block >= 0:
            if self._last_streamed is not None:
                self._next[self._last_streamed.index] = unit
            self._last_streamed = unit
            self._prefetch_after(unit)

    def _prefetch_after(self, unit: Unit) -> None:
        """Starts to bring the units that followed this one last time, across the end of the step too."""
        following: list[Unit] = []
        num_current, ended = 0, False
        for _ in range(2 * (self._ring.num_slots - 1)):
            ended |= unit is self._last_of_pass
            unit = self._next[unit.index]
            following.append(unit)
            num_current += not ended
        self._ring.expect(following, num_current)

    def _release(self, unit: Unit) -> None:
        present = self._present.pop(unit.index)
        if self.tap is not None:
            self.tap(unit, present.buffer)
        self._store(unit).release(unit, present.dirty)

    def _views_of(self, unit: Unit, buffer: torch.Tensor) -> list[torch.Tensor]:
        key = (unit.index, buffer.data_ptr())
        if key not in self._views:
            self._views[key] = unit.views(buffer)
        return self._views[key]

    def _views_under(
        self, unit: Unit, emission: Emission, emissions: Sequence[Emission], pinned: Collection[int]
    ) -> tuple[list[torch.Tensor], int]:
        """A present unit's parameters as `emission` has them, with every update made so far.

        Args:
            unit: must be present.
            emission: what to perturb by.
            emissions: all of the pass; the mirror image of `emission` is made in the same call.
            pinned: addresses of scratch buffers that must stay as they are.

        Returns:
            The parameters, in the order of `unit.params`, and the address of the scratch buffer used (0: none).
        """
        present = self._present[unit.index]
        if self._updates.table(unit) is None or (emission.clean and not self._elides(unit)):
            self._materialize(present, (), ())
            return present.views, 0
        buffer = self._scratch.find(unit, self._key(emission))
        if buffer is None:
            mirrored = [e for e in emissions if e.mirrors(emission) and e != emission]
            wanted = [emission, *(e for e in mirrored if self._scratch.find(unit, self._key(e)) is None)]
            try:
                outs = self._scratch.take(unit, [self._key(e) for e in wanted], pinned)
                self._materialize(present, wanted, outs)
            except BaseException:
                self._scratch.forget()
                raise
            buffer = outs[0]
        views = self._views_of(unit, buffer)
        mixed = [views[i] if p.index in self._updates.group_of else present.views[i] for i, p in enumerate(unit.params)]
        return mixed, buffer.data_ptr()

    def _key(self, emission: Emission) -> tuple:
        return self.version, emission.terms, self._updates.perturb_scales

    def _elides(self, unit: Unit | Slice) -> bool:
        """Whether the stored copy stays behind at this visit: it is written at every `write_every`-th update, units in
        turn. Perturbed copies are then made of it and the updates that it has missed, the clean one included.
        """
        return unit.block >= 0 and unit.version < self.version and (self.version + unit.block) % self._write_every != 0

    def _materialize(self, present: Present, emissions: Sequence[Emission], outs: Sequence[torch.Tensor]) -> None:
        unit, table = present.unit, self._updates.table(present.unit)
        missed = self._updates.missed_at(unit.version)
        write_back = bool(missed) and not (emissions and self._elides(unit))
        if table is not None and (missed or emissions):
            program = self._updates.program(unit.version, tuple(emissions))
            outs = [out[: unit.num_bytes] for out in outs]
            self._timed_materialize(unit, present.buffer, table, program, outs, write_back=write_back)
            present.dirty |= write_back
        if write_back or not missed or table is None:
            unit.version = self.version

    def _timed_materialize(
        self,
        unit: Unit,
        buffer: torch.Tensor,
        table: SegmentTable,
        program: Program,
        outs: Sequence[torch.Tensor],
        *,
        write_back: bool,
    ) -> None:
        start = time.perf_counter_ns()
        materialize(buffer, table, seed=self.seed, program=program, outs=outs, write_back=write_back)
        end = time.perf_counter_ns()
        self._noise_ns += end - start
        self.trace.add("materialize", unit.name, start, end)

    def _update_slice(self, part: Slice, stored: torch.Tensor, out: torch.Tensor) -> bool:
        """Writes a slice with every update made so far to `out`, and to `stored` too unless that copy stays behind.
        Returns whether `stored` was changed."""
        (table, is_whole), missed = self._updates.slice_table(part), self._updates.missed_at(part.version)
        if table is None or not missed or not is_whole:
            out.copy_(stored)
        if table is None or not missed:
            part.version = self.version
            return False
        write_back = not self._elides(part)
        self._timed_materialize(
            part.unit, stored, table, self._updates.program(part.version, (Emission(),)), [out], write_back=write_back
        )
        if write_back:
            part.version = self.version
        return write_back

    def _catch_up_slice(self, part: Slice, stored: torch.Tensor) -> bool:
        """The same in place."""
        (table, _), missed = self._updates.slice_table(part), self._updates.missed_at(part.version)
        if table is not None and missed:
            self._timed_materialize(
                part.unit, stored, table, self._updates.program(part.version, ()), [], write_back=True
            )
        part.version = self.version
        return table is not None and bool(missed)

    def flush(self) -> None:
        """Brings every stored copy to the current version, and waits until it is where the weights live."""
        self._check_idle("flush")
        for unit in self.units:
            self._catch_up(unit)
        if self._ring is not None:
            self._ring.flush()
        self._updates.forget_but(0)

    def _catch_up(self, unit: Unit) -> None:
        part = self._slice_of(unit)
        if part is not None:
            if part.version < self.version:
                self._ring.catch_up(unit, self._catch_up_slice)
        elif unit.version < self.version and self._updates.table(unit) is not None:
            self._bring(unit)
            self._materialize(self._present[unit.index], (), ())
            self._release(unit)
        unit.version = self.version

    # ---- figures ----------------------------------------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Starts the counting of bytes and seconds anew."""
        self._compute_ns = self._noise_ns = self._wait_ns = 0
        if self._ring is not None:
            self._ring.reset_stats()

    def stats(self) -> dict[str, int | float]:
        """Bytes and seconds since `reset_stats`, and bytes allocated. On CUDA, seconds are the host's."""
        return {
            **(self._ring.stats() if self._ring else {}),
            "compute_s": self._compute_ns * 1e-9,
            "noise_s": self._noise_ns * 1e-9,
            "exposed_wait_s": self._wait_ns * 1e-9,
            "resident_bytes": sum(u.num_bytes for u in self.units if u.block < 0),
            "streamed_bytes": sum(u.num_bytes for u in self.units if u.block >= 0),
            "slot_bytes": self._ring.slot_bytes * self._ring.num_slots if self._ring else 0,
            "scratch_bytes": self._scratch.num_bytes,
        }

    def enable_trace(self, enable: bool = True) -> None:
        """Records every transfer, wait, materialize and lane's run from now on."""
        self.trace.enable(enable)
        if self._ring is not None:
            self._ring.trace(enable)

    def save_trace(self, path: str | os.PathLike) -> None:
        """Writes what was recorded as a Chrome trace (JSON; opens in Perfetto)."""
        names = {u.block: u.name for u in self.units if u.block >= 0}
        transfers = []
        for kind, *rest in self._ring.events() if self._ring is not None else ():
            if kind != "wait":
                transfers.append((kind, *rest))
            elif self.device.type != "cpu":  # of the device; on a CPU `_bring` has recorded the same waits
                transfers.append(("stall", *rest))
        self.trace.save(path, transfers, names)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _check_idle(self, what: str) -> None:
        if self._closed:
            raise DistZO2Error(f"{what}: this model's streaming runtime was closed")
        if self._busy:
            raise DistZO2Error(f"{what}: not possible in the middle of a pass over this model")

    def close(self) -> None:
        """Ends transfers and deletes the working block file."""
        self._closed = True
        self._views.clear()
        self._present.clear()
        if self._ring is not None:
            self._ring.close()
        self._memory.close()
