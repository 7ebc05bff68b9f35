"""Rates of transfers: through the copy engine, and raw, by as many threads or streams as the engine has.

All blocks of a pass go through a ring of three slots as in a step: the next ones are prefetched while one is acquired.
`up` leaves them clean; `both` marks each as changed, so that it also goes back; `down` changes blocks that are present.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from distzo2.errors import DistZO2Error, UsageError
from distzo2.planning.machines import Link, read_link
from distzo2.planning.measure_timing import Effort, interleaved_seconds
from distzo2.text import gib
from distzo2_core import BlockFile, CopyEngine, HostPool, aligned_buffer

MIB = 2**20
SLOTS = 3
NUM_BLOCKS = 9  # a multiple of the slots
COPY_THREADS = 2  # of the engine on a CPU, for each direction
DISK_THREADS = 4  # readers of the engine
COPY_CHUNK = 8 * MIB
DISK_CHUNK = 4 * MIB
DIRECTIONS = ("up", "down", "both")
_PASS_S = 1.0  # of the disk, at most so much a pass


class Ring:
    """Passes of an engine over its blocks, each to the end of all its copies."""

    def __init__(self, engine: CopyEngine, num_blocks: int, device: torch.device) -> None:
        self._engine, self._num_blocks, self._device = engine, num_blocks, device
        self._held = SLOTS
        if num_blocks % SLOTS != 0:
            raise ValueError(f"expected a multiple of {SLOTS} blocks, got {num_blocks}")

    def run(self, direction: str) -> None:
        if direction == "down":
            self._down()
        else:
            self._pass(dirty=direction == "both")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    def _pass(self, dirty: bool) -> None:
        engine, stream, ahead = self._engine, self._stream(), SLOTS - 1
        for block in range(min(ahead, self._num_blocks)):
            engine.prefetch(block)
        for block in range(self._num_blocks):
            engine.acquire(block, stream)
            engine.release(block, stream, dirty=dirty, version=0)
            if block + ahead < self._num_blocks:
                engine.prefetch(block + ahead)
        if dirty:
            engine.flush()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.forget()

    def forget(self) -> None:
        """The next pass brings every block again."""
        for block in self._engine.present():
            self._engine.drop(block)

    def prepare(self, direction: str) -> None:
        """Makes present what goes down."""
        for block in range(self._held if direction == "down" else 0):
            self._engine.acquire(block, self._stream())
            self._engine.release(block, self._stream())

    def _down(self) -> None:
        for _ in range(self._num_blocks // self._held):
            for block in range(self._held):
                self._engine.acquire(block, self._stream())
                self._engine.release(block, self._stream(), dirty=True, version=0)
            self._engine.flush()  # a download that has not begun when its block is acquired again would be put off


def _compare(
    ring: Ring, raw: Callable[[str], None], num_bytes: int, effort: Effort, before: Callable[[], None] = lambda: None
) -> dict[str, dict[str, float]]:
    """Bytes/s by direction, of the engine and raw; for both directions at once, those of both together."""
    rates = {}
    for direction in DIRECTIONS:

        def prepare(key: str, direction: str = direction) -> None:
            before()
            if key == "engine":
                ring.prepare(direction)

        seconds = interleaved_seconds(
            {"engine": lambda d=direction: ring.run(d), "raw": lambda d=direction: raw(d)}, effort, prepare=prepare
        )
        moved = num_bytes * (2 if direction == "both" else 1)
        rates[direction] = {f"{key}_bytes_per_s": moved / value for key, value in seconds.items()}
        ring.forget()
    return rates


def measure_copies(device: torch.device, effort: Effort) -> dict[str, Any]:
    """Copies between host memory and `device`; on a CPU between two places in memory.

    Raises:
        DistZO2Error: the memory cannot be had or pinned.
    """
    cuda = device.type == "cuda"
    block_bytes, num_blocks = effort.pick(2, 64) * MIB, NUM_BLOCKS
    name = str(device)
    try:
        pool = HostPool([block_bytes] * num_blocks, name)
    except RuntimeError as error:
        raise DistZO2Error(str(error)) from error
    slots = [
        torch.zeros(block_bytes, dtype=torch.uint8, device=device) if cuda else aligned_buffer(block_bytes)
        for _ in range(SLOTS)
    ]
    engine = CopyEngine(name, pool, [slot.data_ptr() for slot in slots], block_bytes)
    blocks = [pool.tensor(block) for block in range(num_blocks)]
    try:
        with _raw_cuda(blocks, slots) if cuda else raw_cpu(blocks, slots) as raw:
            rates = _compare(Ring(engine, num_blocks, device), raw, block_bytes * num_blocks, effort)
    finally:
        engine.close()
        pool.close()
    return {"device": name, "block_bytes": block_bytes, "num_blocks": num_blocks, **rates}


@contextmanager
def raw_cpu(blocks: list[torch.Tensor], slots: list[torch.Tensor]) -> Iterator[Callable[[str], None]]:
    """memmove by threads, which share the blocks' chunks; for both directions twice as many, with no order between."""
    num_bytes = blocks[0].numel()
    chunk = min(COPY_CHUNK, num_bytes // COPY_THREADS)

    def copy(thread: int, up: bool) -> None:
        for number, block in enumerate(blocks):
            slot = slots[(number + up) % len(slots)]  # the two directions at once are in different slots
            to, source = (slot, block) if up else (block, slot)
            for offset in range(thread * chunk, num_bytes, COPY_THREADS * chunk):
                size = min(chunk, num_bytes - offset)
                ctypes.memmove(to.data_ptr() + offset, source.data_ptr() + offset, size)  # lets go of the GIL

    with ThreadPoolExecutor(2 * COPY_THREADS) as threads:

        def run(direction: str) -> None:
            ways = {"up": [True], "down": [False], "both": [True, False]}[direction]
            for future in [threads.submit(copy, thread, up) for thread in range(COPY_THREADS) for up in ways]:
                future.result()

        yield run


@contextmanager
def _raw_cuda(blocks: list[torch.Tensor], slots: list[torch.Tensor]) -> Iterator[Callable[[str], None]]:
    """Copies of the same pinned memory, a stream for each direction, with no order between them."""
    device = slots[0].device
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def run(direction: str) -> None:
        for number, block in enumerate(blocks):
            slot = slots[number % len(slots)]
            if direction != "down":
                with torch.cuda.stream(up):
                    slot.copy_(block, non_blocking=True)
            if direction != "up":
                with torch.cuda.stream(down):
                    block.copy_(slot, non_blocking=True)
        torch.cuda.synchronize(device)

    yield run


def link_under_load(device: torch.device, address: str) -> Link:
    """The GPU's link while it is in use: an idle one is slowed down to save power."""
    host = torch.zeros(64 * MIB, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=device)
    for _ in range(40):
        there.copy_(host, non_blocking=True)
    time.sleep(0.02)
    link = read_link(address)
    torch.cuda.synchronize(device)
    return link


# ---- disk ---------------------------------------------------------------------------------------------------------


def measure_disk(directory: str | os.PathLike, effort: Effort) -> dict[str, Any]:
    """Reads and writes of a file of blocks in `directory`, and how long a small write takes to be durable.

    The files have no names while they are measured, so that nothing is left behind whatever ends the process.

    Raises:
        UsageError: there is no such directory, or it cannot be written to.
        DistZO2Error: its disk is full, or refuses a transfer.
    """
    fsync_s = _fsync_seconds(directory, effort.pick(5, 40))
    block_bytes, num_blocks = effort.pick(2, 64) * MIB, NUM_BLOCKS
    if not effort.quick:
        while block_bytes > 4 * MIB and block_bytes * num_blocks > _PASS_S * _guess_write_rate(directory):
            block_bytes //= 2
    try:
        return {**_measure_blocks(directory, block_bytes, num_blocks, effort), "fsync_s": fsync_s}
    except RuntimeError as error:
        raise DistZO2Error(str(error)) from error


def _measure_blocks(directory: str | os.PathLike, block_bytes: int, num_blocks: int, effort: Effort) -> dict[str, Any]:
    num_bytes = block_bytes * num_blocks
    # Raw transfers have a file of their own: the blocks' checksums would tell of theirs.
    with _nameless(directory) as (descriptor, path, unlink), _nameless(directory) as (raw_descriptor, _, unlink_raw):
        unlink_raw()
        _check_room(directory, num_bytes)
        file = BlockFile(path, [block_bytes] * num_blocks)
        os.close(descriptor)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        unlink()
        direct = _go_direct(raw_descriptor) if file.stats()["direct"] else False
        slots = [aligned_buffer(block_bytes) for _ in range(SLOTS)]
        for slot in slots:
            slot.random_(generator=torch.Generator().manual_seed(0))  # a disk that compresses must not see zeros
        for block in range(num_blocks):  # written, since blocks that are only allocated are read without the disk
            file.write(block, slots[block % SLOTS].data_ptr(), block_bytes)
        file.sync()
        engine = CopyEngine("cpu", file, [slot.data_ptr() for slot in slots], block_bytes)

        def forget() -> None:
            """Without O_DIRECT the page cache would be measured instead."""
            for each in () if direct else (descriptor, raw_descriptor):
                os.fsync(each)
                os.posix_fadvise(each, 0, 0, os.POSIX_FADV_DONTNEED)

        try:
            with raw_disk(raw_descriptor, num_bytes) as raw:
                raw("down")  # what has never been written is read without the disk
                ring = Ring(engine, num_blocks, torch.device("cpu"))
                rates = _compare(ring, raw, num_bytes, effort, forget)
        finally:
            engine.close()
            file.close()
            os.close(descriptor)
            os.close(raw_descriptor)
    return {
        "directory": os.path.realpath(directory),
        "direct": direct,
        "block_bytes": block_bytes,
        "num_blocks": num_blocks,
        "read": rates["up"],
        "write": rates["down"],
        "both": rates["both"],
    }


@contextmanager
def _nameless(directory: str | os.PathLike) -> Iterator[tuple[int, str, Callable[[], None]]]:
    """A new file: descriptor, path, and what takes its name away, at the latest at the end."""
    if not os.path.isdir(directory):
        raise UsageError(f"--directory {directory}: a directory on the disk to measure was expected")
    try:
        descriptor, path = tempfile.mkstemp(prefix="distzo2-measure-", dir=directory)
    except OSError as error:
        raise UsageError(f"--directory {directory}: no file can be made there: {error.strerror}") from error

    def unlink() -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)

    try:
        yield descriptor, path, unlink
    finally:
        unlink()


