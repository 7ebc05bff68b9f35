"""Where weights live, and how a unit's packed buffer becomes present on the compute device.

    weights=     compute on CPU                  compute on CUDA
    device       pool in memory, used in place   device memory, used in place
    host         pool in memory, used in place   pinned pool -> ring of device slots
    disk         block file -> ring of slots     block file -> pinned staging -> ring of device slots

A `StoredCopy` names what a store holds of a unit. Resident units are always used in place. `acquire` and `release` act
on the current stream of the compute device; the host waits only where the device is the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from distzo2.errors import DistZO2Error
from distzo2.weights.units import ParamInfo, Unit
from distzo2_core import BlockFile, CopyEngine, HostPool, aligned_buffer

SLOT_ALIGNMENT = 4096  # bytes; what O_DIRECT needs
_M_MMAP_THRESHOLD = -3  # of malloc.h

_FALLBACKS = {
    "direct_fallback": "the block file is read through the page cache, without O_DIRECT",
    "pin_error": "the weights' host memory is not pinned",
}

logger = logging.getLogger("distzo2")

P = ParamSpec("P")
T = TypeVar("T")


def _core_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Turns the compiled core's errors (memory, disk, driver; one line each) into errors for the user."""

    @functools.wraps(function)
    def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            raise DistZO2Error(str(error)) from error

    return translated


