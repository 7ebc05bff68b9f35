"""The live model, its saved checkpoint and a replay of its journal give the same loss bits."""

from __future__ import annotations

import pytest
import torch
from same_bits import same_bits
from zoo import BY_NAME

import distzo2
from distzo2.checkpoint.replay import replay


def loss_of(path, batch, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(**batch, use_cache=False).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "weights"), [("opt-tied", "disk"), ("mixtral", "host"), ("gpt2", "disk")])
def test_model_checkpoint_and_replay_agree(name, weights, dtype, tmp_path):
    case = BY_NAME[name]
    case.build().to(dtype).save_pretrained(tmp_path / "base")
    model = distzo2.from_pretrained(tmp_path / "base", weights=weights, directory=tmp_path, attn_implementation="eager")
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=5, num_probes=2, weight_decay=0.01, journal=tmp_path / "journal")
    for step in range(5):
        opt.step(case.closure(model, step))
    opt.close()
    batch = case.batch(77)
    with torch.no_grad():
        live = model(**batch, use_cache=False).loss
    distzo2.save_pretrained(model, tmp_path / "saved")
    replay(tmp_path / "base", tmp_path / "journal", tmp_path / "replayed", progress=False)
    distzo2.runtime_of(model).close()
    assert not same_bits(live, loss_of(tmp_path / "base", batch, dtype))
    assert same_bits(live, loss_of(tmp_path / "saved", batch, dtype))
    assert same_bits(live, loss_of(tmp_path / "replayed", batch, dtype))
