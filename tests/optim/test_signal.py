"""How much of a difference of losses is the perturbation, and that to look at it changes nothing."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, offloaded
from same_bits import assert_same_tensors

import distzo2
from distzo2.optim.signal import REFERENCE, TF32, _signal, advice, signal_of
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
        ([0.0, 1.0, -1.0, 2.0, -2.0], (1, 1, 0, 0, 0)),
        ([0.0, -2.0, 2.0, -4.0, 4.0], (-1, -2, 3, math.sqrt(45), 0)),
        ([0.0, 3.0, 1.0, 4.0, 0.0], (1, 1, 0, 0, 4 / 3)),
        ([1.0, 1.0, 1.0, 1.0, 1.0], (math.nan, 0, 1, math.sqrt(5), math.nan)),
    ],
)
def test_figures(found: list[float], expected: tuple[float, ...]):
    s = _signal(HALF, 1e-3, np.array(found), 0.0, np.array([2.0, 4.0]))
    figures = (s.correlation, s.slope, s.relative_error, s.floor, s.curvature)
    assert figures == pytest.approx(expected, nan_ok=True)
    assert math.isnan(s.correlation) == ("are 0, or not finite;" in (advice(s) or ""))


@pytest.mark.parametrize(
    ("correlation", "probes", "expected"),
    [
        (0.999, 4, "enough"), (0.96, 4, None), (0.96, 8, None), (0.99, 8, "enough"), (0.5, 4, "little"),
        (0.7, 4, None), (0.7, 8, "little"), (1.0, 2, "enough"), (0.999, 2, None), (math.nan, 8, "little"),
    ],
)  # fmt: skip
def test_what_so_few_probes_tell_for_sure(correlation: float, probes: int, expected: str | None):
    """The interval of nine tenths: of 4 probes with 0.96 in truth, one in twenty seem enough, and none seem little."""
    reference = np.eye(probes)[0]
    found = correlation * reference + math.sqrt(1 - correlation**2) * np.eye(probes)[1]
    s = _signal(HALF, 1e-3, np.append(0.0, np.stack([found, 0 * found], 1)), 0.0, reference)
    assert (s.is_enough, s.is_little) == (expected == "enough", expected == "little")
    assert (advice(s) is not None) == s.is_little
    if correlation == correlation:
        assert s.least <= s.correlation <= s.most and s.correlation == pytest.approx(correlation)


def test_no_signal_in_any_dtype_asks_for_a_larger_eps():
    s = _signal(HALF, 1e-3, np.zeros(5), 0.0, np.zeros(2))
    assert s.size == 0 and "in float32 too; try a larger --eps or --batch-size" in advice(s)


@pytest.mark.parametrize("stop", [4, 8])
def test_more_probes_are_the_same_ones_and_others(stop: int):
    model = optimizer()[0]
    more = {"dtypes": [HALF], "eps": [1e-3], "noise": "rademacher"}
    asked = []
    found = signal_of(
        model, [lambda: model(IDS)], probes=(4, 8), is_open=lambda found: asked.append(found) or stop == 8, **more
    )
    whole = signal_of(model, [lambda: model(IDS)], probes=8, **more)
    assert len(asked) == 1 and found[0].differences.tolist() == whole[0].differences[:stop].tolist()
    if stop == 8:
        same = {"seconds": 0, "cost": 0, "differences": None}
        assert replace(found[0], **same) == replace(whole[0], **same)


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_tf32_is_for_its_own_forwards_alone(before: str, request: pytest.FixtureRequest):
    """Only a GPU has such products, so the flag is all that is to be seen here."""
    matmul = torch.backends.cuda.matmul
    request.addfinalizer(functools.partial(setattr, matmul, "fp32_precision", matmul.fp32_precision))
    matmul.fp32_precision = before
    model, seen = optimizer()[0], []

    def closure():
        seen.append((model.head.weight.dtype, matmul.fp32_precision))
        return model(IDS)

    signal_of(model, [closure], dtypes=[HALF, TF32], eps=[1e-3], probes=2)
    exact = "none" if before == "none" else "ieee"
    assert list(dict.fromkeys(seen)) == [(HALF, exact), (torch.float32, TF32), (torch.float32, exact)]
    assert matmul.fp32_precision == before


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


@pytest.mark.parametrize(
    "given", [{"probes": 1}, {"eps": 0.0}, {"eps": []}, {"dtypes": [torch.float64]}, {"dtypes": [TF32]}]
)
def test_bad_input(given: dict):
    model, opt = optimizer()
    with pytest.raises(distzo2.DistZO2Error, match="expected"):
        opt.signal(lambda: model(IDS), **given)


def test_an_optimizer_follows_a_look_that_failed():
    """Its traceback keeps what looked, which is no optimizer with a journal."""
    model = offloaded(Blocks(width=64).to(HALF))
    with pytest.raises(ZeroDivisionError) as caught:
        signal_of(model, [lambda: model(IDS) / (1 // 0)], eps=[1e-3], dtypes=[HALF], probes=2)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    assert caught.value.__traceback__ is not None and opt.step(lambda: model(IDS)).isfinite()
