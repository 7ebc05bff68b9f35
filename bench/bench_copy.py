"""Speed of HostPool and CopyEngine beside the raw copy that moves the same bytes.

    python bench/bench_copy.py                  # CPU, and CUDA where there is a GPU
    python bench/bench_copy.py --directory /big/disk --device cpu

Blocks go through a ring of three slots as in a step: the next two are prefetched, one is acquired and released. `up`
leaves them clean, `duplex` marks each as changed, so that it also goes back; `down` writes back blocks that stay in
their slots. Raw on a CPU is memmove, by one thread and by as many as the engine has (`threads`, the figure to reach);
raw on CUDA is a copy from and to memory pinned by torch, one stream for each direction; raw of a file is O_DIRECT reads
from four threads. The contents of every slot are checked first. A pool is made before that: `overlapped` is how it is
made, `in series` is touched first and pinned then.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from bench_common import interleaved_seconds, synchronize, write_results

import distzo2_core

MIB = 2**20
SLOTS = 3
WAYS = {"up": [True], "duplex": [True, False], "down": [False]}  # whether a copy goes up
READERS = 4
COPY_THREADS = 2  # of the engine on a CPU, for each direction
COPY_CHUNK = 8 * MIB
POOL_CHUNK = 2**30  # bytes that a pool pins at once
POOL_CHUNKS = 8
POOL_THREADS = 16  # that touch, at most


@contextmanager
def raw_cpu(blocks: list[torch.Tensor], slots: list[torch.Tensor]) -> Iterator[Callable[[str], None]]:
    """memmove by threads that share the blocks' chunks; both directions at once take twice as many, in no order."""
    num_bytes = blocks[0].numel()
    chunk = min(COPY_CHUNK, num_bytes // COPY_THREADS)

    def copy(thread: int, up: bool) -> None:
        for number, block in enumerate(blocks):
            slot = slots[(number + up) % len(slots)]  # the two directions at once are in different slots
            to, source = (slot, block) if up else (block, slot)
            for offset in range(thread * chunk, num_bytes, COPY_THREADS * chunk):
                size = min(chunk, num_bytes - offset)
                ctypes.memmove(to.data_ptr() + offset, source.data_ptr() + offset, size)  # releases the GIL

    with ThreadPoolExecutor(2 * COPY_THREADS) as threads:

        def run(direction: str) -> None:
            ways = WAYS[direction]
            for future in [threads.submit(copy, thread, up) for thread in range(COPY_THREADS) for up in ways]:
                future.result()

        yield run


def stream_handle(device: str) -> int:
    """The stream that compute would run on; 0 on a CPU."""
    return torch.cuda.current_stream().cuda_stream if device.startswith("cuda") else 0


def run_ring(
    engine: distzo2_core.CopyEngine, num_blocks: int, device: str, dirty: bool, visit: Callable | None = None
) -> None:
    """One pass over all blocks, to the end of all copies; visit(block, slot) looks at each while it is acquired."""
    stream = stream_handle(device)
    for ahead in range(min(SLOTS - 1, num_blocks)):
        engine.prefetch(ahead)
    for block in range(num_blocks):
        slot = engine.acquire(block, stream)
        if visit is not None:
            visit(block, slot)
        engine.release(block, stream, dirty=dirty, version=0)
        if block + SLOTS - 1 < num_blocks:
            engine.prefetch(block + SLOTS - 1)
    if dirty:
        engine.flush()
    synchronize(device)
    for block in range(num_blocks):
        engine.drop(block)


def run_down(engine: distzo2_core.CopyEngine, num_blocks: int, device: str) -> None:
    """Writes SLOTS blocks back in turn, `num_blocks` in all; they are uploaded by the first call alone."""
    stream = stream_handle(device)
    for number in range(num_blocks):
        engine.acquire(number % SLOTS, stream)
        engine.release(number % SLOTS, stream, dirty=True, version=0)
        if number % SLOTS == SLOTS - 1 or number == num_blocks - 1:
            engine.flush()


def checker(slots: list[torch.Tensor], nbytes: int) -> Callable[[int, int], None]:
    """Compares each slot with the content that `fill` gives the block."""

    def check(block: int, slot: int) -> None:
        if not torch.equal(slots[slot][:nbytes].cpu(), fill(block, nbytes)):
            raise AssertionError(f"block {block}: slot {slot} holds other bytes")

    return check


def fill(block: int, nbytes: int) -> torch.Tensor:
    """The content of a block: uint8 [nbytes], another for each block."""
    return (torch.arange(nbytes, dtype=torch.int32) * (2 * block + 3) >> 5).to(torch.uint8)


def row(device: str, source: str, pattern: str, nbytes: int, num_blocks: int, seconds: dict) -> dict:
    """A result: rates in GB/s of one direction, and the ratio of the engine's rate to the raw one's."""
    total, mib = nbytes * num_blocks, nbytes / MIB
    engine, raw = seconds["engine"]["median"], seconds["raw"]["median"]
    result = {
        "device": device,
        "source": source,
        "pattern": pattern,
        "block_mib": mib,
        "num_blocks": num_blocks,
        "seconds": seconds,
        "engine_gb_per_s": total / engine / 1e9,
        "raw_gb_per_s": total / raw / 1e9,
        "engine_over_raw": raw / engine,
    }
    threads = ""
    if "threads" in seconds:
        result["threads_gb_per_s"] = total / seconds["threads"]["median"] / 1e9
        result["engine_over_threads"] = seconds["threads"]["median"] / engine
        threads = f"  threads {result['threads_gb_per_s']:7.2f} GB/s  {result['engine_over_threads']:5.2f}"
    print(
        f"{device:5} {source:5} {pattern:7} {mib:6.0f} MiB  engine {result['engine_gb_per_s']:7.2f} GB/s"
        f"  raw {result['raw_gb_per_s']:7.2f} GB/s  {result['engine_over_raw']:5.2f}{threads}",
        flush=True,
    )
    return result


def bench_host(device: str, nbytes: int, num_blocks: int, rounds: int) -> list[dict]:
    """Blocks in a HostPool: upload alone, with download, and download alone."""
    cuda = device.startswith("cuda")
    pool = distzo2_core.HostPool([nbytes] * num_blocks, "cuda:0" if cuda else "cpu", pin=cuda)
    blocks = [pool.tensor(block) for block in range(num_blocks)]
    for block, tensor in enumerate(blocks):
        tensor.copy_(fill(block, nbytes))
    slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
    engine = distzo2_core.CopyEngine("cuda:0" if cuda else "cpu", pool, [slot.data_ptr() for slot in slots], nbytes)
    run_ring(engine, num_blocks, device, dirty=True, visit=checker(slots, nbytes))
    run_ring(engine, num_blocks, device, dirty=False, visit=checker(slots, nbytes))  # what came back is what went up
    raw = raw_cuda(slots, nbytes, num_blocks) if cuda else raw_memmove(slots, blocks, nbytes)
    rows = []
    with nullcontext() if cuda else raw_cpu(blocks, slots) as threaded:
        for pattern in WAYS:
            contenders = {
                "engine": partial(run_ring, engine, num_blocks, device, pattern == "duplex"),
                "raw": partial(raw, pattern),
            }
            if pattern == "down":
                contenders["engine"] = partial(run_down, engine, num_blocks, device)
            if not cuda:
                contenders["threads"] = partial(threaded, pattern)
            # By the host's clock to the end of all copies: the engine's streams are its own.
            seconds = interleaved_seconds(contenders, "cpu", rounds)
            rows.append(row(device, "host", pattern, nbytes, num_blocks, seconds))
    engine.close()
    pool.close()
    return rows


def raw_memmove(slots: list[torch.Tensor], blocks: list[torch.Tensor], nbytes: int) -> Callable[[str], None]:
    """One thread: every block into a slot, and back."""

    def run(pattern: str) -> None:
        for index, block in enumerate(blocks):
            slot = slots[index % SLOTS]
            for up in WAYS[pattern]:
                target, source = (slot, block) if up else (block, slot)
                ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)

    return run


