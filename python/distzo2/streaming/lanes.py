"""Lanes: the evaluations of one pass, each the user's own code in its own thread, one running at a time.

A lane parks where it enters a unit. Who runs next is what the pass's schedule, a generator, yields. The thread that
parks asks it and wakes the next one itself: to wake a thread costs more than the schedule does, so a lane whose own
turn it is again goes on at once, and the caller's thread sleeps until the pass ends.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from _thread import allocate_lock
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.streaming.isolation import CallerState, LaneAttributes, LaneSwitches, RandomStream, ScheduleState
from distzo2.weights.units import Unit
from distzo2.weights.updates import Emission

UNWIND_SECONDS = 60.0  # a cancelled lane that is still running after this long is left behind


@dataclass(frozen=True)
class LanePlace:
    """Which evaluation of an optimizer's step is running.

    Attributes:
        step: number of the step.
        index: of the evaluation: the loss is `opt.last.losses[index]`, at the micro-batch's place, and its (probe,
            sign) is `opt.last.evaluations[index]`. A plain loop evaluates in this order.
        batch: number of the micro-batch, counted over all ranks.
        probe: number of the perturbation.
        sign: of the perturbation: 1, -1, or 0 for the clean weights.
        first: this is the first evaluation of its micro-batch, and not a repetition of it. It is true once for each
            micro-batch, whatever the ranks, so what is counted under it is counted once. It is never
            true in `opt.check` and `opt.signal`.
    """

    step: int
    index: int
    batch: int
    probe: int
    sign: int
    first: bool


_place: contextvars.ContextVar[LanePlace | None] = contextvars.ContextVar("place", default=None)


def current_lane() -> LanePlace | None:
    """Returns which evaluation of a step calls this; None outside of an optimizer's evaluations.

    A closure runs once for each evaluation, and some more times when its code is new: metrics that it gathers belong
    under `if distzo2.current_lane().first:`. Threads that a closure starts are outside, unless they run in its context.
    """
    return _place.get()


class LaneCancelled(BaseException):
    """Unwinds a parked lane; not an Exception, so that the user's own handlers do not take it."""


@dataclass(eq=False)
class Route:
    """The units that a lane enters, in their order, and the forwards by which it does, none of them inside another."""

    units: list[Unit] = field(default_factory=list)
    calls: list[tuple[Any, int]] = field(default_factory=list)  # the module, and the number of units before it
    ended: bool = False

    def pass_ends(self) -> list[int]:
        """Numbers of units behind which a pass over them has ended and another begun, as with each token that
        `generate` makes. A pass begins where the first of the modules that are called twice is called."""
        seen: set[Any] = set()
        for module, _ in self.calls:
            if module in seen:
                return [at for other, at in self.calls if other is module][1:]
            seen.add(module)
        return []

    def has(self, units: Iterable[Unit]) -> bool:
        """Whether all of `units` are entered."""
        return {unit.index for unit in units} <= {unit.index for unit in self.units}

    def passes(self) -> list[list[Unit]]:
        """The units, pass by pass."""
        return [self.units[a:b] for a, b in pairwise([0, *self.pass_ends(), len(self.units)])]


def check_routes(first: Route, other: Route, batch: int, agreed: int = 0) -> None:
    """Compares the routes of two lanes, the `other` one of micro-batch `batch`, behind their first `agreed` units. One
    may have ended behind a pass over the units after which the other has begun another.

    Raises:
        DistZO2Error: the routes differ.
    """
    short, long = sorted((first, other), key=lambda route: len(route.units))
    length = len(short.units)
    if short.units[agreed:] == long.units[agreed:length] and (
        length == len(long.units) or (short.ended and length in long.pass_ends() and short.has(long.units[length:]))
    ):
        return
    differing = (i for i, (a, b) in enumerate(zip(short.units, long.units, strict=False)) if a is not b)
    at = next(differing, length)

    def entered(route: Route) -> str:
        if at < len(route.units):
            return f"unit {route.units[at].name!r}"
        return "no further unit" if route.ended else "another unit"

    raise DistZO2Error(
        f"the lanes of a step must enter the same units in the same order: at position {at} one lane entered "
        f"{entered(first)}, and the lane of batch {batch} {entered(other)}. Only behind a whole pass over the units, "
        "as behind a token, may one lane end while others go on. Where a forward skips blocks for some batches or "
        "perturbations, name with units= a module around them."
    )


