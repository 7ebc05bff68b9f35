"""Safetensors files: checked headers, reads straight into a tensor's memory, and writes in any order.

Files are read with `pread` and never mapped, so that no page of a checkpoint counts as this process's memory. A header
is believed only after every offset, shape and dtype in it agrees with the size of the file. Byte order is
little-endian, as in the format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from distzo2.checkpoint.file_checksum import FileChecksum, WriteChecksum
from distzo2.errors import DistZO2Error

# Bounds on what a file from anyone may say. A header in memory takes some 25 times its length.
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_SMALL_HEADER_BYTES = 4 << 20  # of a file of any length; that of a longer one may be 1/32 of it
MAX_DIMS = 64  # as torch's
_MAX_IO_BYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(DistZO2Error, ValueError):
    """A checkpoint that cannot be read or written; one line that names the file, what was expected and what came."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: where its bytes are, counted from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"need a contiguous CPU tensor, got {tensor.device} with strides {tensor.stride()}")
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file as 64 hex digits, read in a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise CheckpointError(f"the name {brief(twice)} occurs twice")
    return keys


def header_limit(num_bytes: int) -> int:
    """The longest header that is read of a file of so many bytes, lest it take more memory than the tensors."""
    return min(MAX_HEADER_BYTES, max(MAX_SMALL_HEADER_BYTES, num_bytes // 32))


def is_size(value: object) -> bool:
    """Whether a value is a whole number that a size, an offset or a stride can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def brief(value: object) -> str:
    """A value of a file from anyone in a message."""
    return repr(value[:200]) if isinstance(value, str) else reprlib.repr(value)[:200]


def _parse_entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {brief(fields)}")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: expected a dtype among {', '.join(DTYPES)}, got {brief(fields['dtype'])}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(is_size(size) for size in shape):
        raise CheckpointError(f"{where}: expected a shape of non-negative whole numbers, got {brief(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(at) for at in offsets):
        raise CheckpointError(f"{where}: expected data_offsets [begin, end], got {brief(offsets)}")
    num_bytes = math.prod(shape) * dtype.itemsize
    # Of an empty tensor, strides are computed all the same.
    if math.prod(size for size in shape if size) >= 1 << 63:
        raise CheckpointError(f"{where}: no tensor can have the shape {brief(shape)}")
    if offsets[1] - offsets[0] != num_bytes:
        raise CheckpointError(
            f"{where}: expected {num_bytes} bytes for {fields['dtype']} {shape}, got data_offsets {offsets}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], num_bytes)


class RangeFile:
    """A file of tensors opened for reading: `.tensors` by name, and reads of byte ranges of it.

    Raises CheckpointError, one line that names the file, what was expected and what came, if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._fd = -1
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            self.num_bytes = os.fstat(self._fd).st_size
            self.metadata: dict[str, str] = {}
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> dict[str, TensorEntry]:
        raise NotImplementedError

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes from `offset` on."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done : done + _MAX_IO_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be read at byte {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: truncated while it was read: expected {len(buffer)} bytes at {offset}, got {done}"
                )
            done += count

    def fileno(self) -> int:
        """The descriptor that the file was opened with."""
        return self._fd

    def read(self, name: str, out: torch.Tensor, begin: int = 0) -> None:
        """Reads `out.numel()` elements of tensor `name` from element `begin` on into a contiguous CPU tensor."""
        entry = self.tensors[name]
        if out.dtype != entry.dtype or not 0 <= begin <= begin + out.numel() <= entry.numel:
            raise ValueError(
                f"{self.path}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; "
                f"cannot read elements {begin} to {begin + out.numel()} as {out.dtype}"
            )
        self.read_into(bytes_of(out), entry.offset + begin * entry.dtype.itemsize)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class SafetensorsFile(RangeFile):
    """A safetensors file: `.tensors` by name, `.metadata`, and reads of byte ranges.

    Raises CheckpointError if the file is truncated, is no safetensors file, or has a header that disagrees with itself
    or with the size of the file.
    """

    def _read_header(self) -> dict[str, TensorEntry]:
        path = self.path
        if self.num_bytes < 8:
            raise CheckpointError(f"{path}: expected at least 8 bytes of a safetensors file, got {self.num_bytes}")
        prefix = bytearray(8)
        self.read_into(memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        if header_limit(self.num_bytes) < length <= self.num_bytes - 8:
            raise CheckpointError(
                f"{path}: it announces a header of {length} bytes, and has {self.num_bytes} in all: at most "
                f"{header_limit(self.num_bytes)} were expected"
            )
        if length > self.num_bytes - 8:
            raise CheckpointError(
                f"{path}: truncated or no safetensors file: it announces a header of {length} bytes and has "
                f"{self.num_bytes - 8} bytes after the first 8"
            )
        raw = bytearray(length)
        self.read_into(memoryview(raw), 8)
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: header: {error}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected a header in JSON: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: expected a JSON object as the header, got {type(header).__name__}")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{path}: expected __metadata__ to be an object, got {brief(metadata)}")
        self.metadata = {str(key): str(value) for key, value in metadata.items()}

        data_start = 8 + length
        entries = [_parse_entry(path, name, fields, data_start) for name, fields in header.items()]
        end = data_start
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
            if entry.offset != end:
                raise CheckpointError(
                    f"{path}: tensor {entry.name!r}: expected data at byte {end - data_start}, "
                    f"got {entry.offset - data_start}: a hole or an overlap"
                )
            end += entry.num_bytes
        if end != self.num_bytes:
            state = "truncated" if end > self.num_bytes else "too long"
            raise CheckpointError(f"{path}: {state}: expected {end} bytes from its header, got {self.num_bytes}")
        return {entry.name: entry for entry in entries}


class SafetensorsWriter:
    """A file whose tensors are known up front and whose bytes come in any order.

    The header is written and the whole file allocated at once, so that a full disk shows before any work is done. Its
    CRC-32 is found from the bytes as they are written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self._fd = -1
        self._written = WriteChecksum()
        header: dict[str, Any] = {"__metadata__": dict(metadata if metadata is not None else {"format": "pt"})}
        layout: list[TensorEntry] = []
        end = 0
        # Wide dtypes first: every tensor then starts on a multiple of its own item size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            if dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{self.path}: tensor {name!r}: {dtype} cannot be stored in a safetensors file")
            num_bytes = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + num_bytes]}
            layout.append(TensorEntry(name, dtype, tuple(shape), end, num_bytes))
            end += num_bytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        start = 8 + len(raw)
        self.num_bytes = start + end
        self.tensors = {e.name: TensorEntry(e.name, e.dtype, e.shape, start + e.offset, e.num_bytes) for e in layout}
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._allocate()
            self.write_bytes(memoryview(struct.pack("<Q", len(raw)) + raw), 0)
        except BaseException:
            self.close(sync=False)
            self.path.unlink(missing_ok=True)
            raise

    def _allocate(self) -> None:
        try:
            os.posix_fallocate(self._fd, 0, self.num_bytes)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise CheckpointError(f"{self.path}: no room for {self.num_bytes} bytes on its disk") from error
            os.ftruncate(self._fd, self.num_bytes)  # a file system that cannot allocate ahead

    def write_bytes(self, buffer: memoryview, offset: int, is_last: bool = True) -> None:
        """Writes `buffer` at byte `offset` of the file. Unless it `is_last`, some of the bytes may be written again."""
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._fd, buffer[done : done + _MAX_IO_BYTES], offset + done)
        if is_last:
            self._written.note(buffer, offset)

    def checksum(self) -> FileChecksum:
        """Of the file as it is now."""
        return self._written.finish(self.num_bytes, self.read_into)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Reads back what was written at byte `offset`."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done : done + _MAX_IO_BYTES]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: shrank while it was written")
            done += count

    def close(self, sync: bool = True) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close(sync=False)


def sync_directory(path: str | os.PathLike) -> None:
    """Makes renames and new names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(fd)