def raw_cuda(slots: list[torch.Tensor], nbytes: int, num_blocks: int) -> Callable[[str], None]:
    """Pinned copies, each direction on a stream of its own, with no order between them."""
    pinned = [torch.randint(256, (nbytes,), dtype=torch.uint8).pin_memory() for _ in range(2)]
    up, down = torch.cuda.Stream(), torch.cuda.Stream()

    def run(pattern: str) -> None:
        for index in range(num_blocks):
            if pattern != "down":
                with torch.cuda.stream(up):
                    slots[index % 2].copy_(pinned[0], non_blocking=True)
            if pattern != "up":
                with torch.cuda.stream(down):
                    pinned[1].copy_(slots[2], non_blocking=True)
        torch.cuda.synchronize()

    return run


def bench_file(directory: Path, nbytes: int, num_blocks: int, rounds: int) -> list[dict]:
    """Blocks in a file, read into slots on the CPU device."""
    path = directory / "bench_copy.blocks"
    file = distzo2_core.BlockFile(str(path), [nbytes] * num_blocks)
    slots = [distzo2_core.aligned_buffer(nbytes) for _ in range(SLOTS)]
    for block in range(num_blocks):
        slots[0].copy_(fill(block, nbytes))
        file.write(block, slots[0].data_ptr(), nbytes)
    file.sync()
    engine = distzo2_core.CopyEngine("cpu", file, [slot.data_ptr() for slot in slots], nbytes)
    run_ring(engine, num_blocks, "cpu", dirty=False, visit=checker(slots, nbytes))
    with ThreadPoolExecutor(READERS) as threads:
        raw = raw_reads(path, nbytes * num_blocks, threads)
        seconds = interleaved_seconds(
            {"engine": lambda: run_ring(engine, num_blocks, "cpu", False), "raw": raw}, "cpu", rounds
        )
    engine.close()
    stats = file.stats()
    file.close(unlink=True)
    return [row("cpu", "disk", "up", nbytes, num_blocks, seconds) | {"direct": stats["direct"]}]


