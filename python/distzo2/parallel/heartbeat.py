"""Whether the other ranks are alive, and the first cause when one is not: heartbeats over the rendezvous store.

A thread of each rank counts up a key and reads everyone's. These are failures: a rank that stops counting, a process of
this machine that has ended, a cause that some rank has posted, and a store that no longer answers. Time is counted in
rounds, so that a machine that slept, with all its ranks, finds them as they were. Nobody is interrupted: whoever waits
for other ranks calls `check` meanwhile, and callbacks end what waits elsewhere.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

from distzo2.errors import DistZO2Error

STORE_SECONDS = 5.0  # that a last message to the store may take
LEFT = b"left"  # instead of a count: the rank has shut down its mesh


class RankFailedError(DistZO2Error):
    """Another rank failed, was lost or has left; the message names it and the first cause.

    `rank` is None where it is not known which one. `told`: the failed rank is alive, and reports its error itself.
    """

    def __init__(self, message: str, rank: int | None = None, told: bool = False) -> None:
        super().__init__(message)
        self.rank, self.told = rank, told


def describe(error: BaseException) -> str:
    """An error in one line, with its type unless it is one of ours."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    kind = "" if isinstance(error, DistZO2Error) else type(error).__name__
    return ": ".join(filter(None, [kind, " ".join(str(error).split())]))


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """Returns what `call` returns; None if it raises, or takes longer: then it continues in a thread.

    For calls of a store whose host may be cut off, which end only when TCP gives up, and by no signal before.
    """
    results: list[Any] = []

    def run() -> None:
        with suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=seconds)
    return results[0] if results else None


