"""Codes, zero points and scales brought into an order that the decoder knows, without loss, a few MiB at a time.

Files of GPTQ and AWQ hold the transpose of a weight [rows, cols], with eight codes of 4 bits, or four of 8, in a 32-bit
word; compressed-tensors packs zero points along rows; bitsandbytes may quantize its scales once more. What is made here
is codes as NIBBLES_32 or UINT8 [rows, cols], zero points as UINT8 [rows, groups], scales as [rows, groups].
"""

from __future__ import annotations

import torch

from distzo2.checkpoint.packed_param import CHUNK_BYTES, Piece
from distzo2.checkpoint.tensor_files import TensorEntry

# Where a word of AWQ has the codes of its eight columns: column j is nibble _AWQ_ORDER[j].
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def piece_of(tensor: TensorEntry) -> Piece:
    """All bytes of a tensor."""
    return Piece(tensor.path, tensor.offset, tensor.num_bytes)


def read_rows(tensor: TensorEntry, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """Rows [begin, end) of a tensor, or all of it."""
    rows = tensor.shape[0] if tensor.shape else 1
    end, row_bytes = rows if end is None else end, tensor.num_bytes // rows
    data = piece_of(tensor).part(begin * row_bytes, (end - begin) * row_bytes).read().view(tensor.dtype)
    return data.view(end - begin, *tensor.shape[1:]) if tensor.shape else data.view(())


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


def transposed_codes(qweight: TensorEntry, bits: int, awq: bool) -> Piece:
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
            words = read_rows(qweight, begin, min(num_lines, begin + step))
            codes = unpacked(words, bits, 1 if awq else 0, awq).t()
            data = nibbles_32(codes.contiguous()) if bits == 4 else codes
            first = begin * (1 if awq else per) * bits // 8
            out[:, first : first + data.shape[1]] = data
        return out

    return Piece.made(rows * cols * bits // 8, make)


def zeros(packed: TensorEntry, rows: int, bits: int, axis: int, awq: bool = False, plus: int = 0) -> Piece:
    """Zero points packed as words [groups, rows * bits / 32], axis 1, or [rows * bits / 32, groups], axis 0: UINT8
    [rows, groups], plus `plus` within the bits."""

    def make() -> torch.Tensor:
        found = unpacked(read_rows(packed), bits, axis, awq)
        return (found.t() if axis == 1 else found)[:rows] + plus & (1 << bits) - 1

    return Piece.made(rows * packed.shape[1 - axis], make)


def nested_scales(absmax: TensorEntry, levels: TensorEntry, outer: TensorEntry, offset: float, block: int) -> Piece:
    """bitsandbytes' scales that are quantized themselves, as float32: levels[q] * outer + offset, each step rounded."""

    def make() -> torch.Tensor:
        scale = read_rows(levels).view(-1)[read_rows(absmax).view(-1).int()]
        return scale * read_rows(outer).view(-1).repeat_interleave(block)[: scale.numel()] + offset

    return Piece.made(4 * absmax.numel, make)
