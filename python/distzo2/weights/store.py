"""Where weights live, and how a unit's packed buffer becomes present on the compute device.

    weights=     compute on CPU                  compute on CUDA
    device       pool in memory, used in place   device memory, used in place
    host         pool in memory, used in place   pinned pool -> ring of device slots
    disk         files -> ring of slots          files -> pinned staging -> ring of device slots

On disk, blocks live in a block file; those that are frozen stream from the files that hold them already, as they are
there, where these are known (`RangeFiles`).

A `StoredCopy` names what a store holds of a unit. Resident units are always used in place. `acquire` and `release` act
on the current stream of the compute device; the host waits only where the device is the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from distzo2.errors import DistZO2Error
from distzo2.weights.units import ParamInfo, Unit, aligned
from distzo2_core import BlockFile, CopyEngine, HostPool, RangeFiles, aligned_buffer

SLOT_ALIGNMENT = 4096  # bytes; what O_DIRECT needs
_M_MMAP_THRESHOLD = -3  # of malloc.h

_FALLBACKS = {
    "direct_fallback": "weights on disk are read through the page cache, without O_DIRECT",
    "pin_error": "the weights' host memory is not pinned",
}

logger = logging.getLogger("distzo2")

T = TypeVar("T")


def core_errors(function: Callable[..., T]) -> Callable[..., T]:
    """Turns the compiled core's errors (memory, disk, driver; one line each) into errors for the user."""

    @functools.wraps(function)
    def translated(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            raise DistZO2Error(str(error)) from error

    return translated


@dataclass(eq=False)
class StoredCopy:
    """What is stored here of a unit: a slice, bytes [begin, end) of its packed buffer, and behind it the scales of the
    trained codes in the slice that lie elsewhere in the buffer, and what the trained weights in it were at the start.

    A whole unit is a slice of one. A slice may include padding behind the unit's end.
    """

    unit: Unit
    begin: int
    end: int
    version: int = 0  # how many updates the bytes hold
    block: int = -1  # its number among the copies that stream; -1: it does not stream
    is_fixed: bool = False  # its bytes are those of a checkpoint's own files, which are only read
    is_gathered: bool = False  # from slices, without what lies behind them

    @classmethod
    def whole(cls, unit: Unit, version: int = 0) -> StoredCopy:
        """Returns a copy of the whole unit, which does not stream."""
        return cls(unit, 0, unit.num_bytes, version)

    @property
    def streams(self) -> bool:
        return self.block >= 0

    @cached_property
    def places(self) -> list[tuple[range, int]]:
        """Which bytes of the unit's buffer are stored, and at which byte of the copy they begin: the slice is first."""
        places, end = [(range(self.begin, self.end), 0)], self.end - self.begin
        for param in self.unit.params:
            scales = param.scales_of(self.elements_of(param)) if param.is_coded else range(0)
            if scales and not self.begin <= scales.start < scales.stop <= self.end:
                places.append((scales, end))
                end += len(scales)
        return places

    @cached_property
    def starts(self) -> list[tuple[range, int]]:
        """Which bytes of the copy are trained weights, where it keeps their start, and at which byte that begins."""
        last, at = self.places[-1]
        end, starts = aligned(at + len(last)), []
        for param in self.unit.params if self.unit.keeps_start and not self.is_gathered else ():
            part = param.bytes_in(range(self.begin, self.end))
            if part and param.has_start:
                first = param.byte_offset + part.start - self.begin
                starts.append((range(first, first + len(part)), end))
                end += aligned(len(part))
        return starts

    @cached_property
    def num_bytes(self) -> int:
        """Of all that is stored, a multiple of `ALIGNMENT`."""
        last, at = (self.places + self.starts)[-1]
        return aligned(at + len(last))

    @property
    def num_kept(self) -> int:
        """How many of the bytes, at the end, no update changes, since they are of the start."""
        return self.num_bytes - self.starts[0][1] if self.starts else 0

    def take_start(self, buffer: torch.Tensor) -> None:
        """Makes the weights in a buffer of the copy those at the start."""
        for place, at in self.starts:
            buffer[at : at + len(place)].copy_(buffer[place.start : place.stop])

    def elements_of(self, param: ParamInfo) -> range:
        """Returns which elements of one of the unit's parameters are in the slice; which bytes, where it is packed and
        frozen. (Slices cut no element, and no group of trained codes.)"""
        item = param.stored_itemsize
        most = param.numel if param.is_coded else param.num_bytes // item
        own = param.bytes_in(range(self.begin, self.end))
        return range(min(own.start // item, most), min(own.stop // item, most))

    def kept_of(self, param: ParamInfo) -> list[range]:
        """Returns which elements of one of the unit's parameters are stored, behind the slice too; which bytes, where
        it is packed."""
        item = param.dtype.itemsize if param.layout is None else 1
        held = [part for place, _ in self.places if (part := param.bytes_in(place))]
        return [range(part.start // item, part.stop // item) for part in held]

    def scale_offset(self, param: ParamInfo) -> int:
        """Returns at which byte of the copy the scales of a parameter's codes in the slice begin."""
        first = param.scales_of(self.elements_of(param)).start
        return next(at + first - place.start for place, at in reversed(self.places) if first in place)

    def start_offset(self, byte: int) -> int:
        """Returns at which byte the start of the trained weights lies that begin at `byte` of the copy; 0: nowhere."""
        return next((at for place, at in self.starts if place.start == byte), 0)


class Store:
    """What every store does. This one is the store of no copies, in which nothing moves."""

    in_host_memory = False  # whether `open` gives the stored bytes themselves
    gathers = False  # whether `acquire` gives whole units, read-only, with every update
    slot_bytes = num_slots = 0  # of the ring, where there is one

    @property
    def source(self) -> Store:
        """The store whose `acquire` gives the stored copies themselves, which may be changed in place."""
        return self

    def acquire(self, copy: StoredCopy) -> torch.Tensor:
        """Returns the bytes of `copy` on the compute device, uint8, until they are released."""
        raise NotImplementedError

    def release(self, copy: StoredCopy, dirty: bool, stream: Any = None) -> None:
        """Ends a use. Dirty bytes are stored once the journal's lines before `copy.version` are durable.

        `stream` (torch.cuda.Stream) is where the bytes were read last; None: the current one. The bytes are not changed
        before what it holds now has ended.
        """

    def open(self, copy: StoredCopy, write: bool, keep: bool = True) -> Any:
        """A context manager that gives the unit's bytes in host memory, uint8 [unit.num_bytes].

        With `write`, the bytes become the stored copy at the end. Without `keep` they are undefined at first.
        """
        raise NotImplementedError

    def prefetch(self, copy: StoredCopy) -> bool:
        """Starts to bring a copy; returns False if no slot is free for it now."""
        return True

    def expect(self, following: Sequence[StoredCopy], num_current: int) -> None:
        """Starts to bring the copies that are acquired next, in this order; the first `num_current` of them before the
        next update is made."""

    def poll(self) -> None:
        """Begins transfers whose turn has come; called whenever a lane has run."""

    def forget(self) -> None:
        """Drops what was derived from stored copies, which are changed from outside."""

    def set_durable(self, version: int) -> None:
        """Lets copies up to `version` reach a disk, since the journal's lines before it are there."""

    def fail(self, reason: str) -> None:
        """Makes whatever waits to write a stored copy end with an error."""

    def flush(self) -> None:
        """Waits until every released copy is stored."""

    def stats(self) -> dict[str, Any]:
        """Returns bytes held, and counters of transfers since `reset_stats`."""
        return {}

    def reset_stats(self) -> None:
        """Sets the counters of transfers to 0."""

    def trace(self, enable: bool) -> None:
        """Records every transfer from now on."""

    def events(self) -> list[tuple]:
        """Returns the recorded transfers, as `CopyEngine.events`."""
        return []

    def close(self) -> None:
        """Ends transfers and lets go of the weights."""


class MemoryStore(Store):
    """Copies in memory on the compute device, used in place."""

    @core_errors
    def __init__(self, copies: Sequence[StoredCopy], device: torch.device, **pool_options: Any) -> None:
        """`pool_options` are `HostPool`'s, from `MemoryShare.pool_options`."""
        self._pool: HostPool | None = None
        if device.type == "cpu" and copies:
            self._pool = HostPool([c.num_bytes for c in copies], device="cpu", **pool_options)
            self._buffers = {c: self._pool.tensor(i) for i, c in enumerate(copies)}
        else:
            self._buffers = {c: torch.empty(c.num_bytes, dtype=torch.uint8, device=device) for c in copies}
        self.in_host_memory = self._pool is not None
        self._read_elsewhere: dict[StoredCopy, Any] = {}  # CUDA events behind reads on other streams

    def acquire(self, copy: StoredCopy) -> torch.Tensor:
        buffer = self._buffers[copy]
        if (ended := self._read_elsewhere.pop(copy, None)) is not None:
            torch.cuda.current_stream(buffer.device).wait_event(ended)
        return buffer

    def release(self, copy: StoredCopy, dirty: bool, stream: Any = None) -> None:
        if stream is not None:
            self._read_elsewhere[copy] = stream.record_event()

    @contextmanager
    def open(self, copy: StoredCopy, write: bool, keep: bool = True) -> Iterator[torch.Tensor]:
        buffer = self.acquire(copy)
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
    """Copies in a pinned host pool or in files, brought to a ring of slots by the copy engine."""

    @core_errors
    def __init__(
        self,
        copies: Sequence[StoredCopy],
        storage: HostPool | BlockFile | None,
        device: torch.device,
        slots: int,
        fixed: RangeFiles | None = None,
    ) -> None:
        """`copies` are the blocks of `storage`, then those of `fixed`, in this order; at most `slots` of them are on
        `device` at once."""
        self.slot_bytes = slot_bytes_of(c.num_bytes for c in copies)
        self.num_slots = num_slots_of(slots, len(copies))
        self._storage, self._fixed, self._device = storage, fixed, device
        self._num_stored = len(copies) if fixed is None else len(copies) - len(fixed)
        self.in_host_memory = isinstance(storage, HostPool)
        self._spare: torch.Tensor | None = None  # reused while copies are written one after another, as in loading
        if device.type == "cpu":
            self._slots = [aligned_buffer(self.slot_bytes) for _ in range(self.num_slots)]
        else:
            ring = torch.empty(self.slot_bytes * self.num_slots, dtype=torch.uint8, device=device)
            self._slots = list(ring.split(self.slot_bytes))
        addresses = [slot.data_ptr() for slot in self._slots]
        source = storage if fixed is None else (storage, fixed)
        self.engine = engine = CopyEngine(str(device), source, addresses, self.slot_bytes, stream=self._stream())
        if self.in_host_memory and any(c.starts for c in copies):
            engine.set_tails([c.num_kept for c in copies])
        self.set_durable, self.fail, self.flush = engine.set_durable, engine.fail, core_errors(engine.flush)
        self.reset_stats, self.trace, self.events = engine.reset_stats, engine.trace, engine.events
        stats = self.stats()
        for key, what in _FALLBACKS.items():
            if stats.get(key):
                logger.warning("%s: %s", what, stats[key])

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    @core_errors
    def acquire(self, copy: StoredCopy) -> torch.Tensor:
        self._spare = None
        return self._slots[self.engine.acquire(copy.block, self._stream())][: copy.num_bytes]

    @core_errors
    def release(self, copy: StoredCopy, dirty: bool, stream: Any = None) -> None:
        handle = self._stream() if stream is None else stream.cuda_stream
        self.engine.release(copy.block, handle, dirty, copy.version)

    @core_errors
    def prefetch(self, copy: StoredCopy) -> bool:
        return self.engine.prefetch(copy.block)

    def expect(self, following: Sequence[StoredCopy], num_current: int) -> None:
        for copy in following[: self.num_slots - 1]:
            if not self.prefetch(copy):
                return

    @contextmanager
    def open(self, copy: StoredCopy, write: bool, keep: bool = True) -> Iterator[torch.Tensor]:
        self.flush()
        if self.in_host_memory:
            yield self._storage.tensor(copy.block)
        else:
            buffer = self._spare if write and self._spare is not None else aligned_buffer(self.slot_bytes)
            self._spare = None
            host = buffer[: copy.num_bytes]
            if copy.is_fixed:
                if write:
                    raise DistZO2Error(
                        f"unit {copy.unit.name} streams from its checkpoint's files, which are only read"
                    )
                core_errors(self._fixed.read)(copy.block - self._num_stored, host.data_ptr(), copy.num_bytes)
            elif keep:
                core_errors(self._storage.read)(copy.block, host.data_ptr(), copy.num_bytes)
            yield host
            if write:
                core_errors(self._storage.write)(copy.block, host.data_ptr(), copy.num_bytes)
                self._spare = buffer
        if write:
            core_errors(self.engine.drop)(copy.block)

    def stats(self) -> dict[str, Any]:
        parts = [part.stats() for part in (self._storage, self._fixed) if part is not None]
        both = {key: sum(part[key] for part in parts) for key in ("bytes_used", "bytes_read") if key in parts[-1]}
        fallback = next(filter(None, (part.get("direct_fallback") for part in parts)), "")
        return {**parts[-1], **parts[0], **both, "direct_fallback": fallback, **self.engine.stats()}

    def close(self) -> None:
        self.engine.close()
        if self._device.type == "cuda":  # the allocator gives the slots away, and knows only the stream it made them on
            with suppress(RuntimeError):  # a device that has failed reads no more
                torch.cuda.synchronize(self._device)
        for part in (self._storage, self._fixed):
            if part is not None and not self.in_host_memory:
                part.close()
        self._slots.clear()
        self._storage = self._fixed = self._spare = None


def slot_bytes_of(sizes: Iterable[int]) -> int:
    """Returns the bytes of a slot that holds a copy of any of the sizes."""
    return -(-max(sizes) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def num_slots_of(slots: int, num_copies: int) -> int:
    """Returns how many slots are made where `slots` are asked for."""
    return max(2, min(slots, num_copies + 1))


@core_errors
def streaming_store(
    copies: Sequence[StoredCopy],
    device: torch.device,
    *,
    directory: str | os.PathLike | None = None,
    file: BlockFile | None = None,
    fixed: RangeFiles | None = None,
    slots: int,
    **pool_options: Any,
) -> StreamingStore:
    """Makes a store whose copies live in `file`, or in a working block file in `directory`, or in host memory; those
    that are fixed are the last ones, and the blocks of `fixed`."""
    sizes = [c.num_bytes for c in copies if not c.is_fixed]
    if file is None and directory is not None and sizes:
        file = _working_file(Path(directory), sizes)
    if file is None and fixed is None:
        return StreamingStore(copies, HostPool(sizes, device=str(device), **pool_options), device, slots)
    if device.type == "cpu":
        _return_freed_memory()
    return StreamingStore(copies, file, device, slots, fixed)


def _working_file(directory: Path, sizes: Sequence[int]) -> BlockFile:
    """Makes a block file that belongs to this process alone."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise DistZO2Error(f"{directory}: a directory for the block file was expected") from None
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