def _check_room(directory: str | os.PathLike, num_bytes: int) -> None:
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < 3 * num_bytes:
        raise DistZO2Error(f"{directory}: measuring its disk takes {gib(num_bytes)}, and {gib(free)} are free there")


def _go_direct(descriptor: int) -> bool:
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        return True
    return False


def _guess_write_rate(directory: str | os.PathLike) -> float:
    """Bytes/s of a short write, so that a slow disk is not measured for minutes."""
    with _nameless(directory) as (descriptor, _, unlink):
        unlink()
        try:
            _check_room(directory, 16 * MIB)
            data = os.urandom(DISK_CHUNK)
            start = time.perf_counter()
            for _ in range(4):
                os.write(descriptor, data)
            os.fsync(descriptor)
            return 4 * DISK_CHUNK / (time.perf_counter() - start)
        finally:
            os.close(descriptor)


def _fsync_seconds(directory: str | os.PathLike, num_writes: int) -> float:
    """Median seconds until an appended line, as the journal's, is on the disk."""
    samples = []
    with _nameless(directory) as (descriptor, _, unlink):
        unlink()
        try:
            for _ in range(num_writes):
                start = time.perf_counter()
                os.write(descriptor, b"x" * 300)
                os.fsync(descriptor)
                samples.append(time.perf_counter() - start)
        except OSError as error:
            raise DistZO2Error(f"{directory}: cannot be written to: {error.strerror}") from error
        finally:
            os.close(descriptor)
    return statistics.median(samples)


