"""Rounding to 16 bits: exact definitions, every value with the points around it, every backend, and what it is for."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    DTYPES,
    INTERPRETED,
    Visit,
    assert_same_bits,
    needs_native,
    needs_triton,
    rounded,
    spacing_at,
)

import distzo2_core
from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update, reference
from distzo2_core.types import CODE_DTYPES, DTYPE_CODES

BF16, FP16 = DTYPE_CODES[torch.bfloat16], DTYPE_CODES[torch.float16]
FORMATS = {BF16: (7, -133), FP16: (10, -24)}  # bits of fraction, and the exponent of the least number
LARGEST = {BF16: Fraction(2) ** 128 - Fraction(2) ** 120, FP16: Fraction(65504)}


def decode_one(bits: int, code: int) -> float:
    return float(reference.decode(np.array([bits], np.uint16), code)[0])


def neighbours(code: int) -> np.ndarray:
    """For every finite 16-bit value: itself, the float32 beside it, midpoints and their neighbours, both signs."""
    limit = 0x7F80 if code == BF16 else 0x7C00
    values = reference.decode(np.arange(limit + 1, dtype=np.uint16), code)
    with np.errstate(all="ignore"):
        middles = ((values[:-1].astype(np.float64) + values[1:].astype(np.float64)) / 2).astype(np.float32)
        middles[-1] = (
            np.float32(65520) if code == FP16 else np.float32((LARGEST[BF16] + Fraction(2) ** 119).__float__())
        )
    points = np.concatenate([values, middles])
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return np.concatenate([points, -points])


# Rounding.


@pytest.mark.parametrize("code", [BF16, FP16])
def test_nearest_is_nearest_even_at_every_midpoint(code: int) -> None:
    """Against torch's own conversion (itself checked against rationals below), at all values, midpoints and beside."""
    points = neighbours(code)
    dtype = torch.bfloat16 if code == BF16 else torch.float16
    expected = torch.from_numpy(points).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert (reference.round_nearest(points, code) == expected).all()


float_bits = st.integers(0, 2**32 - 1)


@settings(max_examples=300)
@given(bits=float_bits, code=st.sampled_from([BF16, FP16]))
def test_nearest_against_rationals(bits: int, code: int) -> None:
    value = float(np.array([bits], np.uint32).view(np.float32)[0])
    got = int(reference.round_nearest(np.array([value], np.float32), code)[0])
    if np.isnan(value):
        assert got == {BF16: 0x7FC0, FP16: 0x7E00}[code]
        return
    assert got >> 15 == bits >> 31
    if np.isinf(value):
        assert decode_one(got, code) == value
        return
    assert decode_one(got, code) == rounded(Fraction(value), *FORMATS[code], LARGEST[code])


@settings(max_examples=300)
@given(bits=float_bits, near_one=st.booleans(), random16=st.integers(0, 65535), code=st.sampled_from([BF16, FP16]))
def test_stochastic_against_rationals(bits: int, near_one: bool, random16: int, code: int) -> None:
    """The definition, in exact arithmetic: up if and only if floor(frac(|x| / spacing) 2^16) + R >= 2^16."""
    if near_one:  # exponents where fp16 is neither zero nor infinite
        bits = bits & 0x807FFFFF | (100 + (bits >> 23) % 45) << 23
    value = float(np.array([bits], np.uint32).view(np.float32)[0])
    got = int(reference.round_stochastic(np.array([value], np.float32), np.array([random16], np.uint32), code)[0])
    if not np.isfinite(value):
        assert got == int(reference.round_nearest(np.array([value], np.float32), code)[0])
        return
    assert got >> 15 == bits >> 31
    magnitude = abs(Fraction(value))
    spacing = spacing_at(magnitude, *FORMATS[code])
    steps = magnitude // spacing
    up = (magnitude / spacing - steps) * 65536 // 1 + random16 >= 65536
    exact = (steps + up) * spacing
    assert abs(decode_one(got, code)) == (float("inf") if exact > LARGEST[code] else exact)


@pytest.mark.parametrize("code", [BF16, FP16])
def test_stochastic_keeps_values_of_the_dtype(code: int) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = reference.decode(bits, code)
    kept = reference.round_stochastic(values, np.full(65536, 65535, np.uint32), code)
    number = ~np.isnan(values)
    assert (kept[number] == bits[number]).all()
    assert set(kept[~number].tolist()) == {0x7FC0 if code == BF16 else 0x7E00}


# The same in every backend, which rounds only what it has computed: the weights are every bit pattern of the dtype, one
# segment and one group for each exponent, and a coefficient of `share` with the spacing as the group's scale brings
# them that share of the way to the neighbour above or below, as the sign of the noise says.

SHARES = [2.0**-16, 0.25, 0.5 - 2.0**-13, 0.5, 0.5 + 2.0**-13, 0.8125, 1 - 2.0**-16, 1.0]


