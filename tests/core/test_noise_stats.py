"""The statistics of `make stats`, in their short form: they pass, and fail when the noise is not what it should be."""

from __future__ import annotations

import sys
from collections.abc import Callable

import noise_stats
import noise_sums
import pytest
import torch

import distzo2_core

pytestmark = pytest.mark.skipif(not distzo2_core.build_info()["native"], reason="the reference would take minutes")
Make = Callable[[str, int, noise_sums.Place], torch.Tensor]
MAKE: Make = noise_sums.make


def run(monkeypatch: pytest.MonkeyPatch, make: Make) -> int:
    monkeypatch.setattr(noise_sums, "make", make)
    monkeypatch.setattr(sys, "argv", ["noise_stats.py", "--quick"])
    return noise_stats.main()


def test_the_noise_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, MAKE) == 0
    assert "passed: " in capsys.readouterr().out


def with_repeats(family: str, numel: int, place: noise_sums.Place) -> torch.Tensor:
    """A lane of normals and a bit of the rounding come twice."""
    z = MAKE(family, numel, place)
    if family == "normal":
        z[1::64] = z[0::64]
    if family == "rounding":
        z[9::64] = z[3::64]
    return z


def without_probe_bit_and_large_values(family: str, numel: int, place: noise_sums.Place) -> torch.Tensor:
    return MAKE(family, numel, place | {"probe": place["probe"] & ~(1 << 17)}).clamp_(-4.8, 4.8)


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (with_repeats, ["normal: place and successors, by lane", "rounding: pairs of bits in a group"]),
        (without_probe_bit_and_large_values, ["z of places one bit", "normal: largest magnitude"]),
    ],
)
def test_what_is_not_random_is_found(
    make: Make, kinds: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, make) == 1
    text = capsys.readouterr().out
    assert all(f"  failed: {kind}" in text for kind in kinds)
