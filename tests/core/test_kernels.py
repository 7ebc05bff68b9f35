"""Perturbation, update and materialize: against plain arithmetic, and native against the reference, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    CODES,
    DTYPES,
    anchored_visit,
    assert_same_bits,
    check_in_place,
    check_noise,
    check_splits,
    check_visit,
    needs_native,
    random_visit,
    random_weights,
)

import distzo2_core
from distzo2_core import FROZEN, Emit, GroupScalars, Segment, SegmentTable, Term, Update

ALL = (*DTYPES, *CODES)

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_anchor_is_plain_arithmetic(backend: str) -> None:
    """a = fma(anchor, w - w0, decay * w), then the terms; of float32 beside a loop in float64, rounded by NumPy."""
    rng = np.random.default_rng(0)
    w, w0 = (torch.from_numpy(rng.standard_normal(300).astype(np.float32)) for _ in range(2))
    w0[:100] = w[:100]  # these have not moved
    place = {"seed": 9, "step": 4, "param": 3, "offset": 5, "backend": backend}
    z = distzo2_core.normal(300, **place, probe=7).double().numpy()
    for decay, coef in ((0.0, 0.0), (0.0, 0.3), (0.1, 0.3)):
        buffer = torch.cat([w, w0]).view(torch.uint8)
        table = SegmentTable([Segment(0, 300, torch.float32, 3, 5, 0, 1, 305, start_offset=1200)])
        update = Update(4, (GroupScalars(1e-2, decay, anchor=0.5),), (Term(0, 4, 7, 0, coef),))
        distzo2_core.materialize(buffer, table, seed=9, updates=[update], write_back=True, backend=backend)
        lr, decay, coef, anchor = (float(np.float32(x)) for x in (1e-2, decay, coef, 0.5))
        old, start = w.numpy(), w0.numpy()
        a = np.float32(decay) * old if decay else np.zeros(300, np.float32)
        a = (anchor * (old - start).astype(np.float64) + a).astype(np.float32)  # exact products and sums, nearly always
        a = (coef * z + a).astype(np.float32) if coef else a
        expected = (-lr * a.astype(np.float64) + old).astype(np.float32)
        got = buffer.view(torch.float32)
        assert_same_bits(got[:300], torch.from_numpy(expected))
        assert_same_bits(got[300:], w0)
        if not decay and not coef:
            assert_same_bits(got[:100], w[:100])


def test_anchors_are_refused_where_there_is_no_start() -> None:
    segment = Segment(0, 64, torch.float32, 0, 0, 1, 1, 64)
    update = Update(0, (GroupScalars(0.1, 0.0, anchor=0.0), GroupScalars(0.1, 0.0, anchor=0.5)), ())
    buffer = torch.zeros(1024, dtype=torch.uint8)
    with pytest.raises(ValueError, match="group 1 has an anchor, and a segment without start_offset"):
        distzo2_core.materialize(buffer, SegmentTable([segment]), seed=0, updates=[update], write_back=True)
    for changes, message in (
        ({"start_offset": 3}, "segment 0: start_offset 3 is not aligned to torch.float32"),
        ({"start_offset": 128}, "segments 0 and 0 overlap"),
        ({"start_offset": 256, "nonnegative": True}, "start_offset is for plain weights"),
        ({"start_offset": 2048}, "segment 0 ends at byte 2304, beyond the buffer of 1024 bytes"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            SegmentTable([segment._replace(**changes)], 1024)
    codes = Segment(0, 64, torch.int8, 0, 0, 0, 1, 64, 0, torch.float32, 64, 64, start_offset=256)
    with pytest.raises(TypeError, match="start_offset is for plain weights, not for codes or nonnegative ones"):
        SegmentTable([codes])


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_emits_are_of_a_dtype_of_their_own(backend: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """A frozen segment as it is, and another one after its update, which is rounded as it is stored."""
    w = (torch.randn(2, 200, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    part = 200 * dtype.itemsize
    segments = [
        Segment(part * i, 200, dtype, i, 5, group, 1, 205, 4 + 200 * out_dtype.itemsize * i, out_dtype)
        for i, group in enumerate((FROZEN, 0))
    ]
    table, buffer = SegmentTable(segments), w.view(torch.uint8).view(-1).clone()
    out = torch.zeros(table.out_bytes, dtype=torch.uint8)
    program = {
        "updates": [Update(1, (GroupScalars(1e-2, 0.1),), (Term(0, 1, 7, 0, 0.3),))],
        "emits": [Emit((Term(0, 2, 7, 0, 1e-3),), (1.0,))],
    }
    distzo2_core.materialize(buffer, table, seed=9, **program, outs=[out], write_back=True, backend=backend)
    place = {"seed": 9, "param": 1, "probe": 7, "offset": 5, "backend": backend}
    updated = distzo2_core.update_(w[1].clone(), 1e-2, 0.3, weight_decay=0.1, step=1, **place)
    assert_same_bits(buffer.view(dtype), torch.cat([w[0], updated]))
    z = distzo2_core.normal(200, step=2, **place).double()
    exact = (updated.double() + float(np.float32(1e-3)) * z).float()  # to 2^-53, far below a float32 tie
    assert_same_bits(out[4:].view(out_dtype), torch.cat([w[0].to(out_dtype), exact.to(out_dtype)]))


# Native against the reference: every bit, for everything that can vary.


needs_cuda_kernels = pytest.mark.skipif(not distzo2_core.build_info()["cuda"], reason="built without CUDA kernels")
on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=needs_native), pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda_kernels])],
)


@on_each_device
def test_native_noise(device: str) -> None:
    check_noise("native", device, numels=(1, 2, 3, 4, 5, 7, 8, 31, 128, 129, 1024, 70_001))


@on_each_device
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), numel=st.integers(1, 3000))
def test_native_in_place(device: str, seed: int, dtype: torch.dtype, numel: int) -> None:
    check_in_place(np.random.default_rng(seed), "native", dtype, numel, device)


@on_each_device
@settings(max_examples=250)
@given(seed=st.integers(0, 2**32), dtypes=st.sampled_from([DTYPES, ALL, CODES, *((dtype,) for dtype in ALL)]))
def test_native_materialize(device: str, seed: int, dtypes: tuple[torch.dtype, ...]) -> None:
    rng = np.random.default_rng(seed)
    visit = random_visit(rng, dtypes, max_numel=2500, nonnegative=seed % 2 == 1)
    check_visit(anchored_visit(rng, visit) if seed % 3 == 0 else visit, "native", device)


CHECK_LEVEL = """
import json, sys
import numpy as np
import code_cases, noise_cases, packed_cases
from kernel_cases import CODES, DTYPES, check_in_place, check_noise, check_splits, check_visit, random_visit
from kernel_cases import anchored_visit, check_low_rank, low_rank_visit
noise_cases.check_golden("native")
assert code_cases.make_golden("native") == json.load(open(sys.argv[1] + "/golden_codes.json"))
assert packed_cases.make_golden() == json.load(open(sys.argv[1] + "/golden_decode.json"))
check_noise("native", numels=(1, 3, 129, 1500))
check_low_rank("native", numels=(1500,))
for seed in range(3):
    packed_cases.check_decode(np.random.default_rng(seed), "native", list(packed_cases.FORMATS))
