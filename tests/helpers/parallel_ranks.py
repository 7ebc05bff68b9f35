"""Processes that stand for ranks: started once, they run one function after another, on as many ranks as it wants."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import forked

INTERVAL, LIMIT = 0.1, 30.0  # seconds, of heartbeats


@dataclass(frozen=True)
class Raised:
    """What a function raised on a rank."""

    kind: str
    text: str
    traceback: str


@dataclass(frozen=True)
class Died:
    """A rank whose process ended; the exit code as multiprocessing gives it."""

    code: int | None


class Ranks:
    """Up to `num_ranks` ranks on this machine. A function gets (rank, world_size, *args); what it returns is pickled.

    `modules` are imported before. The rendezvous store is in this process, as torchrun's is in its agent.
    """

    def __init__(self, num_ranks: int, *modules: str) -> None:
        import torch.distributed as dist

        self._context = forked.context(*modules)  # a rank then starts at once
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._num_calls = 0
        self._processes: list[Any] = [None] * num_ranks
        self._pipes: list[Connection] = [None] * num_ranks
        for rank in range(num_ranks):
            self._start(rank)

    def _start(self, rank: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._store.port), daemon=True)
        process.start()
        theirs.close()
        self._processes[rank], self._pipes[rank] = process, ours

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        patience: float | None = None,
        meanwhile: Callable[[list[int]], None] | None = None,
    ) -> list[Any]:
        """Results of the ranks: what the function returned, Raised, or Died (the process is then replaced).

        Args:
            timeout: seconds after which what still runs is killed, and told as Died(None).
            patience: as `timeout`, once a rank has ended.
            meanwhile: called with the process ids once the function runs.
        """
        self._num_calls += 1
        for rank in range(world_size):
            self._pipes[rank].send((function, rank, world_size, args, self._num_calls))
        if meanwhile is not None:
            meanwhile([self._processes[rank].pid for rank in range(world_size)])
        results: list[Any] = [None] * world_size
        waiting = {self._pipes[rank]: rank for rank in range(world_size)}
        while waiting:
            seconds = timeout if patience is None or len(waiting) == world_size else patience
            ready: list[Any] = []
            for _ in range(int(10 * seconds)):  # not in one wait: a machine that sleeps takes no time of it
                ready = ready or wait(list(waiting), timeout=0.1)
            for pipe in ready or list(waiting):
                rank = waiting.pop(pipe)
                process = self._processes[rank]
                try:
                    if not ready:
                        raise EOFError
                    results[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join(timeout=1.0 if ready else 0.0)
                    results[rank] = Died(process.exitcode)
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGUSR1)  # it tells where it stands
                        process.join(timeout=0.5)
                        os.kill(process.pid, signal.SIGKILL)
                        process.join()
                    pipe.close()
                    self._start(rank)
        return results

    def values(self, function: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[Any]:
        """As `run`, where every rank must return."""
        results = self.run(function, world_size, *args, **options)
        for rank, result in enumerate(results):
            if isinstance(result, Raised | Died):
                raise AssertionError(f"rank {rank}: {getattr(result, 'traceback', result)}")
        return results

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with suppress(OSError):
                pipe.send(None)
            process.join(timeout=5.0)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)


def _serve(pipe: Connection, port: int) -> None:
    faulthandler.register(signal.SIGUSR1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    import torch
    import torch.distributed as dist

    import distzo2.parallel

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, rank, world_size, args, number = job
        try:
            store = dist.PrefixStore(f"call{number}", dist.TCPStore("127.0.0.1", port, is_master=False))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            result = function(rank, world_size, *args)
            distzo2.parallel.shutdown()
        except BaseException as error:
            result = Raised(type(error).__name__, str(error), traceback.format_exc())
            distzo2.parallel.shutdown(error)
        finally:
            with suppress(Exception):
                dist.destroy_process_group()
        gc.collect()  # a journal that an exception left open is locked
        pipe.send(result)


def mesh_of(pert: int, data: int, **options: Any) -> Any:
    """`distzo2.parallel.init` with heartbeats for tests."""
    import distzo2.parallel

    return distzo2.parallel.init(pert, data, **{"interval": INTERVAL, "limit": LIMIT, **options})
