"""Low-rank noise: which elements of which factors make an element, its statistics, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    CODES,
    DTYPES,
    LOW_RANK,
    assert_same_bits,
    check_low_rank,
    check_visit,
    low_rank_visit,
    needs_native,
    random_visit,
)
from noise_cases import group_words

import distzo2_core
from distzo2_core import FAMILIES, GroupScalars, Segment, SegmentTable, Term, Update, reference
from distzo2_core.types import MAX_ELEMENTS, MAX_SEED, dense_family, matrix_shape

PLACE = {"seed": MAX_SEED - 5, "step": 7, "param": 11, "probe": 3}


def factor(purpose: int, is_sign: bool, index: int) -> np.float32:
    """An element of a factor, from words of Philox in Python's integers."""
    if is_sign:
        return np.float32(1 if group_words(purpose, PLACE, index // 128)[index % 128 // 32] >> index % 32 & 1 else -1)
    words = [np.array([word], np.uint32) for word in group_words(purpose, PLACE, index // 4)]
    return reference.normals_from_words(*words)[index % 4][0]


@settings(max_examples=60)
@given(
    family=st.sampled_from(LOW_RANK),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 2**20), st.integers(1, 2**14)),
    place=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
def test_an_element_is_of_a_row_and_a_column(
    family: str, shape: tuple[int, ...], place: tuple[float, float, float]
) -> None:
    """Of expert e: A has element (e R + i) r + s, B (e C + j) r + s."""
    e, i, j = (int(part * size) for part, size in zip(place, shape, strict=True))
    is_sign, rank = family.startswith("sign"), int(family[-1])
    a = [factor(4, is_sign, (e * shape[1] + i) * rank + s) for s in range(rank)]
    b = [factor(5, is_sign, (e * shape[2] + j) * rank + s) for s in range(rank)]
    z = a[0] * b[0]
    for s in range(1, rank):
        z = reference.fma(a[s], b[s], z)
    at = {"offset": (e * shape[1] + i) * shape[2] + j, "numel": 1}
    got = distzo2_core.low_rank(shape, family=family, backend="reference", **PLACE, **at)
    assert got.numpy().tobytes() == np.float32(z * np.float32(rank**-0.5)).tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_and_ops_in_place(backend: str) -> None:
    check_low_rank(backend)


@needs_native
@settings(max_examples=80)
@given(seed=st.integers(0, 2**32), dtypes=st.sampled_from([DTYPES, CODES, (*DTYPES, *CODES)]))
def test_native_materialize(seed: int, dtypes: tuple[torch.dtype, ...]) -> None:
    rng = np.random.default_rng(seed)
    visit = random_visit(rng, dtypes, max_numel=3000, nonnegative=seed % 2 == 1)
    check_visit(low_rank_visit(rng, visit), "native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", LOW_RANK)
def test_what_has_no_columns_has_dense_noise(backend: str, family: str) -> None:
    """Vectors, and convolutions: by their shape where it says so."""
    where = {"backend": backend, "seed": 1, "step": 2, "param": 3}
    z = getattr(distzo2_core, dense_family(family))(60, **where)
    for w, matrix in ((torch.zeros(60), None), (torch.zeros(5, 4, 3, 1), None), (torch.zeros(5, 4, 3), (60, 0))):
        got = distzo2_core.perturb_(w, 1.0, family=family, matrix=matrix, **where)
        assert_same_bits(got.view(-1), z)
    whole = distzo2_core.perturb_(torch.zeros(3, 5, 4), 1.0, family=family, **where)
    assert_same_bits(whole, distzo2_core.low_rank((3, 5, 4), family=family, **where))


@pytest.mark.parametrize("family", LOW_RANK)
def test_statistics(family: str) -> None:
    """Over probes: mean 0, variance 1, and elements uncorrelated within rows, columns and experts; the fourth moment of
    a rectangle's corners, which is 0 for dense noise, is 1/r."""
    shape, rank, num = (2, 40, 50), int(family[-1]), 600
    place = {"seed": 5, "step": 6, "param": 7}
    z = torch.stack([distzo2_core.low_rank(shape, family=family, **place, probe=p) for p in range(num)]).double()
    # Means of num * 4000 values, or products, of which those of one probe hang together: some 90 factors each.
    assert abs(z.mean()) < 6 / (num * 80) ** 0.5
    assert abs((z * z).mean() - 1) < 6 * (8 / (num * 80)) ** 0.5
    for other in (z[:, :, :, 1:], z[:, :, 1:, :], z[:, 1:], z[:, :, 1:, 1:]):
        first = z[:, : other.shape[1], : other.shape[2], : other.shape[3]]
        assert abs((first * other).mean()) < 6 * (2 / (num * 40)) ** 0.5
    corners = (z[:, :, ::2, ::2] * z[:, :, ::2, 1::2] * z[:, :, 1::2, ::2] * z[:, :, 1::2, 1::2]).mean()
    assert abs(corners - 1 / rank) < 0.1
    assert torch.linalg.matrix_rank(z[0], rtol=1e-5).tolist() == [rank, rank]


def test_shapes() -> None:
    assert matrix_shape((3, 4)) == (3, 4, 1) and matrix_shape((2, 3, 4)) == (3, 4, 2)
    assert (
        matrix_shape((12,)) == matrix_shape((2, 2, 3), is_convolution=True) == matrix_shape((3, 2, 2, 1)) == (12, 0, 1)
    )
    assert matrix_shape((0, 4)) == (0, 0, 1) and matrix_shape(()) == (1, 0, 1)
    SegmentTable([Segment(0, 24, torch.float32, 0, 0, 0, 3, 4, matrices=2)])
    for shape, message in (
        ({"rows": 3, "cols": 4}, "elements 0 to 24 do not lie in a parameter of 3 x 4 elements"),
        ({"rows": 23, "cols": 0}, "do not lie in a parameter of 23 elements"),
        ({"rows": 2, "cols": 3, "matrices": 3}, "do not lie in a parameter of 3 x 2 x 3 elements"),
        ({"rows": 1, "cols": 2**37}, "segment 0: cols must be between 0 and 68719476736"),
        ({"rows": 24, "cols": 1, "matrices": 0}, "segment 0: matrices must be between 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentTable([Segment(0, 24, torch.float32, 0, 0, 0, **shape)])


def test_refusals() -> None:
    place = {"seed": 1, "step": 2, "param": 3, "backend": "reference"}
    for arguments, message in (
        ({"family": "normal", "shape": (3, 4)}, "family must be one of sign-r1, .*, normal-r4, got 'normal'"),
        ({"family": "sign-r4", "shape": (12,)}, r"shape must be \(rows, cols\) or \(experts, rows, cols\), got"),
        ({"family": "sign-r4", "shape": (3, 4), "offset": 7, "numel": 6}, "elements 7 to 13 do not lie in .* 12"),
    ):
        shape = arguments.pop("shape")
        with pytest.raises(ValueError, match=message):
            distzo2_core.low_rank(shape, **arguments, **place)
    with pytest.raises(ValueError, match="matrix must be given for noise of 'sign-r4' at offset 5"):
        distzo2_core.perturb_(torch.zeros(3, 4), 1.0, family="sign-r4", offset=5, **place)
    with pytest.raises(ValueError, match=r"unknown family of noise 'sign-r2'; known: .*sign-r1 .17.*normal-r4 .64."):
        distzo2_core.perturb_(torch.zeros(3, 4), 1.0, family="sign-r2", **place)
    assert FAMILIES["sign-r4"] == 65 and MAX_ELEMENTS == 2**38


@needs_native
def test_a_visit_of_more_terms_than_are_kept_has_the_bits_of_many_visits():
    """A copy that is far behind lists thousands of terms; factors that find no room are made anew for each tile."""
    table = SegmentTable([Segment(0, 24 * 700, torch.float32, 0, 0, 0, 24, 700)])
    updates = [
        Update(step, (GroupScalars(1e-3, 0.0),), tuple(Term(FAMILIES["sign-r4"], step, k, 0, 0.1) for k in range(8)))
        for step in range(300)
    ]
    once = torch.zeros(24 * 700 * 4, dtype=torch.uint8)
    parts = once.clone()
    distzo2_core.materialize(once, table, seed=1, updates=updates, write_back=True, backend="native")
    for first in range(0, 300, 64):
        some = updates[first : first + 64]
        distzo2_core.materialize(parts, table, seed=1, updates=some, write_back=True, backend="native")
    assert torch.equal(once, parts) and once.any()
