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
from distzo2.exchange import is_known
from distzo2.lanes import Emission
from distzo2.memory_share import memory_share
from distzo2.replicas import checksum
from distzo2.residency import MemoryBudget, free_memory, keep_blocks
from distzo2.scratch import Scratch
from distzo2.slice_choice import Sharing
from distzo2.sliced_store import Slice, SlicedStore
from distzo2.store import MemoryStore, StreamingStore
from distzo2.trace import Trace
from distzo2.units import ParamInfo, Unit, collect_params, find_units
from distzo2_core import Emit, Program, Segment, SegmentTable, Update, encode_program, materialize

MAX_PROGRAMS = 64  # encoded visits that are kept within a step


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
        choose_slices: Callable[[Sequence[Unit]], Sharing | None] = lambda units: None,
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
        self.version = 0  # updates made so far
        self._memory: MemoryStore | None = None
        self._ring: StreamingStore | SlicedStore | None = None
        with self._all_ranks("handing over a model") as agreed:
            share = memory_share()
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

        self._updates: list[Update] = []  # the last of them; the first one's number is version - len(_updates)
        self.seed = 0
        self._owner: weakref.ref | None = None
        self._group_of: dict[int, int] = {}  # parameter index -> group; absent: read, never changed
        self._perturb_scales: tuple[float, ...] = ()
        self._tables: dict[int, SegmentTable | None] = {}
        self._slice_tables: dict[int, tuple[SegmentTable | None, bool]] = {}
        self._programs: dict[tuple, Program] = {}

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
        self.seed, self._group_of = seed, dict(group_of)
        self._perturb_scales = (1.0,) * num_groups
        self._tables.clear()
        self._slice_tables.clear()
        self._programs.clear()
        self._scratch.forget()

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
        if self._perturb_scales != tuple(scales):
            self._perturb_scales = tuple(scales)
            self._programs.clear()

    def push(self, updates: Iterable[Update]) -> None:
        """Adds updates; each unit applies them at its next visit."""
        for update in updates:
            self._updates.append(update)
            self.version += 1
        self._programs.clear()

    @property
    def pending(self) -> list[Update]:
        """The updates that some stored copy has not got yet, oldest first."""
        stored = (self._stored_version(u) for u in self.units if self._table(u) is not None)
        return self._missed(min(stored, default=self.version))

    def _stored_version(self, unit: Unit) -> int:
        """How many updates the stored copy holds; of a sliced unit, this rank's slice."""
        part = self._slice_of(unit)
        return unit.version if part is None else part.version

    def _slice_of(self, unit: Unit) -> Slice | None:
        return self._ring.parts[unit.index] if isinstance(self._ring, SlicedStore) and unit.block >= 0 else None

    def trim(self) -> None:
        """Forgets the updates that every stored copy holds."""
        self._updates = self.pending

    def _missed(self, version: int) -> list[Update]:
        return self._updates[len(self._updates) - (self.version - version) :] if version < self.version else []

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
        if self._table(unit) is None or (emission.clean and not self._elides(unit)):
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
        mixed = [views[i] if p.index in self._group_of else present.views[i] for i, p in enumerate(unit.params)]
        return mixed, buffer.data_ptr()

    def _key(self, emission: Emission) -> tuple:
        return self.version, emission.terms, self._perturb_scales

    def _elides(self, unit: Unit | Slice) -> bool:
        """Whether the stored copy stays behind at this visit: it is written at every `write_every`-th update, units in
        turn. Perturbed copies are then made of it and the updates that it has missed, the clean one included.
        """
        return unit.block >= 0 and unit.version < self.version and (self.version + unit.block) % self._write_every != 0

    def _materialize(self, present: Present, emissions: Sequence[Emission], outs: Sequence[torch.Tensor]) -> None:
        unit, table = present.unit, self._table(present.unit)
        missed = self._missed(unit.version)
        write_back = bool(missed) and not (emissions and self._elides(unit))
        if table is not None and (missed or emissions):
            program = self._program(unit.version, tuple(emissions))
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
        (table, is_whole), missed = self._slice_table(part), self._missed(part.version)
        if table is None or not missed or not is_whole:
            out.copy_(stored)
        if table is None or not missed:
            part.version = self.version
            return False
        write_back = not self._elides(part)
        self._timed_materialize(
            part.unit, stored, table, self._program(part.version, (Emission(),)), [out], write_back=write_back
        )
        if write_back:
            part.version = self.version
        return write_back

    def _catch_up_slice(self, part: Slice, stored: torch.Tensor) -> bool:
        """The same in place."""
        (table, _), missed = self._slice_table(part), self._missed(part.version)
        if table is not None and missed:
            self._timed_materialize(part.unit, stored, table, self._program(part.version, ()), [], write_back=True)
        part.version = self.version
        return table is not None and bool(missed)

    def _slice_table(self, part: Slice) -> tuple[SegmentTable | None, bool]:
        """As `_table`, of the part of the unit that is in the slice; and whether nothing else is in it."""
        if part.index not in self._slice_tables:
            segments, is_whole = [], True
            for p in part.unit.params:
                begin = max(p.byte_offset, part.begin)
                end = min(p.byte_offset + p.num_bytes, part.begin + part.num_bytes)
                if begin >= end:
                    continue
                group = self._group_of.get(p.index)
                is_whole &= group is not None
                if group is not None:
                    numel, first = (end - begin) // p.dtype.itemsize, (begin - p.byte_offset) // p.dtype.itemsize
                    segments.append(Segment(begin - part.begin, numel, p.dtype, p.index, first, group, *p.matrix_shape))
            self._slice_tables[part.index] = SegmentTable(segments) if segments else None, is_whole
        return self._slice_tables[part.index]

    def _program(self, version: int, emissions: tuple[Emission, ...]) -> Program:
        """What a visit of a unit at `version` does, encoded once for all units."""
        key = version, self.version, emissions
        if key not in self._programs:
            if len(self._programs) >= MAX_PROGRAMS:
                self._programs.clear()
            emits = [Emit(e.terms, self._perturb_scales) for e in emissions]
            self._programs[key] = encode_program(self._missed(version), emits, len(self._perturb_scales))
        return self._programs[key]

    def _table(self, unit: Unit) -> SegmentTable | None:
        """The segments of the unit that updates and perturbations reach; None if there are none."""
        if unit.index not in self._tables:
            segments = [
                Segment(p.byte_offset, p.numel, p.dtype, p.index, 0, self._group_of[p.index], *p.matrix_shape)
                for p in unit.params
                if p.index in self._group_of and p.numel
            ]
            self._tables[unit.index] = SegmentTable(segments) if segments else None
        return self._tables[unit.index]

    # ---- reading and writing from outside -------------------------------------------------------------------------

    def flush(self) -> None:
        """Brings every stored copy to the current version, and waits until it is where the weights live."""
        self._check_idle("flush")
        for unit in self.units:
            self._catch_up(unit)
        if self._ring is not None:
            self._ring.flush()
        self._updates.clear()

    def _catch_up(self, unit: Unit) -> None:
        part = self._slice_of(unit)
        if part is not None:
            if part.version < self.version:
                self._ring.catch_up(unit, self._catch_up_slice)
        elif unit.version < self.version and self._table(unit) is not None:
            self._bring(unit)
            self._materialize(self._present[unit.index], (), ())
            self._release(unit)
        unit.version = self.version

    def trained_units(self) -> list[Unit]:
        """The units that updates reach."""
        return [unit for unit in self.units if self._table(unit) is not None]

    def touch(self, unit: Unit) -> None:
        """Brings one unit up to date and lets go of it, as a pass that enters it does."""
        self._check_idle("reading weights")
        self._bring(unit)
        try:
            self._materialize(self._present[unit.index], (), ())
        finally:
            self._release(unit)

    def set_version(self, unit: Unit, version: int) -> None:
        """What was written last, with `writing`, holds so many updates; those after it are still to come."""
        unit.version = version
        if (part := self._slice_of(unit)) is not None:
            part.version = version

    def visit(self) -> Iterator[tuple[Unit, list[torch.Tensor]]]:
        """Every unit in turn with its parameters on the compute device, every update made so far in them. Each is read
        once, and written back if it had missed any."""
        self._check_idle("visiting the weights")
        for unit in self.units:
            self._bring(unit)
            try:
                present = self._present[unit.index]
                self._materialize(present, (), ())
                yield unit, present.views
            finally:
                self._release(unit)

    @contextmanager
    def reading(self, unit: Unit) -> Iterator[dict[str, torch.Tensor]]:
        """The unit's parameters in host memory, by name, with every update made so far. They must not be changed."""
        self._check_idle("reading weights")
        if self._slice_of(unit) is None:
            self._catch_up(unit)
            opened = self._store(unit).open(unit, write=False)
        else:  # whoever reads one unit is likely to read the next ones
            following = [u for u in self.units[unit.index + 1 :] if u.block >= 0]
            opened = self._ring.open(unit, write=False, following=following)
        with opened as buffer:
            yield {p.name: view for p, view in zip(unit.params, unit.views(buffer), strict=True)}

    @contextmanager
    def replacing(
        self, what: str, *, error: BaseException | None = None, source: Callable[[], Any] | None = None
    ) -> Iterator[Callable[[str, Sequence[torch.Tensor]], None]]:
        """Around all that replaces weights from outside. With slices all ranks enter and leave it together, so that
        none gathers a block that is half replaced, and what they write must be the same, since later a difference could
        not be seen.

        Args:
            what: the name of it, in words.
            error: this rank cannot enter; no rank does then.
            source: what it returns must be the same, where each rank writes its slices only.

        Yields:
            A function to be called with the name and the tensors of what is written; they are compared.
        """
        if self._exchange is None:
            if error is not None:
                raise error
            yield lambda name, tensors: None
            return
        fields: dict[str, Any] = {}
        try:
            if source is not None and error is None:
                fields["the source"] = source()
        except Exception as not_readable:
            error = not_readable
        self._exchange.agree(what, {} if error is not None else fields, error=error)
        written: list[tuple[str, int]] = []
        with self._all_ranks(f"{what}: the end") as agreed:
            yield lambda name, tensors: written.append((name, checksum([t.contiguous() for t in tensors])))
            agreed["the weights"] = written
        if self._ring is not None:
            self._ring.forget()

    @contextmanager
    def writing(self, unit: Unit, keep: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """The unit's parameters in host memory, by name, to be filled; they become the stored copy at the end.

        All of them must be filled; with `keep`, they hold their up-to-date values at first (of a unit in slices, those
        of this rank's slice).
        """
        self._check_idle("writing weights")
        if keep:
            self._catch_up(unit)
        unit.version = self.version
        self._scratch.forget()
        with self._store(unit).open(unit, write=True, keep=keep) as buffer:
            yield {p.name: view for p, view in zip(unit.params, unit.views(buffer), strict=True)}

    def kept_elements(self, unit: Unit) -> dict[str, range]:
        """Which elements of each parameter `writing` keeps on this rank: all, unless the unit is in slices."""
        part, result = self._slice_of(unit), {}
        for p in unit.params:
            result[p.name] = range(p.numel)
            if part is not None:
                begin, end = part.begin - p.byte_offset, part.begin + part.num_bytes - p.byte_offset
                item = p.dtype.itemsize
                result[p.name] = range(min(max(begin, 0), p.num_bytes) // item, min(max(end, 0), p.num_bytes) // item)
        return result

    def fills_in_place(self, unit: Unit) -> bool:
        """Whether `writing` a unit is writing its stored copy, so that several may be open at no cost in memory."""
        return self._store(unit).in_host_memory

    def rebase(self) -> None:
        """The weights were replaced from outside: the updates of before no longer lead to them."""
        self.flush()
        self.version = 0
        for unit in self.units:
            unit.version = 0
            if (part := self._slice_of(unit)) is not None:
                part.version = 0
        if self._ring is not None:
            self._ring.forget()
        self._scratch.forget()
        self._programs.clear()
        self.epoch += 1

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
