"""A parameter whose bytes are quantized: where they are in files, and how they are decoded.

The readers of GGUF files and of quantized safetensors checkpoints return these. Nothing here holds weights: a parameter
is byte ranges of files, and bytes that are made anew each time they are read where a file has them in no order that the
decoder knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from distzo2.checkpoint.tensor_files import CheckpointError, bytes_of, read_at
from distzo2.weights.units import ParamInfo, StoredAs
from distzo2_core.packed import Field, Kind, PackedLayout

PIECE_ALIGNMENT = 64  # bytes: of each piece in a parameter's buffer
CHUNK_BYTES = 4 << 20  # read at once, where not all of a piece is needed at a time
VALUE_DTYPES = {
    Kind.FLOAT32: torch.float32,
    Kind.BFLOAT16: torch.bfloat16,
    Kind.FLOAT16: torch.float16,
    Kind.FLOAT8_E4M3: torch.float8_e4m3fn,
    Kind.FLOAT8_E5M2: torch.float8_e5m2,
    Kind.E8M0: torch.uint8,
}


@dataclass(frozen=True)
class Piece:
    """Bytes that become part of a parameter's buffer: a range of a file, or of what `make` writes."""

    path: Path | None  # a file, read as it lies; None: made
    offset: int  # bytes, in the file or in what is made
    num_bytes: int
    make: Callable[[torch.Tensor, int], None] | None = field(default=None, compare=False)
    """Fills a uint8 CPU tensor with the bytes from an offset on; any thread may call it."""
    is_checked: bool = False  # what is made is refused where it is not finite

    @classmethod
    def made(cls, num_bytes: int, make: Callable[[], torch.Tensor]) -> Piece:
        """A piece with the bytes of the CPU tensor that `make` returns."""

        def fill(out: torch.Tensor, begin: int) -> None:
            out.copy_(make().contiguous().view(-1).view(torch.uint8)[begin : begin + out.numel()])

        return cls(None, 0, num_bytes, fill)

    def part(self, begin: int, num_bytes: int) -> Piece:
        """Bytes of this piece."""
        return replace(self, offset=self.offset + begin, num_bytes=num_bytes)

    def read_into(self, out: torch.Tensor) -> None:
        """Fills `out`, uint8 [num_bytes], contiguous and on the CPU.

        Raises:
            CheckpointError: a file cannot be read or is too short, or what is made cannot be.
        """
        if self.make is not None:
            self.make(out, self.offset)
            return
        try:
            with open(self.path, "rb", buffering=0) as file:
                read_at(self.path, file.fileno(), bytes_of(out), self.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error

    def read(self) -> torch.Tensor:
        """The bytes, uint8 [num_bytes]; raises as `read_into`."""
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        self.read_into(data)
        return data


@dataclass(frozen=True)
class PackedParam:
    """A packed parameter of a model.

    Attributes:
        name: of the parameter in transformers, e.g. model.layers.0.self_attn.q_proj.weight.
        shape: of the parameter in transformers.
        format: for people, e.g. "Q4_K", "gptq int4 g128", "nf4".
        pieces: laid one after another in a buffer, each from a multiple of `PIECE_ALIGNMENT` bytes on.
        layout: how the buffer is decoded; its offsets count from the first piece's first byte.
        transposed: whether the decoded rows are the parameter with its last two dimensions swapped, as for the experts
            of gpt-oss. The parameter is then a view of what is decoded: `rows.view(*leading, n, k).mT`.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    pieces: tuple[Piece, ...]
    layout: PackedLayout
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the buffer, without padding behind the last piece."""
        return starts(self.pieces)[-1] + self.pieces[-1].num_bytes

    @property
    def has_scales_apart(self) -> bool:
        """Whether scales lie behind all codes, and so can be read without these."""
        scale = self.layout.scale
        return scale is not None and scale.offset >= self.layout.rows * self.layout.codes.row_stride

    def placed(self) -> list[tuple[Piece, int]]:
        """The pieces, each with the byte of the buffer at which it begins."""
        return list(zip(self.pieces, starts(self.pieces), strict=True))

    def read_into(self, out: torch.Tensor) -> None:
        """Fills `out`, uint8 [num_bytes], contiguous and on the CPU: the buffer, with zeros between pieces.

        Raises:
            CheckpointError: a file cannot be read or is too short, or weights cannot be packed.
        """
        self.clear_gaps(out)
        for piece, start in self.placed():
            piece.read_into(out[start : start + piece.num_bytes])

    def clear_gaps(self, out: torch.Tensor) -> None:
        """Sets the bytes of a buffer that are between pieces to 0: sums of a parameter's bytes count them too."""
        end = 0
        for piece, start in self.placed():
            out[end:start] = 0
            end = start + piece.num_bytes

    def read(self) -> torch.Tensor:
        """The buffer, uint8 [num_bytes]; raises as `read_into`."""
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        self.read_into(buffer)
        return buffer

    def stored_as(self) -> StoredAs:
        """How a streamed model stores it."""
        ranges = None
        if all(piece.make is None for piece in self.pieces):
            ranges = tuple((piece.path, piece.offset, piece.num_bytes, start) for piece, start in self.placed())
        return StoredAs(self.num_bytes, ranges, None, self.layout, self.transposed, self.format)

    def param(self, dtype: torch.dtype, index: int = 0) -> ParamInfo:
        """The parameter as of a model that declares it in `dtype`."""
        stored, tensor = self.stored_as(), torch.empty(self.shape, dtype=dtype, device="meta")
        trains = stored.code_dtype is not None
        return ParamInfo(index, self.name, tensor.shape, dtype, tensor.stride(), trains, tensor, stored=stored)

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """The parameter itself, decoded to `dtype`. As for `read`."""
        return self.param(dtype).value(self.read())

    def check_scales(self) -> None:
        """Reads the scales and minima, piece by piece, and refuses what no weight can be made of.

        Raises:
            CheckpointError: one of them is infinite or NaN (255 in e8m0); or as for `read`.
        """
        layout = self.layout
        if all(piece.is_checked for piece in self.pieces):
            return
        for role in ("scale", "outer", "min", "outer_min"):
            place = getattr(layout, role)
            if place is None or place.kind not in VALUE_DTYPES:  # six-bit integers are finite
                continue
            for row, values, *_ in values_of(self, place):
                bad = values == 255 if place.kind == Kind.E8M0 else ~values.float().isfinite()
                if bad.any():
                    where = f"{self.name} ({self.format}), row {row + int(bad.nonzero()[0, 0]) * place.rows}"
                    raise CheckpointError(f"{where}: expected finite numbers as {role}, got {values[bad][0].item()}")


def starts(pieces: Sequence[Piece]) -> list[int]:
    """The byte at which each piece begins in the buffer."""
    lengths = (-(-piece.num_bytes // PIECE_ALIGNMENT) * PIECE_ALIGNMENT for piece in pieces[:-1])
    return [*accumulate(lengths, initial=0)]


class Values(NamedTuple):
    """Values of a field [lines, values of a row], and where they are.

    Attributes:
        row: at which the first line begins.
        piece: the bytes from the first value to the last.
        data: those bytes, uint8.
        places: of the values in `data`, a view: uint8 [lines, blocks, values of a block, bytes of a value].
    """

    row: int
    values: torch.Tensor
    piece: Piece
    data: torch.Tensor
    places: torch.Tensor


def values_of(param: PackedParam, place: Field) -> Iterator[Values]:
    """The values of a field, some MiB at a time. A line is what `place.rows` rows share; it lies in one piece."""
    layout, dtype = param.layout, VALUE_DTYPES[place.kind]
    num_lines = -(-layout.rows // place.rows)
    sizes = (layout.cols // layout.block, -(-layout.block // place.cols), dtype.itemsize)
    strides = (place.block_stride, place.stride, 1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    line = 0
    for piece, start in zip(param.pieces, starts(param.pieces), strict=True):
        while line < num_lines and (at := place.offset + line * place.row_stride - start) + span <= piece.num_bytes:
            fitting = (piece.num_bytes - at - span) // max(place.row_stride, 1) + 1
            count = min(fitting, num_lines - line, max(1, CHUNK_BYTES // max(place.row_stride, 1)))
            part = piece.part(at, (count - 1) * place.row_stride + span)
            data = part.read()
            places = data.as_strided((count, *sizes), (place.row_stride, *strides))
            values = places.contiguous().view(dtype).reshape(count, -1)
            yield Values(line * place.rows, values, part, data, places)
            line += count
