"""Stored formats of materialize: trained codes against exact arithmetic, nonnegative float32, every backend against the
reference, golden hashes."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from code_cases import format_visit, make_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    CODES,
    DTYPES,
    Visit,
    assert_same_bits,
    needs_native,
    random_visit,
    rounded,
)

import distzo2_core
from distzo2_core import FROZEN, Emit, GroupScalars, Segment, SegmentTable, Term, Update, reference
from distzo2_core.types import CODE8, CODE16, LARGEST_CODES

GOLDEN = Path(__file__).with_name("golden_codes.json")
ALL = (*DTYPES, *CODES)


float_bits, half_bits = st.integers(0, 2**32 - 1), st.integers(0, 65535)
scale_bits = st.one_of(st.integers(0, 2**31 - 2**23 - 1), st.integers(0, 100), st.integers(110 << 23, 130 << 23))


@settings(max_examples=300)
@given(share=st.integers(-32767, 32767), change=float_bits, scale=scale_bits, near=st.booleans(), r=half_bits)
@pytest.mark.parametrize("code", [CODE8, CODE16])
def test_steps_against_rationals(code: int, share: int, change: int, scale: int, near: bool, r: int) -> None:
    """The definition, in exact arithmetic: the quotient and the sum are rounded to float32, the rest is of integers."""
    largest = LARGEST_CODES[code]
    q = share * largest // 32767
    s, x = (float(np.array([bits], np.uint32).view(np.float32)[0]) for bits in (scale, change))
    if near and np.isfinite(x):  # a change of about a code
        x = float(np.float32(s) * np.float32(1 + x % 3 - 1.5))
    dtype = {CODE8: np.int8, CODE16: np.int16}[code]
    arrays = [np.array([each], np.float32) for each in (x, s)]
    got = int(reference.step_codes(np.array([q], dtype), *arrays, np.array([r], np.uint32), code)[0])
    if s == 0 or np.isnan(x):
        assert got == q
        return
    quotient = x if np.isinf(x) else rounded(Fraction(x) / Fraction(s))
    total = quotient if np.isinf(quotient) else rounded(Fraction(quotient) + Fraction(r, 65536))
    step = total if np.isinf(total) else total // 1
    assert got == max(-largest, min(largest, q + step))


def one_segment(dtype: torch.dtype, codes: list[int], scales: list[float]) -> tuple[torch.Tensor, SegmentTable]:
    """A buffer with codes and their scales, each of 32 of them, and its table; emitted as float32."""
    at = len(codes) * dtype.itemsize
    stored = torch.tensor(codes).to(dtype).view(torch.uint8)
    buffer = torch.cat([stored, torch.tensor(scales).view(torch.uint8)])
    segment = Segment(0, len(codes), dtype, 3, 0, 0, 1, len(codes), 0, torch.float32, at, 32)
    return buffer, SegmentTable([segment], num_bytes=len(buffer))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", CODES)
def test_values_are_products(backend: str, dtype: torch.dtype) -> None:
    largest = torch.iinfo(dtype).max
    codes = torch.arange(-32, 32) * largest // 32
    scales = [0.37, 1e-45]
    buffer, table = one_segment(dtype, codes.tolist(), scales)
    out = torch.empty(256, dtype=torch.uint8)
    distzo2_core.materialize(buffer, table, seed=1, emits=[Emit((), (1.0,))], outs=[out], backend=backend)
    expected = codes.float() * torch.tensor(scales).repeat_interleave(32)
    assert_same_bits(out.view(torch.float32), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", CODES)
def test_an_update_is_a_rounded_step(backend: str, dtype: torch.dtype) -> None:
    """On average a code moves by -lr * (decay * v + c * z) / s; a scale of 0, and what is out of range, holds it."""
    numel, scale, largest = 200_000, 2.0**-10, torch.iinfo(dtype).max
    buffer, table = one_segment(dtype, [20] * numel, [scale] * (numel // 32))
    update = Update(4, (GroupScalars(0.5, 0.25),), (Term(1, 4, 0, 0, 0.3 * scale),))
    run = {"seed": 7, "write_back": True, "backend": backend}
    distzo2_core.materialize(buffer, table, updates=[update], **run)
    got = buffer[: numel * dtype.itemsize].view(dtype).double()
    z = distzo2_core.rademacher(numel, seed=7, step=4, param=3, backend=backend).double()
    exact = 20 - 0.5 * (0.25 * 20 + 0.3 * z)
    assert ((got - exact).abs() < 1).all()  # to one of the two neighbours
    for sign in (-1, 1):
        assert abs((got - exact)[z == sign].mean().item()) < 6 * 0.5 / (numel / 2) ** 0.5
    held, table = one_segment(dtype, [largest] * 32 + [-largest] * 32 + [5] * 32, [1e-30, 1e-30, 0.0])
    far = Update(4, (GroupScalars(1.0, 0.0),), (Term(0, 4, 0, 0, 1e30),))
    distzo2_core.materialize(held, table, updates=[far], **run)
    codes = held[: 96 * dtype.itemsize].view(dtype)
    assert set(codes[:64].tolist()) == {largest, -largest} and (codes[64:] == 5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nonnegative(backend: str) -> None:
    """After each of two updates nothing is below 0, and NaN stays; the plain update says what is 0."""
    values = torch.tensor([0.0, -0.0, 0.5, 1e-3, float("inf"), float("nan"), -float("nan")] * 300)
    plain, kept = values.clone(), values.clone()
    updates = [Update(step, (GroupScalars(1.0, 0.0),), (Term(0, step, 0, 0, 0.7),)) for step in range(2)]
    for update in updates:
        for w, nonnegative in ((plain, False), (kept, True)):
            segment = Segment(0, len(w), torch.float32, 3, 5, 0, 1, len(w) + 5, nonnegative=nonnegative)
            more = {"seed": 1, "write_back": True, "backend": backend}
            distzo2_core.materialize(w.view(torch.uint8), SegmentTable([segment]), updates=[update], **more)
        assert (kept[kept.signbit()].isnan()).all() and (kept[~kept.isnan()] >= 0).all()
        expected = torch.where(plain.signbit() & ~plain.isnan(), 0.0, plain)
        assert_same_bits(kept, expected)
        plain.copy_(kept)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), backend=st.sampled_from(["reference", "native"]))
@needs_native
def test_missed_updates_are_single_ones(seed: int, backend: str) -> None:
    visit = random_visit(np.random.default_rng(seed), ALL, 700, nonnegative=True)
    at_once, one_by_one = visit.run(backend, True)[0], visit
    for update in visit.updates:
        single = one_by_one._replace(updates=(update,), emits=())
        one_by_one = one_by_one._replace(weights=single.run(backend, True)[0])
    assert_same_bits(one_by_one.weights, at_once)


def cut(visit: Visit, rng: np.random.Generator) -> Visit:
    """The visit with its segments cut in two, codes between groups."""
    parts = []
    for segment in visit.segments.segments:
        each = segment.scale_group or 1
        first = min(segment.numel, int(rng.integers(0, segment.numel + 1)) // each * each)
        itemsize = segment.dtype.itemsize
        second = segment._replace(
            numel=segment.numel - first,
            byte_offset=segment.byte_offset + first * itemsize,
            element_offset=segment.element_offset + first,
            out_offset=(segment.byte_offset if segment.out_offset is None else segment.out_offset)
            + first * (segment.out_dtype or segment.dtype).itemsize,
            scale_offset=segment.scale_offset + first // each * 4 if segment.scale_group else 0,
        )
        parts += [segment._replace(numel=first), second]
    return visit._replace(segments=SegmentTable(parts, num_bytes=visit.weights.numel()))


@needs_native
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_native_cuts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    visit = random_visit(rng, ALL, 3000, nonnegative=True)
    for got, expected in zip(cut(visit, rng).run("native", True), visit.run("native", True), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", CODES)
def test_identity_updates_change_no_bit(backend: str, dtype: torch.dtype) -> None:
    """Not even the code that training never makes."""
    buffer, table = one_segment(dtype, [torch.iinfo(dtype).min] * 64, [1.0, float("nan")])
    terms = (Term(0, 1, 0, 0, 1.0),)
    updates = [Update(1, (GroupScalars(0.0, 0.1),), terms), Update(2, (GroupScalars(1.0, 0.0, 1.0, 0.0),), terms)]
    before = buffer.clone()
    distzo2_core.materialize(buffer, table, seed=1, updates=updates, write_back=True, backend=backend)
    assert_same_bits(buffer, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str) -> None:
    """Written by running this file, with tests/helpers on PYTHONPATH: changed bits are another format's."""
    assert make_golden(backend) == json.loads(GOLDEN.read_text())