class Heartbeat:
    """The heartbeats of one rank, and what it knows of the others."""

    def __init__(self, store: Any, rank: int, world_size: int, *, interval: float, limit: float) -> None:
        """
        Args:
            store: a connection for the heartbeats alone, since a blocked call on one holds up all others.
            interval, limit: seconds between heartbeats, and without one before a rank is given up.
        """
        self.rank, self.world_size, self.interval, self.limit = rank, world_size, interval, limit
        self._store = store
        self._keys = [f"beat/{r}" for r in range(world_size)]
        self.failure: RankFailedError | None = None  # the first one that is known
        self.on_failure: Callable[[], None] | None = None  # called once, in a thread of the heartbeat
        self.left: set[int] = set()
        self.store_lost = False  # the store no longer answers
        self._rounds = 0  # of the heartbeat with the store
        self._lock, self._stop = threading.Lock(), threading.Event()
        mine = {"host": host_name(), "name": socket.gethostname(), "pid": os.getpid()}
        store.set(f"process/{rank}", json.dumps({**mine, "start": process_start(os.getpid())}))
        store.add(self._keys[rank], 1)
        self._processes = [json.loads(text) for text in store.multi_get([f"process/{r}" for r in range(world_size)])]
        self._here = [r for r, process in enumerate(self._processes) if process["host"] == mine["host"] and r != rank]
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    # ---- what others ask ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises RankFailedError once another rank is known to have failed."""
        if self.failure is not None:
            raise copy(self.failure)

    def post(self, text: str) -> None:
        """Tells all ranks that this one has failed. They report the first cause that any rank has posted."""
        bounded(lambda: self._first_cause(self.rank, text), STORE_SECONDS)

    def explain(self, error: BaseException) -> RankFailedError:
        """Waits until it is known which rank's failure is behind an error of a connection; returns that failure."""
        deadline = time.monotonic() + self.limit + 2 * self.interval
        while self.failure is None and not self.left and time.monotonic() < deadline:
            time.sleep(min(0.02, self.interval))
        if self.failure is None and self.left:
            gone = self.gone()
            self._lost(gone.rank, str(gone))  # who leaves because of this one is not to be blamed
        return copy(self.failure) or RankFailedError(f"the connection to another rank was lost ({describe(error)})")

    def gone(self) -> RankFailedError:
        """Returns the error for those who still need ranks that have shut down their mesh."""
        return left_mesh(min(self.left))

    def fail(self, text: str, rank: int | None, told: bool = False) -> None:
        """Makes `check` raise from now on; the first failure stays."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = RankFailedError(text, rank, told)
        if self.on_failure is not None:
            with suppress(Exception):
                self.on_failure()

    def leave(self) -> None:
        """Ends the threads, and tells the other ranks that this one has left."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=0.0 if self.store_lost else STORE_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            bounded(lambda: self._store.set(self._keys[self.rank], LEFT), STORE_SECONDS)

    def wait_for_others(self) -> None:
        """Waits until all others have left, or one has failed. For the rank whose process serves the store."""
        deadline = time.monotonic() + self.limit
        while len(self.left) < self.world_size - 1 and self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)

    # ---- the threads --------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        before, silent = [b""] * self.world_size, [0] * self.world_size  # of each rank; rounds since its count changed
        while not self._stop.wait(self.interval):
            with suppress(Exception):  # how long the store may fail is for _watch to judge
                self._store.add(self._keys[self.rank], 1)
                beats = self._store.multi_get(self._keys)
                cause = json.loads(self._store.get("cause")) if self._store.check(["cause"]) else None
                self._rounds += 1
                if cause is not None and cause["rank"] != self.rank:
                    self.fail(cause["text"], cause["rank"], told=cause["rank"] == cause["by"])
                self.left = {r for r, beat in enumerate(beats) if beat == LEFT}  # after a cause, which is posted first
                silent = [s + 1 if new == old else 0 for s, new, old in zip(silent, beats, before, strict=True)]
                before = beats
            self._look_at_processes()
            for rank in set(range(self.world_size)) - {self.rank} - self.left:
                if silent[rank] * self.interval > self.limit:
                    where = "" if rank in self._here else f" ({self._processes[rank]['name']})"
                    text = f"rank {rank}{where} has not been heard of for {self.limit:g} s: it hangs, or is cut off"
                    self._lost(rank, text)

    def _look_at_processes(self) -> None:
        for rank in self._here:
            pid = self._processes[rank]["pid"]
            if rank in self.left or process_start(pid) == self._processes[rank]["start"]:
                continue
            with suppress(Exception):
                if self._store.get(self._keys[rank]) == LEFT:  # it left in order, and then ended
                    continue
            self._lost(rank, f"rank {rank} was lost: its process {pid} has ended")

    def _lost(self, rank: int, text: str) -> None:
        with suppress(Exception):
            cause = self._first_cause(rank, text)
            rank, text = cause["rank"], cause["text"]
        self.fail(text, rank)

    def _first_cause(self, rank: int, text: str) -> dict[str, Any]:
        """Posts why a rank has failed; returns the first such cause that any rank has posted."""
        mine = json.dumps({"rank": rank, "by": self.rank, "text": text})
        return json.loads(self._store.compare_set("cause", "", mine))

    def _watch(self) -> None:
        limit, seen, silent = self.limit + 5 * self.interval, 0, 0
        while not self._stop.wait(self.interval):
            seen, silent = self._rounds, (0 if seen != self._rounds else silent + 1)
            if silent * self.interval > limit:
                self.store_lost = True
                where = f" on {os.environ['MASTER_ADDR']}" if "MASTER_ADDR" in os.environ else ""
                text = f"the rendezvous store{where} has not answered for {limit:g} s: it or the network is down"
                self.fail(text, None)


def left_mesh(rank: int) -> RankFailedError:
    return RankFailedError(f"rank {rank} has left the mesh: its program ended, or called shutdown()", rank)


def machine_name() -> str:
    """The kernel's name for this boot of the machine, which containers on it share as they share its memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def host_name() -> str:
    """Names this machine and its space of process ids."""
    pids = Path("/proc/self/ns/pid")
    return f"{machine_name()} {pids.readlink() if pids.is_symlink() else ''}"


def process_start(pid: int) -> str | None:
    """Returns when a process started, in clock ticks; None if it has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