@dataclass(eq=False)
class Lane:
    """One evaluation: the loss of one batch under one emission, with its own random stream."""

    emission: Emission
    batch: int
    closure: Callable[[], Any]
    stream: RandomStream
    place: LanePlace | None = None
    result: Any = None
    error: BaseException | None = None
    done: bool = False
    entered: bool = False  # a unit's forward
    request: Unit | None = None  # the unit at whose entry the lane is parked
    ahead: int = 0  # units entered since, without parking
    windows: list[Unit] = field(default_factory=list)  # open, outermost first
    route: Route = field(default_factory=Route)
    depth: int = 0  # of forwards, one inside another
    generates: bool = False  # the forward is one of `generate`
    changed_buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    attributes: LaneAttributes = field(default_factory=LaneAttributes)
    switches: LaneSwitches = field(default_factory=LaneSwitches)
    thread: LaneThread | None = None

    def park(self, unit: Unit) -> None:
        """Called in the lane's thread, at the entry of `unit`: returns when the lane's turn has come there."""
        self.request = unit
        self.thread.park()


class Turns:
    """Whose turn it is in one pass. At any time one thread has it: the caller's, or that of `running`."""

    def __init__(self, schedule: Generator[Lane | None], state: ScheduleState, back: Any) -> None:
        self.running: Lane | None = None
        self.cancelled = False  # the lanes end, and the schedule does not go on
        self.away = False  # the caller's thread waits; whoever gives the turn back says so before it releases `back`
        self.ended = False
        self.error: BaseException | None = None
        self._schedule, self._state, self._back = schedule, state, back

    def ask(self) -> None:
        """Lets the schedule say who runs next; None: the caller's thread."""
        self.running = None
        try:
            self.running = next(self._schedule)
        except StopIteration:
            self.ended = True
        except BaseException as error:
            self.error = error.__cause__ if isinstance(error.__cause__, StopIteration) else error  # PEP 479
        if self.running is not None:
            self.running.request = None

    def hand_on(self, own: LaneThread | None = None) -> None:
        """Called in a lane's thread that parks, or whose lane has ended (`own`: None): wakes whose turn it is."""
        if self.cancelled:
            self.running = None
        else:
            try:
                with self._state:
                    self.ask()
            except BaseException as error:  # of the state
                self.running, self.error = None, error
        following = self.running and self.running.thread
        if following is own is not None:
            return
        if following is None:
            self.away = False
            if self._back.locked():
                self._back.release()
        else:
            following.resume()
        if own is not None:
            own.wait()

    def close(self) -> None:
        """Ends the schedule where it stands."""
        with suppress(ValueError):  # it runs, in a lane that does not come back
            self._schedule.close()


class LaneThread(threading.Thread):
    """A thread that is kept across steps and runs one lane at a time."""

    def __init__(self, index: int) -> None:
        super().__init__(name=f"distzo2-lane-{index}", daemon=True)
        self._go = allocate_lock()
        self._go.acquire()
        self._turns: Turns | None = None
        self._lane: Lane | None = None
        self._caller: CallerState | None = None
        self._context: contextvars.Context | None = None
        self.line = 0  # of control
        self.cancelled = False
        self.start()

    def assign(self, lane: Lane, caller: CallerState, context: contextvars.Context, turns: Turns) -> None:
        self._lane, self._caller, self._context, self._turns = lane, caller, context, turns
        self.cancelled, self.line = False, line_of_control()
        lane.thread = self

    def resume(self) -> None:
        self._go.release()

    def wait(self) -> None:
        self._go.acquire()

    def park(self) -> None:
        """Called in the lane: gives the turn on and waits for it."""
        self._turns.hand_on(self)
        if self.cancelled:
            raise LaneCancelled

    def run(self) -> None:
        while True:
            self.wait()
            lane, turns = self._lane, self._turns
            if lane is None:
                return
            if not self.cancelled:
                self._context.run(self._evaluate, lane)
            lane.done = lane.route.ended = True
            self._lane = self._caller = self._context = self._turns = None
            lane = None
            turns.hand_on()
            turns = None

    def _evaluate(self, lane: Lane) -> None:
        try:
            self._caller.enter()
            if lane.place is not None:  # else that of the lane which called `evaluate`, if any
                _place.set(lane.place)
            try:
                lane.attributes.record()
                with torch.no_grad():
                    lane.result = lane.closure()
            finally:
                lane.attributes.stop()
                self._caller.thread_state.exit()
        except LaneCancelled:
            lane.error = None
        except BaseException as error:
            lane.error = error


