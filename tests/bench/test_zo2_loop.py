"""The baseline that stands for ZO2 does what MeZO's loop does: same losses, same weights.

On a GPU, where products in another place may be summed in another order, nearly so: a block that is used before it has
come, or is written over, is off by lr * g * z, some 1e-2.
"""

from __future__ import annotations

import pytest
import torch
from baselines.zo2_loop import ZO2Loop
from bench_step import loss_closure, plain_step
from transformers import OPTConfig, OPTForCausalLM

EPS, LR, SEED = 1e-3, 1e-2, 7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("buffers", [2, 3])
def test_losses_and_weights_are_those_of_the_plain_loop(device: str, buffers: int) -> None:
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=96, hidden_size=32, num_hidden_layers=5, ffn_dim=64, num_attention_heads=4,
                       word_embed_proj_dim=32, max_position_embeddings=32)  # fmt: skip
    plain = OPTForCausalLM(config).eval().requires_grad_(False).to(device)
    ids = torch.randint(4, 96, (2, 16), device=device)
    other = OPTForCausalLM(config)
    other.load_state_dict(plain.state_dict())
    loop = ZO2Loop(other, device, lr=LR, eps=EPS, seed=SEED, buffers=buffers)
    closure, seen = loss_closure(plain, ids), []

    def watched() -> torch.Tensor:
        seen.append(closure())
        return seen[-1]

    for step in range(4):
        plain_step(plain, watched, EPS, LR, SEED + step)
        losses = loop.step(ids)
        assert losses == pytest.approx([each.item() for each in seen[-2:]], rel=0 if device == "cpu" else 1e-4), step
        assert losses[0] != losses[1]
    loop.flush()
    weights = dict(loop.named_weights())
    assert weights.keys() == dict(plain.named_parameters()).keys()
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(weights[name].to(device), expected, rtol=0, atol=0 if device == "cpu" else 1e-3)
    loop.close()
