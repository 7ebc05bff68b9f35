"""The schedule of a rank's steps, by the rules of the runtime: which unit is brought when and to which slot, what a
visit perturbs and updates, when blocks go back. `Schedule` issues tasks; `play` says when they run; `play_steps` plays
steps until they repeat.

Resources: compute; host, which issues (where the host computes, it is the same as compute); upload, download; and,
where blocks are sliced, side, which updates a slice, and gather. A resource runs its tasks one at a time, in the order
of their issue.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

from distzo2.planning.machines import Duplex, Rates
from distzo2.planning.plan_model import ModelPlan, Part
from distzo2.streaming.lanes import Emission
from distzo2.weights.scratch import Scratch
from distzo2.weights.units import TRAINABLE_DTYPES, Unit

# Steps that are played first: the first has no update to make and nothing prefetched, and where transfers bound, they
# pile up for a while. More of them while the steps after still differ.
WARM_STEPS = (2, 6, 14)
SAME = 1e-3
MOST_STEPS = 16  # that are played, where blocks are written in turn
_ADDRESSES = itertools.count(1)  # of memory that only counts


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
        if task.kind in ("materialize", "update"):
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
        schedule.scratch_bytes,
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
    streamed: Collection[int]  # indices of units that stream; their Unit.block is set
    slots: int
    link: Duplex | None  # the rank's share of it
    passes: Sequence[Sequence[Emission]]  # of a step: the lanes' emissions in their order
    num_terms: int  # of a step's update
    family: str
    write_every: int = 1
    slicing: Slicing | None = None
    exchange_s: float = 0.0  # of the scalars, at a step's end


class _Ledger(Scratch):
    """The runtime's scratch, without its memory."""

    def _follow(self) -> None:
        """No-op: there are no streams."""

    def _allocate(self, num_bytes: int) -> SimpleNamespace:
        address = next(_ADDRESSES)
        return SimpleNamespace(data_ptr=lambda: address, numel=lambda: num_bytes)

    def settled_bytes(self, units: Iterable[Unit]) -> int:
        """Bytes after many steps: each perturbs the `units` that updates reach anew, in further buffers until there are
        as many as may be."""
        renewed = {id(self._class_of[unit.index]) for unit in units if unit.trainable}
        used = [one for one in self._classes.values() if one.buffers]
        return sum(one.num_bytes * max(len(one.buffers), one.limit if id(one) in renewed else 0) for one in used)


@dataclass(eq=False)
class _Slot:
    number: int
    unit: Unit | None = None
    held: bool = False
    wanted: bool = False
    last_use: int = 0
    ready: Task | None = None  # the upload, or what completes the block
    readers: Task | None = None  # of the visit that ended last
    stored: Task | None = None  # the last download from here
    version: int = -1  # sliced blocks: updates that the gathered block holds


