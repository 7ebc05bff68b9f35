"""Every causal language model class of transformers, tiny: streamed as it is plain, to the bit, and through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from causal_zoo import NOT_BUILT, TYPES, build, logits_of, loss_of
from plain import flat_losses, plain_loop
from same_bits import assert_same, assert_same_tensors, same_bits

import distzo2

STEPS, OPTIONS = 2, {"eps": 1e-3, "seed": 11}


def steps_of(model: torch.nn.Module) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses and weights of a few streamed steps."""
    opt = distzo2.ZOSGD(model, lr=1e-3, **OPTIONS)
    losses = []
    for step in range(STEPS):
        opt.step(lambda step=step: loss_of(model, step))
        losses.append(flat_losses(opt))
    return losses, model.state_dict()


def check(model_type: str, directory: Path) -> None:
    """Forward and steps of a plain model, of the same one streamed, and of one that went through files."""
    plain = build(model_type)
    plain.save_pretrained(directory / "in")
    with torch.no_grad():
        expected = logits_of(plain)
    model = distzo2.offload(build(model_type), weights="host")
    with torch.no_grad():
        assert same_bits(logits_of(model), expected)
    closures = [[lambda step=step: loss_of(plain, step)] for step in range(STEPS)]
    losses = plain_loop(plain, closures, lr=lambda step: 1e-3, **OPTIONS)
    assert losses[0][0] != losses[0][1]
    assert_same(steps_of(model), (losses, plain.state_dict()))
    distzo2.runtime_of(model).close()

    model = distzo2.from_pretrained(directory / "in", weights="disk", directory=directory, attn_implementation="eager")
    model.config.use_cache = False
    with torch.no_grad():
        assert same_bits(logits_of(model), expected)
    assert_same(steps_of(model), (losses, plain.state_dict()))
    distzo2.save_pretrained(model, directory / "out")
    distzo2.runtime_of(model).close()
    again = type(plain).from_pretrained(directory / "out")
    assert_same_tensors(again.state_dict(), plain.state_dict())


FEW = (
    "opt", "gpt2", "bloom", "deepseek_v2", "deepseek_v3", "falcon_mamba", "gemma3n_text", "jamba", "mamba2", "mixtral",
    "qwen3_next", "reformer", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("model_type", FEW)
def test_some_causal_classes(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TYPES.keys() - {*FEW} - NOT_BUILT.keys()))
def test_all_causal_classes(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)
