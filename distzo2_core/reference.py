"""The noise and the arithmetic in NumPy: the oracle that every compiled backend equals bit for bit.

Written for clarity. Arrays of float32 hold values; 16-bit weights are held as their bits. `fma` is exactly rounded, so
no result here depends on how NumPy was built. `reference_ops` applies it to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .types import (
    LARGEST_CODES,
    NONNEGATIVE,
    NORMAL,
    PURPOSE_COLS,
    PURPOSE_DATA_ORDER,
    PURPOSE_ROUNDING,
    PURPOSE_ROWS,
    RADEMACHER,
    check_int,
)
from .types import MAX_STEP as _MAX_STEP

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # dtype codes


# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).


def philox4x32(counter: Sequence[np.ndarray | int], key: Sequence[int]) -> Words:
    """The four uint32 words for each counter (c0, c1, c2, c3), broadcast, under the key (k0, k1)."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint32) for c in counter)
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0 = c0.astype(np.uint64) * np.uint64(0xD2511F53)
        p1 = c2.astype(np.uint64) * np.uint64(0xCD9E8D57)
        hi0, lo0 = (p0 >> np.uint64(32)).astype(np.uint32), p0.astype(np.uint32)
        hi1, lo1 = (p1 >> np.uint64(32)).astype(np.uint32), p1.astype(np.uint32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ np.uint32(k0), lo1, hi0 ^ c3 ^ np.uint32(k1), lo0
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _group_words(purpose: int, seed: int, step: int, param: int, probe: int, first: int, count: int) -> Words:
    """Philox words of the groups [first, first + count) of a parameter; c3 is purpose:8 | probe:20 | q >> 32:4."""
    q = np.arange(first, first + count, dtype=np.uint64)
    c0 = (q & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    c3 = (q >> np.uint64(32)).astype(np.uint32) | np.uint32(purpose << 24 | probe << 4)
    seed %= 2**64  # ops carry the seed as the int64 with the same bits
    return philox4x32((c0, param, step, c3), (seed & 0xFFFFFFFF, seed >> 32))


# Exactly rounded float32 arithmetic.


def fma(a: np.ndarray | np.float32, b: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """a * b + c of float32 values, rounded once to float32, to nearest even, subnormals kept.

    The product of two float32 is exact in float64. The sum is brought to float64 by rounding to odd, which a second
    rounding to float32 cannot harm (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        addend = np.broadcast_to(np.asarray(c, np.float32).astype(np.float64), np.broadcast(product, c).shape)
        total = np.atleast_1d(product + addend)
        # Knuth's TwoSum: total + error is the exact sum.
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        bits = total.view(np.int64)
        inexact_even = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
        away = (error > 0) == (total > 0)  # the exact sum is larger in magnitude than total
        odd = np.where(inexact_even, bits + np.where(away, 1, -1), bits).view(np.float64)
        return odd.astype(np.float32).reshape(addend.shape)


def mul(a: np.ndarray | np.float32, b: np.ndarray | np.float32) -> np.ndarray:
    """a * b of float32 values, rounded to float32."""
    with np.errstate(all="ignore"):
        return np.multiply(a, b, dtype=np.float32)


# Normals: Box-Muller in float32, operation by operation as csrc/noise/normal.h, where the derivation is.

_Q = [
    "0x1.000000p+1",
    "0x1.0002e0p+0",
    "0x1.5528f8p-1",
    "0x1.fd80f6p-2",
    "0x1.a3114ep-2",
    "0x1.82eb24p-2",
    "0x1.f4fa02p-3",
]
_S = ["0x1.921fb4p+0", "-0x1.4abba2p-1", "0x1.466506p-4", "-0x1.31fc64p-8", "0x1.391de4p-13"]
_C = ["0x1p+0", "-0x1.3bd3b0p+0", "0x1.03bd9ap-2", "-0x1.550208p-6", "0x1.c2939ap-11"]
LOG_COEFS, SIN_COEFS, COS_COEFS = (tuple(map(float.fromhex, coefs)) for coefs in (_Q, _S, _C))
LOG_SCALE = float.fromhex("-0x1.62e43p-23")  # -2 ln 2 * 2^-23
SQRT_HALF_BITS = 0x3F3504F3


def _polynomial(coefs: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Horner's scheme from the highest power down, one fma a step; coefs are in ascending order of power."""
    total = np.float32(coefs[-1])
    for coef in coefs[-2::-1]:
        total = fma(total, x, np.float32(coef))
    return total


def _radius(word: np.ndarray) -> np.ndarray:
    """sqrt(-2 ln u), u = (word + 1/2) / 2^32 in (0, 1]: u = m * 2^k with m in [sqrt(1/2), sqrt(2)), f = 1 - m."""
    u = fma(word.astype(np.float32), np.float32(2.0**-32), np.float32(2.0**-33))
    exponent = (u.view(np.uint32) - np.uint32(SQRT_HALF_BITS)) & np.uint32(0xFF800000)  # k * 2^23
    f = np.float32(1) - (u.view(np.uint32) - exponent).view(np.float32)
    level = fma(exponent.view(np.int32).astype(np.float32), np.float32(LOG_SCALE), mul(f, _polynomial(LOG_COEFS, f)))
    return np.sqrt(level)


def _normal_pair(radius_word: np.ndarray, angle_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r cos(phi), r sin(phi) with phi = 2 pi w / 2^32 = pi/2 y, plus a half turn that changes the sign of r."""
    half_turn = (angle_word + np.uint32(0x40000000)) & np.uint32(0x80000000)
    r = (_radius(radius_word).view(np.uint32) ^ half_turn).view(np.float32)
    y = mul((angle_word << np.uint32(1)).view(np.int32).astype(np.float32), np.float32(2.0**-31))
    t = mul(y, y)
    return mul(r, _polynomial(COS_COEFS, t)), mul(r, mul(y, _polynomial(SIN_COEFS, t)))


def normals_from_words(w0: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> Words:
    """The four normals of each group, float32."""
    return *_normal_pair(w0, w1), *_normal_pair(w2, w3)


# Noise, as float32 values of the elements [offset, offset + numel) of a parameter.


def normal_values(
    seed: int, step: int, param: int, probe: int, offset: int, numel: int, purpose: int = NORMAL
) -> np.ndarray:
    """Purpose 0, or a factor's: element e is lane e mod 4 of group e div 4."""
    first, last = offset // 4, (offset + numel + 3) // 4
    words = _group_words(purpose, seed, step, param, probe, first, last - first)
    lanes = np.stack(normals_from_words(*words), axis=1).reshape(-1)
    return lanes[offset - 4 * first :][:numel]


def rademacher_values(
    seed: int, step: int, param: int, probe: int, offset: int, numel: int, purpose: int = RADEMACHER
) -> np.ndarray:
    """Purpose 1, or a factor's: element e is bit e mod 128 of group e div 128, w0's least significant bit first; bit 1
    is +1."""
    first, last = offset // 128, (offset + numel + 127) // 128
    words = np.stack(_group_words(purpose, seed, step, param, probe, first, last - first), axis=1)
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    signs = np.where(bits == 1, np.float32(1), np.float32(-1)).reshape(-1)
    return signs[offset - 128 * first :][:numel]


def rounding_bits(seed: int, step: int, param: int, offset: int, numel: int) -> np.ndarray:
    """Purpose 2: 16 bits as uint32; element e takes half e mod 8 of group e div 8, w0's low half first."""
    first, last = offset // 8, (offset + numel + 7) // 8
    words = np.stack(_group_words(PURPOSE_ROUNDING, seed, step, param, 0, first, last - first), axis=1)
    halves = (words[:, :, None] >> np.array([0, 16], dtype=np.uint32)) & np.uint32(0xFFFF)
    return halves.reshape(-1)[offset - 8 * first :][:numel]


def noise_values(
    family: int, seed: int, step: int, param: int, probe: int, offset: int, numel: int, rows: int = 0, cols: int = 0
) -> np.ndarray:
    """The noise of a family by its number, in a parameter of matrices of rows x cols; cols is 0 where it is none."""
    if family % 16 not in (NORMAL, RADEMACHER) or family // 16 not in (0, 1, 4):
        raise ValueError(f"unknown family of noise {family}")
    dense = normal_values if family % 16 == NORMAL else rademacher_values
    if cols == 0 or family < 16:
        return dense(seed, step, param, probe, offset, numel)
    return _low_rank_values(family // 16, partial(dense, seed, step, param, probe), offset, numel, rows, cols)


def _low_rank_values(
    rank: int, dense: Callable[..., np.ndarray], offset: int, numel: int, rows: int, cols: int
) -> np.ndarray:
    """z = A B^T / sqrt(rank): A from purpose 4, its element i * rank + s, i counting the rows of all matrices; B from
    purpose 5, j * rank + s, j counting all columns. z = fl(a_0 b_0), then fma(a_s, b_s, z) for each s, / sqrt(rank)."""
    elements = np.arange(offset, offset + numel)
    row, col = elements // cols, elements % cols
    col += row // max(rows, 1) * cols

    def factor(purpose: int, index: np.ndarray) -> np.ndarray:
        """[rank, numel]: what each element takes of a factor."""
        first, last = int(index.min()), int(index.max())
        values = dense(first * rank, (last + 1 - first) * rank, purpose)
        return values.reshape(-1, rank)[index - first].T

    a, b = factor(PURPOSE_ROWS, row), factor(PURPOSE_COLS, col)
    z = mul(a[0], b[0])
    for s in range(1, rank):
        z = fma(a[s], b[s], z)
    return mul(z, np.float32(rank**-0.5))


def permutation(numel: int, seed: int, epoch: int) -> np.ndarray:
    """The data order of an epoch, purpose 3: argsort of (w0, w1) at c0 = i, c2 = epoch; ties by i.

    Args:
        numel: number of examples, at most 2^32.
        seed: the run's seed, in [0, 2^64).
        epoch: in [0, 2^32).

    Returns:
        int64 [numel], a permutation of 0 .. numel - 1.

    Raises:
        TypeError, ValueError: an argument is not an integer or out of range.
    """
    check_int("numel", numel, 0, 2**32)
    check_int("seed", seed, 0, 2**64 - 1)
    check_int("epoch", epoch, 0, _MAX_STEP)
    w0, w1, _, _ = _group_words(PURPOSE_DATA_ORDER, seed, epoch, 0, 0, 0, numel)
    return np.argsort(w0.astype(np.uint64) << np.uint64(32) | w1, kind="stable").astype(np.int64)


# Rounding of float32 values to a weight's dtype: float32 values in, stored bits out (uint32, uint16).

_SPACING_FLOOR = {BFLOAT16: 2.0**-133, FLOAT16: 2.0**-24}  # spacing of subnormals
_FRACTION_BITS = {BFLOAT16: 7, FLOAT16: 10}
_CANONICAL_NAN = {BFLOAT16: 0x7FC0, FLOAT16: 0x7E00}


def decode(bits: np.ndarray, code: int, scales: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of stored bits; of integer codes, products with the scale of each."""
    if scales is not None:
        return mul(bits.astype(np.float32), scales)
    if code in (FLOAT32, NONNEGATIVE):
        return bits.view(np.float32)
    if code == BFLOAT16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(all="ignore"):
        return bits.view(np.float16).astype(np.float32)


def round_nearest(values: np.ndarray, code: int) -> np.ndarray:
    """To nearest, ties to even; beyond the largest finite value infinity; NaN canonical."""
    if code == FLOAT32:
        return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))
    if code == BFLOAT16:
        bits = values.view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
    else:
        with np.errstate(all="ignore"):
            rounded = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(_CANONICAL_NAN[code]), rounded)


def round_stochastic(values: np.ndarray, random16: np.ndarray, code: int) -> np.ndarray:
    """Up in magnitude if and only if floor(frac(|x| / spacing) * 2^16) + R >= 2^16; fp32 rounds to nearest."""
    if code == FLOAT32:
        return round_nearest(values, code)
    if code == NONNEGATIVE:  # no NaN has a sign any more
        return np.maximum(round_nearest(values, FLOAT32).view(np.int32), np.int32(0)).view(np.uint32)
    with np.errstate(all="ignore"):
        magnitude = np.abs(values.astype(np.float64))
        finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
        _, exponent = np.frexp(finite)  # finite = m * 2^exponent, 0.5 <= m < 1
        spacing = np.maximum(np.ldexp(1.0, exponent - 1 - _FRACTION_BITS[code]), _SPACING_FLOOR[code])
        y = finite / spacing  # exact: spacing is a power of two
        below = np.floor(y)
        k = np.floor((y - below) * 65536.0).astype(np.int64)
        up = k + random16.astype(np.int64) >= 65536
        # Exact in the dtype, or past its largest value, which rounds to infinity.
        chosen = np.where(np.isinf(magnitude), magnitude, (below + up) * spacing)
        chosen = np.copysign(chosen, values).astype(np.float32)
    return round_nearest(np.where(np.isnan(values), np.float32(np.nan), chosen).astype(np.float32), code)


def step_codes(
    codes: np.ndarray, changes: np.ndarray, scales: np.ndarray, random16: np.ndarray, code: int
) -> np.ndarray:
    """Codes after a change of their values: clamp(q + floor(change / s + R / 2^16)), quotient and sum in float32. The
    step is 0 where the sum is NaN or the scale 0."""
    with np.errstate(all="ignore"):
        sums = np.float32(2.0**-16) * random16.astype(np.float32) + np.divide(changes, scales, dtype=np.float32)
        steps = np.where((scales == 0) | np.isnan(sums), np.float32(0), np.floor(sums)).astype(np.float64)
    limit = LARGEST_CODES[code]
    return np.clip(codes + steps, -limit, limit).astype(codes.dtype)


# Perturbation and update of float32 values. A term is a coefficient and a function that makes its noise.

NoiseTerm = tuple[np.float32, Callable[[], np.ndarray]]


def perturbed(values: np.ndarray, terms: Sequence[NoiseTerm]) -> np.ndarray:
    """w + sum of c * z, one fma a term, in order; terms with c = 0 are left out."""
    for coef, noise in terms:
        if coef != 0:
            values = fma(coef, noise(), values)
    return values


def is_identity(
    lr: np.float32, weight_decay: np.float32, terms: Sequence[NoiseTerm], anchor: np.float32 | int = 0
) -> bool:
    """Whether an update leaves the weights' bits as they are."""
    return bool(lr == 0 or (weight_decay == anchor == 0 and all(coef == 0 for coef, _ in terms)))


def direction(
    values: np.ndarray,
    weight_decay: np.float32,
    terms: Sequence[NoiseTerm],
    anchor: np.float32 | int = 0,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """weight_decay * w + anchor * (w - w0) + sum of c * z."""
    total = np.zeros_like(values) if weight_decay == 0 else mul(weight_decay, values)
    if anchor != 0:
        with np.errstate(all="ignore"):
            total = fma(anchor, values - starts, total)
    return perturbed(total, terms)


def updated(values: np.ndarray, lr: np.float32, *pulls: Any) -> np.ndarray:
    """w - lr * direction, not yet rounded to the weight's dtype; `pulls` are what `direction` takes."""
    return fma(-lr, direction(values, *pulls), values)