class Schedule:
    """Issues the tasks of steps, one after another, as the runtime would."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.units = work.model.units
        self.tasks: list[Task] = []
        self.step_ends: list[Task] = []
        self._version = 0
        self._stored = {u.index: 0 for u in self.units}  # versions
        self._copied = {  # what copies for modules hold: parameters that updates reach, and those of a unit to convert
            u.index: [p for p in u.params if p.trainable or (u.converts and p.dtype in TRAINABLE_DTYPES)]
            for u in self.units
        }
        self._scratch = _Ledger([u for u in self.units if self._copied[u.index]], None)
        self._slots = [_Slot(number) for number in range(work.slots)]
        self._slot_of: dict[int, _Slot] = {}
        self._store_of: dict[int, Task] = {}  # by unit: its last download
        self._uses = itertools.count(1)
        streamed = [u for u in self.units if u.index in work.streamed]
        self._next = {u.index: streamed[(i + 1) % len(streamed)] for i, u in enumerate(streamed)}
        self._last: Unit | None = None
        self._present: set[int] = set()
        self._dirty: set[int] = set()
        self._visited: set[int] = set()  # in the pass
        self._to_complete: list[Unit] = []  # sliced blocks uploaded ahead of the update that they miss
        self._host: Task | None = None  # the last one that the host has issued from
        self._compute: Task | None = None
        self._part_s = [work.rates.part_s(p) for p in work.model.parts]

    @property
    def scratch_bytes(self) -> int:
        """Memory of the perturbed copies, after many steps."""
        return self._scratch.settled_bytes(self.units)

    # ---- tasks ------------------------------------------------------------------------------------------------------

    def _add(self, resource: str, kind: str, name: str, seconds: float, *after: Task | None, **more: float) -> Task:
        task = Task(resource, kind, name, seconds, tuple(t for t in after if t is not None), **more)
        self.tasks.append(task)
        return task

    def _issue(self, seconds: float) -> float:
        """The host spends `seconds` on issuing; returns what of it falls to compute: all where the host computes."""
        if self.work.on_host:
            return seconds
        self._host = self._add("host", "host", "", seconds)
        return 0.0

    def _run(self, kind: str, name: str, seconds: float, *after: Task | None) -> Task:
        """Adds a task of compute, behind everything issued before."""
        self._compute = self._add("compute", kind, name, seconds, self._host, *after)
        if self.work.on_host:
            self._host = self._compute
        return self._compute

    # ---- steps ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        for emissions in self.work.passes:
            self._pass(emissions)
        name, seconds = f"step {self._version}", self.work.rates.host.step_s + self.work.exchange_s
        if self.work.on_host:
            end = self._run("host", name, seconds)
        else:  # the losses are read: the host waits for the device
            end = self._host = self._add("host", "host", name, seconds, self._compute, self._host)
        self.step_ends.append(end)
        self._version += 1

    def _pass(self, emissions: Sequence[Emission]) -> None:
        self._dirty.clear()
        self._visited.clear()
        distinct = list(dict.fromkeys(emissions))
        for unit in self._to_complete:
            self._complete(unit)
        self._to_complete.clear()
        host, turned = self.work.rates.host, True
        for group in self._groups(len(distinct)):
            first = group[0][0]
            if first.units:
                for index in self._present - set(first.units):
                    self._release(self.units[index])
                entered = self.units[first.units[-1]]
                overhead = self._issue(host.visit_s)
                if entered.index not in self._present:
                    self._bring(entered)
                if overhead:
                    self._run("compute", entered.name, overhead)
            turned = not turned  # the lane that ran last is the first to continue
            in_order = emissions[::-1] if turned else emissions
            for i, emission in enumerate(in_order):
                for part, seconds in group:
                    pinned: set[int] = set()
                    for index in part.units:
                        pinned.add(self._point(self.units[index], emission, distinct, pinned))
                    if part is first and first.units:
                        self._release_early(entered, in_order[i:])
                    overhead = self._issue(host.lane_s + part.num_ops * host.op_s)
                    name = self.units[part.units[-1]].name if part.units else "(start)"
                    self._run("compute", name, seconds + overhead)
        for index in list(self._present):
            self._release(self.units[index])

    def _groups(self, num_emissions: int) -> Iterator[list[tuple[Part, float]]]:
        """The parts that a lane runs one after another, with their seconds: it waits for the others where a unit that
        streams begins, or scratch has no room for the perturbed copies of one more."""
        group: list[tuple[Part, float]] = []
        for part, seconds in zip(self.work.model.parts, self._part_s, strict=True):
            unit = self.units[part.units[-1]] if part.units else None
            if group and unit is not None:
                copied = self._copied[unit.index]
                most = max(0, self._scratch.limit(unit) // num_emissions - 1) if copied else 1
                if unit.trainable and unit.beside is not None:  # lanes wait at what is beside it
                    most = max(1, most)
                if unit.index in self.work.streamed or len(group) > most:
                    yield group
                    group = []
            group.append((part, seconds))
        yield group

    # ---- as UnitWeights ---------------------------------------------------------------------------------------------

    def _bring(self, unit: Unit) -> None:
        self._present.add(unit.index)
        self._visited.add(unit.index)
        if unit.index not in self.work.streamed:
            return
        slot = self._take(unit, hold=True)
        if self.work.slicing is not None and unit.trainable and slot.version != self._version:
            self._complete(unit)  # present since the last pass
        self._run("wait" if self.work.on_host else "stall", unit.name, 0.0, slot.ready, slot.stored)
        if self._last is not None:
            self._next[self._last.index] = unit
        self._last = unit
        self._prefetch_after(unit)

    def _prefetch_after(self, after: Unit) -> None:
        for _ in range(self.work.slots - 1):
            after = self._next[after.index]
            if self._take(after, hold=False) is None:
                return

    def _release(self, unit: Unit) -> None:
        self._present.discard(unit.index)
        if unit.index not in self.work.streamed:
            return
        slot = self._slot_of[unit.index]
        slot.held, slot.readers = False, self._compute
        slot.last_use = next(self._uses)
        if unit.index in self._dirty:
            self._dirty.discard(unit.index)
            self._download(unit, slot, unit.num_bytes, self._compute)

    def _release_early(self, unit: Unit, emissions: Sequence[Emission]) -> None:
        if unit.index not in self.work.streamed or unit.index not in self._present:
            return
        as_stored = not unit.converts and any(e.clean and not self._elides(unit) for e in emissions)
        if as_stored or len(self._copied[unit.index]) < len(unit.params):
            return
        if all(self._scratch.find(unit, self._key(unit, e)) is not None for e in emissions):
            self._release(unit)
            self._prefetch_after(unit)

    def _elides(self, unit: Unit) -> bool:
        behind = unit.index in self.work.streamed and self._stored[unit.index] < self._version
        return behind and (self._version + unit.block) % self.work.write_every != 0

    def _point(self, unit: Unit, emission: Emission, emissions: Sequence[Emission], pinned: Collection[int]) -> int:
        """The address of the copy that the lane uses; 0: the clean weights as they are stored."""
        stays_behind = self._elides(unit) and self.work.slicing is None
        if not unit.converts and (not unit.trainable or (emission.clean and not stays_behind)):
            self._materialize(unit, 0, 0)
            return 0
        key = self._key(unit, emission)
        buffer = self._scratch.find(unit, key)
        if buffer is None:
            mirrored = (self._key(unit, e) for e in emissions if e.mirrors(emission))
            wanted = dict.fromkeys([key, *(k for k in mirrored if self._scratch.find(unit, k) is None)])
            buffer = self._scratch.take(unit, list(wanted), pinned)[0]
            self._materialize(unit, len(wanted), 0 if emission.clean else 1)
        return buffer.data_ptr()

    def _key(self, unit: Unit, emission: Emission) -> tuple:
        """What a copy is a function of: where no update reaches it, of the stored weights alone."""
        return (self._version, emission.terms) if unit.trainable else ()

    def _materialize(self, unit: Unit, num_outs: int, num_noises: int) -> None:
        # A sliced block reaches its slot with every update made.
        sliced = self.work.slicing is not None and unit.index in self.work.streamed
        missed = 0 if sliced or not unit.trainable else self._version - self._stored[unit.index]
        writes = missed > 0 and not (num_outs and self._elides(unit))
        if missed or num_outs:
            seconds = self._noise_s(unit, 1.0, missed, num_noises, num_outs, writes)
            self._run("materialize", unit.name, seconds + self._issue(self.work.rates.host.materialize_s))
            if writes:
                self._dirty.add(unit.index)
        if writes or not (missed or sliced):
            self._stored[unit.index] = self._version

    def _noise_s(self, unit: Unit, share: float, missed: int, noises: int, outs: int, writes: bool) -> float:
        seconds, made = 0.0, {"terms": missed * self.work.num_terms, "emissions": noises, "write": writes}
        for p in self._copied[unit.index]:
            if p.trainable or outs:
                size = round(p.numel * share), p.dtype, self.work.family
                call = made if p.trainable else dict.fromkeys(made, 0)
                seconds += self.work.rates.noise_s(*size, out_bytes=outs * p.seen.itemsize, **call)
        return seconds

    # ---- as the copy engine -----------------------------------------------------------------------------------------

    def _take(self, unit: Unit, hold: bool) -> _Slot | None:
        """The slot of a unit, which is held, or else prefetched and so wanted. A unit without one gets the slot that
        was released longest ago; to be held, in need, the one wanted last. None: no slot is free."""
        slot = self._slot_of.get(unit.index)
        if slot is None:
            unheld = [s for s in self._slots if not s.held]
            slot = min((s for s in unheld if not s.wanted), key=lambda s: s.last_use, default=None)
            if slot is None and hold:
                slot = max(unheld, key=lambda s: s.last_use)
            if slot is None:
                return None
            self._assign(slot, unit)
        if hold:
            slot.held, slot.wanted = True, False
        elif not slot.held:
            slot.wanted, slot.last_use = True, next(self._uses)
        return slot

    def _assign(self, slot: _Slot, unit: Unit) -> None:
        if slot.unit is not None:
            del self._slot_of[slot.unit.index]
        slot.unit, slot.wanted, slot.version = unit, False, -1
        self._slot_of[unit.index] = slot
        num_bytes = unit.num_bytes / (self.work.slicing.num_ranks if self.work.slicing else 1)
        seconds = num_bytes / self.work.link.up
        after = (self._host, slot.readers, slot.stored, self._store_of.get(unit.index))
        slot.ready = self._add("upload", "upload", unit.name, seconds, *after, num_bytes=num_bytes, slot=slot.number)
        slot.stored = None
        if self.work.slicing is not None:
            if unit.trainable and unit.index in self._visited:  # the next pass's update of it may not be known yet
                self._to_complete.append(unit)
            else:
                self._complete(unit)

    def _download(self, unit: Unit, slot: _Slot, num_bytes: float, after: Task | None) -> None:
        seconds, more = num_bytes / self.work.link.down, {"num_bytes": num_bytes, "slot": slot.number}
        slot.stored = self._add("download", "download", unit.name, seconds, after, slot.ready, **more)
        self._store_of[unit.index] = slot.stored

    def _complete(self, unit: Unit) -> None:
        """Updates a slice that was uploaded, writes it back, and gathers the block."""
        slicing, slot = self.work.slicing, self._slot_of[unit.index]
        share = 1.0 / slicing.num_ranks
        ready, slot.version = slot.ready, self._version
        missed = self._version - self._stored[unit.index] if unit.trainable else 0
        if missed:
            writes = not self._elides(unit)
            seconds = self._noise_s(unit, share, missed, 0, 0, writes)
            ready = self._add("side", "update", unit.name, seconds, ready, self._host)
            if writes:
                self._download(unit, slot, unit.num_bytes * share, ready)
                # Blocks behind by elision are brought up to date in the slot only, at every visit.
                self._stored[unit.index] = self._version
        where = "upload" if slicing.over_link else "gather"
        received = unit.num_bytes * (slicing.num_ranks - 1) * share
        seconds = unit.num_bytes * slicing.gather_s
        slot.ready = self._add(where, "gather", unit.name, seconds, ready, self._host, num_bytes=received)