@contextmanager
def raw_disk(descriptor: int, num_bytes: int) -> Iterator[Callable[[str], None]]:
    """pread and pwrite of chunks by threads of their own for each direction, over the whole file."""
    # The same kind of memory as the slots': on huge pages a transfer has fewer segments.
    memory = aligned_buffer(2 * DISK_THREADS * DISK_CHUNK).random_(generator=torch.Generator().manual_seed(1))
    buffers = memory.view(2, DISK_THREADS, DISK_CHUNK).numpy()

    def transfer(thread: int, write: bool) -> None:
        view = memoryview(buffers[int(write), thread])
        move = os.pwritev if write else os.preadv
        for start in range(thread * DISK_CHUNK, num_bytes, DISK_THREADS * DISK_CHUNK):
            part, offset = view[: min(DISK_CHUNK, num_bytes - start)], start
            while part:  # transfers may be short; what is left stays aligned
                moved = move(descriptor, [part], offset)
                if moved == 0:
                    raise DistZO2Error(f"the file that is measured ends at {offset}, and {num_bytes} were expected")
                part, offset = part[moved:], offset + moved

    with ThreadPoolExecutor(2 * DISK_THREADS) as threads:

        def run(direction: str) -> None:
            ways = {"up": [False], "down": [True], "both": [False, True]}[direction]
            for future in [threads.submit(transfer, t, write) for t in range(DISK_THREADS) for write in ways]:
                future.result()

        yield run
