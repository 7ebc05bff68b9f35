"""Ctrl-C at safe points only: between two units, never between a weight's update and the note that it was made."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

_entered: list[DeferredInterrupt] = []  # by the main thread; the last is the innermost


class DeferredInterrupt:
    """While entered in the main thread, SIGINT is kept; `check` raises it, and leaving does.

    May be entered again while entered. In other threads, which Python never interrupts, it does nothing.
    """

    def __init__(self) -> None:
        self._depth = 0
        self.pending = False  # an interrupt came, and is kept
        self._previous = None
        self.also: Callable[[], None] | None = None  # asked at safe points too; what it raises ends the pass

    def _keep(self, signum: int, frame: FrameType | None) -> None:
        self.pending = True

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            if self._depth == 0:
                previous = signal.getsignal(signal.SIGINT)
                if callable(previous):
                    self._previous, self.pending = previous, False
                    signal.signal(signal.SIGINT, self._keep)
            self._depth += 1
            _entered.append(self)
        return self

    def __exit__(self, *error) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        _entered.remove(self)
        if self._depth == 0 and self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
            if self.pending:
                self.pending = False
                signal.raise_signal(signal.SIGINT)

    def check(self) -> None:
        """A safe point: an interrupt that came is raised here."""
        if self.pending and threading.current_thread() is threading.main_thread():
            self.pending = False
            self._previous(signal.SIGINT, None)  # Python's own handler raises KeyboardInterrupt
        if self.also is not None:
            self.also()


def check_for_interrupt(in_lane: bool = False) -> None:
    """Raises an interrupt that came and is kept; for waits that may be long, whose end can be given up. `in_lane`: in
    the thread of a lane too, for whose end the main thread waits."""
    if in_lane or threading.current_thread() is threading.main_thread():
        for interrupt in reversed(_entered):
            if interrupt.pending:
                interrupt.pending = False
                interrupt._previous(signal.SIGINT, None)
