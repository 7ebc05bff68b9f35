"""The noise: Philox words, which words an element takes, normals against float64, golden hashes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, LOW_RANK
from noise_cases import (
    GOLDEN,
    check_golden,
    digest,
    exact_pair,
    golden,
    group_words,
    noise_bytes,
    philox_scalar,
)

import distzo2_core
from distzo2_core import reference
from distzo2_core.types import MAX_ELEMENTS, MAX_PARAM, MAX_PROBE, MAX_SEED, MAX_STEP

places = st.fixed_dictionaries(
    {
        "seed": st.integers(0, MAX_SEED),
        "step": st.integers(0, MAX_STEP),
        "param": st.integers(0, MAX_PARAM),
        "probe": st.integers(0, MAX_PROBE),
    }
)
offsets = st.one_of(st.integers(0, 300), st.integers(2**34 - 300, 2**34 + 300), st.integers(0, MAX_ELEMENTS - 2000))


# Philox.


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The vectors of Random123's kat_vectors file for philox4x32-10."""
    assert [int(word) for word in reference.philox4x32(counter, key)] == words
    assert philox_scalar(counter, key) == words


# Which words an element takes.


@settings(max_examples=30)
@given(place=places, element=offsets)
def test_normal_takes_lane_of_group_of_4(place: dict[str, int], element: int) -> None:
    words = [np.array([word], np.uint32) for word in group_words(0, place, element // 4)]
    expected = reference.normals_from_words(*words)[element % 4]
    assert reference.normal_values(**place, offset=element, numel=1).tobytes() == expected.tobytes()


@settings(max_examples=30)
@given(place=places, element=offsets)
def test_rademacher_takes_bit_of_group_of_128(place: dict[str, int], element: int) -> None:
    bit = group_words(1, place, element // 128)[element % 128 // 32] >> element % 32 & 1
    assert reference.rademacher_values(**place, offset=element, numel=1).tolist() == [1.0 if bit else -1.0]


@settings(max_examples=30)
@given(place=places, element=offsets)
def test_rounding_takes_half_of_group_of_8(place: dict[str, int], element: int) -> None:
    half = group_words(2, place | {"probe": 0}, element // 8)[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF
    got = reference.rounding_bits(place["seed"], place["step"], place["param"], element, 1)
    assert got.tolist() == [half]


@settings(max_examples=20)
@given(place=places, offset=offsets, cut=st.integers(0, 700))
def test_a_slice_is_that_part_of_the_whole(place: dict[str, int], offset: int, cut: int) -> None:
    for values in (reference.normal_values, reference.rademacher_values):
        whole = values(**place, offset=offset, numel=700)
        parts = [values(**place, offset=offset, numel=cut), values(**place, offset=offset + cut, numel=700 - cut)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_every_coordinate_changes_the_noise() -> None:
    base = {"seed": 0, "step": 0, "param": 0, "probe": 0, "offset": 0}
    others = [
        {"seed": 1}, {"seed": 2**32}, {"seed": 2**63}, {"step": 1}, {"step": 2**31}, {"param": 1}, {"probe": 1},
        {"probe": 2**16}, {"probe": MAX_PROBE}, {"offset": 2**34}, {"offset": 2**37},
    ]  # fmt: skip
    draws = [distzo2_core.normal(64, backend="reference", **(base | other)) for other in [{}, *others]]
    assert len({draw.numpy().tobytes() for draw in draws}) == len(draws)


def test_normals_are_within_2e6_of_float64() -> None:
    rng = np.random.default_rng(1)
    edges = np.concatenate([np.arange(2**k - 40, 2**k + 40) % 2**32 for k in range(1, 33)]).astype(np.uint32)
    radius = np.concatenate([edges, rng.integers(0, 2**32, 300_000, dtype=np.uint32), np.repeat(edges[:80], 80)])
    angle = np.concatenate(
        [np.roll(edges, 77), rng.integers(0, 2**32, 300_000, dtype=np.uint32), np.tile(edges[-80:], 80)]
    )
    zeros = np.zeros_like(radius)
    got = reference.normals_from_words(radius, angle, zeros, zeros)[:2]
    for values, exact in zip(got, exact_pair(radius, angle), strict=True):
        assert np.isfinite(values).all()
        assert np.abs(values - exact).max() <= 2e-6


def test_extreme_words_give_finite_normals() -> None:
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 257, 2**32 - 1], np.uint32)
    radius, angle = (grid.reshape(-1) for grid in np.meshgrid(words, words))
    values = np.stack(reference.normals_from_words(radius, angle, radius, angle))
    # The largest radius is that of u = 2^-33: sqrt(66 ln 2) = 6.7637.
    assert np.isfinite(values).all() and 6.7 < np.abs(values).max() < 6.764


def make_golden() -> dict:
    places = [
        {"seed": 0, "step": 0, "param": 0, "probe": 0, "offset": 0, "numel": 20_000},
        {"seed": MAX_SEED, "step": MAX_STEP, "param": MAX_PARAM, "probe": MAX_PROBE, "offset": 3, "numel": 9_999},
        {"seed": 0x9E3779B97F4A7C15, "step": 7, "param": 41, "probe": 70_000, "offset": 2**34 - 1_001, "numel": 5_003},
        {"seed": 1, "step": 2, "param": 3, "probe": 4, "offset": MAX_ELEMENTS - 777, "numel": 777},
    ]
    noise = [
        {"kind": kind, "dtype": dtype} | place
        for kind in ("normal", "rademacher")
        for dtype in ("float32", "bfloat16", "float16")
        for place in places
    ]
    shapes = [
        {"shape": [300, 257], "offset": 0, "numel": 300 * 257},
        {"shape": [7, 90, 64], "offset": 1_003, "numel": 30_000},
        {"shape": [2**24, 4096], "offset": 2**36 - 5_000, "numel": 5_000},
    ]
    low_rank = [
        {"kind": "low_rank", "family": family, "dtype": "float32"} | places[i] | shape
        for family in LOW_RANK
        for i, shape in enumerate(shapes)
    ]
    noise += low_rank
    rounding = [{name: place[name] for name in ("seed", "step", "param", "offset", "numel")} for place in places]
    orders = [{"numel": 10_007, "seed": seed, "epoch": epoch} for seed, epoch in ((0, 0), (MAX_SEED, 5))]
    return {
        "noise_version": distzo2_core.NOISE_VERSION,
        "noise": [case | {"sha256": digest(noise_bytes(case, "reference"))} for case in noise],
        "rounding": [case | {"sha256": digest(reference.rounding_bits(**case).astype("<u2"))} for case in rounding],
        "permutation": [case | {"sha256": digest(distzo2_core.permutation(**case).astype("<i8"))} for case in orders],
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_noise(backend: str) -> None:
    check_golden(backend)


def test_golden_rounding_and_permutation() -> None:
    assert golden() == make_golden()


if __name__ == "__main__":
    # Changed bits are a new version of the noise: raise NOISE_VERSION, then run this file, with tests/helpers on
    # PYTHONPATH, to write the hashes.
    GOLDEN.write_text(json.dumps(make_golden(), indent=1) + "\n")
