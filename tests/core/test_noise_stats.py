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


def repeated_lane(family: str, numel: int, place: noise_sums.Place) -> torch.Tensor:
    z = MAKE(family, numel, place)
    z[1::64] = z[0::64]
    return z


def without_a_bit_of_the_probe(family: str, numel: int, place: noise_sums.Place) -> torch.Tensor:
    return MAKE(family, numel, place | {"probe": place["probe"] & ~(1 << 17)})


def without_large_values(family: str, numel: int, place: noise_sums.Place) -> torch.Tensor:
    return MAKE(family, numel, place).clamp_(-4.8, 4.8)


def repeated_rounding_bit(family: str, numel: int, place: noise_sums.Place) -> torch.Tensor:
    z = MAKE(family, numel, place)
    if family == "rounding":
        z[9::64] = z[3::64]
    return z


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (repeated_lane, "normal: place and successors, by lane"),
        (without_a_bit_of_the_probe, "z of places one bit"),
        (without_large_values, "normal: largest magnitude"),
        (repeated_rounding_bit, "rounding: pairs of bits in a group"),
    ],
)
def test_what_is_not_random_is_found(
    make: Make, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, make) == 1
    assert f"  failed: {kind}" in capsys.readouterr().out
