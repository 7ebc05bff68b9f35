"""The reference's own parts: the order of the data, and a fused multiply-add that is rounded exactly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import rounded
from noise_cases import philox_scalar

import distzo2_core
from distzo2_core import reference
from distzo2_core.types import MAX_SEED

# Data order.


def test_permutation_is_argsort_of_words() -> None:
    seed, epoch, numel = MAX_SEED - 5, 3, 257
    keys = [philox_scalar([i, 0, epoch, 3 << 24], [seed % 2**32, seed >> 32])[:2] for i in range(numel)]
    expected = sorted(range(numel), key=lambda i: (keys[i], i))
    order = distzo2_core.permutation(numel, seed, epoch)
    assert order.dtype == np.int64 and order.tolist() == expected


def test_permutation_covers_and_differs() -> None:
    orders = [distzo2_core.permutation(100_000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert (np.sort(order) == np.arange(100_000)).all()
    assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()
    assert distzo2_core.permutation(0, 1, 2).shape == (0,)
    assert distzo2_core.permutation(1, 1, 2).tolist() == [0]


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (3, -1, 0), (3, 2**64, 0), (3, 0, 2**32)])
def test_permutation_refuses_what_is_out_of_range(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be between"):
        distzo2_core.permutation(*arguments)


# The reference's own fma.

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
TINY = 2.0**-149


@settings(max_examples=300)
@given(a=floats32, b=floats32, c=floats32)
@example(a=1 + 2.0**-23, b=1 + 2.0**-23, c=-(1 + 2.0**-22))
@example(a=1 + 2.0**-12, b=1 + 2.0**-12, c=2.0**-149)
@example(a=1 + 2.0**-12, b=1 + 2.0**-12, c=-(2.0**-149))
@example(a=TINY, b=0.5, c=TINY)
@example(a=TINY, b=0.5, c=-TINY)
@example(a=3.4028234663852886e38, b=2.0, c=-3.4028234663852886e38)
def test_fma_is_exactly_rounded(a: float, b: float, c: float) -> None:
    got = float(reference.fma(*(np.array([x], np.float32) for x in (a, b, c)))[0])
    assert got == rounded(Fraction(a) * Fraction(b) + Fraction(c))


@settings(max_examples=200)
@given(
    a=st.integers(2**23, 2**24 - 1),
    b=st.integers(2**23, 2**24 - 1),
    c=st.integers(2**23, 2**24 - 1),
    shift=st.integers(-60, 60),
    negative=st.booleans(),
)
def test_fma_is_exactly_rounded_near_ties(a: int, b: int, c: int, shift: int, negative: bool) -> None:
    addend = (-c if negative else c) * 2.0**shift
    got = float(reference.fma(*(np.array([x], np.float32) for x in (float(a), float(b), addend)))[0])
    assert got == rounded(Fraction(a) * b + Fraction(addend))
