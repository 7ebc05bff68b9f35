"""Triton device functions: the noise of one tile, and conversions between stored bits and float32 values.

They repeat csrc/noise operation by operation, with every fma written out; kernels that use them are launched with
enable_fp_fusion=False. A tile is a run of elements of a parameter that begins at a multiple of its length, the length
being a multiple of 128, so that a tile holds whole Philox groups of every purpose, and the high bits of its group
indices are one scalar.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference
from .types import (
    CODE8,
    LARGEST_CODES,
    NONNEGATIVE,
    NORMAL,
    PURPOSE_COLS,
    PURPOSE_ROUNDING,
    PURPOSE_ROWS,
    RADEMACHER,
)

_NORMAL = tl.constexpr(NORMAL)
_RADEMACHER = tl.constexpr(RADEMACHER)
_ROUNDING = tl.constexpr(PURPOSE_ROUNDING)
_ROWS, _COLS = tl.constexpr(PURPOSE_ROWS), tl.constexpr(PURPOSE_COLS)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6 = (tl.constexpr(coef) for coef in reference.LOG_COEFS)
_S0, _S1, _S2, _S3, _S4 = (tl.constexpr(coef) for coef in reference.SIN_COEFS)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(coef) for coef in reference.COS_COEFS)
_LOG_SCALE = tl.constexpr(reference.LOG_SCALE)
_SQRT_HALF_BITS = tl.constexpr(reference.SQRT_HALF_BITS)
_TWO_M31, _TWO_M32, _TWO_M33 = tl.constexpr(2.0**-31), tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)
_TWO_40 = tl.constexpr(2.0**40)
_TWO_M16 = tl.constexpr(2.0**-16)
_CODE8, _NONNEGATIVE = tl.constexpr(CODE8), tl.constexpr(NONNEGATIVE)
_LARGEST_CODE8, _LARGEST_CODE16 = (tl.constexpr(float(largest)) for largest in LARGEST_CODES.values())


# Noise of one tile, in the order of its elements; operation by operation as csrc/noise.


@triton.jit
def _tile_words(first_group, purpose: tl.constexpr, step, param, probe, k0, k1, NUM_GROUPS: tl.constexpr):
    """Philox4x32-10 of NUM_GROUPS groups from first_group (int64) on: four uint32 vectors."""
    c0 = tl.arange(0, NUM_GROUPS).to(tl.uint32) | first_group.to(tl.uint32)  # first_group is a multiple of NUM_GROUPS
    c1 = tl.full([NUM_GROUPS], 0, tl.uint32) | param
    c2 = tl.full([NUM_GROUPS], 0, tl.uint32) | step
    high = (first_group >> 32).to(tl.uint32)
    c3 = tl.full([NUM_GROUPS], purpose << 24, tl.uint32) | (probe << 4) | high
    return _philox(c0, c1, c2, c3, k0, k1)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _interleave4(x0, x1, x2, x3, LENGTH: tl.constexpr):
    """x0[0], x1[0], x2[0], x3[0], x0[1], ... of four vectors, LENGTH in all."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [LENGTH])


@triton.jit
def _normal_pair(radius_word, angle_word):
    u = tl.fma(radius_word.to(tl.float32), _TWO_M32, _TWO_M33)
    bits = u.to(tl.uint32, bitcast=True)
    exponent = tl.sub(bits, _SQRT_HALF_BITS, sanitize_overflow=False) & 0xFF800000
    f = 1.0 - tl.sub(bits, exponent, sanitize_overflow=False).to(tl.float32, bitcast=True)
    q = tl.fma(f, _Q6, _Q5)
    q = tl.fma(q, f, _Q4)
    q = tl.fma(q, f, _Q3)
    q = tl.fma(q, f, _Q2)
    q = tl.fma(q, f, _Q1)
    q = tl.fma(q, f, _Q0)
    r = tl.sqrt_rn(tl.fma(exponent.to(tl.int32, bitcast=True).to(tl.float32), _LOG_SCALE, f * q))
    half_turn = tl.add(angle_word, 0x40000000, sanitize_overflow=False) & 0x80000000
    r = (r.to(tl.uint32, bitcast=True) ^ half_turn).to(tl.float32, bitcast=True)
    y = (angle_word << 1).to(tl.int32, bitcast=True).to(tl.float32) * _TWO_M31
    t = y * y
    s = tl.fma(t, _S4, _S3)
    s = tl.fma(s, t, _S2)
    s = tl.fma(s, t, _S1)
    s = tl.fma(s, t, _S0)
    c = tl.fma(t, _C4, _C3)
    c = tl.fma(c, t, _C2)
    c = tl.fma(c, t, _C1)
    c = tl.fma(c, t, _C0)
    return r * c, r * (y * s)


