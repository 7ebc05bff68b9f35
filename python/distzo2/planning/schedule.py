"""The schedule of a rank's steps: which unit is brought when and to which slot, what a visit decodes, perturbs and
updates, when blocks go back. The rules are the runtime's own, `UnitWeights`, over a store whose transfers, and with
visits whose arithmetic, are tasks. `Schedule` issues them; `play` says when they run; `play_steps` plays steps until
they repeat.

Resources: compute; host, which issues (where the host computes, it is the same as compute); upload, download; and,
where blocks are sliced, side, which updates a slice, and gather. A resource runs its tasks one at a time, in the order
of their issue.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from distzo2.planning.machines import Duplex, Rates
from distzo2.planning.plan_model import ModelPlan, Part
from distzo2.weights.scratch import Scratch
from distzo2.weights.store import Store, StoredCopy
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import Unit
from distzo2.weights.updates import Emission
from distzo2_core import Update

# Steps that are played first: the first has no update to make and nothing prefetched, and where transfers bound, they
# pile up for a while. More of them while the steps after still differ.
WARM_STEPS = (2, 6, 14)
SAME = 1e-3
MOST_STEPS = 16  # that are played, where blocks are written in turn
_ADDRESSES = itertools.count(1)  # of memory that only counts
_NOWHERE: Any = SimpleNamespace(copy_=lambda stored: None, numel=lambda: 0)


@dataclass(eq=False)
class Task:
    """`seconds` of work on `resource`, at full speed, once every task of `after` has ended."""

    resource: str
    kind: str
    name: str
    seconds: float
    after: tuple[Task, ...] = field(default=(), repr=False)
    num_bytes: float = 0.0  # of a transfer
    slot: int = 0
    start: float = -1.0
    end: float = -1.0


def play(tasks: Iterable[Task], duplex: tuple[float, float] = (1.0, 1.0), pool: Set[str] = frozenset()) -> None:
    """Sets start and end of every task.

    Args:
        tasks: in the order of their issue.
        duplex: speeds of upload and download while both are busy; 1: as alone.
        pool: resources that share one processor: while k of them are busy, each runs at 1/k.
    """
    queues: dict[str, deque[Task]] = {}
    for task in tasks:
        queues.setdefault(task.resource, deque()).append(task)
    now = 0.0
    running: dict[str, tuple[Task, float]] = {}  # by resource: what runs there, seconds left at full speed
    while True:
        moved = True
        while moved:
            moved = False
            for resource, queue in queues.items():
                while queue and resource not in running and all(before.end >= 0 for before in queue[0].after):
                    task = queue.popleft()
                    task.start, moved = now, True
                    if task.seconds > 0:
                        running[resource] = task, task.seconds
                    else:
                        task.end = now
        if not running:
            assert not any(queues.values()), "tasks wait for one another"
            return
        speed = {r: 1.0 / len(running.keys() & pool) if r in pool else 1.0 for r in running}
        if {"upload", "download"} <= running.keys():
            speed["upload"], speed["download"] = duplex
        step = min(left / speed[r] for r, (_, left) in running.items())
        now += step
        for resource, (task, left) in list(running.items()):
            left -= step * speed[resource]
            if left <= 1e-12 * max(1.0, task.seconds):
                del running[resource]
                task.end = now
            else:
                running[resource] = task, left


def wait_intervals(tasks: Sequence[Task]) -> list[tuple[float, float, str]]:
    """When compute stood still for a transfer, and the unit it waited for."""
    result, reached = [], 0.0
    for task in tasks:
        if task.resource != "compute":
            continue
        if task.kind in ("wait", "stall") and task.end > reached:
            issued = max((t.end for t in task.after if t.resource == "host"), default=0.0)
            if task.end > max(reached, issued):
                result.append((max(reached, issued), task.end, task.name))
        reached = max(reached, task.end)
    return result


# ---- steps in the steady state ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """What the work takes, a step in the steady state."""

    step_s: float
    busy_s: dict[str, float]  # by resource
    wait_s: float  # of compute, for transfers
    noise_s: float  # part of compute, and of side
    bytes_up: float
    bytes_down: float
    bytes_gathered: float  # received from other ranks
    scratch_bytes: int
    tasks: Sequence[Task]
    steps: Sequence[tuple[float, float]]  # begin and end of each step of the steady state


def play_steps(work: Work) -> Played:
    """Plays steps until they repeat, and takes the mean of those after."""
    link = work.link
    duplex = tuple(min(1.0, link.both / 2 / rate) for rate in (link.up, link.down)) if link else (1.0, 1.0)
    # A slice's update takes from the device what compute would have; on a CPU so does a gather.
    pool = {"compute", "side", "gather"} if work.on_host else {"compute", "side"}
    num_steps = max(2, min(work.write_every, MOST_STEPS))
    for warm in WARM_STEPS:
        schedule = Schedule(work)
        for _ in range(warm + num_steps):
            schedule.step()
        play(schedule.tasks, duplex, pool)
        ends = [task.end for task in schedule.step_ends]
        lengths = [b - a for a, b in pairwise(ends)]
        before, after = sum(lengths[-2 * num_steps : -num_steps]), sum(lengths[-num_steps:])
        settled = len(lengths) >= 2 * num_steps and abs(after - before) <= SAME * after
        if settled or 1 < work.write_every <= warm:
            break
    begin, end = ends[warm - 1], ends[-1]
    busy, noise_s, num_bytes = Counter(), 0.0, dict.fromkeys(("upload", "download", "gather"), 0.0)
    for task in schedule.tasks:
        inside = min(task.end, end) - max(task.start, begin)
        if inside <= 0:
            continue
        busy[task.resource] += inside / num_steps
        if task.kind in ("decode", "materialize", "update"):
            noise_s += inside / num_steps
        elif task.kind in num_bytes:
            num_bytes[task.kind] += task.num_bytes * inside / (task.end - task.start) / num_steps
    waits = wait_intervals(schedule.tasks)
    return Played(
        (end - begin) / num_steps,
        dict(busy),
        sum(max(0.0, min(b, end) - max(a, begin)) for a, b, _ in waits) / num_steps,
        noise_s,
        *num_bytes.values(),
        schedule.scratch.settled_bytes(schedule.units),
        schedule.tasks,
        list(pairwise(ends[warm - 1 :])),
    )


# ---- the rules ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slicing:
    """Blocks are kept in `num_ranks` slices; an all-gather takes `gather_s` a byte of the block. `over_link`: it uses
    the link of the uploads."""

    num_ranks: int
    gather_s: float
    over_link: bool = False


@dataclass(frozen=True)
class Work:
    """What one rank does."""

    model: ModelPlan
    rates: Rates
    on_host: bool  # the host computes
    streamed: Sequence[Unit]  # the units that stream, by their blocks
    slots: int
    link: Duplex | None  # the rank's share of it
    passes: Sequence[Sequence[Emission]]  # of a step: the lanes' emissions in their order
    num_terms: int  # of a step's update
    family: str
    write_every: int = 1
    slicing: Slicing | None = None
    exchange_s: float = 0.0  # of the scalars, at a step's end
    on_disk: bool = False  # what streams lives in a file


class _Ledger(Scratch):
    """The runtime's scratch, without its memory."""

    def _allocate(self, num_bytes: int) -> Any:
        address = next(_ADDRESSES)
        return SimpleNamespace(data_ptr=lambda: address, numel=lambda: num_bytes)

    def settled_bytes(self, units: Iterable[Unit]) -> int:
        """Bytes after many steps: each perturbs the `units` that updates reach anew, in further buffers until there are
        as many as may be."""
        renewed = {id(self._class_of[unit.index]) for unit in units if unit.trainable or unit.has_gains}
        used = [one for one in self._classes.values() if one.buffers]
        return sum(one.num_bytes * max(len(one.buffers), one.limit if id(one) in renewed else 0) for one in used)