for seed in range(30):
    rng, dtype = np.random.default_rng(seed), DTYPES[seed % 3]
    check_visit(random_visit(rng, DTYPES, max_numel=2500), "native")
    check_visit(anchored_visit(rng, low_rank_visit(rng, random_visit(rng, DTYPES, max_numel=2500))), "native")
    check_visit(random_visit(rng, (*CODES, *DTYPES), max_numel=2500, nonnegative=True), "native")
    check_visit(low_rank_visit(rng, random_visit(rng, (*CODES, *DTYPES), max_numel=2500)), "native")
    check_in_place(rng, "native", dtype, 1 + 91 * seed)
    check_splits(rng, dtype, [0, 1 + seed, 1024, 1100 + seed, 1500])
"""


@needs_native
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_each_instruction_set(level: str) -> None:
    """Golden hashes, and random cases against the reference."""
    command, environment = [sys.executable, "-c", CHECK_LEVEL, str(Path(__file__).parent)], {"DISTZO2_SIMD": level}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=250)
    if "this processor does not have these instructions" in done.stderr or "not in this build" in done.stderr:
        pytest.skip(f"no {level} here")
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="asks the kernel")
def test_native_ops_run_on_torch_threads() -> None:
    """A build without OpenMP gives the same bits on one thread, so that only the threads themselves tell."""
    w = torch.zeros(1 << 24)

    def ran() -> dict[str, int]:  # nanoseconds of each thread
        return {p.parent.name: int(p.read_text().split()[0]) for p in Path("/proc/self/task").glob("*/schedstat")}

    torch.set_num_threads(2)
    distzo2_core.perturb_(w, 1.0, seed=1, step=2, param=3)
    before = ran()
    distzo2_core.perturb_(w, 1.0, seed=1, step=2, param=4)
    assert len([thread for thread, ns in ran().items() if ns - before.get(thread, 0) > 1_000_000]) == 2


@needs_native
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), CODES])
def test_native_materialize_across_threads(dtypes: tuple[torch.dtype, ...]) -> None:
    """Large enough to be split among threads: the bits do not depend on how many there are."""
    visit = random_visit(np.random.default_rng(1), dtypes, max_numel=300_000)
    alone = visit.run("native", write_back=True)
    torch.set_num_threads(2)
    check_visit(visit, "native")
    for got, expected in zip(alone, visit.run("native", write_back=True), strict=True):
        assert torch.equal(got, expected)


cut_points = st.lists(st.integers(0, 2000), max_size=4)


@needs_native
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), cuts=cut_points)
def test_native_splits_of_each_op(seed: int, dtype: torch.dtype, cuts: list[int]) -> None:
    check_splits(np.random.default_rng(seed), dtype, sorted({0, 2000, *cuts}))


@pytest.mark.cuda
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_cuda_kernels), "triton"])
def test_kernels_run_on_the_current_stream(backend: str) -> None:
    """A launch goes behind the work that the current stream has: run before it, the zeroing would wipe it out."""
    place = {"seed": 1, "step": 0, "param": 0, "backend": backend}
    expected = distzo2_core.perturb_(torch.zeros(2**20, device="cuda"), 1.0, **place)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        weights = torch.ones(2**20, device="cuda")
        torch.cuda._sleep(50_000_000)
        weights.zero_()
        distzo2_core.perturb_(weights, 1.0, **place)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(weights, expected)
