"""How much of a difference of losses is the perturbation, and that to look at it changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, offloaded
from same_bits import assert_same_tensors

import distzo2
from distzo2.optim.signal import REFERENCE, _signal, advice
from distzo2.streaming.offload import runtime_of

HALF = torch.bfloat16


def optimizer(compute: torch.dtype | None = None, **options):
    model = offloaded(Blocks(width=64).to(HALF), compute_dtype=compute)
    return model, distzo2.ZOSGD(model, lr=1e-2, noise="rademacher", **options)


def test_a_small_eps_is_signal_in_float32_and_rounding_in_16_bits():
    model, opt = optimizer()
    found = {(s.dtype, s.eps): s for s in opt.signal(lambda: model(IDS), eps=[1e-2, 1e-3, 1e-4, 1e-5])}
    full, half = ({eps: s for (dtype, eps), s in found.items() if dtype == d} for d in (torch.float32, HALF))
    assert full[1e-4].correlation > 0.99 and full[1e-4].slope == pytest.approx(1, abs=0.1)
    assert advice(full[1e-4]) is None and advice(half[1e-2]) is None
    assert half[1e-2].correlation > 0.97 and half[1e-5].correlation < 0.8
    assert "--compute-dtype float32" in advice(half[1e-5])
    assert half[1e-4].floor > 100 * full[1e-4].floor > 0
    assert full[1e-2].curvature > 10 * full[1e-4].curvature
    assert [s.eps for s in found.values()] == [1e-2, 1e-3, 1e-4, 1e-5] * 2


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1.0, -1.0, 2.0, -2.0, 0.0], (1, 1, 0, 0, 0)),
        ([-2.0, 2.0, -4.0, 4.0, 0.0], (-1, -2, 3, math.sqrt(45), 0)),
        ([3.0, 1.0, 4.0, 0.0, 0.0], (1, 1, 0, 0, 4 / 3)),
        ([1.0, 1.0, 1.0, 1.0, 1.0], (math.nan, 0, 1, math.sqrt(5), math.nan)),
    ],
)
def test_figures(found: list[float], expected: tuple[float, ...]):
    s = _signal(HALF, 1e-3, np.array(found), 0.0, np.array([2.0, 4.0]))
    figures = (s.correlation, s.slope, s.relative_error, s.floor, s.curvature)
    assert figures == pytest.approx(expected, nan_ok=True)
    assert math.isnan(s.correlation) == ("no size" in (advice(s) or ""))


@pytest.mark.parametrize("compute", [None, torch.float32])
def test_to_look_changes_nothing(compute: torch.dtype | None):
    """Neither weights, nor what modules compute in, nor random states, nor the next step."""
    results = []
    for looks in (True, False):
        torch.manual_seed(3)
        model, opt = optimizer(compute, num_probes=2)
        opt.step(lambda model=model: model(IDS))
        before, state = model.state_dict(), torch.get_rng_state()
        if looks:
            opt.signal([lambda model=model: model(IDS)] * 2, eps=1e-3, probes=3, dtypes=[HALF, torch.float16])
            assert torch.equal(torch.get_rng_state(), state)
            assert_same_tensors(model.state_dict(), before)
            assert runtime_of(model).compute_dtype == compute
        opt.step(lambda model=model: model(IDS))
        results.append((opt.last, model.state_dict()))
    assert results[0][0].losses == results[1][0].losses and results[0][0].coefs == results[1][0].coefs
    assert_same_tensors(results[0][1], results[1][1])


def test_a_failing_forward_leaves_the_compute_dtype():
    model, opt = optimizer()

    def closure():
        if model.head.weight.dtype == REFERENCE:
            raise ValueError("no float32 here")
        return model(IDS)

    with pytest.raises(ValueError, match="no float32"):
        opt.signal(closure)
    assert runtime_of(model).compute_dtype is None
    opt.step(closure)


@pytest.mark.parametrize("given", [{"probes": 1}, {"eps": 0.0}, {"eps": []}, {"dtypes": [torch.float64]}])
def test_bad_input(given: dict):
    model, opt = optimizer()
    with pytest.raises(distzo2.DistZO2Error, match="expected"):
        opt.signal(lambda: model(IDS), **given)