class _Memory(Store):
    """The units that stay on the device."""

    def acquire(self, copy: StoredCopy) -> Any:
        return None


@dataclass(eq=False)
class _Slot:
    number: int
    copy: StoredCopy | None = None
    held: bool = False
    wanted: bool = False
    last_use: int = 0
    ready: Task | None = None  # the upload, or what completes the block
    readers: Task | None = None  # of the visit that ended last
    stored: Task | None = None  # the last download from here
    version: int = -1  # sliced blocks: updates that the gathered block holds

    def clone(self) -> _Slot:
        return self

    def __getitem__(self, part: slice) -> _Slot:
        return self


class _Ring(Store):
    """The store of what streams: as the copy engine, and, where blocks are sliced, as `SlicedStore`."""

    def __init__(self, schedule: Schedule, work: Work) -> None:
        self.schedule, self.work = schedule, work
        self.num_slots, self.gathers = work.slots, work.slicing is not None
        self._slots = [_Slot(number) for number in range(work.slots)]
        self._slot_of: dict[int, _Slot] = {}
        self._store_of: dict[int, Task] = {}  # by unit: its last download
        self._uses = itertools.count(1)
        self._to_complete: list[StoredCopy] = []  # uploaded ahead of the update that they miss

    def begin_pass(self) -> None:
        for copy in self._to_complete:
            self._complete(copy)
        self._to_complete.clear()

    def acquire(self, copy: StoredCopy) -> Any:
        slot = self._take(copy, hold=True)
        if self.gathers and copy.unit.trainable and slot.version != self.schedule.version:
            self._complete(copy)  # present since the last pass
        kind = "wait" if self.work.on_host else "stall"
        self.schedule.run(kind, copy.unit.name, 0.0, slot.ready, slot.stored)
        return None

    def release(self, copy: StoredCopy, dirty: bool, stream: Any = None) -> None:
        slot = self._slot_of[copy.unit.index]
        slot.held, slot.readers, slot.last_use = False, self.schedule.compute, next(self._uses)
        if dirty:
            self._download(copy, slot, copy.num_bytes - self._tail(copy), self.schedule.compute)

    def expect(self, following: Sequence[StoredCopy], num_current: int) -> None:
        for number, copy in enumerate(following[: self.num_slots - 1]):
            if self._take(copy, hold=False, is_current=number < num_current) is None:
                return

    def _take(self, copy: StoredCopy, hold: bool, is_current: bool = True) -> _Slot | None:
        """The slot of a block, which is held, or else prefetched and so wanted. One without gets the slot that was
        released longest ago; to be held, in need, the one wanted last. None: no slot is free."""
        slot = self._slot_of.get(copy.unit.index)
        if slot is None:
            unheld = [s for s in self._slots if not s.held]
            slot = min((s for s in unheld if not s.wanted), key=lambda s: s.last_use, default=None)
            if slot is None and hold:
                slot = max(unheld, key=lambda s: s.last_use)
            if slot is None:
                return None
            self._assign(slot, copy, is_current)
        if hold:
            slot.held, slot.wanted = True, False
        elif not slot.held:
            slot.wanted, slot.last_use = True, next(self._uses)
        return slot

    def _assign(self, slot: _Slot, copy: StoredCopy, is_current: bool) -> None:
        if slot.copy is not None:
            del self._slot_of[slot.copy.unit.index]
        slot.copy, slot.wanted, slot.version = copy, False, -1
        self._slot_of[copy.unit.index] = slot
        num_bytes = self._stored_bytes(copy)
        after = (self.schedule.host, slot.readers, slot.stored, self._store_of.get(copy.unit.index))
        seconds, more = num_bytes / self.work.link.up, {"num_bytes": num_bytes, "slot": slot.number}
        slot.ready = self.schedule.add("upload", "upload", copy.unit.name, seconds, *after, **more)
        slot.stored = None
        if self.gathers and copy.unit.trainable and not is_current:  # the update of the next pass may not be known yet
            self._to_complete.append(copy)
        elif self.gathers:
            self._complete(copy)

    def _stored_bytes(self, copy: StoredCopy) -> float:
        """Of a unit, or of its slice."""
        whole = copy.num_bytes
        return (whole + copy.unit.scale_bytes) / self.work.slicing.num_ranks if self.gathers else whole

    def _download(self, copy: StoredCopy, slot: _Slot, num_bytes: float, after: Task | None) -> None:
        seconds, more = num_bytes / self.work.link.down, {"num_bytes": num_bytes, "slot": slot.number}
        slot.stored = self.schedule.add("download", "download", copy.unit.name, seconds, after, slot.ready, **more)
        self._store_of[copy.unit.index] = slot.stored

    def _tail(self, copy: StoredCopy) -> int:
        """Bytes that are not written back: in a file a block is written whole."""
        return 0 if self.work.on_disk else copy.num_kept

    def _complete(self, copy: StoredCopy) -> None:
        """Updates a slice that was uploaded, writes it back, and gathers the block. Blocks behind by elision are
        brought up to date in the slot only, at every visit."""
        slicing, slot = self.work.slicing, self._slot_of[copy.unit.index]
        slot.version, share = self.schedule.version, 1.0 / slicing.num_ranks
        if self.schedule.write_up_to_date(copy, slot, _NOWHERE):
            self._download(copy, slot, self._stored_bytes(copy) - self._tail(copy) * share, slot.ready)
        where = "upload" if slicing.over_link else "gather"
        after, received = (slot.ready, self.schedule.host), copy.unit.num_bytes * (slicing.num_ranks - 1) * share
        seconds = copy.unit.num_bytes * slicing.gather_s
        slot.ready = self.schedule.add(where, "gather", copy.unit.name, seconds, *after, num_bytes=received)


