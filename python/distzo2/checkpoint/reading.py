"""Many ranges of files at once, by a few threads, into memory that is already there.

A file that the page cache holds is read through it; any other with O_DIRECT, so that a checkpoint larger than memory
drives nothing out of it. Direct reads need aligned offsets and memory, which tensors in a file do not have: each thread
reads into a block of its own, on huge pages (a read is then a few segments and not a thousand), and copies from there.
That block is all the memory that reading takes, whatever is read.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from distzo2.checkpoint.weight_files import CheckpointError, RangeFile, bytes_of
from distzo2_core import aligned_buffer

CHUNK_BYTES = 4 << 20  # of one read
NUM_THREADS = 6
_PAGE = 4096  # O_DIRECT asks for less on most disks, and for more on none
_HUGE_PAGE = 2 << 20
_GAP_BYTES = 64 << 10  # what may be read for nothing to save a read


@dataclass(frozen=True)
class Range:
    """Bytes [offset, offset + num_bytes) of a file, at most `CHUNK_BYTES`, and what becomes of them.

    `fill` is called with them as a uint8 tensor, in one of the threads. A range whose `place` is set is copied there.
    """

    file: RangeFile
    offset: int
    num_bytes: int
    place: torch.Tensor | None = None  # uint8, contiguous, on the CPU
    fill: Callable[[torch.Tensor], None] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


def split(file: RangeFile, offset: int, place: torch.Tensor) -> Iterator[Range]:
    """The ranges of a long run of bytes that belongs at `place`, cut where the file's chunks end."""
    flat = place.detach().reshape(-1).view(torch.uint8)
    begin = 0
    while begin < flat.numel():
        end = min(flat.numel(), begin + CHUNK_BYTES - (offset + begin) % CHUNK_BYTES)
        yield Range(file, offset + begin, end - begin, flat[begin:end])
        begin = end


def _batches(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Ranges that are read at once: neighbours in one chunk of a file. Chunks begin at multiples of `CHUNK_BYTES`:
    what is a page longer than a disk's largest request (4 MiB on many) takes two.
    """
    batch: list[Range] = []
    for part in ranges:
        fits = (
            batch
            and part.file is batch[0].file
            and 0 <= part.offset - batch[-1].end <= _GAP_BYTES
            and batch[0].offset // CHUNK_BYTES == (part.end - 1) // CHUNK_BYTES
        )
        if batch and not fits:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


class ParallelReader:
    """A few threads that read ranges. Not for use by several threads at once.

    After an error, reads that were waiting are dropped, and `finish` raises the first error.
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="distzo2-read")
        self._local = threading.local()
        self._files: dict[RangeFile, _Descriptors] = {}

    def start(self, ranges: Iterable[Range]) -> list[Future[None]]:
        """Queues reads; ranges that follow one another in a file should follow one another here."""
        futures = []
        for batch in _batches(ranges):
            file = batch[0].file
            if file not in self._files:
                self._files[file] = _Descriptors(file)
            futures.append(self._threads.submit(self._read, self._files[file], batch))
        return futures

    def finish(self, futures: list[Future[None]]) -> None:
        """Waits for reads that were started.

        Raises CheckpointError (one line: file, offset, what was expected) for a file that is truncated or unreadable.
        """
        _, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(waiting)
        for future in futures:
            if not future.cancelled():
                future.result()

    def close(self) -> None:
        """Ends the threads; reads that have not begun are dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for descriptors in self._files.values():
            descriptors.close()
        self._files.clear()

    def __enter__(self) -> ParallelReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _block(self) -> torch.Tensor:
        if not hasattr(self._local, "block"):
            self._local.block = aligned_buffer(CHUNK_BYTES + _HUGE_PAGE)  # a range may begin and end within a page
        return self._local.block

    def _read(self, descriptors: _Descriptors, batch: list[Range]) -> None:
        begin, end = batch[0].offset, batch[-1].end
        direct = descriptors.direct
        if direct is None and len(batch) == 1 and batch[0].place is not None:
            batch[0].file.read_into(bytes_of(batch[0].place), begin)
            return
        block = self._block()
        if direct is None:
            first = begin
            batch[0].file.read_into(bytes_of(block[: end - begin]), begin)
        else:
            first = begin // _PAGE * _PAGE
            self._read_direct(batch[0].file, direct, block, first, end)
        for part in batch:
            data = block[part.offset - first : part.end - first]
            if part.place is not None:
                ctypes.memmove(part.place.data_ptr(), data.data_ptr(), part.num_bytes)  # lets go of the GIL
            if part.fill is not None:
                part.fill(data)

    @staticmethod
    def _read_direct(file: RangeFile, descriptor: int, block: torch.Tensor, begin: int, end: int) -> None:
        """Whole pages from `begin` on, which is aligned, until `end` is in the block."""
        wanted = -(-(end - begin) // _PAGE) * _PAGE
        view, done = bytes_of(block), 0
        while done < end - begin:
            try:
                count = os.preadv(descriptor, [view[done:wanted]], begin + done)
            except OSError as error:
                where = f"{file.path}: cannot be read at byte {begin + done}"
                raise CheckpointError(f"{where}: {error.strerror}") from error
            done += count
            if count == 0 or (done < end - begin and done % _PAGE != 0):  # the file's end
                where = f"{file.path}: truncated while it was read"
                raise CheckpointError(f"{where}: expected {end - begin} bytes at {begin}, got {done}")


class _Descriptors:
    """How a file is read: `direct` is a descriptor with O_DIRECT, or None where its own descriptor does better."""

    def __init__(self, file: RangeFile) -> None:
        self.direct: int | None = None
        if not _is_cached(file):
            try:
                self.direct = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                os.preadv(self.direct, [bytes_of(aligned_buffer(_PAGE))], 0)  # some take the flag and refuse the read
            except OSError:
                self.close()  # this file system has no O_DIRECT
        if self.direct is not None and not os.path.samestat(os.fstat(self.direct), os.fstat(file.fileno())):
            self.close()  # the name belongs to another file by now

    def close(self) -> None:
        if self.direct is not None:
            os.close(self.direct)
            self.direct = None


def _is_cached(file: RangeFile) -> bool:
    """Whether the page cache holds the file, by a look at its first page, its last, and some between."""
    page = memoryview(bytearray(1))
    for place in range(8):
        try:
            os.preadv(file.fileno(), [page], max(0, file.num_bytes - 1) * place // 7, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:  # not on this file system, which is then read through its cache unless O_DIRECT works
            return False
    return True
