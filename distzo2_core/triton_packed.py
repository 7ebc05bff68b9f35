"""The Triton kernel that decodes packed weights, bit for bit as csrc/kernels/packed.h does.

A program handles TILE columns of one row. The kinds of the fields are known when compiling, one kernel for each format;
where they lie is read from the matrix's row of the table of `PackedTable`. Launched with enable_fp_fusion=False.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .packed import ABSENT, Kind
from .triton_kernels import store_bits
from .triton_noise import decode, round_nearest

_ABSENT = tl.constexpr(ABSENT)
_NIBBLES_32, _NIBBLES_64 = tl.constexpr(int(Kind.NIBBLES_32)), tl.constexpr(int(Kind.NIBBLES_64))
_NIBBLES_LOW, _NIBBLES_HIGH = tl.constexpr(int(Kind.NIBBLES_LOW)), tl.constexpr(int(Kind.NIBBLES_HIGH))
_UINT8, _INT8, _INT16 = tl.constexpr(int(Kind.UINT8)), tl.constexpr(int(Kind.INT8)), tl.constexpr(int(Kind.INT16))
_Q5_K, _Q6_K = tl.constexpr(int(Kind.Q5_K)), tl.constexpr(int(Kind.Q6_K))
_E4M3, _E5M2 = tl.constexpr(int(Kind.FLOAT8_E4M3)), tl.constexpr(int(Kind.FLOAT8_E5M2))
_BFLOAT16, _FLOAT16, _E8M0 = (tl.constexpr(int(kind)) for kind in (Kind.BFLOAT16, Kind.FLOAT16, Kind.E8M0))
_K_SCALE, _K_MIN = tl.constexpr(int(Kind.K_SCALE)), tl.constexpr(int(Kind.K_MIN))
# Places in the row of a table.
_CODES, _SCALE, _OUTER, _ZERO, _MIN, _OUTER_MIN, _GAIN = (tl.constexpr(place) for place in range(10, 59, 7))


@triton.jit
def _byte(pointer, mask):
    return tl.load(pointer, mask=mask, other=0).to(tl.uint32)


@triton.jit
def _float_at(p, mask, KIND: tl.constexpr):
    """The float32 value of this kind at each pointer."""
    bits = _byte(p, mask)
    if KIND == _UINT8:
        return bits.to(tl.float32)
    elif KIND == _INT8:
        return ((bits << 24).to(tl.int32, bitcast=True) >> 24).to(tl.float32)
    elif KIND == _E8M0:
        usual = tl.where(bits == 255, 0x7FC00000, bits << 23)
        return tl.where(bits == 0, 0x00400000, usual).to(tl.uint32).to(tl.float32, bitcast=True)
    elif KIND == _E5M2:
        return decode(bits << 8, 2)
    elif KIND == _E4M3:  # fp16 has its range, divided by 256
        half = decode(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), 2)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0)
    else:
        bits |= _byte(p + 1, mask) << 8
        if KIND == _INT16:
            return ((bits << 16).to(tl.int32, bitcast=True) >> 16).to(tl.float32)
        elif KIND == _BFLOAT16:
            return decode(bits, 1)
        elif KIND == _FLOAT16:
            return decode(bits, 2)
        else:
            bits |= (_byte(p + 2, mask) << 16) | (_byte(p + 3, mask) << 24)
            return decode(bits, 0)


@triton.jit
def _block_of(stored, table, row, block, PLACE: tl.constexpr):
    """Where each column's block of a field begins."""
    field = table + PLACE
    start = tl.load(field + 1) + row // tl.load(field + 5) * tl.load(field + 2)
    return stored + start + block.to(tl.int64) * tl.load(field + 3)


@triton.jit
def _value(stored, table, row, block, inside, mask, KIND: tl.constexpr, PLACE: tl.constexpr):
    """A field's value for each column."""
    p = _block_of(stored, table, row, block, PLACE)
    i = inside // tl.load(table + PLACE + 6).to(tl.int32)
    if KIND == _K_SCALE:
        own = _byte(p + tl.where(i < 4, i, i + 4), mask)
        shared = _byte(p + tl.where(i < 4, i, i - 4), mask)
        return tl.where(i < 4, own & 63, (own & 15) | ((shared >> 6) << 4)).to(tl.float32)
    elif KIND == _K_MIN:
        own = _byte(p + i + 4, mask)
        shared = _byte(p + i, mask)
        return tl.where(i < 4, own & 63, (own >> 4) | ((shared >> 6) << 4)).to(tl.float32)
    else:
        return _float_at(p + i.to(tl.int64) * tl.load(table + PLACE + 4), mask, KIND)