class Schedule(UnitWeights):
    """Issues the tasks of steps, one after another, as the runtime would: its rules of units, updates and perturbed
    copies, with tasks in the place of what a visit computes."""

    def __init__(self, work: Work) -> None:
        self.work, device = work, torch.device("cpu")
        self.tasks: list[Task] = []
        self.step_ends: list[Task] = []
        self.host: Task | None = None  # the last one that the host has issued from
        self.compute: Task | None = None
        block = {unit: number for number, unit in enumerate(work.streamed)}
        copies = [StoredCopy(u, 0, u.num_bytes, block=block.get(u, -1)) for u in work.model.units]
        ring, every = _Ring(self, work), work.write_every
        super().__init__(work.model.units, copies, _Memory(), ring, device=device, write_every=every)
        self.scratch = self._scratch = _Ledger([u for u in self.units if u.trainable or u.converts], device)
        self.bind(self, {p.index: 0 for p in self.params if p.trainable}, 1, 0)
        self._part_s = [work.rates.part_s(p) for p in work.model.parts]

    # ---- tasks ------------------------------------------------------------------------------------------------------

    def add(self, resource: str, kind: str, name: str, seconds: float, *after: Task | None, **more: float) -> Task:
        task = Task(resource, kind, name, seconds, tuple(t for t in after if t is not None), **more)
        self.tasks.append(task)
        return task

    def _issue(self, seconds: float) -> float:
        """The host spends `seconds` on issuing; returns what of it falls to compute: all where the host computes."""
        if self.work.on_host:
            return seconds
        self.host = self.add("host", "host", "", seconds)
        return 0.0

    def run(self, kind: str, name: str, seconds: float, *after: Task | None) -> Task:
        """Adds a task of compute, behind everything issued before."""
        self.compute = self.add("compute", kind, name, seconds, self.host, *after)
        if self.work.on_host:
            self.host = self.compute
        return self.compute

    def visit(self, kind: str, unit: Unit, seconds: float) -> None:
        """Adds a call that makes copies of a unit, or updates it."""
        self.run(kind, unit.name, seconds + self._issue(self.work.rates.host.materialize_s))

    # ---- steps ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        for emissions in self.work.passes:
            self._pass(emissions)
        name, seconds = f"step {self.version}", self.work.rates.host.step_s + self.work.exchange_s
        if self.work.on_host:
            end = self.run("host", name, seconds)
        else:  # the losses are read: the host waits for the device
            end = self.host = self.add("host", "host", name, seconds, self.compute, self.host)
        self.step_ends.append(end)
        self.push(Update(self.version, (), ()), ())

    def _pass(self, emissions: Sequence[Emission]) -> None:
        distinct = list(dict.fromkeys(emissions))
        self.ring.begin_pass()
        host, turned = self.work.rates.host, True
        for group in self._groups(len(distinct)):
            first = group[0][0]
            if first.units:
                self.release_all_but(first.units)
                entered = self.units[first.units[-1]]
                overhead = self._issue(host.visit_s)
                self.bring(entered)
                if overhead:
                    self.run("compute", entered.name, overhead)
            turned = not turned  # the lane that ran last is the first to continue
            in_order = emissions[::-1] if turned else emissions
            for i, emission in enumerate(in_order):
                for part, seconds in group:
                    pinned: set[int] = set()
                    for index in part.units:
                        pinned.add(self.under(self.units[index], emission, distinct, pinned)[1])
                    if part is first and first.units:
                        self.release_early(entered, in_order[i:])
                    overhead = self._issue(host.lane_s + part.num_ops * host.op_s)
                    name = self.units[part.units[-1]].name if part.units else "(start)"
                    self.run("compute", name, seconds + overhead)
        self.release_all_but()
        self.end_pass()

    def _groups(self, num_emissions: int) -> Iterator[list[tuple[Part, float]]]:
        """The parts that a lane runs one after another, with their seconds: it waits for the others where a unit that
        streams begins, or scratch has no room for the perturbed copies of one more."""
        group: list[tuple[Part, float]] = []
        for part, seconds in zip(self.work.model.parts, self._part_s, strict=True):
            unit = self.units[part.units[-1]] if part.units else None
            if group and unit is not None and len(group) > self.room_ahead(unit, num_emissions):
                yield group
                group = []
            group.append((part, seconds))
        yield group

    # ---- as UnitWeights ---------------------------------------------------------------------------------------------

    def _views_of(self, unit: Unit, buffer: Any, for_modules: bool = False) -> list[Any]:
        return unit.params

    def _decode(self, unit: Unit, stored: Any, outs: Sequence[Any], gains: Any) -> None:
        packed = [p for p in unit.params if p.layout is not None and not p.is_coded]
        seconds = sum(self.work.rates.decode_s(p) for p in packed)
        self.visit("decode", unit, seconds * len(outs))

    def _materialize(self, copy, stored, table, emissions, outs, for_modules, write_back) -> None:
        """`stored` is the slot of a slice, which is updated beside the lanes, or None."""
        work, unit, seconds = self.work, copy.unit, 0.0
        share = 1.0 / work.slicing.num_ranks if stored is not None else 1.0
        made = {
            "terms": (self.version - copy.version) * work.num_terms,
            "emissions": int(not all(e.clean for e in emissions)),  # both signs of a probe are made of one noise
            "write": write_back,
        }
        for p, copied in zip(unit.params, self._reach_of(unit).copied, strict=True):
            if copied and (outs or p.trainable) and (p.layout is None or p.is_coded):
                size = round(p.numel * share), p.stored.code_dtype if p.is_coded else p.dtype, work.family
                call = made if p.trainable else dict.fromkeys(made, 0)
                seconds += work.rates.noise_s(*size, out_bytes=len(outs) * p.seen.itemsize, **call)
        if stored is not None:
            stored.ready = self.add("side", "update", unit.name, seconds, stored.ready, self.host)
        else:
            self.visit("materialize", unit, seconds)
