"""Where the weights live, and how a unit's packed buffer becomes present on the compute device.

    weights=     compute on CPU                  compute on CUDA
    device       pool in memory, used in place   device memory, used in place
    host         pool in memory, used in place   pinned pool -> ring of device slots
    disk         block file -> ring of slots     block file -> pinned staging -> ring of device slots

Resident units are always used in place. `acquire` and `release` act on the current stream of the compute device; the
host waits only where the device is the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from distzo2.errors import DistZO2Error
from distzo2.parallel.memory_share import MemoryShare
from distzo2.weights.units import Unit
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
    """The compiled core's errors (memory, disk, driver; one line each) as errors that a user can mend."""

    @functools.wraps(function)
    def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            raise DistZO2Error(str(error)) from error

    return translated


class MemoryStore:
    """Packed units in memory on the compute device, used in place."""

    @_core_errors
    def __init__(self, units: Sequence[Unit], device: torch.device, share: MemoryShare | None = None) -> None:
        """`share`: this rank's of its machine's memory; None: all of it."""
        self._pool: HostPool | None = None
        self._buffers: dict[int, torch.Tensor] = {}
        if not units:
            return
        if device.type == "cpu":
            self._pool = HostPool([u.num_bytes for u in units], device="cpu", **(share.pool_options() if share else {}))
            self._buffers = {u.index: self._pool.tensor(i) for i, u in enumerate(units)}
        else:
            self._buffers = {u.index: torch.empty(u.num_bytes, dtype=torch.uint8, device=device) for u in units}

    @property
    def in_host_memory(self) -> bool:
        """Whether `open` gives the stored copy itself."""
        return self._pool is not None

    def acquire(self, unit: Unit) -> torch.Tensor:
        return self._buffers[unit.index]

    def release(self, unit: Unit, dirty: bool) -> None:
        """Nothing to do: the unit is changed where it lives."""

    def prefetch(self, unit: Unit) -> bool:
        return True

    def set_durable(self, version: int) -> None:
        """Memory is not what a crash leaves behind; the write-ahead rule does not bind it."""

    def flush(self) -> None:
        """Nothing is in flight."""

    @contextmanager
    def open(self, unit: Unit, write: bool, keep: bool = True):
        """The unit's bytes in host memory; with `write`, what is in them at the end becomes the stored copy. Without
        `keep` they need not hold the stored copy at first."""
        buffer = self._buffers[unit.index]
        if buffer.device.type == "cpu":
            yield buffer
        else:
            host = buffer.cpu() if keep else torch.empty_like(buffer, device="cpu")
            yield host
            if write:
                buffer.copy_(host)

    def stats(self) -> dict[str, int | float]:
        return dict(self._pool.stats()) if self._pool else {}

    def reset_stats(self) -> None:
        """Nothing is counted."""

    def trace(self, enable: bool) -> None:
        """There are no transfers."""

    def events(self) -> list[tuple]:
        return []

    def close(self) -> None:
        self._buffers.clear()
        self._pool = None  # views that are still held keep the memory