@triton.jit
def _code(p, i, mask, KIND: tl.constexpr):
    """What code i of the block at each pointer stands for: a float, or a uint32 where it has fewer than 8 bits."""
    j = i % 32
    chunk = i // 32
    if KIND == _NIBBLES_32:
        return (_byte(p + chunk * 16 + j % 16, mask) >> (j // 16 * 4).to(tl.uint32)) & 15
    elif KIND == _NIBBLES_64:
        return (_byte(p + i // 64 * 32 + j, mask) >> (chunk % 2 * 4).to(tl.uint32)) & 15
    elif KIND == _NIBBLES_LOW:
        return (_byte(p + i // 2, mask) >> (i % 2 * 4).to(tl.uint32)) & 15
    elif KIND == _NIBBLES_HIGH:
        return (_byte(p + i // 2, mask) >> (4 - i % 2 * 4).to(tl.uint32)) & 15
    elif KIND == _Q5_K:
        low = (_byte(p + 32 + i // 64 * 32 + j, mask) >> (chunk % 2 * 4).to(tl.uint32)) & 15
        return low | (((_byte(p + j, mask) >> chunk.to(tl.uint32)) & 1) << 4)
    elif KIND == _Q6_K:
        half = i // 128
        quarter = chunk % 4
        low = (_byte(p + 64 * half + quarter % 2 * 32 + j, mask) >> (quarter // 2 * 4).to(tl.uint32)) & 15
        return low | (((_byte(p + 128 + 32 * half + j, mask) >> (2 * quarter).to(tl.uint32)) & 3) << 4)
    elif KIND == _INT16:
        return _float_at(p + 2 * i, mask, KIND)
    else:
        return _float_at(p + i, mask, KIND)


@triton.jit
def decode_kernel(
    stored,
    out,
    table,
    levels,
    gains,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ZERO: tl.constexpr,
    MIN: tl.constexpr,
    OUTER_MIN: tl.constexpr,
    GAIN: tl.constexpr,
    DIVIDES: tl.constexpr,
    LEVELS: tl.constexpr,
    OUT_CODE: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE columns of one row.

    stored, gains: uint8. out: int32 or int16 pointer by OUT_CODE, to the matrix. table: int64 [59], the matrix's row
        of a `PackedTable`. levels: float32 [16].
    CODES to GAIN: kinds of the fields, -1 where there is none. DIVIDES: by the outer scale. LEVELS: whether codes
        stand for them.
    """
    row = tl.program_id(0)
    cols = tl.load(table + 1).to(tl.int32)
    columns = tl.load(table + 2).to(tl.int32)  # of a block
    head_dim = tl.load(table + 6).to(tl.int32)
    stored_row = row
    if head_dim != 0:
        in_head = row % head_dim
        half = head_dim // 2
        stored_row = row - in_head + in_head % half * 2 + in_head // half
    stored_row = stored_row.to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = col < cols
    block = col // columns
    inside = col % columns

    s = _value(stored, table, stored_row, block, inside, mask, SCALE, _SCALE)
    if OUTER != _ABSENT:
        outer = _value(stored, table, stored_row, block, inside, mask, OUTER, _OUTER)
        if DIVIDES:
            s = tl.div_rn(s, outer)
        else:
            s = outer * s
    q = _code(_block_of(stored, table, stored_row, block, _CODES), inside, mask, CODES)
    if LEVELS:
        x = tl.load(levels + q.to(tl.int32), mask=mask, other=0.0)
    else:
        x = q.to(tl.float32)
        if ZERO == _ABSENT:
            x = x - tl.load(table + 3).to(tl.float32)
        else:
            x = x - _value(stored, table, stored_row, block, inside, mask, ZERO, _ZERO)
    if MIN == _ABSENT:
        value = s * x
    else:
        m = _value(stored, table, stored_row, block, inside, mask, MIN, _MIN)
        if OUTER_MIN != _ABSENT:
            m = _value(stored, table, stored_row, block, inside, mask, OUTER_MIN, _OUTER_MIN) * m
        value = tl.fma(s, x, tl.load(table + 4).to(tl.float32) * m)
    if GAIN != _ABSENT:
        value = _value(gains, table, stored_row, block, inside, mask, GAIN, _GAIN) * value
    store_bits(out + row.to(tl.int64) * cols + col, round_nearest(value, OUT_CODE), mask, OUT_CODE)
