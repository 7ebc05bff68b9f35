"""Rates of transfers through the copy engine, of host memory and of a disk, and of an all-gather between ranks.

All blocks of a pass go through a ring of three slots as in a step: the next ones are prefetched while one is acquired.
`up` leaves them clean; `both` marks each as changed, so that it also goes back; `down` changes blocks that are present.
How each compares with raw copies, `bench/bench_copy.py` and `bench/bench_disk.py` measure.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer

from distzo2.errors import DistZO2Error, UsageError
from distzo2.weights.store import core_errors
from distzo2_core import BlockFile, CopyEngine, HostPool, aligned_buffer

MIB = 2**20
SLOTS = 3
NUM_BLOCKS = 9  # a multiple of the slots
DIRECTIONS = ("up", "down", "both")
GATHER_LIMIT_S = 90.0


class Effort(NamedTuple):
    """How long to measure."""

    quick: bool = False  # shows that all of it works; the figures are rough
    rounds: int = 5  # of transfers
    seconds: float = 0.25  # of calls at least

    def pick(self, quick: int, whole: int) -> int:
        return quick if self.quick else whole


QUICK = Effort(True, 2, 0.004)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], effort: Effort, device: torch.device) -> float:
    """Median seconds of a call on the device."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # which the timer synchronizes
        return timer.blocked_autorange(min_run_time=effort.seconds).median


# ---- the copy engine ----------------------------------------------------------------------------------------------


