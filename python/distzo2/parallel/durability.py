"""How far rank 0's journal is durable, told to the other ranks while they compute.

The write-ahead rule holds on every rank: a stored copy may reach that rank's disk only after the journal's lines before
it are durable, and rank 0 alone writes them. Its journal's thread tells each rank by a numbered key of the store; each
of the others waits for its next key in a thread of its own, so that a ring whose slots wait for the journal goes on in
the middle of a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from distzo2.parallel.heartbeat import bounded

ALWAYS_DURABLE = 2**62  # without a journal nothing waits for one
LONGEST_WAIT = timedelta(days=365)
END = b"end"


class DurabilityTeller:
    """On rank 0. `tell` may be called from any one thread."""

    def __init__(self, store: Any, name: str, world_size: int) -> None:
        self._store, self._name, self._world_size = store, name, world_size
        self._number = 0

    def tell(self, durable: int) -> None:
        """Tells every other rank; one that cannot be told any more is not this rank's concern."""
        number, self._number = self._number, self._number + 1
        for rank in range(1, self._world_size):
            with suppress(Exception):
                self._store.set(f"{self._name}/{rank}/{number}", str(durable))


class DurabilityListener:
    """On the other ranks. `on_durable` is called from the thread with each count, in order."""

    def __init__(
        self, store: Any, clone: Any, name: str, rank: int, durable: int, on_durable: Callable[[int], None]
    ) -> None:
        """`clone`, on which the thread waits, must be a connection of its own. `durable`: how many entries are now."""
        self._store, self._clone, self._prefix = store, clone, f"{name}/{rank}"
        self._on_durable = on_durable
        self._number = 0
        self._durable = durable
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="distzo2-durability", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            key = f"{self._prefix}/{self._number}"
            try:
                self._clone.wait([key], LONGEST_WAIT)
                value = self._clone.get(key)
                if value == END:
                    return
                self._clone.delete_key(key)
            except Exception:  # the store is gone; the heartbeat says so
                return
            self._number += 1
            self._durable = int(value)
            self._on_durable(self._durable)

    def wait_until(self, durable: int, seconds: float, check: Callable[[], None]) -> bool:
        """Whether so many entries became durable in time; `check` may end the wait by raising."""
        deadline = time.monotonic() + seconds
        while self._durable < durable and self._thread.is_alive() and time.monotonic() < deadline:
            check()
            time.sleep(0.001)
        return self._durable >= durable

    def close(self, seconds: float = 5.0) -> None:
        """Ends the thread; one that waits for a store which no longer answers is left to itself after `seconds`."""
        self._closing = True
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            bounded(lambda: self._store.set(f"{self._prefix}/{self._number}", END), 1.0)
            self._thread.join(timeout=0.05)