@triton.jit
def normal_tile(first, step, param, probe, k0, k1, TILE: tl.constexpr):
    w0, w1, w2, w3 = _tile_words(first >> 2, _NORMAL, step, param, probe, k0, k1, TILE // 4)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return _interleave4(z0, z1, z2, z3, TILE)


@triton.jit
def rademacher_tile(first, step, param, probe, k0, k1, TILE: tl.constexpr):
    w0, w1, w2, w3 = _tile_words(first >> 7, _RADEMACHER, step, param, probe, k0, k1, TILE // 128)
    words = _interleave4(w0, w1, w2, w3, TILE // 32)
    bits = (words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.where(tl.reshape(bits, [TILE]) == 1, 1.0, -1.0)


@triton.jit
def rounding_tile(first, step, param, k0, k1, TILE: tl.constexpr):
    """16 bits an element, as uint32."""
    w0, w1, w2, w3 = _tile_words(first >> 3, _ROUNDING, step, param, step & 0, k0, k1, TILE // 8)
    words = _interleave4(w0, w1, w2, w3, TILE // 2)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [TILE])


@triton.jit
def noise_tile(family, first, step, param, probe, k0, k1, TILE: tl.constexpr):
    if family == _NORMAL:
        z = normal_tile(first, step, param, probe, k0, k1, TILE)
    else:
        z = rademacher_tile(first, step, param, probe, k0, k1, TILE)
    return z


@triton.jit
def _pick(i, x0, x1, x2, x3):
    return tl.where(i < 2, tl.where(i == 0, x0, x1), tl.where(i == 2, x2, x3))


@triton.jit
def _factor_words(purpose: tl.constexpr, group, step, param, probe, k0, k1):
    c0 = group.to(tl.uint32)
    c3 = (group >> 32).to(tl.uint32) | (purpose << 24) | (probe << 4)
    return _philox(c0, (c0 & 0) | param, (c0 & 0) | step, c3, k0, k1)


@triton.jit
def _factor_normals(purpose: tl.constexpr, group, step, param, probe, k0, k1):
    w0, w1, w2, w3 = _factor_words(purpose, group, step, param, probe, k0, k1)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def _factor_bits(purpose: tl.constexpr, first, step, param, probe, k0, k1):
    """The sign bits from element `first` on, to the end of its word."""
    w0, w1, w2, w3 = _factor_words(purpose, first >> 7, step, param, probe, k0, k1)
    return _pick((first >> 5) & 3, w0, w1, w2, w3) >> (first & 31).to(tl.uint32)


@triton.jit
def low_rank_tile(family, first, step, param, probe, k0, k1, rows, cols, TILE: tl.constexpr):
    """Low-rank noise of a parameter of matrices of rows x cols (int64), an element's factors made for it alone."""
    element = first + tl.arange(0, TILE)
    i = element // cols
    j = element - i * cols + i // rows * cols
    rank = family >> 4
    if (family & 15) == _NORMAL:
        shift = tl.where(rank == 4, 0, 2)
        a0, a1, a2, a3 = _factor_normals(_ROWS, i >> shift, step, param, probe, k0, k1)
        b0, b1, b2, b3 = _factor_normals(_COLS, j >> shift, step, param, probe, k0, k1)
        if rank == 4:
            z = tl.fma(a3, b3, tl.fma(a2, b2, tl.fma(a1, b1, a0 * b0))) * 0.5
        else:
            z = _pick(i & 3, a0, a1, a2, a3) * _pick(j & 3, b0, b1, b2, b3)
    else:
        a = _factor_bits(_ROWS, i * rank, step, param, probe, k0, k1)
        differ = a ^ _factor_bits(_COLS, j * rank, step, param, probe, k0, k1)
        count = (differ & 1).to(tl.float32)
        if rank == 4:
            count += ((differ >> 1) & 1).to(tl.float32) + ((differ >> 2) & 1).to(tl.float32)
            z = 2.0 - (count + ((differ >> 3) & 1).to(tl.float32))
        else:
            z = 1.0 - 2.0 * count
    return z


@triton.jit
def any_tile(family, first, step, param, probe, k0, k1, rows, cols, TILE: tl.constexpr):
    if (family >= 16) & (cols != 0):
        z = low_rank_tile(family, first, step, param, probe, k0, k1, rows, cols, TILE)
    else:
        z = noise_tile(family & 15, first, step, param, probe, k0, k1, TILE)
    return z


# Stored bits (as uint32, whatever the dtype; codes are sign-extended) and float32 values; operation by operation as
# csrc/noise/rounding.h.


@triton.jit
def decode(bits, CODE: tl.constexpr):
    if CODE == 0 or CODE == _NONNEGATIVE:
        return bits.to(tl.float32, bitcast=True)
    elif CODE >= _CODE8:
        return bits.to(tl.int32, bitcast=True).to(tl.float32)
    elif CODE == 1:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def round_nearest(x, CODE: tl.constexpr):
    b = x.to(tl.uint32, bitcast=True)
    magnitude = b & 0x7FFFFFFF
    if CODE == 0:
        return tl.where(magnitude > 0x7F800000, 0x7FC00000, b)
    elif CODE == _NONNEGATIVE:
        return tl.where(magnitude > 0x7F800000, 0x7FC00000, tl.where(b == magnitude, b, 0))
    elif CODE == 1:
        rounded = tl.add(b, 0x7FFF + ((b >> 16) & 1), sanitize_overflow=False) >> 16
        return tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
    else:
        sign = (b >> 16) & 0x8000
        # Below 2^-14 the spacing of 0.5f is fp16's own, so the sum rounds as the subnormal does.
        small = tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True) + 0.5
        subnormal = small.to(tl.uint32, bitcast=True) - 0x3F000000
        large = tl.where(magnitude < 0x38800000, 0x38800000, tl.where(magnitude < 0x477FF000, magnitude, 0x47800000))
        rounded = ((large + (0xFFF + ((large >> 13) & 1))) >> 13) - (112 << 10)
        result = sign | tl.where(magnitude < 0x38800000, subnormal, rounded)
        return tl.where(magnitude > 0x7F800000, 0x7E00, result)


@triton.jit
def round_stochastic(x, random16, CODE: tl.constexpr):
    b = x.to(tl.uint32, bitcast=True)
    magnitude = b & 0x7FFFFFFF
    if CODE == 1:
        rounded = tl.add(b, random16, sanitize_overflow=False) >> 16
        return tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
    else:
        sign = (b >> 16) & 0x8000
        # |x| * 2^40 is exact and below 2^26 here: the subnormal with 16 bits of fraction.
        small = tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True) * _TWO_40
        subnormal = (small.to(tl.int32).to(tl.uint32) + random16) >> 16
        # Above, the low 13 bits are the fraction; from 2^16 on everything is infinity.
        large = tl.where(magnitude < 0x38800000, 0x38800000, tl.where(magnitude < 0x47800000, magnitude, 0x47800000))
        rounded = ((large + (random16 >> 3)) >> 13) - (112 << 10)
        rounded = tl.where(rounded < 0x7C00, rounded, 0x7C00)
        result = sign | tl.where(magnitude < 0x38800000, subnormal, rounded)
        return tl.where(magnitude > 0x7F800000, 0x7E00, result)


@triton.jit
def step_codes(q, change, scale, random16, CODE: tl.constexpr):
    exact = tl.fma(random16.to(tl.float32), _TWO_M16, tl.div_rn(change, tl.where(scale == 0.0, float("inf"), scale)))
    exact = tl.minimum(tl.maximum(tl.where(exact == exact, exact, 0.0), -131072.0), 131072.0)  # beyond all codes
    whole = exact.to(tl.int32)
    whole -= (whole.to(tl.float32) > exact).to(tl.int32)  # tl.floor would flush subnormal numbers
    limit: tl.constexpr = _LARGEST_CODE8 if CODE == _CODE8 else _LARGEST_CODE16
    q = tl.minimum(tl.maximum(q + whole.to(tl.float32), -limit), limit)
    return q.to(tl.int32).to(tl.uint32, bitcast=True)