def _rates(
    store: HostPool | BlockFile,
    slots: Sequence[torch.Tensor],
    device: torch.device,
    effort: Effort,
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Bytes/s by direction between `store` and `slots`; `both` counts those of both directions together. `before` is
    called before each pass."""
    block_bytes, ahead = slots[0].numel(), SLOTS - 1
    engine = CopyEngine(str(device), store, [slot.data_ptr() for slot in slots], block_bytes)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def visit(block: int, dirty: bool = False) -> None:
        engine.acquire(block, stream)
        engine.release(block, stream, dirty=dirty, version=0)

    def run(direction: str) -> None:
        """One pass, to the end of all its copies."""
        if direction == "down":
            for _ in range(NUM_BLOCKS // SLOTS):
                for block in range(SLOTS):
                    visit(block, dirty=True)
                engine.flush()  # else a download that has not begun when its block is acquired is put off
        else:
            for block in range(ahead):
                engine.prefetch(block)
            for block in range(NUM_BLOCKS):
                visit(block, dirty=direction == "both")
                if block + ahead < NUM_BLOCKS:
                    engine.prefetch(block + ahead)
            engine.flush()
        _synchronize(device)

    rates = {}
    with closing(engine):
        for direction in DIRECTIONS:
            samples = []
            for _ in range(effort.rounds + 1):  # one to warm up
                for block in engine.present():
                    engine.drop(block)
                for block in range(SLOTS if direction == "down" else 0):  # which it changes
                    visit(block)
                _synchronize(device)
                before()
                start = time.perf_counter()
                run(direction)
                samples.append(time.perf_counter() - start)
            moved = block_bytes * NUM_BLOCKS * (2 if direction == "both" else 1)
            rates[f"{direction}_bytes_per_s"] = moved / statistics.median(samples[1:])
    return rates


@core_errors
def measure_copies(device: torch.device, effort: Effort) -> dict[str, Any]:
    """Copies between host memory and `device`; on a CPU between two places in memory.

    Raises:
        DistZO2Error: the memory cannot be had or pinned.
    """
    block_bytes, name = effort.pick(2, 64) * MIB, str(device)
    pool = HostPool([block_bytes] * NUM_BLOCKS, name)
    on_cpu = device.type == "cpu"
    slots = [
        aligned_buffer(block_bytes) if on_cpu else torch.zeros(block_bytes, dtype=torch.uint8, device=device)
        for _ in range(SLOTS)
    ]
    for block in range(NUM_BLOCKS):
        pool.tensor(block).random_()
    with closing(pool):
        return {"device": name, "block_bytes": block_bytes, **_rates(pool, slots, device, effort)}


@core_errors
def measure_disk(directory: str | os.PathLike, effort: Effort) -> dict[str, Any]:
    """Reads and writes of a file of blocks in `directory`, and how long an appended line takes to be durable.

    The file has no name while it is measured, so that nothing is left behind whatever ends the process.

    Raises:
        UsageError: there is no such directory, or it cannot be written to.
        DistZO2Error: its disk is full, or refuses a transfer.
    """
    if not (os.path.isdir(directory) and os.access(directory, os.W_OK)):
        raise UsageError(f"--directory {directory}: expected a directory, on the disk to measure, to write to")
    block_bytes = effort.pick(2, 32) * MIB
    try:
        with tempfile.NamedTemporaryFile(prefix="distzo2-measure-", dir=directory, buffering=0) as named:
            samples = []
            for _ in range(effort.pick(5, 40)):
                start = time.perf_counter()
                named.write(b"x" * 300)  # such as a line of the journal
                os.fsync(named.fileno())
                samples.append(time.perf_counter() - start)
            named.truncate(0)
            file = BlockFile(named.name, [block_bytes] * NUM_BLOCKS)
            descriptor = os.open(named.name, os.O_RDWR)
    except (OSError, RuntimeError) as error:
        raise DistZO2Error(f"{directory}: cannot be written to: {error}") from error
    slots = [aligned_buffer(block_bytes) for _ in range(SLOTS)]
    for slot in slots:
        slot.random_(generator=torch.Generator().manual_seed(0))  # a disk that compresses must not see zeros
    direct = file.stats()["direct"]

    def forget() -> None:
        """Without O_DIRECT the page cache would be measured instead."""
        if not direct:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    try:
        for block in range(NUM_BLOCKS):  # written, since blocks that are only allocated are read without the disk
            file.write(block, slots[block % SLOTS].data_ptr(), block_bytes)
        file.sync()
        rates = _rates(file, slots, torch.device("cpu"), effort, forget)
    finally:
        file.close()
        os.close(descriptor)
    about = {"directory": os.path.realpath(directory), "direct": direct, "block_bytes": block_bytes}
    return {**about, **rates, "fsync_s": statistics.median(samples)}


# ---- gather -------------------------------------------------------------------------------------------------------


def measure_gather(
    backend: str, num_ranks: int, block_bytes: int, num_rounds: int, time_limit_s: float = GATHER_LIMIT_S
) -> dict[str, Any]:
    """An all-gather between GPUs (nccl) or processes (gloo), over the loopback interface: each rank holds a slice of a
    block and gets the whole. Bytes/s are the block's over the slowest rank's time.

    Raises:
        DistZO2Error: the ranks did not end within the time limit, or one failed. None is left running.
    """
    slice_bytes = block_bytes // num_ranks
    mp = torch.multiprocessing
    times = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="distzo2-gather-") as directory:
        arguments = (backend, num_ranks, slice_bytes, num_rounds, f"file://{directory}/ranks", times)
        ranks = mp.start_processes(_gather_rank, arguments, num_ranks, join=False, daemon=True)
        deadline = time.monotonic() + time_limit_s
        try:
            while not ranks.join(max(0.0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise DistZO2Error(f"the gather did not end within {time_limit_s:g} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise DistZO2Error(f"rank {error.error_index} of the gather failed: {reason}") from error
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
    num_bytes = slice_bytes * num_ranks
    rate = num_bytes / statistics.median(times.get())
    return {"backend": backend, "ranks": num_ranks, "block_bytes": num_bytes, "bytes_per_s": rate}


def _gather_rank(
    rank: int, backend: str, num_ranks: int, slice_bytes: int, num_rounds: int, meet: str, times: Any
) -> None:
    """One rank, in its own process; rank 0 puts the slowest rank's seconds of each round into `times`."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=GATHER_LIMIT_S)
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=num_ranks, timeout=limit)
    part = torch.randint(256, (slice_bytes,), dtype=torch.uint8, device=device)
    whole = torch.zeros(slice_bytes * num_ranks, dtype=torch.uint8, device=device)
    places = whole.split(slice_bytes)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13's name for it
    samples = []
    for _ in range(num_rounds + 2):  # two to warm up
        dist.barrier()
        start = time.perf_counter()
        if backend == "nccl":
            all_gather(whole, part)
            torch.cuda.synchronize(device)
        else:  # as sliced stores gather
            places[rank].copy_(part)
            for work in [dist.broadcast(place, source, async_op=True) for source, place in enumerate(places)]:
                work.wait()
        samples.append(time.perf_counter() - start)
    slowest = torch.tensor(samples[2:], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        times.put(slowest.tolist())
    dist.destroy_process_group()
