"""Files of weights: where each tensor's bytes are, reads of byte ranges, and safetensors files written in any order.

A safetensors header, or the description in a PyTorch archive, is believed only where every offset, shape and dtype in
it agrees with the size of the file. Tensors are read with `pread` and never through a mapping, so that their pages do
not count as this process's memory. Byte order is little-endian.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open

from distzo2.errors import DistZO2Error, one_line, refusing
from distzo2.files import write_all
from distzo2.text import brief
from distzo2_core import aligned_buffer

# Bounds on what a file of unknown origin may ask for. A parsed header takes some 25 times its length in memory.
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_SMALL_HEADER_BYTES = 4 << 20  # for a file of any length; a longer file may have 1/32 of its length
MAX_JSON_BYTES = 16 << 20  # of a file of settings
MAX_DIMS = 64  # as in torch
PAGE = 4096  # most disks allow O_DIRECT at less, none asks for more
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
# What the pickle of a flat dictionary of tensors names. weights_only admits more, such as a bytearray of any length.
_PICKLE_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}


class CheckpointError(DistZO2Error, ValueError):
    """A checkpoint cannot be read or written. One line: the file, what was expected and what was found."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file at `path`. `offset` counts bytes from the start of the file, `strides` elements (None:
    row-major)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None
    path: Path | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def span_bytes(self) -> int:
        """Bytes from the first element in the file to the end of the last one."""
        if self.strides is None or not self.numel:
            return self.num_bytes
        steps = zip(self.strides, self.shape, strict=True)
        return (1 + sum(step * (size - 1) for step, size in steps)) * self.dtype.itemsize