def every_value(
    code: int, stride: int = 1, num_updates: int = 0, out_dtype: torch.dtype | None = None
) -> tuple[Visit, np.ndarray]:
    """The visit, and the spacing of each weight; `stride` leaves out exponents, but for the two lowest and highest."""
    out_dtype = out_dtype or CODE_DTYPES[code]
    mantissa, num_exponents, lowest = (7, 256, -133) if code == BF16 else (10, 32, -24)
    numel = 2 << mantissa
    exponents = [e for e in range(num_exponents) if e % stride == 0 or e < 2 or e >= num_exponents - 2]
    segments = [
        Segment(2 * n, numel, CODE_DTYPES[code], e, 3 * e, i, 1, 3 * e + numel, out_dtype.itemsize * n, out_dtype)
        for i, (e, n) in enumerate((e, numel * i) for i, e in enumerate(exponents))
    ]
    spacings = [2.0 ** (lowest + min(max(e, 1), num_exponents - 2) - 1) for e in exponents]
    bits = np.concatenate(
        [sign | e << mantissa | np.arange(1 << mantissa) for e in exponents for sign in (0, 0x8000)]
    ).astype(np.uint16)
    groups = tuple(GroupScalars(1.0, 0.0, 1.0, spacing) for spacing in spacings)
    updates = tuple(Update(step, groups, (Term(1, step, 0, 0, SHARES[step]),)) for step in range(num_updates))
    emits = tuple(Emit((Term(1, 99, 0, 0, share),), tuple(spacings)) for share in ([] if updates else SHARES))
    visit = Visit(torch.from_numpy(bits.view(np.uint8)), SegmentTable(segments), 77, updates, emits)
    return visit, np.repeat(spacings, numel)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", [BF16, FP16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_torchs_for_every_value(backend: str, code: int, dtype: torch.dtype) -> None:
    """The emits of every value, against torch's sum in float32 and its conversion; NaN is the canonical one."""
    visit, spacings = every_value(code, out_dtype=dtype)
    weights = visit.weights.view(CODE_DTYPES[code])
    place = {"seed": 77, "step": 99, "backend": backend}
    signs = [
        distzo2_core.rademacher(s.numel, param=s.param, offset=s.element_offset, **place)
        for s in visit.segments.segments
    ]
    way = torch.cat(signs) * torch.from_numpy(spacings.astype(np.float32))
    outs = visit.run(backend, write_back=False)[1:]
    for share, out in zip(SHARES, outs, strict=True):
        expected = (weights.float() + share * way).to(dtype)  # one rounding to float32, as the fma of the kernels has
        expected[expected.isnan()] = float("nan")
        assert_same_bits(out.view(dtype), expected, share)


@needs_native
@pytest.mark.parametrize("code", [BF16, FP16])
def test_native_stochastic_of_every_value(code: int) -> None:
    """Updates, each of what the last one left, by native kernels and by the reference."""
    visit, _ = every_value(code, num_updates=6)
    assert_same_bits(visit.run("native", True)[0], visit.run("reference", True)[0])


@needs_triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, in the interpreter, of infinities
@pytest.mark.parametrize("code", [BF16, FP16])
def test_triton_rounding(code: int) -> None:
    device = "cpu" if INTERPRETED else "cuda"
    for num_updates in (0, 2):
        visit, _ = every_value(code, stride=32 if code == BF16 else 8, num_updates=num_updates)
        visit = visit._replace(emits=visit.emits[2:4])
        for got, expected in zip(visit.run("triton", True, device), visit.run("reference", True), strict=True):
            assert_same_bits(got, expected)


# What stochastic rounding is for.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_of_16_bits_is_unbiased(backend: str, dtype: torch.dtype) -> None:
    """A step of a twentieth of a spacing moves a twentieth of the weights by a spacing, on average right."""
    w = torch.full((200_000,), 0.02).to(dtype)
    code = DTYPE_CODES[dtype]
    spacing = float(spacing_at(Fraction(w[0].item()), *FORMATS[code]))
    got = distzo2_core.update_(
        w.clone(), 1.0, -spacing / 20, seed=1, step=2, param=3, family="rademacher", backend=backend
    )
    z = distzo2_core.rademacher(200_000, seed=1, step=2, param=3, backend=backend).double()
    moved = (got.double() - w.double()) / spacing * z
    assert set(moved.unique().tolist()) <= {0.0, 1.0, 0.5}  # half a spacing where w is a power of two below
    assert abs(moved.mean().item() - 0.05) < 6 * (0.05 * 0.95 / 200_000) ** 0.5


@needs_native
def test_bf16_learns_small_steps_only_with_stochastic_rounding() -> None:
    """Many updates, eta 1e-7, |g| about 10, weights of about 0.02: the slope of the bf16 change on the float32 change.

    It is 1 where the 16-bit weights follow, with an error of 11 / sqrt(numel) whatever the number of updates, of which
    each is 1/120 of a spacing. Rounding to nearest loses all steps below half a spacing.
    """
    numel, num_updates, lr = 1 << 20, 100, 1e-7
    generator = torch.Generator().manual_seed(3)
    start = (torch.randn(numel, generator=generator) * 0.02).bfloat16()
    coefs = (torch.randn(num_updates, generator=generator) * 10).tolist()
    updates = [Update(t, (GroupScalars(lr, 0.0),), (Term(0, t, 0, 0, c),)) for t, c in enumerate(coefs)]

    def train(w: torch.Tensor) -> torch.Tensor:
        buffer = w.view(torch.uint8).clone()
        table = SegmentTable([Segment(0, numel, w.dtype, 3, 0, 0, 1, numel)])
        distzo2_core.materialize(buffer, table, seed=5, updates=updates, write_back=True, backend="native")
        return buffer.view(w.dtype)

    nearest = start.clone()
    for t, c in enumerate(coefs):
        z = distzo2_core.normal(numel, seed=5, step=t, param=3, backend="native")
        nearest = torch.add(nearest, z, alpha=-lr * c).bfloat16()  # promoted to float32, then rounded to nearest

    exact = train(start.float()).double() - start.double()

    def slope(trained: torch.Tensor) -> float:
        return ((trained.double() - start.double()) @ exact / (exact @ exact)).item()

    assert abs(slope(train(start)) - 1) <= 0.05
    assert abs(slope(nearest)) <= 0.2
