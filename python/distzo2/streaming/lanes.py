"""Lanes: the evaluations of one pass, each the user's own code in its own thread, one running at a time.

A lane parks where it enters a unit. `LaneGroup.advance` lets one lane run to its next unit or to its end; everything
that belongs to a lane rather than to the process (random streams, changed buffers, open windows) is swapped there.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from _thread import allocate_lock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.streaming.isolation import CallerState, LaneAttributes, LaneSwitches, RandomStream
from distzo2.weights.units import Unit
from distzo2.weights.updates import Emission

UNWIND_SECONDS = 60.0  # a cancelled lane that is still running after this long is left behind


class LaneCancelled(BaseException):
    """Unwinds a parked lane; not an Exception, so that the user's own handlers do not take it."""


@dataclass(eq=False)
class Lane:
    """One evaluation: the loss of one batch under one emission, with its own random stream."""

    emission: Emission
    batch: int
    closure: Callable[[], Any]
    stream: RandomStream
    result: Any = None
    error: BaseException | None = None
    done: bool = False
    entered: bool = False  # a unit's forward
    request: Unit | None = None  # the unit at whose entry the lane is parked
    windows: list[Unit] = field(default_factory=list)  # open, outermost first
    visited: list[Unit] = field(default_factory=list)
    changed_buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    attributes: LaneAttributes = field(default_factory=LaneAttributes)
    switches: LaneSwitches = field(default_factory=LaneSwitches)
    thread: LaneThread | None = None


class LaneThread(threading.Thread):
    """A thread that is kept across steps and runs one lane at a time."""

    def __init__(self, back: Any, index: int) -> None:
        super().__init__(name=f"distzo2-lane-{index}", daemon=True)
        self._go = allocate_lock()
        self._go.acquire()
        self._back = back  # released whenever the lane parks or ends
        self._lane: Lane | None = None
        self._caller: CallerState | None = None
        self._context: contextvars.Context | None = None
        self.cancelled = False
        self.start()

    def assign(self, lane: Lane, caller: CallerState, context: contextvars.Context) -> None:
        self._lane, self._caller, self._context = lane, caller, context
        self.cancelled = False
        lane.thread = self

    def resume(self) -> None:
        self._go.release()

    def park(self) -> None:
        """Called in the lane: gives control back and waits for it."""
        self._back.release()
        self._go.acquire()
        if self.cancelled:
            raise LaneCancelled

    def run(self) -> None:
        while True:
            self._go.acquire()
            lane = self._lane
            if lane is None:
                return
            if not self.cancelled:
                self._context.run(self._evaluate, lane)
            lane.done = True
            self._lane = self._caller = self._context = None
            lane = None
            self._back.release()

    def _evaluate(self, lane: Lane) -> None:
        try:
            self._caller.enter()
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


class LaneGroup:
    """The lanes of one pass and the threads they run in. `advance` is the only way a lane runs."""

    def __init__(self) -> None:
        self._back = allocate_lock()
        self._back.acquire()
        self._threads: list[LaneThread] = []
        self.running: Lane | None = None
        # A group that is dropped without close() takes its threads with it.
        weakref.finalize(self, _end, self._threads).atexit = False

    def begin(self, lanes: Sequence[Lane], callers: Sequence[CallerState]) -> None:
        """Gives every lane a thread and one of `callers`; none runs yet."""
        while len(self._threads) < len(lanes):
            self._threads.append(LaneThread(self._back, len(self._threads)))
        for lane, thread, caller in zip(lanes, self._threads, callers, strict=False):
            thread.assign(lane, caller, contextvars.copy_context())

    def advance(self, lane: Lane) -> None:
        """Runs `lane` until it parks at its next unit or ends; raises what its code raised."""
        self.running, lane.request = lane, None
        lane.thread.resume()
        self._back.acquire()
        self.running = None
        if lane.error is not None:
            raise lane.error

    def park(self, unit: Unit) -> None:
        """Called in the running lane, at the entry of `unit`."""
        lane = self.running
        if lane is None or threading.current_thread() is not lane.thread:
            raise DistZO2Error(f"unit {unit.name} was entered from a thread that is not a lane of this pass")
        lane.request = unit
        lane.visited.append(unit)
        lane.thread.park()

    def unwind(self, lanes: Sequence[Lane]) -> None:
        """Ends every lane that has not ended. A lane that will not end in time takes its thread with it."""
        stuck = self.running
        interrupted = stuck is not None and not stuck.done  # while the lane computes: wait for it to come back
        if interrupted and not self._back.acquire(timeout=UNWIND_SECONDS):
            self._abandon()
            return
        self.running = None
        for lane in lanes:
            thread = lane.thread
            attempts = 0
            while thread is not None and not lane.done:
                thread.cancelled = True
                self.running = lane
                thread.resume()
                if not self._back.acquire(timeout=UNWIND_SECONDS) or (attempts := attempts + 1) > 1000:
                    self._abandon()
                    return
                self.running = None

    def _abandon(self) -> None:
        """Leaves a lane that does not come back behind: the threads of its pass are daemons, and new ones are made."""
        self._back = allocate_lock()
        self._back.acquire()
        self._threads.clear()
        self.running = None

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
