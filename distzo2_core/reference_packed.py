"""The `decode` op in NumPy: what a packed weight is worth, step by step, as packed.py says it. The caller checked the
arguments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .packed import ABSENT, KINDS_OF, Kind
from .reference import BFLOAT16, FLOAT16, fma, mul, round_nearest
from .reference import decode as decode_floats
from .types import CODE_DTYPES

_CHUNK = 1 << 18  # weights handled at a time, in whole rows: bounds the memory of temporaries


@dataclass(frozen=True)
class _Places:
    """A field of some rows of a matrix: its bytes, by row, block and place in the block.

    Attributes:
        kind, stride, cols: of the field.
        starts: int64 [rows, blocks], the byte that each row's blocks begin at.
    """

    kind: Kind
    stride: int
    cols: int
    starts: np.ndarray


def decode(stored: Tensor, matrices: Tensor, levels: Tensor, out: Tensor, gains: Tensor | None = None) -> None:
    data, written = stored.numpy(), out.numpy()
    gained = data if gains is None else gains.numpy()
    for row, level in zip(matrices.tolist(), levels.numpy(), strict=True):
        rows, cols, block, zero_point, min_sign, divides, head_dim, has_levels, out_offset, code = row[:10]
        columns = [row[at : at + 7] for at in range(10, len(row), 7)]
        fields = {name: each for name, each in zip(KINDS_OF, columns, strict=True) if each[0] != ABSENT}
        row_bytes = cols * CODE_DTYPES[code].itemsize
        step = max(1, _CHUNK // max(cols, 1))
        for first in range(0, rows if cols else 0, step):
            which = _stored_rows(np.arange(first, min(rows, first + step)), head_dim)
            blocks = np.arange(cols // block)
            places = {
                name: _Places(
                    Kind(kind), stride, shared_cols,
                    offset + (which // shared_rows * row_stride)[:, None] + blocks * block_stride,
                )
                for name, (kind, offset, row_stride, block_stride, stride, shared_rows, shared_cols) in fields.items()
            }  # fmt: skip
            q = _codes(data, places.pop("codes"), block)
            part = {n: _values(gained if n == "gain" else data, place, block) for n, place in places.items()}
            if has_levels:
                q = level[q.astype(np.int64)]
            else:
                q = q - part.get("zero", np.float32(zero_point))  # exact: an integer, or float8 less 0
            scale, minimum = part["scale"], np.float32(-0.0)
            if "outer" in part:
                with np.errstate(all="ignore"):
                    scale = scale / part["outer"] if divides else mul(part["outer"], scale)
            if "min" in part:
                minimum = mul(part["outer_min"], part["min"]) if "outer_min" in part else part["min"]
                minimum = minimum if min_sign > 0 else -minimum
            value = fma(scale, q, minimum)
            if "gain" in part:
                value = mul(part["gain"], value)
            bits = round_nearest(value, code).reshape(-1).view(np.uint8)
            written[out_offset + first * row_bytes :][: bits.size] = bits


def _stored_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where the rows of the parameter are stored: GGUF has the halves of each head interleaved."""
    if not head_dim:
        return rows
    in_head, half = rows % head_dim, head_dim // 2
    return rows - in_head + in_head % half * 2 + in_head // half


def _read(data: np.ndarray, at: np.ndarray, num_bytes: int) -> np.ndarray:
    """Little-endian integers as int64 at these bytes."""
    return sum(data[at + i].astype(np.int64) << 8 * i for i in range(num_bytes))


def _values(data: np.ndarray, place: _Places, block: int) -> np.ndarray:
    """float32 [rows, cols]: the field's value of each weight."""
    index = np.arange(block) // place.cols
    numbers = np.arange(index[-1] + 1)
    if place.kind in (Kind.K_SCALE, Kind.K_MIN):
        values = _k_values(data, place)
    else:
        values = _floats(data, place.starts[:, :, None] + numbers * place.stride, place.kind)
    return values[:, :, index].reshape(len(values), -1)


def _floats(data: np.ndarray, at: np.ndarray, kind: Kind) -> np.ndarray:
    """The float32 values of this kind at these bytes."""
    if kind is Kind.FLOAT32:
        return _read(data, at, 4).astype(np.uint32).view(np.float32)
    if kind in (Kind.BFLOAT16, Kind.FLOAT16):
        return decode_floats(_read(data, at, 2).astype(np.uint16), BFLOAT16 if kind is Kind.BFLOAT16 else FLOAT16)
    byte = _read(data, at, 1)
    if kind is Kind.UINT8:
        return byte.astype(np.float32)
    if kind is Kind.INT8:
        return (byte - (byte >> 7 << 8)).astype(np.float32)
    if kind is Kind.E8M0:
        return np.where(byte == 255, np.nan, np.ldexp(1.0, byte - 127)).astype(np.float32)
    dtype = torch.float8_e4m3fn if kind is Kind.FLOAT8_E4M3 else torch.float8_e5m2
    return torch.from_numpy(byte.astype(np.uint8)).view(dtype).float().numpy()


def _k_values(data: np.ndarray, place: _Places) -> np.ndarray:
    """float32 [rows, blocks, 8]: eight scales, or minima, of six bits in 12 bytes."""
    a, b, c = (data[place.starts[:, :, None] + np.arange(4) + 4 * part] for part in range(3))
    low, high = (a & 63, c & 15 | a >> 6 << 4) if place.kind is Kind.K_SCALE else (b & 63, c >> 4 | b >> 6 << 4)
    return np.concatenate([low, high], axis=2).astype(np.float32)


def _codes(data: np.ndarray, place: _Places, block: int) -> np.ndarray:
    """float32 [rows, cols]: the numbers that the codes are."""
    kind, i = place.kind, np.arange(block)

    def bits(byte: np.ndarray, shift: np.ndarray, mask: int) -> np.ndarray:
        """The field of bits of each weight, from the given bytes of its block."""
        return data[place.starts[:, :, None] + byte] >> shift.astype(np.uint8) & mask

    if kind is Kind.NIBBLES_32:
        codes = bits(i // 32 * 16 + i % 16, i // 16 % 2 * 4, 15)
    elif kind is Kind.NIBBLES_64:
        codes = bits(i // 64 * 32 + i % 32, i // 32 % 2 * 4, 15)
    elif kind is Kind.NIBBLES_LOW:
        codes = bits(i // 2, i % 2 * 4, 15)
    elif kind is Kind.NIBBLES_HIGH:
        codes = bits(i // 2, (1 - i % 2) * 4, 15)
    elif kind is Kind.Q5_K:
        codes = bits(32 + i // 64 * 32 + i % 32, i // 32 % 2 * 4, 15) | bits(i % 32, i // 32, 1) << 4
    elif kind is Kind.Q6_K:
        half, quarter = i // 128, i // 32 % 4
        codes = bits(64 * half + quarter % 2 * 32 + i % 32, quarter // 2 * 4, 15)
        codes |= bits(128 + 32 * half + i % 32, quarter * 2, 3) << 4
    elif kind is Kind.INT16:
        codes = _read(data, place.starts[:, :, None] + 2 * i, 2).astype(np.uint16).view(np.int16)
    else:
        codes = _floats(data, place.starts[:, :, None] + i, kind)
    return codes.astype(np.float32).reshape(len(place.starts), -1)
