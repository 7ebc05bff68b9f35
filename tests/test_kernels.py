"""Rounding, perturbation, update and materialize: against exact arithmetic, and native against the reference."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    assert_same_bits,
    check_in_place,
    check_noise,
    check_visit,
    random_visit,
    random_weights,
)

import distzo2_core
from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update, reference
from distzo2_core.types import DTYPE_CODES

NATIVE = distzo2_core.build_info()["native"]
needs_native = pytest.mark.skipif(not NATIVE, reason="the extension distzo2_core._C is not built")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]

BF16, FP16 = DTYPE_CODES[torch.bfloat16], DTYPE_CODES[torch.float16]
LARGEST = {BF16: Fraction(2) ** 128 - Fraction(2) ** 120, FP16: Fraction(65504)}


def decode_one(bits: int, code: int) -> float:
    return float(reference.decode(np.array([bits], np.uint16), code)[0])


def spacing_at(magnitude: Fraction, code: int) -> Fraction:
    """Distance between neighbours of the dtype at a magnitude, by the definition in terms of exponents."""
    lowest, mantissa = (-133, 7) if code == BF16 else (-24, 10)
    if magnitude == 0:
        return Fraction(2) ** lowest
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    return Fraction(2) ** max(exponent - mantissa, lowest)


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


@settings(max_examples=300, deadline=None)
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
    spacing = spacing_at(abs(Fraction(value)), code)
    exact = round(abs(Fraction(value)) / spacing) * spacing  # Python rounds halves to even
    rounded = abs(decode_one(got, code))
    assert rounded == (float("inf") if exact > LARGEST[code] else exact)


@settings(max_examples=300, deadline=None)
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
    spacing = spacing_at(magnitude, code)
    steps = magnitude // spacing
    up = (magnitude / spacing - steps) * 65536 // 1 + random16 >= 65536
    exact = (steps + up) * spacing
    assert abs(decode_one(got, code)) == (float("inf") if exact > LARGEST[code] else exact)


@pytest.mark.parametrize("code", [BF16, FP16])
def test_stochastic_goes_up_as_often_as_the_fraction_says(code: int) -> None:
    """Over all 2^16 random values the mean is x rounded down to 16 bits of fraction: unbiased to 2^-16 spacings."""
    every = np.arange(65536, dtype=np.uint32)
    for value in (0.02, -0.02, 1.0, 1.0001, 3e-6, 6.0e-5, 6.2e-5, 1e-7, -1e-8):
        values = np.full(65536, value, np.float32)
        mean = reference.decode(reference.round_stochastic(values, every, code), code).astype(np.float64).mean()
        spacing = float(spacing_at(abs(Fraction(float(np.float32(value)))), code))
        assert 0 <= abs(float(np.float32(value))) - abs(mean) <= spacing / 65536 * (1 + 1e-9)


@pytest.mark.parametrize("code", [BF16, FP16])
def test_stochastic_keeps_values_of_the_dtype(code: int) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = reference.decode(bits, code)
    kept = reference.round_stochastic(values, np.full(65536, 65535, np.uint32), code)
    number = ~np.isnan(values)
    assert (kept[number] == bits[number]).all()
    assert set(kept[~number].tolist()) == {0x7FC0 if code == BF16 else 0x7E00}


# The contract of each op, in plain float32 terms. One term at a time, so that NumPy's float64 shows what is meant.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["normal", "rademacher"])
def test_perturb_is_a_rounded_sum(backend: str, dtype: torch.dtype, family: str) -> None:
    place = {"seed": 11, "step": 5, "param": 3, "probe": 1, "offset": 17}
    w = (torch.randn(501, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    z = getattr(distzo2_core, family)(501, backend=backend, **place).double()
    got = distzo2_core.perturb_(w.clone(), 1e-3, family=family, backend=backend, **place)
    exact = w.double() + float(np.float32(1e-3)) * z  # exact to 2^-53, far below a float32 tie
    assert_same_bits(got, exact.float().to(dtype))
    back = distzo2_core.restore_(w.clone(), -1e-3, family=family, backend=backend, **place)
    assert_same_bits(back, got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_is_a_rounded_step(backend: str) -> None:
    place = {"seed": 2**64 - 1, "step": 5, "param": 3, "probe": 1, "offset": 17}
    w = torch.randn(501, generator=torch.Generator().manual_seed(0)) * 0.02
    z = distzo2_core.normal(501, backend=backend, **place)
    for decay in (0.0, 0.1):
        got = distzo2_core.update_(w.clone(), 1e-2, -0.7, weight_decay=decay, backend=backend, **place)
        direction = decay * w.double() - 0.7 * z.double()
        assert (got.double() - (w.double() - 1e-2 * direction)).abs().max() < 1e-8  # three roundings at up to 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_of_16_bits_is_unbiased(backend: str, dtype: torch.dtype) -> None:
    """A step of a twentieth of a spacing moves a twentieth of the weights by a spacing, on average right."""
    w = torch.full((200_000,), 0.02).to(dtype)
    code = DTYPE_CODES[dtype]
    spacing = float(spacing_at(Fraction(w[0].item()), code))
    got = distzo2_core.update_(
        w.clone(), 1.0, -spacing / 20, seed=1, step=2, param=3, family="rademacher", backend=backend
    )
    z = distzo2_core.rademacher(200_000, seed=1, step=2, param=3, backend=backend).double()
    moved = (got.double() - w.double()) / spacing * z
    assert set(moved.unique().tolist()) <= {0.0, 1.0, 0.5}  # half a spacing where w is a power of two below
    assert abs(moved.mean().item() - 0.05) < 6 * (0.05 * 0.95 / 200_000) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_updates_change_no_bit(backend: str, dtype: torch.dtype) -> None:
    """lr = 0, or no decay and no coefficient: payloads of NaN, signs of zeros and all else stay."""
    rng = np.random.default_rng(0)
    weights = random_weights(rng, 300, dtype)
    weights.view(torch.uint8)[: 3 * dtype.itemsize] = 0xFF  # NaN with a payload
    arguments = {"seed": 1, "step": 2, "param": 3, "backend": backend}
    for lr, coef, decay in ((0.0, 1.0, 0.1), (-0.0, 1.0, 0.0), (0.1, 0.0, 0.0), (0.1, -0.0, 0.0)):
        got = distzo2_core.update_(weights.clone(), lr, coef, weight_decay=decay, **arguments)
        assert_same_bits(got, weights)


def one_segment(w: torch.Tensor, offset: int = 0, param: int = 3) -> tuple[torch.Tensor, SegmentTable]:
    segment = Segment(0, w.numel(), w.dtype, param, offset, 0, 1, offset + w.numel())
    return w.view(torch.uint8).clone(), SegmentTable([segment])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_materialize_is_the_single_ops_in_turn(backend: str, dtype: torch.dtype) -> None:
    """Missed updates one by one, then both signs; the clean weights stay unless they are written back."""
    w = (torch.randn(700, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    buffer, table = one_segment(w, offset=5)
    clean = buffer.clone()
    updates = [Update(step, (GroupScalars(1e-2, 0.1),), (Term(0, step, 7, 0, 0.3),)) for step in (1, 2, 3)]
    emits = [Emit((Term(0, 4, 7, 0, sign * 1e-3),), (1.0,)) for sign in (1, -1)]
    outs = [torch.zeros_like(buffer) for _ in emits]
    arguments = {"seed": 9, "updates": updates, "emits": emits, "outs": outs, "backend": backend}
    distzo2_core.materialize(buffer, table, **arguments)
    assert torch.equal(buffer, clean)

    place = {"seed": 9, "param": 3, "probe": 7, "offset": 5, "backend": backend}
    expected = w.clone()
    for step in (1, 2, 3):
        distzo2_core.update_(expected, 1e-2, 0.3, weight_decay=0.1, step=step, **place)
    for out, scale in zip(outs, (1e-3, -1e-3), strict=True):
        assert_same_bits(out.view(dtype), distzo2_core.perturb_(expected.clone(), scale, step=4, **place))
    distzo2_core.materialize(buffer, table, write_back=True, **arguments)
    assert_same_bits(buffer.view(dtype), expected)


# Native against the reference: every bit, for everything that can vary.


@needs_native
def test_native_noise() -> None:
    check_noise("native", numels=(1, 2, 3, 4, 5, 7, 8, 31, 128, 129, 1024, 70_001))


@needs_native
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), numel=st.integers(1, 3000))
def test_native_in_place(seed: int, dtype: torch.dtype, numel: int) -> None:
    check_in_place(np.random.default_rng(seed), "native", dtype, numel)


@needs_native
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), dtypes=st.sampled_from([DTYPES, *((dtype,) for dtype in DTYPES)]))
def test_native_materialize(seed: int, dtypes: tuple[torch.dtype, ...]) -> None:
    check_visit(random_visit(np.random.default_rng(seed), dtypes, max_numel=2500), "native")


@needs_native
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="asks the kernel")
def test_native_ops_run_on_torch_threads() -> None:
    """A build without OpenMP gives the same bits on one thread, so that only the threads themselves tell."""
    w = torch.zeros(1 << 24)

    def ran() -> dict[str, int]:  # nanoseconds of each thread
        return {p.parent.name: int(p.read_text().split()[0]) for p in Path("/proc/self/task").glob("*/schedstat")}

    distzo2_core.perturb_(w, 1.0, seed=1, step=2, param=3)
    before = ran()
    distzo2_core.perturb_(w, 1.0, seed=1, step=2, param=4)
    busy = [thread for thread, ns in ran().items() if ns - before.get(thread, 0) > 1_000_000]
    assert len(busy) == torch.get_num_threads()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_materialize_across_threads(dtype: torch.dtype) -> None:
    """Large enough to be split among threads: the bits do not depend on how many there are."""
    rng = np.random.default_rng(1)
    visit = random_visit(rng, (dtype,), max_numel=300_000)
    check_visit(visit, "native")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = visit.run("native", write_back=True)
    finally:
        torch.set_num_threads(threads)
    for got, expected in zip(alone, visit.run("native", write_back=True), strict=True):
        assert torch.equal(got, expected)


@needs_native
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), cuts=st.lists(st.integers(0, 2000), max_size=4))
def test_native_splits(seed: int, dtype: torch.dtype, cuts: list[int]) -> None:
    """A tensor updated and perturbed in slices, as ranks of a node do it, has the bits of the whole."""
    rng = np.random.default_rng(seed)
    w, offset = random_weights(rng, 2000, dtype), int(rng.integers(0, 2**36))
    program = {
        "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
        "updates": [Update(8, (GroupScalars(1e-2, 0.1),), (Term(0, 8, 0, 0, 0.3), Term(1, 7, 1, 0, -0.2)))],
        "emits": [Emit((Term(0, 9, 0, 0, sign * 1e-3),), (1.0,)) for sign in (1, -1)],
        "write_back": True,
        "backend": "native",
    }

    def visit(begin: int, end: int) -> list[torch.Tensor]:
        buffer, table = one_segment(w[begin:end].clone(), offset=offset + begin)
        outs = [torch.zeros_like(buffer) for _ in range(2)]
        distzo2_core.materialize(buffer, table, outs=outs, **program)
        return [buffer, *outs]

    edges = sorted({0, 2000, *cuts})
    slices = [visit(begin, end) for begin, end in itertools.pairwise(edges)]
    for index, whole in enumerate(visit(0, 2000)):
        assert_same_bits(torch.cat([part[index] for part in slices]), whole)


# The CUDA kernels against the reference; Triton's are in test_triton.py.

needs_cuda_kernels = pytest.mark.skipif(not distzo2_core.build_info()["cuda"], reason="built without CUDA kernels")


@pytest.mark.cuda
@needs_cuda_kernels
def test_cuda_noise() -> None:
    check_noise("native", "cuda", numels=(1, 3, 129, 1024, 100_003))


@pytest.mark.cuda
@needs_cuda_kernels
@pytest.mark.parametrize("seed", range(40))
def test_cuda_in_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_in_place(rng, "native", DTYPES[seed % 3], int(rng.integers(1, 5000)), "cuda")


@pytest.mark.cuda
@needs_cuda_kernels
@pytest.mark.parametrize("seed", range(100))
def test_cuda_materialize(seed: int) -> None:
    check_visit(random_visit(np.random.default_rng(seed), DTYPES, max_numel=5000), "native", "cuda")


# The reason for stochastic rounding.


@needs_native
def test_bf16_learns_small_steps_only_with_stochastic_rounding() -> None:
    """1000 updates, eta 1e-7, |g| about 10, weights of about 0.02: regress the bf16 change on the float32 change.

    The slope is 1 where the 16-bit weights follow; rounding to nearest loses all steps below half a spacing.
    """
    numel, num_updates, lr = 1 << 20, 1000, 1e-7
    generator = torch.Generator().manual_seed(3)
    start = (torch.randn(numel, generator=generator) * 0.02).bfloat16()
    coefs = (torch.randn(num_updates, generator=generator) * 10).tolist()
    updates = [Update(t, (GroupScalars(lr, 0.0),), (Term(0, t, 0, 0, c),)) for t, c in enumerate(coefs)]

    def train(w: torch.Tensor) -> torch.Tensor:
        buffer, table = one_segment(w)
        distzo2_core.materialize(buffer, table, seed=5, updates=updates, write_back=True, backend="native")
        return buffer.view(w.dtype)

    nearest = start.clone()
    for t, c in enumerate(coefs):
        z = distzo2_core.normal(numel, seed=5, step=t, param=3, backend="native")
        nearest = torch.add(nearest, z, alpha=-lr * c).bfloat16()  # promoted to float32, then rounded to nearest

    exact = train(start.float()).double() - start.double()

    def slope(trained: torch.Tensor) -> float:
        return ((trained.double() - start.double()) @ exact / (exact @ exact)).item()

    stochastic_slope, nearest_slope = slope(train(start)), slope(nearest)
    print(f"slope on the float32 change: stochastic {stochastic_slope:.4f}, nearest {nearest_slope:.4f}")
    assert abs(stochastic_slope - 1) <= 0.05
    assert abs(nearest_slope) <= 0.2
