"""Every causal language model class of transformers, tiny: streamed as it is plain, to the bit, and through files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from causal_zoo import GRADIENT_BITS, NOT_BUILT, TYPES, UNITS, build, logits_of, loss_of
from plain import flat_losses, plain_loop
from same_bits import assert_same, assert_same_tensors, same_bits

import distzo2

STEPS = 2


def steps_of(model: torch.nn.Module) -> tuple[tuple[list[list[float]], dict[str, torch.Tensor]], set[str]]:
    """Losses and weights of a few streamed steps, and the parameters of units that no lane entered."""
    opt = distzo2.ZOSGD(model, lr=1e-3, eps=1e-3, seed=11)
    losses = []
    for step in range(STEPS):
        opt.step(lambda step=step: loss_of(model, step))
        losses.append(flat_losses(opt))
    names = [name for name, _ in model.named_parameters()]
    unused = {name for first, last in opt.last.unused for name in names[first : last + 1]}
    return (losses, model.state_dict()), unused


def called(model: torch.nn.Module) -> set[str]:
    """Parameters of the modules whose forward is called."""
    used: set[str] = set()
    handles = []
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" for name in module._parameters}
        handles.append(module.register_forward_pre_hook(lambda *_, own=own: used.update(own)))
    with torch.no_grad():
        loss_of(model, 0)
    for handle in handles:
        handle.remove()
    return used


def plain_steps(
    model: torch.nn.Module, trained: set[str]
) -> tuple[torch.Tensor, list[list[float]], dict[str, torch.Tensor]]:
    """Logits before, and losses and weights after, of a plain model whose parameters `trained` are trained."""
    with torch.no_grad():
        logits = logits_of(model.requires_grad_(False))
    closures = [[lambda step=step: loss_of(model, step)] for step in range(STEPS)]
    losses = plain_loop(
        model, closures, lr=lambda step: 1e-3, trainable=lambda name: name in trained, eps=1e-3, seed=11
    )
    assert losses[0][0] != losses[0][1]
    return logits, losses, model.state_dict()


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def check(model_type: str, directory: Path) -> None:
    """Forward and steps of a plain model, of the same one streamed, and of one that went through files."""
    plain, units = build(model_type), UNITS.get(model_type)
    plain.save_pretrained(directory / "in")
    with torch.no_grad():
        before = logits_of(plain)
    names = trained(plain)
    used = called(plain)
    with torch.no_grad():
        expected = logits_of(plain.requires_grad_(False))
    assert model_type in GRADIENT_BITS or same_bits(before, expected)
    if units:  # without them: a named error, whose hint helps
        model = distzo2.offload(build(model_type), weights="host")
        with torch.no_grad(), pytest.raises(distzo2.DistZO2Error, match=re.escape(f'units=["{units[0]}"]')):
            logits_of(model)
        distzo2.runtime_of(model).close()
    model = distzo2.offload(build(model_type), weights="host", units=units)
    with torch.no_grad():
        assert same_bits(logits_of(model), expected)
    streamed, unused = steps_of(model)
    assert not unused & used  # the towers that a text does not reach
    _, *steps = plain_steps(plain, names - unused)
    assert_same(streamed, steps)
    distzo2.runtime_of(model).close()

    options = {"attn_implementation": "eager", "units": units}
    model = distzo2.from_pretrained(directory / "in", weights="disk", directory=directory, **options)
    model.config.use_cache = False
    loaded = type(plain).from_pretrained(directory / "in", attn_implementation="eager")
    with torch.no_grad():
        assert same_bits(logits_of(model), expected)
    streamed, unused = steps_of(model)
    assert not unused & used
    if trained(loaded) != names:  # transformers does not keep what a class freezes
        loaded.config.use_cache = False
        _, *steps = plain_steps(loaded, trained(loaded) - unused)
    assert_same(streamed, steps)
    distzo2.save_pretrained(model, directory / "out")
    distzo2.runtime_of(model).close()
    assert_same_tensors(type(plain).from_pretrained(directory / "out").state_dict(), steps[1])


# Classes whose bits depend on where in memory their parameters lie, within a rounding of float32.
ALIGNED_BITS = {"inkling2_text"}
FEW = ("bloom", "deepseek_v3", "gemma3n_text", "jamba", "mamba2", "qwen3_next", "reformer", "zamba2")


@pytest.mark.parametrize("model_type", FEW)
def test_some_causal_classes(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TYPES.keys() - {*FEW} - NOT_BUILT.keys()))
def test_all_causal_classes(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


def check_computed(model_type: str, directory: Path) -> None:
    """Stored in bfloat16 and computed in float32: the bits of the plain model after `.float()`, in files as stored."""
    options = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    made = build(model_type)
    made.save_pretrained(directory / "in")
    plain = type(made).from_pretrained(directory / "in", **options)
    stored = plain.state_dict()
    plain.float().requires_grad_(False).config.use_cache = False
    more = {"units": UNITS.get(model_type), "compute_dtype": torch.float32}
    model = distzo2.from_pretrained(directory / "in", weights="host", **options, **more)
    model.config.use_cache = False
    with torch.no_grad():
        found, expected = logits_of(model), logits_of(plain)
    bound = 1e-6 if model_type in ALIGNED_BITS else 0
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=bound, equal_nan=True)
    assert_same_tensors(model.state_dict(), stored)
    distzo2.save_pretrained(model, directory / "out")
    assert_same_tensors(type(plain).from_pretrained(directory / "out", **options).state_dict(), stored)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(t, marks=[] if t in ("opt", "gpt2") else [pytest.mark.slow])
        for t in sorted(TYPES.keys() - NOT_BUILT.keys())
    ],
)
def test_causal_classes_that_compute_in_another_dtype(model_type: str, tmp_path: Path) -> None:
    check_computed(model_type, tmp_path)