def _where_flat(content: Any) -> str:
    """Where in a file's content there are tensors by name, as the end of a message; "" if nowhere."""
    todo: list[tuple[str, Any]] = [("", content)]
    for path, part in todo:  # grows, breadth first
        if len(todo) > 1000:
            break
        if isinstance(part, dict):
            others = {key: value for key, value in part.items() if not isinstance(value, torch.Tensor)}
            if 2 * len(others) < len(part):
                without = f" without {brief(next(iter(others)))}" if others else ""
                return f": strip what is around them, save torch.load(file){path}{without} alone"
            todo += [(f"{path}[{brief(key)}]", value) for key, value in others.items()]
    return ""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def read_at(
    path: Path, descriptor: int, buffer: memoryview, offset: int, needed: int | None = None, direct: int | None = None
) -> None:
    """Reads from an open file; see `TensorFile.read_into`."""
    done, needed = 0, len(buffer) if needed is None else needed
    while done < needed:
        source = descriptor if direct is None or done % PAGE else direct
        try:
            count = os.preadv(source, [buffer[done : done + _MAX_IO_BYTES]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read at byte {offset + done}: {error.strerror}") from error
        if count == 0:
            where = f"{path}: truncated while it was read"
            raise CheckpointError(f"{where}: expected {needed} bytes at {offset}, got {done}")
        done += count


def header_limit(num_bytes: int) -> int:
    """The longest header accepted in a file of `num_bytes`, so that parsing it takes less memory than the tensors."""
    return min(MAX_HEADER_BYTES, max(MAX_SMALL_HEADER_BYTES, num_bytes // 32))


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`.

    Raises:
        CheckpointError: the file is longer, or holds something else.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path}: at most {max_bytes} bytes were expected, got {os.path.getsize(path)}")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


class TensorFile:
    """A file of tensors opened for reading: `tensors` by name, and reads of byte ranges.

    A name that ends in `.bin` means a file that `torch.save` wrote (torch 1.6 or later), any other a safetensors file.

    Raises CheckpointError, one line that names the file, if it cannot be opened, is truncated or of another kind, or
    has a header that disagrees with itself or with the size of the file, or that is too long for it.
    """

    header_bytes = 0  # in front of the tensors, where the file says which
    _fd = -1

    def __init__(self, path: str | os.PathLike):
        self._open(path)
        self.tensors = self._read_torch() if self.path.suffix == ".bin" else self._read_safetensors()

    def _open(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error
        self._opened = os.fstat(self._fd)
        self.num_bytes = self._opened.st_size

    def check_same(self) -> None:
        """Raises CheckpointError unless the path still names the file that was opened, with the length and the time of
        its last change that it had then. It may have been closed."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: gone since it was opened: {error.strerror}") from error
        for key, what in (("st_ino", "inode"), ("st_size", "length in bytes"), ("st_mtime_ns", "time of change in ns")):
            was, found = getattr(self._opened, key), getattr(now, key)
            if was != found:
                why = "nothing may change a checkpoint while it is in use"
                raise CheckpointError(f"{self.path}: its {what} was {was} when it was opened and is {found}: {why}")

    def _read_safetensors(self) -> dict[str, TensorEntry]:
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if length > header_limit(self.num_bytes):
            raise CheckpointError(
                f"{self.path}: it announces a header of {length} bytes, and has {self.num_bytes} in all: at most "
                f"{header_limit(self.num_bytes)} were expected"
            )
        self.header_bytes = offset = 8 + length
        tensors = {}
        what = f"{self.path}: truncated or no safetensors file, {self.num_bytes} bytes"
        # The library checks that tensors follow each other without a hole, up to the end of the file.
        with refusing(what, CheckpointError), safe_open(f"/proc/self/fd/{self._fd}", framework="np") as file:
            for name in file.offset_keys():
                header = file.get_slice(name)
                dtype, shape = DTYPES.get(header.get_dtype()), tuple(header.get_shape())
                where = f"{self.path}: tensor {brief(name)}"
                if dtype is None:
                    expected = f"expected a dtype among {', '.join(DTYPES)}"
                    raise CheckpointError(f"{where}: {expected}, got {header.get_dtype()}")
                # An empty tensor has strides too.
                if len(shape) > MAX_DIMS or math.prod(size for size in shape if size) >= 1 << 63:
                    raise CheckpointError(f"{where}: no tensor can have the shape {brief(shape)}")
                tensors[name] = TensorEntry(name, dtype, shape, offset, path=self.path)
                offset += tensors[name].num_bytes
        return tensors

    def _read_torch(self) -> dict[str, TensorEntry]:
        """The tensors of a flat dictionary.

        `torch.load` reads the description under fake mode, where it allocates nothing and reports at which byte of the
        file each tensor's storage begins.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        what = f"{self.path}: expected an archive that torch.save wrote (torch 1.6 or later), got"
        with refusing(what, CheckpointError):  # whatever a damaged archive or description raises
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    if info.compress_type != zipfile.ZIP_STORED:
                        name = brief(info.filename.partition("/")[2])
                        raise CheckpointError(f"{self.path}: expected stored bytes in {name}, got compressed ones")
            reader = torch._C.PyTorchFileReader(os.fspath(self.path))
            sizes = {reader.get_record_offset(name): reader.get_record_size(name) for name in reader.get_all_records()}
            if reader.has_record("byteorder") and reader.get_record("byteorder") != b"little":
                raise CheckpointError(f"{self.path}: expected little-endian tensors")
            if reader.get_record_size("data.pkl") > header_limit(self.num_bytes):
                raise CheckpointError(f"{self.path}: its description of tensors is longer than its tensors allow")
            self._check_description(reader.get_record("data.pkl"))
            with FakeTensorMode():
                tensors = torch.load(self.path, weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise CheckpointError(f"{self.path}: expected a flat dictionary of tensors{_where_flat(tensors)}")
        entries = {}
        for name, tensor in tensors.items():
            where = f"{self.path}: tensor {brief(name)}"
            if not isinstance(name, str) or tensor.dim() > MAX_DIMS:
                raise CheckpointError(f"{where}: expected a name, and at most {MAX_DIMS} dimensions")
            strides = None if not tensor.numel() or tensor.is_contiguous() else tensor.stride()
            begin, offset = tensor.untyped_storage()._checkpoint_offset, tensor.storage_offset() * tensor.itemsize
            shape = tuple(tensor.shape)
            entry = entries[name] = TensorEntry(name, tensor.dtype, shape, begin + offset, strides, self.path)
            if entry.numel and not 0 <= offset <= offset + entry.span_bytes <= sizes.get(begin, -1):
                expected = f"expected {entry.span_bytes} bytes at byte {offset} of a member of the archive"
                raise CheckpointError(f"{where}: {expected}")
            if entry.num_bytes > self.num_bytes:
                raise CheckpointError(f"{where}: shape {brief(entry.shape)} repeats few bytes, strides {strides}")
        return entries

    def _check_description(self, stream: bytes) -> None:
        """Refuses a pickle that names anything but tensors, or a place in the memo beyond its length."""
        for opcode, argument, _ in pickletools.genops(stream):
            if "PUT" in opcode.name and argument is not None and not 0 <= argument <= len(stream):
                raise CheckpointError(f"{self.path}: its description has a memo of {argument} entries")
            if opcode.name in ("INST", "GLOBAL") and argument not in _PICKLE_GLOBALS:
                module, _, name = argument.partition(" ")
                if module != "torch" or not name.endswith("Storage"):
                    raise CheckpointError(
                        f"{self.path}: {module[:80]}.{name[:80]} has no place in a file of weights: "
                        "save a flat dictionary of tensors alone"
                    )

    def read_into(self, buffer: memoryview, offset: int, needed: int | None = None, direct: int | None = None) -> None:
        """Fills `buffer` with the file's bytes from `offset` on, at least with the first `needed` (None: all).

        `direct` is a descriptor with O_DIRECT to read through; offset and buffer are then aligned to pages.

        Raises:
            CheckpointError: the disk returns an error, or the file ends before the buffer has what is needed.
        """
        read_at(self.path, self._fd, buffer, offset, needed, direct)

    @cached_property
    def direct(self) -> int | None:
        """A descriptor with O_DIRECT; None if the page cache holds the file or its file system has no direct reads."""
        if self.is_cached():
            return None
        descriptor = -1
        try:  # the open file's own inode, whatever has its name by now
            descriptor = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            os.preadv(descriptor, [bytes_of(aligned_buffer(PAGE))], 0)  # some take the flag and refuse the read
        except OSError:
            if descriptor >= 0:
                os.close(descriptor)
            return None
        return descriptor

    def is_cached(self) -> bool:
        """Whether the page cache holds the file: its first page, its last, and some between."""
        page = memoryview(bytearray(1))
        try:
            for place in range(8):
                os.preadv(self._fd, [page], max(0, self.num_bytes - 1) * place // 7, os.RWF_NOWAIT)
        except OSError:  # not cached, or a file system that cannot tell
            return False
        return True

    def close(self) -> None:
        for descriptor in (self._fd, self.__dict__.pop("direct", None)):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class SafetensorsWriter(TensorFile):
    """A new safetensors file whose tensors are known in advance and whose bytes are written in any order.

    The header is written and the whole file allocated at once, so that a full disk is noticed before any work is done.
    """

    def __init__(self, path: str | os.PathLike, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path = Path(path)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first: every tensor then starts on a multiple of its own item size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            if dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{self.path}: tensor {name!r}: {dtype} cannot be stored in a safetensors file")
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        self.num_bytes = 8 + len(raw) + end
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(self._fd, 0, self.num_bytes)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise CheckpointError(f"{self.path}: no room for {self.num_bytes} bytes on its disk") from error
            os.ftruncate(self._fd, self.num_bytes)  # a file system that cannot allocate in advance
        self.write_bytes(len(raw).to_bytes(8, "little") + raw, 0)
        self.tensors = self._read_safetensors()

    def write_bytes(self, data: bytes | memoryview, offset: int) -> None:
        """Writes `data` at byte `offset` of the file."""
        write_all(self._fd, data, offset)
