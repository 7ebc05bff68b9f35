"""Adapters that cannot be trained by forwards are refused by name, and so is a peft that is missing or too old."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import peft
import pytest
import torch
from tiny_peft import CAUSAL, CONFIGS, adapted, base_for

import distzo2
from distzo2 import version
from distzo2.errors import DistZO2Error
from distzo2.peft.library import WORKING


def lora(**fields) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj"], **fields, **CAUSAL)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.AdaLoraConfig(total_step=9, **CAUSAL), "type ADALORA are not supported: it cuts ranks by gradients"),
        (peft.PromptEncoderConfig(num_virtual_tokens=3, **CAUSAL), "type P_TUNING are not supported: peft saves what"),
        (peft.VeraConfig(**CAUSAL), f"type VERA are not supported; these are: {', '.join(WORKING)}"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, **CAUSAL), "prefix_projection: peft"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa' starts from the base's weights or gradients"),
        (lora(use_dora=True), "use_dora starts from the base's weights or gradients"),
        (lora(layer_replication=[(0, 2)]), "LoRA with layer_replication is not supported: it makes another model"),
        (lora(modules_to_save=["lm_head"], ensure_weight_tying=True), "LoRA with ensure_weight_tying is not supported"),
        (lora(trainable_token_indices=[1]), "LoRA with trainable_token_indices is not supported: its forward reads"),
    ],
)
def test_what_cannot_be_trained(config, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DistZO2Error) as found:
        distzo2.adapter(config, tmp_path)
    assert reason in str(found.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]), "type ADALORA are not supported: it cuts ranks"),
        (peft.PolyConfig(target_modules=["q_proj"]), "type POLY are not supported: it needs task ids"),
        (peft.TrainableTokensConfig(token_indices=[1]), "type TRAINABLE_TOKENS are not supported: its forward reads"),
        (lora(trainable_token_indices=[1]), "LoRA with trainable_token_indices is not supported: its forward reads"),
    ],
)
def test_no_way_to_hand_it_over_is_left(config, reason: str) -> None:
    around = peft.get_peft_model(base_for("lora"), copy.deepcopy(config))
    inside = base_for("lora")
    inside.add_adapter(config)  # of transformers
    edited = distzo2.offload(base_for("lora"))
    for model in (around, torch.nn.Sequential(inside)):
        with pytest.raises(DistZO2Error, match=reason):
            distzo2.offload(model)
        assert not hasattr(model, "_distzo2_runtime")
    with pytest.raises(DistZO2Error, match=reason), distzo2.edit(edited):
        peft.get_peft_model(edited, config)


def test_an_adapter_that_changed_its_base(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["lora"])
    config.init_lora_weights = "pissa"
    config.save_pretrained(tmp_path)
    with pytest.raises(DistZO2Error, match="has changed the base's weights: save it with"):
        distzo2.adapter(tmp_path)


def test_peft_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DistZO2Error, match="the package peft, which an adapter needs: ModuleNotFoundError"):
        distzo2.adapter(tmp_path)
    monkeypatch.setattr(version, "version", lambda name: "0.17.1")
    with pytest.raises(DistZO2Error, match=r"peft 0\.17\.1 is too old, 0\.18 or later is needed: pip install"):
        distzo2.adapter(tmp_path)
    distzo2.offload(base_for("lora"))
