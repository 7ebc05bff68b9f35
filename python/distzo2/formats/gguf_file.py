"""GGUF files: a header whose every length is checked against the file, and how the blocks of each type are decoded.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the header, `block_q4_0` and its neighbours in
ggml/src/ggml-common.h for the blocks. What is written once in a block of 32 or 256 weights lies in front of the codes,
so the fields of a layout differ in their offsets alone.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from distzo2.checkpoint.packed_param import Piece
from distzo2.checkpoint.tensor_files import MAX_DIMS, CheckpointError, TensorFile
from distzo2.errors import DistZO2Error
from distzo2.text import brief
from distzo2_core.packed import Field, Kind, PackedLayout

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 64 << 20  # a vocabulary of 262,144 tokens takes some 8 MiB
RAW_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_LISTED = 1024  # numbers of an array that are kept; of a longer one, and of strings, only how many there are


def _half(offset: int, cols: int = 32) -> Field:
    return Field(Kind.FLOAT16, offset, cols=cols)


_K_PARTS = {
    "scale": Field(Kind.K_SCALE, 4, cols=32),
    "outer": _half(0, 256),
    "min": Field(Kind.K_MIN, 4, cols=32),
    "outer_min": _half(2, 256),
}
# One block of one row. Those of 5 bits are widened to bytes when they are read: the values stay what they are.
_BLOCKS = {
    "Q4_0": PackedLayout(1, 32, 32, Field(Kind.NIBBLES_32, 2), _half(0), zero_point=8),
    "Q4_1": PackedLayout(1, 32, 32, Field(Kind.NIBBLES_32, 4), _half(0), min=_half(2)),
    "Q5_0": PackedLayout(1, 32, 32, Field(Kind.INT8, 2), _half(0)),
    "Q5_1": PackedLayout(1, 32, 32, Field(Kind.UINT8, 4), _half(0), min=_half(2)),
    "Q8_0": PackedLayout(1, 32, 32, Field(Kind.INT8, 2), _half(0)),
    "Q4_K": PackedLayout(1, 256, 256, Field(Kind.NIBBLES_64, 16), **_K_PARTS, min_sign=-1),
    "Q5_K": PackedLayout(1, 256, 256, Field(Kind.Q5_K, 16), **_K_PARTS, min_sign=-1),
    "Q6_K": PackedLayout(
        1, 256, 256, Field(Kind.Q6_K, 0), Field(Kind.INT8, 192, stride=1, cols=16), outer=_half(208, 256), zero_point=32
    ),
}
_WIDENED = {"Q5_0": 34, "Q5_1": 36}  # bytes of a block then
SUPPORTED = (*RAW_DTYPES, *_BLOCKS)


def gguf_package() -> ModuleType:
    """The package `gguf`, which knows the types' sizes and the tensors' names."""
    try:
        import gguf
    except ImportError as error:
        raise DistZO2Error("GGUF files need the package gguf: pip install 'gguf>=0.19', or distzo2[gguf]") from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        kind: its type, as ggml spells it: "Q4_K", "F32".
        shape: as in torch, rows before columns.
        offset: bytes, from the start of the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int

    @property
    def is_packed(self) -> bool:
        return self.kind not in RAW_DTYPES

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def piece(self, begin: int, end: int) -> Piece:
        """Rows of it, as `layout` decodes them: blocks of 5 bits widened."""
        row_bytes = self.num_bytes // self.rows
        piece = Piece(self.path, self.offset + begin * row_bytes, (end - begin) * row_bytes)
        if self.kind not in _WIDENED:
            return piece
        num_blocks = (end - begin) * self.shape[-1] // 32
        return Piece.made(num_blocks * _WIDENED[self.kind], lambda: _widened(piece.read().view(num_blocks, -1)))

    def layout(self, rows: int, head_dim: int = 0) -> PackedLayout:
        """How rows of its type and length are decoded (see `PackedLayout` for `head_dim`)."""
        block, cols = _BLOCKS[self.kind], self.shape[-1]
        num_blocks = cols // block.cols
        block_bytes = _WIDENED.get(self.kind, self.num_bytes // (self.rows * num_blocks))
        strides = {"row_stride": num_blocks * block_bytes, "block_stride": block_bytes}
        values = {each.name: getattr(block, each.name) for each in fields(block)}
        placed = {name: replace(v, **strides) for name, v in values.items() if isinstance(v, Field)}
        return replace(block, rows=rows, cols=cols, head_dim=head_dim, **placed)


def _widened(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of Q5_0 or Q5_1, uint8 [num_blocks, 22 or 24], with a byte for each code: signed for Q5_0, which is then
    Q8_0, and unsigned for Q5_1."""
    head, high, low = blocks[:, :-20], blocks[:, -20:-16], blocks[:, -16:]
    fifth = (high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
    codes = torch.cat([low & 15, low >> 4], dim=1) | fifth << 4
    return torch.cat([head, codes - 16 if head.shape[1] == 2 else codes], dim=1)


class GgufFile(TensorFile):
    """A GGUF file opened for reading.

    Attributes:
        metadata: its values by key; of arrays of strings, and of long ones, only the length.
        tensors: by name. Those of a type that cannot be decoded are there too.

    Raises:
        CheckpointError: it is no GGUF file, truncated, or its header disagrees with itself or with the file's size.
        DistZO2Error: the package `gguf` is missing.
    """

    def __init__(self, path: str | os.PathLike):
        gguf = gguf_package()
        self._open(path)
        data = bytearray(min(self.num_bytes, MAX_HEADER_BYTES))
        self.read_into(memoryview(data), 0)
        header = _Header(self.path, data, self.num_bytes)
        if header.take(4) != MAGIC:
            raise CheckpointError(f"{self.path}: expected a GGUF file, got one that begins with {bytes(data[:4])!r}")
        version, num_tensors, num_values = header.number("I"), header.number("Q"), header.number("Q")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self.path}: expected GGUF version 2 or 3, little-endian, got version {version}")
        header.need(num_values * 13, f"{num_values} values of metadata")  # of which each takes as many bytes at least
        header.need(num_tensors * 25, f"{num_tensors} tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = header.text()
            if key in self.metadata:
                raise CheckpointError(f"{self.path}: {brief(key)} is there twice")
            self.metadata[key] = header.value(header.number("I"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: expected a power of two as general.alignment, got {brief(alignment)}")
        found = [self._tensor(header, gguf) for _ in range(num_tensors)]
        self.header_bytes = -(-header.at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for tensor in found:
            tensor = replace(tensor, offset=self.header_bytes + tensor.offset)
            end = tensor.offset + tensor.num_bytes
            if tensor.offset % alignment or end > self.num_bytes or tensor.name in self.tensors:
                found = f"bytes {tensor.offset} to {end}, the file has {self.num_bytes}"
                expected = "truncated" if end > self.num_bytes else "expected aligned tensors of different names"
                raise CheckpointError(f"{self.path}: {expected}: tensor {brief(tensor.name)} is in {found}")
            self.tensors[tensor.name] = tensor

    def _tensor(self, header: _Header, gguf: ModuleType) -> GgufTensor:
        """The next entry of the table, its offset from the end of the header."""
        name, num_dims = header.text(), header.number("I")
        where = f"{self.path}: tensor {brief(name)}"
        if not 0 < num_dims <= MAX_DIMS:
            raise CheckpointError(f"{where}: expected 1 to {MAX_DIMS} dimensions, got {num_dims}")
        shape = tuple(header.number("Q") for _ in range(num_dims))[::-1]
        number, offset = header.number("I"), header.number("Q")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise CheckpointError(f"{where}: it has type {number}, which is not known") from None
        if math.prod(shape) >= 1 << 63 or 0 in shape or shape[-1] % block:
            expected = f"expected columns in blocks of {block} weights ({kind.name})"
            raise CheckpointError(f"{where}: {expected}, got shape {brief(shape)}")
        return GgufTensor(name, kind.name, shape, self.path, offset, math.prod(shape) // block * block_bytes)


class _Header:
    """The front of a file, read value by value."""

    def __init__(self, path: Path, data: bytearray, file_bytes: int):
        self.path, self.data, self.file_bytes, self.at = path, data, file_bytes, 0

    def need(self, num_bytes: int, what: str = "") -> None:
        """Refuses what does not fit into the rest of the header."""
        if num_bytes > len(self.data) - self.at:
            reason = "truncated" if len(self.data) == self.file_bytes else f"its header exceeds {len(self.data)} bytes"
            announced = f"expected {what or f'{brief(num_bytes)} bytes'} from byte {self.at} on"
            raise CheckpointError(f"{self.path}: {reason}: {announced}, the file has {self.file_bytes} bytes")

    def take(self, num_bytes: int) -> bytes | bytearray:
        self.need(num_bytes)
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        begin, data = self.at, self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.path}: expected text in UTF-8 at byte {begin}, got {brief(bytes(data))}"
            ) from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        item, count = (self.number("I"), self.number("Q")) if kind == _ARRAY else (kind, 0)
        if item in _SCALARS:
            data = self.take(count * struct.calcsize(_SCALARS[item]))
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", data)) if count <= _MAX_LISTED else count
        if item != _STRING:
            raise CheckpointError(f"{self.path}: metadata at byte {self.at} has type {item}, which is not known")
        self.need(count * 8, f"{count} strings")
        for _ in range(count):
            self.take(self.number("Q"))
        return count
