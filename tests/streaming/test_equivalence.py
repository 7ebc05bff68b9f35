"""Streamed training gives the bits of a plain whole-model loop, wherever the weights live."""

from __future__ import annotations

import functools

import pytest
import torch
from plain import flat_losses, plain_loop
from same_bits import assert_same, same_bits
from zoo import ALL, BY_NAME, Case

import distzo2

MODES = ["device", "host", "disk"]
STEPS = 4


def train(
    case: Case,
    weights: str,
    directory,
    *,
    dtype=torch.float32,
    compute=None,
    micro_batches=1,
    trainable=lambda name: True,
    **options,
):
    model = case.build().to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(trainable(name))
    distzo2.offload(model, weights=weights, directory=directory, compute_dtype=compute)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=11, **options)
    losses = []
    for step in range(STEPS):
        closures = [case.closure(model, step * micro_batches + m, compute or dtype) for m in range(micro_batches)]
        opt.step(closures)
        losses.append(flat_losses(opt))
    state = model.state_dict()
    distzo2.runtime_of(model).close()
    return losses, state


@functools.cache
def plain(case: Case, *, dtype=torch.float32, compute=None, micro_batches=1, **options):
    model = case.build().to(dtype)
    closures = [
        [case.closure(model, step * micro_batches + m, compute or dtype) for m in range(micro_batches)]
        for step in range(STEPS)
    ]
    if hasattr(model, "config"):
        model.config.use_cache = False
    losses = plain_loop(model, closures, lr=lambda step: 1e-2, eps=1e-3, seed=11, compute=compute, **options)
    return losses, model.state_dict()


IN_16_BITS = [BY_NAME[name] for name in ("opt-tied", "llama", "mixtral", "conv")]


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, torch.float32) for c in ALL] + [(c, d) for c in IN_16_BITS for d in (torch.bfloat16, torch.float16)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_streamed_equals_plain_loop(case, dtype, weights, tmp_path):
    backend = "reference" if case.name in ("opt-tied", "conv") else None
    assert_same(train(case, weights, tmp_path, dtype=dtype), plain(case, dtype=dtype, backend=backend))


@pytest.mark.parametrize(
    ("name", "noise", "weights", "dtype"),
    [
        ("mixtral", "sign-r4", "disk", torch.bfloat16),  # experts in one parameter
        ("conv", "normal-r1", "host", torch.float32),
        ("opt-tied", "sign-r1", "device", torch.float16),
        ("llama", "normal-r4", "host", torch.float32),
    ],
)
def test_low_rank_noise(name, noise, weights, dtype, tmp_path):
    more = {"dtype": dtype, "noise": noise, "num_probes": 2}
    assert_same(train(BY_NAME[name], weights, tmp_path, **more), plain(BY_NAME[name], **more))


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize(
    ("case", "dtype", "compute"),
    [
        *((BY_NAME[name], torch.bfloat16, torch.float32) for name in ("opt-tied", "mixtral", "conv")),
        *((BY_NAME[name], torch.float16, torch.float32) for name in ("opt-tied", "mixtral")),
        *((BY_NAME[name], torch.float32, torch.bfloat16) for name in ("opt-tied", "mixtral")),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_is_stored_is_not_what_is_computed(case, dtype, compute, weights, tmp_path):
    options = {"dtype": dtype, "compute": compute, "num_probes": 2, "weight_decay": 0.1}
    found = train(case, weights, tmp_path, **options)
    assert_same(found, plain(case, **options))
    assert all(value.dtype == dtype for value in found[1].values() if value.is_floating_point())


@pytest.mark.parametrize("weights", MODES)
def test_probes_micro_batches_decay_and_rademacher(weights, tmp_path):
    case, options = BY_NAME["llama"], {"num_probes": 3, "weight_decay": 0.1, "noise": "rademacher"}
    streamed = train(case, weights, tmp_path, micro_batches=2, **options)
    assert_same(streamed, plain(case, micro_batches=2, **options))


@pytest.mark.parametrize("weights", MODES)
def test_forward_after_training_sees_every_update_and_edit(weights, tmp_path):
    case = BY_NAME["opt-tied"]
    model = distzo2.offload(case.build(), weights=weights, directory=tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3)
    for step in range(3):
        opt.step(case.closure(model, step))
        if step == 1:
            with distzo2.edit(model), torch.no_grad():
                model.lm_head.weight.mul_(2.0)
                doubled = model.lm_head.weight.clone()
            assert same_bits(model.state_dict()["lm_head.weight"], doubled)
        fresh = case.build()
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected = fresh(**case.batch(9)).loss
        assert same_bits(model(**case.batch(9)).loss, expected)
        assert same_bits(distzo2.evaluate(model, [lambda: model(**case.batch(9)).loss])[0], expected)


def in_attention(name: str) -> bool:
    return "self_attn" in name


@pytest.mark.parametrize("weights", MODES)
def test_frozen_parameters_are_read_and_never_changed(weights, tmp_path):
    case = BY_NAME["llama"]
    losses, state = train(case, weights, tmp_path, trainable=in_attention)
    assert_same((losses, state), plain(case, trainable=in_attention))
    for name, value in case.build().named_parameters():
        assert same_bits(state[name], value.detach()) is not in_attention(name), name