def raw_reads(path: Path, num_bytes: int, threads: ThreadPoolExecutor) -> Callable[[], None]:
    """O_DIRECT reads (plain ones where the file system has none) of 4 MiB from READERS threads, over the whole file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    chunk = 4 * MIB
    buffers = [mmap.mmap(-1, chunk) for _ in range(READERS)]

    def read(reader: int) -> None:
        for offset in range(reader * chunk, num_bytes, READERS * chunk):
            os.preadv(descriptor, [buffers[reader]], offset)

    return lambda: list(threads.map(read, range(READERS)))


def make_pool(device: str, num_bytes: int, pin: bool) -> tuple[distzo2_core.HostPool, float]:
    """A pool of one block, and the seconds in which it was made."""
    start = time.perf_counter()
    pool = distzo2_core.HostPool([num_bytes], device, pin=pin)
    return pool, time.perf_counter() - start


def pin(tensor: torch.Tensor, num_threads: int) -> float:
    """Seconds in which memory that is present already is pinned in chunks, by the runtime's call."""
    runtime, chunks = torch.cuda.cudart(), tensor.split(POOL_CHUNK)

    def register(chunk: torch.Tensor) -> None:
        torch.cuda.check_error(runtime.cudaHostRegister(chunk.data_ptr(), chunk.numel(), 0))

    with ThreadPoolExecutor(num_threads) as threads:
        start = time.perf_counter()
        list(threads.map(register, chunks))
        seconds = time.perf_counter() - start
    for chunk in chunks:
        torch.cuda.check_error(runtime.cudaHostUnregister(chunk.data_ptr()))
    return seconds


def bench_pool(device: str, num_bytes: int) -> dict:
    """How fast pages are touched, by all threads and on a CPU by one; on CUDA also pinned, in series and overlapped."""
    cuda, cores = device.startswith("cuda"), os.sched_getaffinity(0)
    seconds = {}
    if not cuda:
        os.sched_setaffinity(0, {min(cores)})
        seconds["touch by 1"] = make_pool("cpu", num_bytes, False)[1]
        os.sched_setaffinity(0, cores)
    pool, touched = make_pool("cpu", num_bytes, False)
    seconds[f"touch by {min(len(cores), POOL_THREADS)}"] = touched
    stats = pool.stats()
    if cuda:
        seconds |= {f"pin by {n}": pin(pool.tensor(0), n) for n in (1, 2)}
        seconds["in series"] = touched + seconds["pin by 1"]
        del pool
        pool, seconds["overlapped"] = make_pool("cuda:0", num_bytes, True)
        stats = pool.stats()
    pool.close()
    rates = {name: num_bytes / value / 1e9 for name, value in seconds.items()}
    figures = "  ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
    print(f"{device:5} pool of {num_bytes / 2**30:.1f} GiB: {figures} GB/s", flush=True)
    return {"device": device, "pattern": "make_pool", "num_bytes": num_bytes, "gb_per_s": rates, "stats": stats}


def main() -> None:
    """Parse the options, run, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "all"], default="all", help="default: what there is")
    parser.add_argument("--mib", default="4,16,64,256", help="block sizes in MiB, comma-separated")
    parser.add_argument("--total-mib", type=int, default=1024, help="bytes moved in a pass, in MiB")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median is reported")
    parser.add_argument("--directory", type=Path, help="where the file of blocks goes (default: the temporary one)")
    parser.add_argument("--skip-disk", action="store_true", help="without the file of blocks")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch sees no GPU")
    devices = ["cpu"] if options.device != "cuda" else []
    if options.device == "cuda" or (options.device == "all" and torch.cuda.is_available()):
        devices.append("cuda")
    rows: list[dict] = []
    for device in devices:
        rows.append(bench_pool(device, POOL_CHUNKS * POOL_CHUNK if device == "cuda" else options.total_mib * MIB))
        for mib in map(int, options.mib.split(",")):
            num_blocks = max(SLOTS + 1, options.total_mib // mib)
            rows += bench_host(device, mib * MIB, num_blocks, options.rounds)
            write_results(options.json, "copy", rows)  # a run that is cut short leaves what it has
    if "cpu" in devices and not options.skip_disk:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            for mib in map(int, options.mib.split(",")):
                rows += bench_file(Path(directory), mib * MIB, max(SLOTS + 1, options.total_mib // mib), options.rounds)
    write_results(options.json, "copy", rows)


if __name__ == "__main__":
    main()