@dataclass(eq=False)
class StoredCopy:
    """What is stored here of a unit: bytes [begin, begin + num_bytes) of its packed buffer.

    A whole unit is a slice of one. A slice may include padding behind the unit's end.
    """

    unit: Unit
    begin: int
    num_bytes: int
    version: int = 0  # how many updates the bytes hold
    block: int = -1  # its number among the copies that stream; -1: it does not stream

    @classmethod
    def whole(cls, unit: Unit, version: int = 0) -> StoredCopy:
        """Returns a copy of the whole unit, which does not stream."""
        return cls(unit, 0, unit.num_bytes, version)

    def elements_of(self, param: ParamInfo) -> range:
        """Returns which elements of one of the unit's parameters are in the copy. (Slices cut no element.)"""
        begin, end = self.begin - param.byte_offset, self.begin + self.num_bytes - param.byte_offset
        item = param.dtype.itemsize
        return range(min(max(begin, 0), param.num_bytes) // item, min(max(end, 0), param.num_bytes) // item)


class Store:
    """What every store does. This one holds nothing: its methods are those of a store in which nothing moves."""

    in_host_memory = False  # whether `open` gives the stored bytes themselves
    gathers = False  # whether `acquire` gives whole units as they are after the last update, not to be changed
    slot_bytes = num_slots = 0  # of the ring, where there is one

    @property
    def source(self) -> Store:
        """The store whose `acquire` gives the stored copies themselves, to be changed in place."""
        return self

    def acquire(self, copy: StoredCopy) -> torch.Tensor:
        """Returns the bytes of `copy` on the compute device, uint8, until they are released."""
        raise NotImplementedError

    def release(self, copy: StoredCopy, dirty: bool) -> None:
        """Ends a use. Dirty bytes are stored once the journal is durable up to `copy.version`."""

    def open(self, copy: StoredCopy, write: bool, keep: bool = True) -> Any:
        """A context manager that gives the unit's bytes in host memory, uint8 [unit.num_bytes].

        With `write`, the bytes at the end become the stored copy. Without `keep` they hold anything at first.
        """
        raise NotImplementedError

    def prefetch(self, copy: StoredCopy) -> bool:
        """Starts to bring a copy; returns False where no slot can be taken for it now."""
        return True

    def expect(self, following: Sequence[StoredCopy], num_current: int) -> None:
        """Starts to bring what will be acquired next, in this order. The first `num_current` are wanted before the
        next update is made."""

    def poll(self) -> None:
        """Begins work whose turn has come; called whenever a lane has run."""

    def forget(self) -> None:
        """Drops what was made of stored copies, after they were changed from outside."""

    def set_durable(self, version: int) -> None:
        """Stored copies up to `version` may be written: the journal's lines before it are on disk. Memory, which a
        crash does not leave behind, does not wait for this."""

    def fail(self, reason: str) -> None:
        """Stored copies can no longer be written: whatever waits for that ends with an error."""

    def flush(self) -> None:
        """Waits until every released copy is stored."""

    def stats(self) -> dict[str, Any]:
        """Returns bytes held, and counters of transfers since `reset_stats`."""
        return {}

    def reset_stats(self) -> None:
        """Starts the counting of transfers anew."""

    def trace(self, enable: bool) -> None:
        """Records every transfer from now on."""

    def events(self) -> list[tuple]:
        """Returns what was recorded, see `CopyEngine.events`."""
        return []

    def close(self) -> None:
        """Ends transfers and lets go of the weights."""


class MemoryStore(Store):
    """Copies in memory on the compute device, used in place."""

    @_core_errors
    def __init__(self, copies: Sequence[StoredCopy], device: torch.device, **pool_options: Any) -> None:
        """`pool_options` are `HostPool`'s, from `MemoryShare.pool_options`."""
        self._pool: HostPool | None = None
        if device.type == "cpu" and copies:
            self._pool = HostPool([c.num_bytes for c in copies], device="cpu", **pool_options)
            self._buffers = {c: self._pool.tensor(i) for i, c in enumerate(copies)}
        else:
            self._buffers = {c: torch.empty(c.num_bytes, dtype=torch.uint8, device=device) for c in copies}
        self.in_host_memory = self._pool is not None

    def acquire(self, copy: StoredCopy) -> torch.Tensor:
        return self._buffers[copy]

    @contextmanager
    def open(self, copy: StoredCopy, write: bool, keep: bool = True) -> Iterator[torch.Tensor]:
        buffer = self._buffers[copy]
        if buffer.device.type == "cpu":
            yield buffer
        else:
            host = buffer.cpu() if keep else torch.empty_like(buffer, device="cpu")
            yield host
            if write:
                buffer.copy_(host)

    def stats(self) -> dict[str, Any]:
        return dict(self._pool.stats()) if self._pool else {}

    def close(self) -> None:
        self._buffers.clear()
        self._pool = None  # views that are still held keep the memory


class StreamingStore(Store):
    """Copies in a pinned host pool or in a block file, brought to a ring of slots by the copy engine."""

    @_core_errors
    def __init__(
        self, copies: Sequence[StoredCopy], storage: HostPool | BlockFile, device: torch.device, slots: int
    ) -> None:
        """
        Args:
            copies: what streams; their blocks are numbered 0, 1, ... in this order.
            storage: has a block of the size of each copy.
            device: where it computes.
            slots: number of slots of the ring, at least 2.
        """
        self.slot_bytes = slot_bytes_of(c.num_bytes for c in copies)
        self.num_slots = num_slots_of(slots, len(copies))
        self._storage, self._device = storage, device
        self.in_host_memory = isinstance(storage, HostPool)
        self._spare: torch.Tensor | None = None  # reused while copies are written one after another, as in loading
        if device.type == "cpu":
            self._slots = [aligned_buffer(self.slot_bytes) for _ in range(self.num_slots)]
        else:
            ring = torch.empty(self.slot_bytes * self.num_slots + SLOT_ALIGNMENT, dtype=torch.uint8, device=device)
            start = -ring.data_ptr() % SLOT_ALIGNMENT
            self._slots = list(ring[start : start + self.slot_bytes * self.num_slots].split(self.slot_bytes))
        self.engine = CopyEngine(device_name(device), storage, [s.data_ptr() for s in self._slots], self.slot_bytes)
        stats = self.stats()
        for key, what in _FALLBACKS.items():
            if stats.get(key):
                logger.warning("%s: %s", what, stats[key])

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    @_core_errors
    def acquire(self, copy: StoredCopy) -> torch.Tensor:
        self._spare = None
        return self._slots[self.engine.acquire(copy.block, self._stream())][: copy.num_bytes]

    @_core_errors
    def release(self, copy: StoredCopy, dirty: bool) -> None:
        self.engine.release(copy.block, self._stream(), dirty, copy.version)

    @_core_errors
    def prefetch(self, copy: StoredCopy) -> bool:
        return self.engine.prefetch(copy.block)

    def expect(self, following: Sequence[StoredCopy], num_current: int) -> None:
        for copy in following[: self.num_slots - 1]:
            if not self.prefetch(copy):
                return

    def set_durable(self, version: int) -> None:
        self.engine.set_durable(version)

    def fail(self, reason: str) -> None:
        self.engine.fail(reason)

    @_core_errors
    def flush(self) -> None:
        self.engine.flush()

    @contextmanager
    def open(self, copy: StoredCopy, write: bool, keep: bool = True) -> Iterator[torch.Tensor]:
        self.flush()
        if self.in_host_memory:
            yield self._storage.tensor(copy.block)
        else:
            buffer = self._spare if write and self._spare is not None else aligned_buffer(self.slot_bytes)
            self._spare = None
            host = buffer[: copy.num_bytes]
            if keep:
                _core_errors(self._storage.read)(copy.block, host.data_ptr(), copy.num_bytes)
            yield host
            if write:
                _core_errors(self._storage.write)(copy.block, host.data_ptr(), copy.num_bytes)
                self._spare = buffer
        if write:
            _core_errors(self.engine.drop)(copy.block)

    def stats(self) -> dict[str, Any]:
        return {**self._storage.stats(), **self.engine.stats()}

    def reset_stats(self) -> None:
        self.engine.reset_stats()

    def trace(self, enable: bool) -> None:
        self.engine.trace(enable)

    def events(self) -> list[tuple]:
        return self.engine.events()

    def close(self) -> None:
        self.engine.close()
        if not self.in_host_memory:
            self._storage.close()
        self._slots.clear()
        self._storage = self._spare = None


def slot_bytes_of(sizes: Iterable[int]) -> int:
    """Returns the bytes of a slot that holds a copy of any of the sizes."""
    return -(-max(sizes) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def num_slots_of(slots: int, num_copies: int) -> int:
    """Returns how many slots are made where `slots` are asked for."""
    return max(2, min(slots, num_copies + 1))


def device_name(device: torch.device) -> str:
    """Returns the core's name of a device, with the index of a CUDA device."""
    return f"{device.type}:0" if device.type != "cpu" and device.index is None else str(device)


@_core_errors
def streaming_store(
    copies: Sequence[StoredCopy],
    device: torch.device,
    *,
    directory: str | os.PathLike | None,
    slots: int,
    **pool_options: Any,
) -> StreamingStore:
    """Makes a store whose copies live in a working block file in `directory`, or, if that is None, in host memory."""
    sizes = [c.num_bytes for c in copies]
    if directory is None:
        storage = HostPool(sizes, device=device_name(device), **pool_options)
    else:
        if device.type == "cpu":
            _return_freed_memory()
        storage = _working_file(Path(directory), sizes)
    return StreamingStore(copies, storage, device, slots)


def _working_file(directory: Path, sizes: Sequence[int]) -> BlockFile:
    """Makes a block file that belongs to this process alone, after checking that it fits."""
    with suppress(FileExistsError):
        directory.mkdir(parents=True)
    if not directory.is_dir():
        raise DistZO2Error(f"{directory}: a directory for the block file was expected")
    free, needed = shutil.disk_usage(directory).free, BlockFile.file_bytes(sizes)
    if free < needed:
        raise DistZO2Error(f"{directory}: the block file needs {needed} bytes, and {free} bytes are free")
    handle, path = tempfile.mkstemp(prefix="weights-", suffix=".dzo2", dir=directory)
    os.close(handle)
    try:
        return BlockFile(path, sizes)
    finally:
        Path(path).unlink(missing_ok=True)  # at once, so that nothing is left behind however the process ends


def _return_freed_memory() -> None:
    """Makes glibc give freed memory of 1 MiB and more back at once; the setting is the process's, and stays.

    Weights on disk mean that memory is scarce. Each lane is a thread, glibc gives each thread its own arena, and each
    arena would keep what its lane freed. The price is a page fault every 4 KiB, which such a tensor's arithmetic hides.
    (Limiting glibc to one arena comes too late: it reads that when the first thread asks for memory.)
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return  # the user has chosen
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
