"""Codes, zero points and scales brought into an order that the decoder knows, without loss, a few MiB at a time.

Files of GPTQ and AWQ hold the transpose of a weight [rows, cols], with eight codes of 4 bits, or four of 8, in a 32-bit
word; compressed-tensors packs zero points along rows; bitsandbytes may quantize its scales once more. What is made here
is codes as NIBBLES_32 or UINT8 [rows, cols], zero points as UINT8 [rows, groups], scales as [rows, groups].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from distzo2.checkpoint.packed_param import CHUNK_BYTES, Piece
from distzo2.checkpoint.tensor_files import TensorEntry

# Where a word of AWQ has the codes of its eight columns: column j is nibble _AWQ_ORDER[j].
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class Stored:
    """A tensor of a file."""

    path: Path
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    def piece(self) -> Piece:
        """All of its bytes."""
        return Piece(self.path, self.entry.offset, self.entry.num_bytes)

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Its rows [begin, end), or all of it."""
        row_bytes = self.entry.num_bytes // (self.shape[0] if self.shape else 1)
        end = end if end is not None else self.shape[0] if self.shape else 1
        data = self.piece().part(begin * row_bytes, (end - begin) * row_bytes).read().view(self.dtype)
        return data.view(end - begin, *self.shape[1:]) if self.shape else data.view(())


def unpacked(words: torch.Tensor, bits: int, axis: int, awq: bool = False) -> torch.Tensor:
    """The codes in 32-bit words [lines, columns], uint8, with 32 / bits times as many along `axis`: lowest bits first,
    or in the order of AWQ."""
    data = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
        data = data[..., _AWQ_ORDER] if awq else data
    return data.flatten(1) if axis == 1 else data.transpose(1, 2).flatten(0, 1)


def nibbles_32(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, uint8 [rows, cols], as NIBBLES_32 [rows, cols / 2]."""
    groups = codes.unflatten(-1, (-1, 2, 16))
    return (groups[:, :, 0] | groups[:, :, 1] << 4).flatten(1)


def transposed_codes(qweight: Stored, bits: int, awq: bool) -> Piece:
    """The codes of GPTQ, int32 words [cols * bits / 32, rows], or of AWQ, [cols, rows / 8]: as NIBBLES_32 [rows, cols]
    or, of 8 bits, as UINT8."""
    num_lines, width = qweight.shape
    per = 32 // bits
    rows, cols = (width * per, num_lines) if awq else (width, num_lines * per)

    def make() -> torch.Tensor:
        out = torch.empty(rows, cols * bits // 8, dtype=torch.uint8)
        step = 32 // (1 if awq else per)  # lines that hold 32 columns
        step *= max(1, CHUNK_BYTES // (4 * width * step))
        for begin in range(0, num_lines, step):
            words = qweight.read(begin, min(num_lines, begin + step))
            codes = unpacked(words, bits, 1 if awq else 0, awq).t()
            data = nibbles_32(codes.contiguous()) if bits == 4 else codes
            first = begin * (1 if awq else per) * bits // 8
            out[:, first : first + data.shape[1]] = data
        return out

    return Piece.made(rows * cols * bits // 8, make)


def zeros(packed: Stored, rows: int, bits: int, axis: int, awq: bool = False, plus: int = 0) -> Piece:
    """Zero points packed as words [groups, rows * bits / 32], axis 1, or [rows * bits / 32, groups], axis 0: UINT8
    [rows, groups], plus `plus` within the bits."""

    def make() -> torch.Tensor:
        found = unpacked(packed.read(), bits, axis, awq)
        return (found.t() if axis == 1 else found)[:rows] + plus & (1 << bits) - 1

    return Piece.made(rows * packed.shape[1 - axis], make)


def nested_scales(absmax: Stored, levels: Stored, outer: Stored, offset: float, block: int) -> Piece:
    """bitsandbytes' scales that are quantized themselves, as float32: levels[q] * outer + offset, each step rounded."""

    def make() -> torch.Tensor:
        scale = levels.read().view(-1)[absmax.read().view(-1).int()]
        return scale * outer.read().view(-1).repeat_interleave(block)[: scale.numel()] + offset

    return Piece.made(4 * absmax.entry.numel, make)
