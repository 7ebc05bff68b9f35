"""The weights of a model in units: which are present, which updates they hold, and perturbed copies of them.

A unit that is made present catches up: the updates that its stored copy has missed are applied in the same pass over
memory that makes the perturbed copies. Everything acts on the current stream of the compute device.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from distzo2.errors import DistZO2Error
from distzo2.interrupts import DeferredInterrupt
from distzo2.text import dtype_name
from distzo2.weights.scratch import Scratch
from distzo2.weights.store import Store, StoredCopy
from distzo2.weights.timeline import Timeline
from distzo2.weights.units import TRAINABLE_DTYPES, ParamInfo, Unit
from distzo2.weights.updates import CLEAN, Emission, Updates
from distzo2_core import GroupScalars, SegmentTable, Update, decode, materialize
from distzo2_core.ops import materialize_again

CLEAN_KEY = ()  # of a copy that no update and no perturbation changes
MAX_VISITED = 4096  # combinations of a unit and buffers that are remembered


@dataclass(eq=False)
class Present:
    """A unit whose weights are on the compute device now."""

    copy: StoredCopy  # what the buffer holds: the stored copy, or one that was gathered from slices
    buffer: torch.Tensor  # uint8 [unit.num_bytes]
    views: list[torch.Tensor]  # the parameters, over the buffer
    dirty: bool = False  # newer than what is stored


class _Reach(NamedTuple):
    """Which parameters of a unit differ from lane to lane, or from what is stored."""

    is_updated: bool  # updates and perturbations reach one of them
    copied: list[bool]  # by parameter: a copy for modules holds it; the others are shown as they are stored
    is_whole: bool  # a copy holds all of them


class UnitWeights:
    """The units of one model, where each is stored, and the updates that stored copies have missed."""

    def __init__(
        self,
        units: Sequence[Unit],
        copies: Sequence[StoredCopy],
        memory: Store,
        ring: Store,
        *,
        device: torch.device,
        write_every: int = 1,
        host_memory: int | None = None,
    ) -> None:
        """
        Args:
            units: of the model, in the order of their use.
            copies: what is stored of each unit.
            memory: the store of the copies that do not stream.
            ring: the store of those that do.
            device: where it computes.
            write_every: each streamed copy is written at every `write_every`-th update, blocks in turn.
            host_memory: of `MemoryShare`, for pools that are made later.
        """
        self.units, self.copies, self.device, self.host_memory = list(units), list(copies), device, host_memory
        self.params = sorted((p for unit in units for p in unit.params), key=lambda p: p.index)
        self.epoch = 0  # how often the weights were replaced from outside
        self.busy = False  # a window is open, or a pass under way
        self.repeats = False  # another pass over the units is likely to follow before the next update
        self.closed = False
        # Called with each unit that is released, its clean bytes and their version; they must not be changed or kept.
        # Returns the stream on which it still reads them, behind the current one; None if it does not.
        self.tap: Callable[[Unit, torch.Tensor, int], Any] | None = None
        self.before_check: Callable[[], None] = lambda: None  # called before it is decided whether the weights are idle
        self.trace = Timeline()
        self.updates = Updates()
        self._unused: tuple[Sequence[Sequence[int]], frozenset[int]] = (), frozenset()  # of the last push: its units
        self.memory, self.ring, self._write_every = memory, ring, write_every
        self._scratch = Scratch([u for u in units if u.trainable or u.converts], device)
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._owner: weakref.ref | None = None
        self._present: dict[int, Present] = {}
        # Buffers, by unit and addresses, that `materialize` has checked: those that it wrote to.
        self._visited: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._reach: dict[int, _Reach] = {}  # by unit
        self._decoded: set[int] = set()  # units whose packed weights are known to be finite
        self._unanchored: dict[int | None, ParamInfo] = {}  # by group, a parameter whose start is not kept
        streamed = [c.unit for c in copies if c.streams]
        self._next = {u.index: streamed[(i + 1) % len(streamed)] for i, u in enumerate(streamed)}  # as seen last
        self._last_streamed: Unit | None = None
        self._last_of_pass: Unit | None = streamed[-1] if streamed else None

    # ---- updates ----------------------------------------------------------------------------------------------------

    def bind(self, owner: object, group_of: Mapping[int, int], num_groups: int, seed: int) -> None:
        """Makes `owner` the optimizer whose updates follow, as in `Updates.bind`. Earlier updates are applied first."""
        self.flush()
        self._assume_current()
        if self.version and self.owner is not owner:  # its run starts here
            self._take_starts()
        self._owner = weakref.ref(owner)
        self.updates.bind(group_of, num_groups, seed)
        unanchored = (p for u in self.units for p in u.params if not (u.keeps_start and p.has_start))
        self._unanchored = {self.updates.group_of.get(p.index): p for p in unanchored}
        self._forget_caches()
        self._unused = (), frozenset()
        self._scratch.forget()

    @property
    def owner(self) -> object | None:
        """Who called `bind` last; None if it is gone."""
        return self._owner() if self._owner is not None else None

    @property
    def version(self) -> int:
        """Number of updates made so far."""
        return self.updates.version

    @property
    def stamp(self) -> int:
        """A number that changes with every update and every replacement from outside."""
        return (self.epoch << 32) + self.version

    @property
    def replaced(self) -> bool:
        """Whether the weights are no longer those that the model was handed over with."""
        return self.stamp > 0

    def stamp_of(self, unit: Unit) -> int:
        """`stamp`, as far as it concerns a unit: updates never reach what is frozen."""
        return self.stamp if unit.trainable else self.epoch << 32

    def left_out(self, entered: Collection[int]) -> list[Unit]:
        """Returns the units that updates reach whose index is not in `entered`."""
        if len(entered) == len(self.units):
            return []
        return [u for u in self.units if u.index not in entered and self._reach_of(u).is_updated]

    def push(self, update: Update, unused: Sequence[Sequence[int]]) -> None:
        """Adds an update, which leaves parameters of the ranges `unused` as they are.

        Raises:
            DistZO2Error: they are a part of what the update reaches in a unit; or as `check_anchors`.
        """
        self.check_anchors(update.groups)
        if unused != self._unused[0]:
            self._unused = unused, self._units_of(update.step, unused)
        self.updates.push(update, self._unused[1])

    def check_anchors(self, groups: Sequence[GroupScalars]) -> None:
        """
        Raises:
            DistZO2Error: a group has an anchor, and a parameter in it no start that is kept.
        """
        for number, group in enumerate(groups):
            if group.anchor and (param := self._unanchored.get(number)) is not None:
                why = f"{param.name} is {'of gains' if param.is_gain else 'stored as codes'}, which no anchor pulls"
                if param.has_start:
                    why = "hand the model over with keep_start=True, which keeps a copy of the weights at the start"
                raise DistZO2Error(f"anchor of parameter group {number} is {group.anchor:g}: {why}")

    def _units_of(self, step: int, unused: Sequence[Sequence[int]]) -> frozenset[int]:
        indices = {index for first, last in unused for index in range(first, last + 1)}
        excluded = []
        for unit in self.units if indices else ():
            reached = {p.index: p.name for p in unit.params if p.index in self.updates.group_of}
            used = [name for index, name in reached.items() if index not in indices]
            if used and len(used) < len(reached):
                unused_name = next(name for index, name in reached.items() if index in indices)
                raise DistZO2Error(
                    f"step {step} of the journal used {used[0]} and not {unused_name}, and both are in unit "
                    f"{unit.name!r} now: cut the model into the units that the run had (units=)"
                )
            if reached and not used:
                excluded.append(unit.index)
        return frozenset(excluded)

    def trim(self) -> None:
        """Forgets the updates that every stored copy holds."""
        for copy in self.copies if self.updates.excluded else ():
            self.updates.pass_excluded(copy)
        versions = (c.version for c in self.copies if self.updates.table(c) is not None)
        self.updates.drop_before(min(versions, default=self.version))

    def set_durable(self, version: int) -> None:
        """Write-ahead rule: lets copies up to `version` reach a disk, since the journal's lines before it are there."""
        self.ring.set_durable(version)

    def fail(self, error: BaseException) -> None:
        """Forbids to store copies, since the journal cannot be written: whatever waits for that ends with an error."""
        self.ring.fail(str(error))

    # ---- presence ---------------------------------------------------------------------------------------------------

    def store_of(self, copy: StoredCopy) -> Store:
        """Returns the store that holds a copy."""
        return self.ring if copy.streams else self.memory

    def bring(self, unit: Unit) -> Present:
        """Makes a unit present until it is released, as its stored copy is; updates are yet to be applied."""
        if unit.index in self._present:
            return self._present[unit.index]
        copy = self.copies[unit.index]
        with self.trace.timing("wait", unit.name) if copy.streams else nullcontext():
            buffer = self.store_of(copy).acquire(copy)
        present = self._present[unit.index] = Present(self._held_copy(unit), buffer, self._views_of(unit, buffer))
        if copy.streams:
            if self._last_streamed is not None:
                self._next[self._last_streamed.index] = unit
            self._last_streamed = unit
            self._prefetch_after(unit)
        return present

    def _held_copy(self, unit: Unit) -> StoredCopy:
        """What the unit's buffer holds when it is present."""
        copy = self.copies[unit.index]
        if not self.store_of(copy).gathers:
            return copy
        return StoredCopy(unit, 0, unit.num_bytes, self.version, is_gathered=True)

    def _prefetch_after(self, unit: Unit) -> None:
        """Starts to bring the units that followed this one last time, across the end of the step too."""
        following: list[StoredCopy] = []
        num_current, ended = 0, False
        for _ in range(2 * (self.ring.num_slots - 1)):
            ended |= unit is self._last_of_pass
            unit = self._next[unit.index]
            following.append(self.copies[unit.index])
            num_current += self.repeats or not ended
        self.ring.expect(following, num_current)

    def end_pass(self) -> None:
        """The unit that streamed last was the last of its pass."""
        self._last_of_pass = self._last_streamed

    def release(self, unit: Unit) -> None:
        """Lets go of a unit; if it is dirty it starts on its way back."""
        present, copy = self._present.pop(unit.index), self.copies[unit.index]
        reader = self.tap(unit, present.buffer, present.copy.version) if self.tap is not None else None
        self.store_of(copy).release(copy, present.dirty, reader)

    def release_all_but(self, held: Collection[int] = ()) -> None:
        """Releases what is present, except the units whose index is in `held`."""
        for index in [i for i in self._present if i not in held]:
            self.release(self.units[index])

    def _views_of(self, unit: Unit, buffer: torch.Tensor, for_modules: bool = False) -> list[torch.Tensor]:
        """The parameters over a buffer of what is stored, or, `for_modules`, of scratch."""
        key = (unit.index, buffer.data_ptr())
        if key not in self._views:
            self._views[key] = unit.seen_views(buffer) if for_modules else unit.views(buffer)
        return self._views[key]

    # ---- catching up, and perturbed copies --------------------------------------------------------------------------

    def up_to_date(self, unit: Unit) -> list[torch.Tensor]:
        """Returns the parameters of a unit, which is made present, with every update made so far."""
        present = self.bring(unit)
        present.dirty |= self._catch_up(present.copy, present.buffer)
        return present.views

    def under(
        self, unit: Unit, emission: Emission, emissions: Sequence[Emission], pinned: Collection[int]
    ) -> tuple[list[torch.Tensor], int]:
        """Returns a unit's parameters as `emission` has them, with every update made so far.

        Args:
            unit: present, or released early.
            emission: what to perturb by.
            emissions: all of the pass; the mirror image of `emission` is made in the same call.
            pinned: addresses of scratch buffers that must stay as they are.

        Returns:
            The parameters, in the order of `unit.params`, and the address of the scratch buffer used (0: none).
        """
        present = self._present.get(unit.index)
        copy = self._held_copy(unit) if present is None else present.copy
        if not unit.converts and (self._is_stored(copy, emission) or self.updates.table(copy) is None):
            return self.up_to_date(unit), 0
        key = self._key(unit, emission)
        buffer = self._scratch.find(unit, key)
        if buffer is None:
            gains = None
            if unit.has_gains:  # one at a time: what is decoded is large, and read once
                gains = self._gains_under(unit.beside, emission, emissions, pinned)
                emission, emissions, pinned = CLEAN, (), {*pinned, gains.data_ptr()}
            present = self.bring(unit)
            wanted = {key: emission if key is not CLEAN_KEY else CLEAN}
            for other in emissions:
                if other.mirrors(emission) and self._scratch.find(unit, self._key(unit, other)) is None:
                    wanted.setdefault(self._key(unit, other), other)
            try:
                outs = self._scratch.take(unit, list(wanted), pinned)
                present.dirty |= self._catch_up(
                    present.copy, present.buffer, list(wanted.values()), outs, unit.converts, gains
                )
            except BaseException:
                self._scratch.forget()
                raise
            buffer = outs[0]
        views = self._views_of(unit, buffer, for_modules=True)
        reach = self._reach_of(unit)
        if not reach.is_whole:
            stored = self.bring(unit).views
            views = [views[i] if copied else stored[i] for i, copied in enumerate(reach.copied)]
        return views, buffer.data_ptr()

    def _gains_under(
        self, unit: Unit, emission: Emission, emissions: Sequence[Emission], pinned: Collection[int]
    ) -> torch.Tensor:
        """The copy of a unit with gains that `under` makes. It is present afterwards if it was before."""
        was_present = unit.index in self._present
        self.under(unit, emission, emissions, pinned)
        if not was_present and unit.index in self._present:
            self.release(unit)
        return self._scratch.find(unit, self._key(unit, emission))

    def _is_stored(self, copy: StoredCopy, emission: Emission) -> bool:
        """Whether what `emission` asks for is what is stored, once the copy has caught up."""
        return emission.clean and not self._leaves_behind(copy)

    def _reach_of(self, unit: Unit) -> _Reach:
        if unit.index not in self._reach:
            updated = [p.index in self.updates.group_of for p in unit.params]
            dtypes = TRAINABLE_DTYPES if unit.converts else ()
            copied = [u or p.dtype in dtypes for u, p in zip(updated, unit.params, strict=True)]
            self._reach[unit.index] = _Reach(any(updated), copied, all(copied))
        return self._reach[unit.index]

    def release_early(self, unit: Unit, emissions: Sequence[Emission]) -> None:
        """Lets go of a unit that streams, before its forwards compute, if all of `emissions` are in scratch: nothing
        else is wanted of it in this visit, so its slot can go on at once. If it is wanted after all it comes back."""
        present = self._present.get(unit.index)
        if present is None or not (self.copies[unit.index].streams and self._reach_of(unit).is_whole):
            return
        if not unit.converts and any(self._is_stored(present.copy, e) for e in emissions):
            return
        if all(self._scratch.find(unit, self._key(unit, e)) is not None for e in emissions):
            self.release(unit)
            self._prefetch_after(unit)

    def room_ahead(self, unit: Unit, num_emissions: int) -> int:
        """How many units like this can be in use beside another with `num_emissions` copies each; 0 if it streams."""
        if self.copies[unit.index].streams:
            return 0
        copied = unit.trainable or unit.converts
        most = max(0, self._scratch.limit(unit) // num_emissions - 1) if copied else 1
        return max(1, most) if unit.trainable and unit.beside is not None else most  # lanes wait at what is beside it

    def compute_in(self, dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
        """Sets what modules compute with in the place of some stored dtypes. No unit may be present."""
        self.check_idle("another compute dtype")
        for unit in self.units:
            unit.compute_in(dtypes)
        self._scratch = Scratch([u for u in self.units if u.trainable or u.converts], self.device)
        self.updates.forget_tables()
        self._forget_caches()

    def _forget_caches(self) -> None:
        for cache in (self._views, self._visited, self._reach, self._decoded):
            cache.clear()

    def _key(self, unit: Unit, emission: Emission) -> tuple:
        """What a copy of a unit is a function of, besides what was stored at first."""
        unit = unit.beside if unit.has_gains else unit
        if unit.converts and not self._reach_of(unit).is_updated:
            return CLEAN_KEY
        return self.version, emission.terms, self.updates.perturb_scales

    def _leaves_behind(self, copy: StoredCopy) -> bool:
        """Whether a stored copy stays behind at this visit, since its turn to be written has not come. Perturbed
        copies, and the clean one, are then made of it and the updates that it has missed."""
        return copy.streams and copy.version < self.version and (self.version + copy.block) % self._write_every != 0

    def _catch_up(
        self,
        copy: StoredCopy,
        stored: torch.Tensor,
        emissions: Sequence[Emission] = (),
        outs: Sequence[torch.Tensor] = (),
        for_modules: bool = False,
        gains: torch.Tensor | None = None,
    ) -> bool:
        """Applies the updates that a copy has missed, and writes one perturbed copy for each emission, in one pass.

        This is where updates are applied, and so where a version rises.

        Args:
            copy: what is in `stored`, uint8 on the compute device; changed in place unless it stays behind.
            emissions: what to perturb by.
            outs: a buffer for each, at least as large as the copy.
            for_modules: copies are for modules, in the dtypes that these compute with.
            gains: a copy of the unit beside, if that has gains.

        Returns:
            Whether `stored` was changed.
        """
        if self.updates.excluded:
            self.updates.pass_excluded(copy)
        if for_modules and copy.unit.packed is not None:  # frozen: all emissions are clean
            self._decode(copy.unit, stored, outs, gains)
        misses = copy.version < self.version and self.updates.table(copy) is not None
        table = self.updates.table(copy, for_modules) if misses or emissions else None
        if table is None:
            return False
        write_back = misses and not (emissions and self._leaves_behind(copy))
        with self.trace.timing("materialize", copy.unit.name):
            self._materialize(copy, stored, table, tuple(emissions), outs, for_modules, write_back)
        if write_back:
            copy.version = self.version
        return write_back

    def _materialize(
        self,
        copy: StoredCopy,
        stored: torch.Tensor,
        table: SegmentTable,
        emissions: tuple[Emission, ...],
        outs: Sequence[torch.Tensor],
        for_modules: bool,
        write_back: bool,
    ) -> None:
        """What `_catch_up` has decided."""
        program = self.updates.program(copy, emissions)
        key = (copy.unit.index, stored.data_ptr(), *[out.data_ptr() for out in outs])
        known = self._visited.get(key)
        if known is not None:
            materialize_again(stored, table, self.updates.seed, program, known, write_back)
        else:
            known = [out[: copy.unit.seen_bytes if for_modules else copy.end - copy.begin] for out in outs]
            materialize(stored, table, seed=self.updates.seed, program=program, outs=known, write_back=write_back)
            if len(self._visited) >= MAX_VISITED:
                self._visited.clear()
            self._visited[key] = known

    def _decode(
        self, unit: Unit, stored: torch.Tensor, outs: Sequence[torch.Tensor], gains: torch.Tensor | None
    ) -> None:
        """Decodes what is packed of a unit.

        Raises:
            DistZO2Error: at its first visit, a weight is not finite.
        """
        with self.trace.timing("decode", unit.name):
            for out in outs:
                decode(stored, unit.packed, out, gains)
        if unit.index in self._decoded:
            return
        for param in unit.params:
            end = param.seen_offset + param.numel * param.seen.itemsize
            values = outs[0][param.seen_offset : end].view(param.seen)
            # One pass, which lets NaN through; isfinite would take memory, and thirty times as long.
            if param.layout is not None and values.numel() and not torch.stack(values.aminmax()).isfinite().all():
                beyond = f"its scales lead beyond {dtype_name(param.seen)}: --compute-dtype float32 has room"
                raise DistZO2Error(
                    f"parameter {param.name} ({param.stored.format}): expected finite weights, got one that is not: "
                    + ("the file is damaged" if values.isnan().any() or param.seen == torch.float32 else beyond)
                )
        self._decoded.add(unit.index)

    def write_up_to_date(self, copy: StoredCopy, stored: torch.Tensor, out: torch.Tensor) -> bool:
        """Writes a slice with every update made so far to `out`; returns whether `stored` was brought up to date."""
        misses = self.updates.missed_by(copy)
        if copy.unit.is_encoded:  # an emission would be decoded
            if stays := misses and self._leaves_behind(copy):
                copy, stored = replace(copy), stored.clone()
            changed = misses and self._catch_up(copy, stored)
            out.copy_(stored[: out.numel()])
            return changed and not stays
        if not misses or not all(p.index in self.updates.group_of for p in copy.unit.params):
            out.copy_(stored[: out.numel()])
        return misses and self._catch_up(copy, stored, [CLEAN], [out])

    def flush(self) -> None:
        """Brings every stored copy to the current version, and waits until it is where the weights live."""
        self.check_idle("flush")
        behind = [copy for copy in self.copies if self.updates.missed_by(copy)]
        for i, copy in enumerate(behind):
            self.catch_up_stored(copy, [c for c in behind[i + 1 : i + self.ring.num_slots] if c.streams])
        self.ring.flush()
        self.updates.drop_before(self.version)

    def catch_up_stored(self, copy: StoredCopy, following: Sequence[StoredCopy] = ()) -> None:
        """Brings a stored copy to the current version. The `following` ones are next."""
        if not self.updates.missed_by(copy):
            return
        source, dirty = self.store_of(copy).source, False
        stored = source.acquire(copy)
        try:
            source.expect(following, len(following))
            with DeferredInterrupt():  # never between the update and the note that it was made
                dirty = self._catch_up(copy, stored)
        finally:
            source.release(copy, dirty)

    # ---- replacement from outside -----------------------------------------------------------------------------------

    def forget_derived(self) -> None:
        """Drops perturbed and gathered copies, since stored copies are changed from outside."""
        self._scratch.forget()
        self.ring.forget()

    def restart(self) -> None:
        """Makes stored copies that were replaced from outside the base of the updates that follow, counted from 0."""
        self.flush()
        self.updates.restart()
        self._assume_current()
        self.forget_derived()
        self._take_starts()
        self.epoch += 1

    def _take_starts(self) -> None:
        """Makes the weights, of which every copy holds the current ones, those at the start."""
        for copy in self.copies:
            if copy.starts:
                with self.store_of(copy).source.open(copy, write=True) as stored:
                    copy.take_start(stored)

    def _assume_current(self) -> None:
        """Every copy counts as one of the current version: it misses nothing, or no update has reached it."""
        for copy in self.copies:
            copy.version = self.version

    # ---- figures, and the end ---------------------------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Starts the counting of bytes and seconds anew."""
        self.trace.total_ns.clear()
        self.ring.reset_stats()

    def stats(self) -> dict[str, int | float]:
        """Returns bytes and seconds since `reset_stats`, and bytes allocated. On CUDA, seconds are the host's."""
        total_ns = self.trace.total_ns
        return {
            **self.ring.stats(),
            "compute_s": total_ns["compute"] * 1e-9,
            "noise_s": (total_ns["materialize"] + total_ns["decode"]) * 1e-9,
            "exposed_wait_s": total_ns["wait"] * 1e-9,
            "resident_bytes": sum(c.unit.stored_bytes for c in self.copies if not c.streams),
            "streamed_bytes": sum(c.unit.stored_bytes for c in self.copies if c.streams),
            "slot_bytes": self.ring.slot_bytes * self.ring.num_slots,
            "scratch_bytes": self._scratch.num_bytes,
        }

    def enable_trace(self, enable: bool = True) -> None:
        """Records every transfer, wait, materialize and lane's run from now on."""
        self.trace.enable(enable)
        self.ring.trace(enable)

    def save_trace(self, path: str | os.PathLike) -> None:
        """Writes what was recorded as a Chrome trace (JSON; opens in Perfetto)."""
        names = {c.block: c.unit.name for c in self.copies if c.streams}
        transfers = [
            ("stall" if kind == "wait" else kind, *rest)
            for kind, *rest in self.ring.events()
            if kind != "wait" or self.device.type != "cpu"  # on a CPU `bring` has recorded the waits
        ]
        self.trace.save(path, transfers, names)

    def check_idle(self, what: str) -> None:
        """
        Raises:
            DistZO2Error: a pass or a forward is under way, or the weights were closed; `what` cannot be done.
        """
        self.before_check()
        if self.closed:
            raise DistZO2Error(f"{what}: this model's streaming runtime was closed")
        if self.busy:
            raise DistZO2Error(f"{what}: not possible in the middle of a pass over this model")

    def close(self) -> None:
        """Ends transfers and deletes the working block file."""
        self.closed = True
        self._forget_caches()
        self._present.clear()
        try:
            self.ring.close()
        finally:
            self.memory.close()
