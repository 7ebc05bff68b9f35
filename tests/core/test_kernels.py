"""Perturbation, update and materialize: against plain arithmetic, and native against the reference, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    DTYPES,
    Visit,
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
from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update, reference
from distzo2_core.types import DTYPE_CODES

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

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        distzo2_core.perturb_(w, 1.0, seed=1, step=2, param=3)
        before = ran()
        distzo2_core.perturb_(w, 1.0, seed=1, step=2, param=4)
        busy = [thread for thread, ns in ran().items() if ns - before.get(thread, 0) > 1_000_000]
    finally:
        torch.set_num_threads(threads)
    assert len(busy) == 2


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


cut_points = st.lists(st.integers(0, 2000), max_size=4)


@needs_native
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), cuts=cut_points)
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


@needs_native
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), cuts=cut_points)
def test_native_splits_of_each_op(seed: int, dtype: torch.dtype, cuts: list[int]) -> None:
    check_splits(np.random.default_rng(seed), dtype, sorted({0, 2000, *cuts}))


# Long programs.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_terms(backend: str, dtype: torch.dtype) -> None:
    """4097 terms in one update and in one emit, added one after another; those of coefficient 0 are left out."""
    num_terms, numel, offset, seed, param = (4097, 37, 2**34 - 17, 2**64 - 5, 3)
    if backend == "reference":
        num_terms = 130  # a second for a thousand
    rng = np.random.default_rng(6)
    coefs = rng.standard_normal(num_terms).astype(np.float32)
    coefs[rng.random(num_terms) < 0.1] = 0.0
    rows = [(j % 2, j // 2 + 1, int(probe)) for j, probe in enumerate(rng.integers(0, 2**20, num_terms))]

    def noise(shift: int) -> np.ndarray:
        """The terms' noise [num_terms, numel], with all the terms' words made at once."""
        terms = np.array(rows, dtype=np.uint32)
        z = np.empty((num_terms, numel), np.float32)
        for family, per_group in ((0, 4), (1, 128)):
            of_family = terms[:, 0] == family
            step, probe = (terms[of_family, column, None] for column in (1, 2))
            q = np.arange(offset // per_group, (offset + numel - 1) // per_group + 1, dtype=np.uint64)
            c3 = np.uint32(family << 24) | probe << np.uint32(4) | (q >> np.uint64(32)).astype(np.uint32)
            counter = ((q & np.uint64(0xFFFFFFFF)).astype(np.uint32), param, step + np.uint32(shift), c3)
            words = np.broadcast_arrays(*reference.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)))
            if family == 0:
                lanes = np.stack(reference.normals_from_words(*words), axis=2)
            else:
                bits = np.stack(words, axis=2)[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
                lanes = bits.astype(np.float32) * 2 - 1
            z[of_family] = lanes.reshape(len(step), -1)[:, offset % per_group :][:, :numel]
        return z

    def summed(values: np.ndarray, shift: int) -> np.ndarray:
        for coef, z in zip(coefs, noise(shift), strict=True):
            values = reference.fma(coef, z, values) if coef != 0 else values
        return values

    code = DTYPE_CODES[dtype]
    w = random_weights(rng, numel, dtype)
    bits = w.view(torch.uint8).numpy().view(np.uint32 if code == 0 else np.uint16)
    values = reference.decode(bits, code)
    lr, decay = np.float32(1e-3), np.float32(0.1)
    updated = reference.fma(-lr, summed(reference.mul(decay, values), 0), values)
    expected = reference.round_stochastic(updated, reference.rounding_bits(seed, 7, param, offset, numel), code)
    emitted = reference.round_nearest(summed(reference.decode(expected, code), 5), code)

    buffer, table = one_segment(w, offset, param)
    out = torch.zeros_like(buffer)
    lists = [
        tuple(Term(f, step + shift, p, 0, float(c)) for (f, step, p), c in zip(rows, coefs, strict=True))
        for shift in (0, 5)
    ]
    updates, emits = [Update(7, (GroupScalars(1e-3, 0.1),), lists[0])], [Emit(lists[1], (1.0,))]
    distzo2_core.materialize(
        buffer, table, seed=seed, updates=updates, emits=emits, outs=[out], write_back=True, backend=backend
    )
    assert buffer.numpy().tobytes() == expected.tobytes()
    assert out.numpy().tobytes() == emitted.tobytes()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_hundreds_of_missed_updates(dtype: torch.dtype) -> None:
    """At once, as the reference does it, and as as many visits of one update each."""
    rng = np.random.default_rng(8)
    segments = SegmentTable([Segment(0, 301, dtype, 5, 1000, 0, 1, 1301), Segment(1300, 44, dtype, 6, 0, 1, 1, 44)])
    weights = torch.cat([random_weights(rng, 650, dtype).view(torch.uint8), torch.zeros(1300, dtype=torch.uint8)])
    weights = weights[:1500].clone()
    updates = [
        Update(
            step,
            (GroupScalars(0.0 if step % 7 == 0 else 1e-3, 0.0), GroupScalars(1e-2, 0.1, 1.0, 0.5)),
            tuple(Term(j % 2, step - j, j, 0, float(rng.standard_normal())) for j in range(step % 3)),
        )
        for step in range(10, 310)
    ]
    visit = Visit(weights, segments, 2**63, tuple(updates), (Emit((Term(0, 310, 0, 0, 1e-3),), (1.0, 1.0)),))
    got = visit.run("native", write_back=True)
    for one, other in zip(got, visit.run("reference", write_back=True), strict=True):
        assert_same_bits(one, other)
    one_by_one = weights.clone()
    for update in updates:
        distzo2_core.materialize(one_by_one, segments, seed=2**63, updates=[update], write_back=True, backend="native")
    assert_same_bits(one_by_one, got[0])


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
