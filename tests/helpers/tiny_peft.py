"""Tiny models with adapters of peft, for the tests of several rooms."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
import transformers as T

CAUSAL = {"task_type": "CAUSAL_LM"}
IDS = torch.arange(24).reshape(2, 12)
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "lora_embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], **CAUSAL),
    "lora_experts": peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS, **CAUSAL),
    "lora_biases": peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all", **CAUSAL),
    "lora_head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], **CAUSAL),
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, **CAUSAL),
    "ia3": peft.IA3Config(**CAUSAL),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"], **CAUSAL),
    "lokr": peft.LoKrConfig(r=2, target_modules=["q_proj"], **CAUSAL),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], **CAUSAL),
    "hra": peft.HRAConfig(r=2, target_modules=["q_proj"], **CAUSAL),
    "miss": peft.MissConfig(r=4, target_modules=["q_proj"], **CAUSAL),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
}
# Of each the base in 16 bits, beside which an adapter is float32; and of two the base as the adapter.
WITH_DTYPE = [(name, torch.bfloat16) for name in CONFIGS] + [("lora", torch.float32), ("lora_head", torch.float32)]


def base_for(name: str) -> Any:
    """A tiny model for one of `CONFIGS`, with the same weights each time."""
    torch.manual_seed(0)
    if name == "lora_experts":
        config = T.MixtralConfig(intermediate_size=48, num_key_value_heads=2, num_local_experts=4, **SMALL)
        return T.MixtralForCausalLM(config).eval()
    if name == "lora_biases":
        return T.OPTForCausalLM(T.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SMALL)).eval()
    untied = T.LlamaConfig(intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=False, **SMALL)
    return T.LlamaForCausalLM(untied).eval()


def adapted(name: str) -> Any:
    """A `peft.PeftModel` of one of `CONFIGS`, with the same weights each time, none of the adapter's 0."""
    base = base_for(name)
    model = peft.get_peft_model(base, copy.deepcopy(CONFIGS[name])).eval()
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data += torch.randn_like(p) / 30
    return model


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def loss_beside_base(model: Any) -> torch.Tensor:
    """As a preference loss has it: the model with its adapter, and without."""
    with model.disable_adapter():
        base = loss_of(model)
    return 1 + 3 * (loss_of(model) - base)