def line_of_control() -> int:
    """A number of the current thread, and the same in the lanes of its passes: of all these one runs at a time."""
    thread = threading.current_thread()
    return thread.line if isinstance(thread, LaneThread) else threading.get_ident()


class LaneGroup:
    """The threads that lanes run in, and the pass under way."""

    def __init__(self) -> None:
        self._back = allocate_lock()
        self._back.acquire()
        self._threads: list[LaneThread] = []
        self._turns: Turns | None = None
        # A group that is dropped without close() takes its threads with it.
        weakref.finalize(self, _end, self._threads).atexit = False

    @property
    def running(self) -> Lane | None:
        """The lane whose turn it is."""
        return self._turns and self._turns.running

    def run(
        self,
        lanes: Sequence[Lane],
        callers: Sequence[CallerState],
        schedule: Generator[Lane | None],
        state: ScheduleState,
    ) -> None:
        """Gives every lane a thread and one of `callers`, and runs them in turn as `schedule` says: each lane that it
        yields runs until it parks at its next unit or ends, and then the schedule goes on, under `state`, in that
        lane's thread, or, where it yields None, in the caller's. Raises what the schedule raises."""
        while len(self._threads) < len(lanes):
            self._threads.append(LaneThread(len(self._threads)))
        self._turns = turns = Turns(schedule, state, self._back)
        for lane, thread, caller in zip(lanes, self._threads, callers, strict=False):
            thread.assign(lane, caller, contextvars.copy_context(), turns)
        while not turns.ended:
            turns.ask()
            if turns.running is not None:
                turns.away = True
                turns.running.thread.resume()
                while turns.away:
                    self._back.acquire()
            if turns.error is not None:
                raise turns.error
        self._turns = None

    def unwind(self, lanes: Sequence[Lane]) -> None:
        """Ends every lane that has not ended. A lane that will not end in time takes its thread with it."""
        turns = self._turns
        if turns is None:
            return
        turns.cancelled = True
        came_back = True
        while turns.away and came_back:
            came_back = self._back.acquire(timeout=UNWIND_SECONDS)
        turns.close()
        if not came_back:
            self._abandon()
            return
        for lane in lanes:
            thread = lane.thread
            attempts = 0
            while thread is not None and not lane.done:
                thread.cancelled = True
                turns.running, turns.away = lane, True
                thread.resume()
                while turns.away and came_back:
                    came_back = self._back.acquire(timeout=UNWIND_SECONDS)
                if not came_back or (attempts := attempts + 1) > 1000:
                    self._abandon()
                    return
        self._turns = turns.error = None

    def _abandon(self) -> None:
        """Leaves a lane that does not come back behind: the threads of its pass are daemons, and new ones are made."""
        self._back = allocate_lock()
        self._back.acquire()
        self._threads.clear()
        self._turns = None

    def close(self) -> None:
        """Ends the threads; they hold no lane between passes."""
        threads = self._threads[:]
        _end(self._threads)
        for thread in threads:
            thread.join(timeout=1.0)


def _end(threads: list[LaneThread]) -> None:
    """Lets idle threads run to their end."""
    while threads:
        threads.pop().resume()
