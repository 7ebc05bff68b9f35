"""A plain decoder of packed matrices in float32, straight from the docstring of `distzo2_core.packed`."""

from __future__ import annotations

import numpy as np
import torch

from distzo2.formats.packed_param import PackedParam
from distzo2_core.packed import Field, Kind, PackedLayout

_FLOATS = {
    Kind.FLOAT32: torch.float32, Kind.BFLOAT16: torch.bfloat16, Kind.FLOAT16: torch.float16, Kind.INT8: torch.int8,
    Kind.UINT8: torch.uint8, Kind.FLOAT8_E4M3: torch.float8_e4m3fn, Kind.FLOAT8_E5M2: torch.float8_e5m2,
}  # fmt: skip


def decode(param: PackedParam) -> torch.Tensor:
    """The weights, float32 of the parameter's shape, before any rounding to 16 bits."""
    rows = decode_rows(param.read(), param.layout)
    if not param.transposed:
        return rows.view(param.shape)
    return rows.view(*param.shape[:-2], param.shape[-1], param.shape[-2]).mT


def decode_rows(buffer: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """float32 [rows, cols]."""
    data = buffer.numpy()
    row, col = np.arange(layout.rows)[:, None], np.arange(layout.cols)[None]
    if layout.head_dim:  # rows of the file
        half, i = np.divmod(row % layout.head_dim, layout.head_dim // 2)
        row = row // layout.head_dim * layout.head_dim + 2 * i + half

    def values(place: Field) -> np.ndarray:
        group = col % layout.block // place.cols
        at = place.offset + row // place.rows * place.row_stride + col // layout.block * place.block_stride
        if place.kind in (Kind.K_SCALE, Kind.K_MIN):
            first = at + group % 4
            a, b, c = (data[first + 4 * part].astype(np.int32) for part in range(3))
            low, high = (a & 63, c & 15 | a >> 6 << 4) if place.kind == Kind.K_SCALE else (b & 63, c >> 4 | b >> 6 << 4)
            return np.where(group < 4, low, high).astype(np.float32)
        return floats(at + group * place.stride, place.kind)

    def floats(at: np.ndarray, kind: Kind) -> np.ndarray:
        if kind == Kind.E8M0:
            return np.ldexp(np.float32(1), data[at].astype(np.int32) - 127)
        size = _FLOATS[kind].itemsize
        chosen = np.ascontiguousarray(data[at[..., None] + np.arange(size)])
        return torch.from_numpy(chosen).view(_FLOATS[kind]).float().numpy()[..., 0]

    def codes(kind: Kind, i: np.ndarray, at: np.ndarray) -> np.ndarray:
        if kind == Kind.Q5_K:
            high = data[at + i % 32] >> (i // 32).astype(np.uint8) & 1
            return codes(Kind.NIBBLES_64, i, at + 32) + 16 * high.astype(np.float32)
        if kind == Kind.Q6_K:
            half, quarter = i // 128, i // 32 % 4
            low = data[at + 64 * half + quarter % 2 * 32 + i % 32] >> (quarter // 2 * 4).astype(np.uint8) & 15
            high = data[at + 128 + 32 * half + i % 32] >> (2 * quarter).astype(np.uint8) & 3
            return (low | high << 4).astype(np.float32)
        nibbles = {Kind.NIBBLES_32: 32, Kind.NIBBLES_64: 64, Kind.NIBBLES_LOW: 2, Kind.NIBBLES_HIGH: 2}.get(kind)
        if nibbles is None:
            return floats(at + i, kind)
        byte, is_high = i // nibbles * (nibbles // 2) + i % (nibbles // 2), i % nibbles >= nibbles // 2
        is_high = is_high ^ (kind == Kind.NIBBLES_HIGH)
        return (data[at + byte] >> (4 * is_high).astype(np.uint8) & 15).astype(np.float32)

    place = layout.codes
    at = place.offset + row * place.row_stride + col // layout.block * place.block_stride
    q = codes(place.kind, np.broadcast_to(col % layout.block, at.shape), at)
    scale = values(layout.scale)
    with np.errstate(all="ignore"):
        if layout.outer:
            outer = values(layout.outer)
            scale = scale / outer if layout.outer_divides else outer * scale
        if layout.levels:
            return torch.from_numpy(np.array(layout.levels, np.float32)[q.astype(np.int32)] * scale)
        q = q - (values(layout.zero) if layout.zero else np.float32(layout.zero_point))
        minimum = values(layout.min) if layout.min else np.float32(-0.0)
        minimum = layout.min_sign * (values(layout.outer_min) * minimum if layout.outer_min else minimum)
        # One fma: a product of float32 is exact in float64, and so is its sum but for what decides a tie.
        product = scale.astype(np.float64) * q
        return torch.from_numpy((product + minimum).astype(np.float32) if layout.min else (scale * q))
