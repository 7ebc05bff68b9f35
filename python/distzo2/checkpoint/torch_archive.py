"""PyTorch checkpoints (`pytorch_model.bin`), read by ranges as safetensors files are, and without running their pickle.

Since version 1.6 torch saves a zip archive whose members are stored as they are: `data.pkl`, which describes the
tensors, and one member of raw bytes for each storage. The description is read as data (`pickle_records.py`), never
unpickled; the bytes are then read in place with `pread`.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from distzo2.checkpoint.layout import row_major_strides
from distzo2.checkpoint.pickle_records import Global, read_records
from distzo2.checkpoint.weight_files import (
    MAX_DIMS,
    MAX_HEADER_BYTES,
    CheckpointError,
    RangeFile,
    TensorEntry,
    header_limit,
    is_size,
)

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _call(function: Global, arguments: tuple) -> _Tensor:
    """The tensor that torch's own functions would rebuild; no other function is known."""
    if function == ("torch._utils", "_rebuild_parameter") and arguments and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if function != ("torch._utils", "_rebuild_tensor_v2"):
        raise ValueError(f"{function} has no place in a file of weights")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage) or not all(_is_shape(numbers) for numbers in ((offset,), shape, strides)):
        raise ValueError("a tensor whose storage, offset, shape or strides are of the wrong kind")
    return _Tensor(storage, offset, shape, strides)


def _storage(pid: tuple) -> _Storage:
    """The storage that a persistent id names."""
    kind, dtype, key, _, numel = pid
    known = isinstance(dtype, Global) and dtype.module == "torch" and dtype.name in _STORAGE_DTYPES
    if kind == "storage" and isinstance(dtype, Global) and not known:
        raise ValueError(f"{dtype} has no place in a file of weights")
    if kind != "storage" or not known or not isinstance(key, str) or not _is_shape((numel,)):
        raise ValueError("a record of something other than a storage")
    return _Storage(_STORAGE_DTYPES[dtype.name], key, numel)


def _is_shape(numbers: object) -> bool:
    return isinstance(numbers, tuple) and len(numbers) <= MAX_DIMS and all(is_size(number) for number in numbers)


class TorchArchive(RangeFile):
    """A `.bin` file opened for reading; `.tensors` and the reads are those of a safetensors file.

    Raises CheckpointError, one line that names the file, if it is truncated, is not a flat dictionary of contiguous
    tensors, or pickles anything else.
    """

    def _read_header(self) -> dict[str, TensorEntry]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return self._read_archive(archive)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged archive or pickle stream makes its reader raise
            raise CheckpointError(
                f"{self.path}: expected an archive that torch.save wrote (torch 1.6 or later), got: {error}"
            ) from error

    def _read_archive(self, archive: zipfile.ZipFile) -> dict[str, TensorEntry]:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in members or members["data.pkl"].file_size > header_limit(self.num_bytes):
            raise CheckpointError(
                f"{self.path}: expected a description data.pkl of the tensors, got none that can be read"
            )
        for name in ("data.pkl", "byteorder"):
            if name in members and members[name].compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{self.path}: expected stored bytes in {name}, got compressed ones")
        if "byteorder" in members:
            with archive.open(members["byteorder"]) as stream:
                if stream.read(16) != b"little":
                    raise CheckpointError(f"{self.path}: expected little-endian tensors")
        with archive.open(members["data.pkl"]) as stream:
            tensors = read_records(stream.read(MAX_HEADER_BYTES), _call, _storage)
        if not isinstance(tensors, dict) or not all(isinstance(t, _Tensor) for t in tensors.values()):
            raise CheckpointError(f"{self.path}: expected a flat dictionary of tensors")
        begins: dict[str, int] = {}
        entries = {}
        for name, tensor in tensors.items():
            storage = tensor.storage
            if storage.key not in begins:
                begins[storage.key] = self._data_offset(members, storage)
            if not isinstance(name, str) or len(tensor.shape) != len(tensor.strides):
                raise CheckpointError(
                    f"{self.path}: tensor {str(name)[:80]!r} has no name, or strides of another number"
                )
            numel = math.prod(tensor.shape)
            steps = zip(tensor.shape, tensor.strides, row_major_strides(tensor.shape), strict=True)
            if numel and any(size > 1 and stride != wanted for size, stride, wanted in steps):
                raise CheckpointError(f"{self.path}: tensor {name!r} is not contiguous, strides {tensor.strides}")
            if not 0 <= tensor.offset <= tensor.offset + numel <= storage.numel:
                raise CheckpointError(f"{self.path}: tensor {name!r} reaches beyond its storage of {storage.numel}")
            item = storage.dtype.itemsize
            begin = begins[storage.key] + tensor.offset * item
            entries[name] = TensorEntry(name, storage.dtype, tensor.shape, begin, numel * item)
        return entries

    def _data_offset(self, members: dict[str, zipfile.ZipInfo], storage: _Storage) -> int:
        """Where the bytes of a storage start in the file."""
        info = members.get(f"data/{storage.key}")
        num_bytes = storage.numel * storage.dtype.itemsize
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size != num_bytes:
            raise CheckpointError(f"{self.path}: expected {num_bytes} stored bytes in data/{storage.key[:80]}")
        local = bytearray(30)
        self.read_into(memoryview(local), info.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", local)
        begin = info.header_offset + 30 + name_length + extra_length
        if signature != b"PK\x03\x04" or begin + num_bytes > self.num_bytes:
            raise CheckpointError(f"{self.path}: data/{storage.key[:80]} is not where the archive says")
        return begin


def open_weights(path: str | os.PathLike) -> RangeFile:
    """A file of weights, by the ending of its name."""
    from distzo2.checkpoint.weight_files import SafetensorsFile

    return TorchArchive(path) if Path(path).suffix == ".bin" else SafetensorsFile(path)
