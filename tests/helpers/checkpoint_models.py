"""Tiny random models of many architectures, saved by transformers, and what the tests of checkpoints compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from same_bits import assert_same_tensors
from torch import nn

from distzo2.checkpoint.mapping import CheckpointMap, persistent_buffers
from distzo2.checkpoint.reading import SINGLE_FILE
from distzo2.checkpoint.tensor_files import TensorFile, bytes_of
from distzo2.checkpoint.writing import CheckpointWriter

T = transformers
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2}
OPT = {
    "vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", {**OPT, "word_embed_proj_dim": 32}),
    "opt_untied": ("OPTForCausalLM", "OPTConfig", {**OPT, "word_embed_proj_dim": 16, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**GQA, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**GQA, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "head_dim": 8}),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**SMALL, "embedding_size": 16}),
    "vit": ("ViTForImageClassification", "ViTConfig", {k: v for k, v in VISION.items() if k != "vocab_size"}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {
            **SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip


def make(name: str, directory: Path | None = None) -> nn.Module:
    """A random model, no two weights equal, saved by transformers if a directory is given."""
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(T, model_class)(getattr(T, config_class)(**options))
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for _, b in persistent_buffers(model))):
            if tensor.is_floating_point():
                tensor.normal_()
    if directory is not None:
        model.save_pretrained(directory)
    return model


def load(model_class: Any, directory: Path, **options: Any) -> nn.Module:
    return model_class.from_pretrained(directory, **options)


def assert_reads_as(checkpoint: CheckpointMap, expected: nn.Module) -> None:
    params = dict(expected.named_parameters())
    assert checkpoint.names == list(params)
    for name, param in params.items():
        out = torch.full(param.shape, torch.nan, dtype=param.dtype)
        checkpoint.read(name, out)
        assert torch.equal(out, param), name


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    assert_same_tensors(model.state_dict(), expected.state_dict())


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def write_all(checkpoint: CheckpointMap, source: nn.Module, out: Path, **options: Any) -> None:
    held = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    with CheckpointWriter(checkpoint, out, **options) as writer:
        for name in checkpoint.names:
            writer.write(name, held[name].detach())


def read_tensor(file: TensorFile, name: str) -> torch.Tensor:
    """A whole tensor of an opened file of weights."""
    entry = file.tensors[name]
    out = torch.empty(entry.shape, dtype=entry.dtype)
    file.read_into(bytes_of(out), entry.offset)
    return out


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(directory / SINGLE_FILE)), directory / SINGLE_FILE, metadata={"format": "pt"})


def edit_config(directory: Path, file: str = "config.json", **changes: Any) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
