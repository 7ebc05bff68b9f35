"""What single instructions of PTX do to NumPy arrays. Registers are unsigned integers of their width; floats are views.

A result that is NaN is the canonical NaN of a GPU, 0x7FFFFFFF. What overflows, or is invalid, is silent as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .parser import PtxError

U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
TYPES = {
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "pred": np.dtype(bool),
}
NAN32, NAN16 = U32(0x7FFFFFFF), U32(0x7FFF)


def canonical(x: np.ndarray) -> np.ndarray:
    """Bits of float32 results, which nobody else holds."""
    bits, nan = x.view(U32), x != x
    if nan.any():
        bits[nan] = NAN32
    return bits


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, rounded to odd: a second rounding, to float32, cannot harm it (Boldo and Melquiond, 2008)."""
    total = a + b
    virtual = total - a  # Knuth's TwoSum: total + error is the exact sum
    error = (a - (total - virtual)) + (b - virtual)
    bits = total.view(I64)
    adjust = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return np.where(adjust, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(F64)


def rounded(x: np.ndarray, mode: str) -> np.ndarray:
    """float64 to float32: rn to nearest even, rz towards zero, rm down, rp up."""
    near = x.astype(F32)
    if mode == "rn":
        return near
    down, up = np.nextafter(near, F32(-np.inf)), np.nextafter(near, F32(np.inf))
    low, high = np.where(near > x, down, near), np.where(near < x, up, near)
    return {"rm": low, "rp": high, "rz": np.where(x > 0, low, high)}[mode]


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str) -> np.ndarray:
    """Bits of a * b + c of float32, rounded once."""
    product = np.multiply(a, b, dtype=F64)  # exact
    total = product + c
    near = total.astype(F32)
    bits = near.view(U32)
    # Rounding twice is wrong only where the first one led to a tie, or where float32 has fewer bits than 24: of what
    # is not normal, NaN included, all is done again.
    doubtful = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    doubtful |= (bits << U32(1)) - U32(0x01000000) >= U32(0xFE000000)
    if mode != "rn" or doubtful.any():
        return canonical(rounded(odd_sum(product, np.broadcast_to(c, total.shape).astype(F64)), mode))
    return bits


def add(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return canonical(a + b if mode == "rn" else rounded(odd_sum(a.astype(F64), b.astype(F64)), mode))


def mul(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return canonical(a * b if mode == "rn" else rounded(np.multiply(a, b, dtype=F64), mode))


def sqrt(a: np.ndarray, mode: str) -> np.ndarray:
    return canonical(np.sqrt(a) if mode == "rn" else rounded(np.sqrt(a.astype(F64)), mode))


def rsqrt(a: np.ndarray, ulps: int) -> np.ndarray:
    """1 / sqrt(a) to nearest, then off by some units in the last place: a GPU's table, not published, is within 2."""
    flushed = np.where(np.abs(a) < F32(2.0**-126), np.copysign(F32(0), a), a)
    near = (1 / np.sqrt(flushed.astype(F64))).astype(F32)
    bits = canonical(near)
    return np.where(np.isfinite(near) & (near > 0), bits + U32(ulps % 2**32), bits)


def to_int(x: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Truncation of float32, which saturates; NaN is 0."""
    info = np.iinfo(kind)
    wide = np.where(x != x, F32(0), x).astype(F64)
    return np.clip(np.trunc(wide), info.min, info.max).astype(kind)


def to_half(x: np.ndarray) -> np.ndarray:
    """Bits of float16, to nearest, in 32."""
    return np.where(x != x, NAN16, x.astype(F16).view(U16).astype(U32))


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, to nearest, in 32."""
    bits = x.view(U32)
    return np.where(x != x, NAN16, bits + U32(0x7FFF) + (bits >> U32(16) & U32(1)) >> U32(16))


def shl(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Shifts by the width or more give 0."""
    width = a.dtype.itemsize * 8
    return np.where(by < width, a << (by % width).astype(a.dtype), a.dtype.type(0))


def shr(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Shifts by the width or more give the sign, or 0."""
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by < width, a >> (by % width).astype(a.dtype), a.dtype.type(0))


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers, rounded towards zero."""
    return (a - remainder(a, b)) // b


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of that quotient: it has the sign of a."""
    return np.fmod(a, b)


def bfi(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """b with its bits [position, position + length) from the lowest of a; both below the width."""
    width, one = 8 * a.dtype.itemsize, a.dtype.type(1)
    if (position >= width).any() or (length >= width).any():
        raise PtxError("a field of bits that is not in a word")
    position = position.astype(a.dtype)
    mask = ((one << length.astype(a.dtype)) - one) << position
    return (b & ~mask) | (a << position & mask)


def bfe(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The field of 32 bits that begins at a position, sign-extended for a signed type."""
    position, length = np.minimum(position & 0xFF, 32).astype(I64), np.minimum(length & 0xFF, 32).astype(I64)
    end = np.minimum(position + length, 32)
    field = (a.view(U32).astype(I64) >> position) & ((I64(1) << (end - position)) - 1)
    if a.dtype.kind == "i":
        sign = (a.view(U32).astype(I64) >> np.maximum(end - 1, 0)) & 1 & (length > 0)
        field = field | -(sign << (end - position))
    return field.astype(U32)


def bfe64(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The field of 64 bits, inside of the word and not empty, that begins at a position; sign-extended where a is."""
    position, length = position.astype(I64), length.astype(I64)
    if (position + length > 64).any() or (length == 0).any():
        raise PtxError("a field of bits that is not in a word")
    above = (64 - position - length).astype(a.dtype)
    return ((a << above) >> (64 - length).astype(a.dtype)).astype(U64)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes chosen from eight; a selector's fourth bit repeats the byte's sign."""
    pool = a.astype(U64) | b.astype(U64) << U64(32)
    result = U32(0)
    for i in range(4):
        pick = selector >> U32(4 * i)
        byte = (pool >> ((pick & U32(7)) * U32(8)).astype(U64) & U64(0xFF)).astype(U32)
        byte = np.where(pick & U32(8), np.where(byte & U32(0x80), U32(0xFF), U32(0)), byte)
        result = result | byte << U32(8 * i)
    return result


def unordered(compare: Callable[[np.ndarray, np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A comparison that NaN also fulfils."""
    return compare(a, b) | (a != a) | (b != b)


COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
COMPARE |= {
    f"{name}u": lambda a, b, name=name: unordered(COMPARE[name], a, b) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
