"""PyTorch checkpoints (`pytorch_model.bin`), read by ranges as safetensors files are, and without running their pickle.

Since version 1.6 torch saves a zip archive whose members are stored as they are: `data.pkl`, which describes the
tensors, and one member of raw bytes for each storage. The description is unpickled by a reader that knows storages and
tensors and nothing else; the bytes are then read in place with `pread`.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distzo2.checkpoint_layout import row_major_strides
from distzo2.safetensors_io import MAX_HEADER_BYTES, CheckpointError, RangeFile, TensorEntry

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


def _tensor(storage: Any, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state dict of tensors is made of; any other is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown record {str(pid)[:80]}")
        return _Storage(dtype, str(key), int(numel))


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
        if "data.pkl" not in members or members["data.pkl"].file_size > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: expected a description data.pkl of the tensors, got none that can be read"
            )
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise CheckpointError(f"{self.path}: expected little-endian tensors")
        with archive.open(members["data.pkl"]) as stream:
            tensors = _Unpickler(stream).load()
        if not isinstance(tensors, dict) or not all(isinstance(t, _Tensor) for t in tensors.values()):
            raise CheckpointError(f"{self.path}: expected a flat dictionary of tensors")
        begins: dict[str, int] = {}
        entries = {}
        for name, tensor in tensors.items():
            storage = tensor.storage
            if storage.key not in begins:
                begins[storage.key] = self._data_offset(members, storage)
            numel = math.prod(tensor.shape)
            steps = zip(tensor.shape, tensor.strides, row_major_strides(tensor.shape), strict=True)
            if numel and any(size > 1 and stride != wanted for size, stride, wanted in steps):
                raise CheckpointError(f"{self.path}: tensor {name!r} is not contiguous, strides {tensor.strides}")
            if not 0 <= tensor.offset <= tensor.offset + numel <= storage.numel:
                raise CheckpointError(f"{self.path}: tensor {name!r} reaches beyond its storage of {storage.numel}")
            item = storage.dtype.itemsize
            begin = begins[storage.key] + tensor.offset * item
            entries[str(name)] = TensorEntry(str(name), storage.dtype, tensor.shape, begin, numel * item)
        return entries

    def _data_offset(self, members: dict[str, zipfile.ZipInfo], storage: _Storage) -> int:
        """Where the bytes of a storage start in the file."""
        info = members.get(f"data/{storage.key}")
        num_bytes = storage.numel * storage.dtype.itemsize
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size != num_bytes:
            raise CheckpointError(f"{self.path}: expected {num_bytes} stored bytes in data/{storage.key}")
        local = bytearray(30)
        self.read_into(memoryview(local), info.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", local)
        begin = info.header_offset + 30 + name_length + extra_length
        if signature != b"PK\x03\x04" or begin + num_bytes > self.num_bytes:
            raise CheckpointError(f"{self.path}: data/{storage.key} is not where the archive says")
        return begin


def open_weights(path: str | os.PathLike) -> RangeFile:
    """A file of weights, by the ending of its name."""
    from distzo2.safetensors_io import SafetensorsFile

    return TorchArchive(path) if Path(path).suffix == ".bin" else SafetensorsFile(path)