def slot_bytes_of(units: Sequence[Unit]) -> int:
    """Bytes of a slot that holds any of the units."""
    return -(-max(u.num_bytes for u in units) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


class StreamingStore:
    """Packed units in a pinned host pool or in a block file, brought to a ring of slots by the copy engine."""

    @_core_errors
    def __init__(
        self,
        units: Sequence[Unit],
        device: torch.device,
        *,
        directory: str | os.PathLike | None,
        slots: int,
        share: MemoryShare | None = None,
    ) -> None:
        """
        Args:
            units: the streamed units; block ids are given in this order.
            device: where it computes.
            directory: of the block file; None keeps the weights in a pinned host pool.
            slots: number of slots of the ring, at least 2.
            share: this rank's of its machine's memory; None: all of it.
        """
        sizes = [u.num_bytes for u in units]
        for i, unit in enumerate(units):
            unit.block = i
        self.slot_bytes = slot_bytes_of(units)
        self.num_slots = max(2, min(slots, len(units) + 1))
        self._device = device
        if device.type == "cpu" and directory is not None:
            _return_freed_memory()
        self._pool: HostPool | None = None
        self._file: BlockFile | None = None
        self._spare: torch.Tensor | None = None  # between units that are written one after another, as in loading
        name = str(device) if device.index is not None or device.type == "cpu" else f"{device.type}:0"
        if directory is None:
            self._pool = HostPool(sizes, device=name, **(share.pool_options() if share else {}))
        else:
            path = _new_block_file(Path(directory), BlockFile.file_bytes(sizes))
            try:
                self._file = BlockFile(str(path), sizes)
            finally:
                # It belongs to this process alone: whatever ends it, nothing is left behind. (Nor is what failed.)
                path.unlink(missing_ok=True)
        if device.type == "cpu":
            self._slots = [aligned_buffer(self.slot_bytes) for _ in range(self.num_slots)]
        else:
            ring = torch.empty(self.slot_bytes * self.num_slots + SLOT_ALIGNMENT, dtype=torch.uint8, device=device)
            start = -ring.data_ptr() % SLOT_ALIGNMENT
            self._slots = list(ring[start : start + self.slot_bytes * self.num_slots].split(self.slot_bytes))
        self.engine = CopyEngine(name, self._pool or self._file, [s.data_ptr() for s in self._slots], self.slot_bytes)
        self._log_fallbacks()

    def _log_fallbacks(self) -> None:
        """What is slower here than it could be, said once."""
        stats = self.stats()
        for key, what in _FALLBACKS.items():
            if stats.get(key):
                logger.warning("%s: %s", what, stats[key])

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    @property
    def in_host_memory(self) -> bool:
        """As `MemoryStore.in_host_memory`."""
        return self._pool is not None

    @_core_errors
    def acquire(self, unit: Unit) -> torch.Tensor:
        self._spare = None
        return self._slots[self.engine.acquire(unit.block, self._stream())][: unit.num_bytes]

    @_core_errors
    def release(self, unit: Unit, dirty: bool) -> None:
        self.engine.release(unit.block, self._stream(), dirty, unit.version)

    @_core_errors
    def prefetch(self, unit: Unit) -> bool:
        return self.engine.prefetch(unit.block)

    def expect(self, following: Sequence[Unit], num_current: int) -> None:
        """Starts the uploads of the units that will be wanted next, in order, as far as there are slots."""
        for unit in following[: self.num_slots - 1]:
            if not self.prefetch(unit):
                return

    def poll(self) -> None:
        """Nothing waits for a turn."""

    def forget(self) -> None:
        """Slots are dropped where stored copies are written."""

    def set_durable(self, version: int) -> None:
        self.engine.set_durable(version)

    def fail(self, reason: str) -> None:
        """Stored copies can no longer be written: whatever waits for that ends with an error."""
        self.engine.fail(reason)

    @_core_errors
    def flush(self) -> None:
        self.engine.flush()

    @contextmanager
    def open(self, unit: Unit, write: bool, keep: bool = True):
        """As `MemoryStore.open`."""
        self.flush()
        if self._pool is not None:
            yield self._pool.tensor(unit.block)
        else:
            buffer = self._spare if write and self._spare is not None else aligned_buffer(self.slot_bytes)
            self._spare = None
            host = buffer[: unit.num_bytes]
            if keep:
                _core_errors(self._file.read)(unit.block, host.data_ptr(), unit.num_bytes)
            yield host
            if write:
                _core_errors(self._file.write)(unit.block, host.data_ptr(), unit.num_bytes)
                self._spare = buffer
        if write:
            _core_errors(self.engine.drop)(unit.block)

    def stats(self) -> dict[str, int | float]:
        source = self._pool or self._file
        return {**source.stats(), **self.engine.stats()}

    def reset_stats(self) -> None:
        """Starts the counting of transfers anew."""
        self.engine.reset_stats()

    def trace(self, enable: bool) -> None:
        """Records every transfer from now on."""
        self.engine.trace(enable)

    def events(self) -> list[tuple]:
        """What was recorded; see `CopyEngine.events`."""
        return self.engine.events()

    def close(self) -> None:
        self.engine.close()
        if self._file is not None:
            self._file.close()
        self._slots.clear()
        self._pool = self._file = self._spare = None


def _return_freed_memory() -> None:
    """Weights on disk mean that memory is scarce. Each lane is a thread, glibc gives each thread an arena of its own,
    and each arena keeps what its lane freed. Of one mebibyte and more it is given back at once instead, for a page
    fault every 4 KiB, which such a tensor's arithmetic hides. (A limit to one arena comes too late: glibc reads it when
    the first thread asks for memory.) It is a setting of the process, and stays.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return  # the user has chosen
    with suppress(OSError, AttributeError):  # another C library has other habits
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _new_block_file(directory: Path, num_bytes: int) -> Path:
    """A new name in `directory`, after checking that the file fits. Block files are working files of one process."""
    with suppress(FileExistsError):
        directory.mkdir(parents=True)
    if not directory.is_dir():
        raise DistZO2Error(f"{directory}: a directory for the block file was expected")
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise DistZO2Error(f"{directory}: the block file needs {num_bytes} bytes, and {free} bytes are free")
    handle, path = tempfile.mkstemp(prefix="weights-", suffix=".dzo2", dir=directory)
    os.close(handle)
    return Path(path)