# What is refused.


def test_segments_refuse() -> None:
    good = Segment(0, 64, torch.int16, 0, 64, FROZEN, 1, 128, 0, torch.bfloat16, 128, 32)
    for message, changes in (
        ("segment 1: scale_group must be one of .* and divide element_offset 64, got 0", {"scale_group": 0}),
        ("scale_group must be one of .*, got 48", {"scale_group": 48}),
        ("divide element_offset 64, got 128", {"scale_group": 128}),
        ("segment 1: scale_offset 126 is not aligned", {"scale_offset": 126}),
        ("segments 1 and 1 overlap: one ends at byte 128, the other begins at 124", {"scale_offset": 124}),
        ("codes need an out_dtype", {"out_dtype": None}),
        ("nonnegative is for torch.float32, got torch.int16", {"nonnegative": True}),
        ("segment 1: scale_group must be 0 for torch.float16, got 32", {"dtype": torch.float16}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            SegmentTable([Segment(4096, 1, torch.float32, 0, 0, 0, 1, 1, 8192), good._replace(**changes)])
    table = SegmentTable([good])
    assert table.num_bytes == 136 and table.tensor[0].tolist() == [0, 64, 4, 0, 64, -1, 1, 128, 0, 1, 128, 32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", CODES)
def test_other_ops_refuse_codes(backend: str, dtype: torch.dtype) -> None:
    table, ids = torch.zeros(2, 32, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"weight must be of .*, got {dtype}"):
        distzo2_core.embedding(table, ids, 1.0, seed=1, step=2, param=3, backend=backend)
    with pytest.raises(TypeError, match=f"w must be of .*, got {dtype}"):
        distzo2_core.update_(table, 1.0, 1.0, seed=1, step=2, param=3, backend=backend)


@needs_native
def test_the_op_refuses_what_is_out_of_bounds() -> None:
    visit = format_visit("code16", 64, 64, 32, 1)
    columns = {"out dtype": (9, 3), "group": (11, 16), "place": (10, 132), "alignment": (10, 126), "element": (4, 33)}
    for column, value in columns.values():
        rows = visit.segments.tensor.clone()
        rows[0, column] = value
        program = distzo2_core.encode_program(visit.updates, visit.emits, 1)
        outs = [torch.empty(visit.segments.out_bytes, dtype=torch.uint8) for _ in visit.emits]
        with pytest.raises(RuntimeError, match="segment 0: "):
            torch.ops.distzo2.materialize(visit.weights, rows, 1, *program, outs, True)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make_golden("reference"), indent=1) + "\n")
