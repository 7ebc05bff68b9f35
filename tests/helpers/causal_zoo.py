"""Every causal language model class of transformers, with its own default configuration made small."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 96
TYPES = {config_class.model_type: config_class for config_class in MODEL_FOR_CAUSAL_LM_MAPPING}
_LAYERS = r"(num_hidden|n|num|encoder|decoder|num_encoder|num_decoder)_(layers?|blocks)|n_layer|depth|num_global_layers"
_RULES: list[tuple[str, Any]] = [  # names of fields, and what a number becomes; the first rule that fits counts
    (r".*experts_per_tok(en)?|moe_top_?k|.*top_k_experts|moe_k|n_groups?|num_expert_group", lambda v, f: min(v, 2)),
    (r".*vocab_size(_per_layer_input)?|.*_vocab", lambda v, f: min(v, VOCAB)),
    (r".*token_(id|index)|.*_(id|ids)|.*_tokens?", lambda v, f: v if v < VOCAB else 4 + v % (VOCAB - 4)),
    (_LAYERS, lambda v, f: min(v, 2)),
    (r"first_k_dense_replace|max_window_layers|num_dense_layers|topk_group|moe_layer_.*", lambda v, f: min(v, 1)),
    (r"(n|num|moe_num|num_local|n_routed)_?(local_|routed_)?experts|zero_expert_num", lambda v, f: min(v, 4)),
    (r".*(position_embeddings|positions|seq_len|model_max_length|n_ctx|context_length)", lambda v, f: min(v, 128)),
    (r"(mamba_)?chunk_size", lambda v, f: min(v, 8)),
    (r".*heads|n_head|num_query_groups", lambda v, f: v // 4 if v % 4 == 0 else v),
    (r".*head_?dim|kv_channels|d_kv|d_head|dim_head|rotary_dim|.*attention_head_size|mamba_d_head",
     lambda v, f: v if v < f else v // f),
    (r".*intermediate_size(_mlp)?", lambda v, f: v if v < 4 * f else -(-v // (16 * f)) * 4),
    (r".*(hidden_size|d_model|n_embd|_rank|embed_dim|_input_size|hidden_size|embedding_dim|emb_dim|headdim|d_ssm)"
     r"|.*ffn_(hidden_size|dim)|d_ff|dff|dim_ff|d_inner|lru_width|mlp_dim|dim_model_base|input_size|hidden_size_.*"
     r"|.*(embedding_size|proj_dim|feed_forward_size)|.*_(output|input|in|out)_dim",
     lambda v, f: v if v < 4 * f else v // (4 * f)),
]  # fmt: skip


def _shrunk(fields: dict[str, Any], factor: int) -> dict[str, Any]:
    number = next((fields[key] for key in fields if re.fullmatch(_LAYERS, key)), None)
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and number and number > 2 and len(v) == number}
    kept = {str([v[i] for v in lists.values()]): i for i in reversed(range(number))} if lists else {}
    chosen = sorted({*kept.values(), 0, 1})[:4] if lists else []
    result = {}
    for key, value in fields.items():
        if key in ("id2label", "label2id", "transformers_version", "architectures", "dtype"):
            continue
        if key == "per_layer_config" and value:  # by the numbers of layers, which change
            layers = {int(number): part for number, part in value.items()}
            value = {str(new): _shrunk(layers[old], factor) for new, old in enumerate(chosen) if old in layers}
        elif isinstance(value, dict):
            value = _shrunk(value, factor)
        elif key in lists:
            value = [value[i] for i in chosen]
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            for pattern, rule in _RULES:
                if re.fullmatch(pattern, key):
                    value = len(chosen) if chosen and re.fullmatch(_LAYERS, key) else rule(value, factor)
                    break
        result[key] = value
    return result


def config_of(model_type: str) -> Any:
    """The default configuration of a type, with few layers and experts, narrow, and with a small vocabulary."""
    config_class = TYPES[model_type]
    options = OVERRIDES.get(model_type, {})
    fields = config_class().to_dict()
    fields = _merge(_shrunk(fields, options.get("factor", 16)), {k: v for k, v in options.items() if k != "factor"})
    return config_class.from_dict(fields)


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        fields[key] = _merge(fields.get(key) or {}, value) if isinstance(value, dict) else value
    return fields


_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_SHARED_KV = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [64] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.95, 0.0] * 2,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Classes that use a parameter outside the module that owns it, with the units that the error then asks for.
UNITS = {
    "gemma4": ["model"],
    "prophetnet": ["prophetnet.decoder"],
}
# Classes whose plain bits depend on whether their parameters require a gradient: here they never do.
GRADIENT_BITS = {"falcon_mamba"}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# Classes that this file does not build, and why.
NOT_BUILT = {
    "gemma3n": "its vision tower needs timm, which is no dependency; gemma3n_text is built",
    "gemma4_assistant": "a draft model that reads another model's hidden states and caches, not token ids",
    "gemma4_unified_assistant": "as gemma4_assistant",
}
# What a default lacks or what the rules do not see; "factor" is by how much it is made narrower (16).
OVERRIDES: dict[str, dict[str, Any]] = {
    "arcee": {"factor": 8},
    "big_bird": {"attention_type": "original_full"},  # what it changes to by itself where a text is short
    "bloom": {"factor": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "dots1": {
        "factor": 9, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
    "falcon_h1": {"mamba_n_heads": 16, "mamba_d_ssm": 128, "mamba_d_head": 8},
    "gemma3n_text": _SHARED_KV,
    # Tied, it uses the embedding outside of both modules that share it, which is refused by name.
    "gemma4": {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
    "gpt_neox_japanese": {"factor": 8},
    "gpt_oss": {"hidden_size": 48, "intermediate_size": 48},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"factor": 8, "num_hidden_layers": 2, "full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 12},
    "phi4_multimodal": {"vision_config": {"num_attention_heads": 2}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "is_decoder": True, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8,
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [4, 12], "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "hash_seed": 0,
        "attn_layers": ["local", "lsh"], "num_buckets": 2,
    },
    "rwkv": {"rescale_every": 0},  # otherwise a forward divides weights in place, which is refused by name
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": _HYBRID, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3]},
}  # fmt: skip


def build(model_type: str) -> nn.Module:
    """The same bits at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = config_of(model_type)
        make = AutoModelForCausalLM.from_config
        if hasattr(config, "decoder"):  # the auto class hands on the whole, the model takes the decoder's
            config, make = config.decoder, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config
        model = make(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.1)
    model.config.use_cache = False
    return model


def logits_of(model: nn.Module, step: int = 0) -> torch.Tensor:
    """The logits of a small batch of token ids."""
    rows = 2 * getattr(model.config, "num_codebooks", 1)
    ids = torch.randint(5, VOCAB - 1, (rows, 9), generator=torch.Generator().manual_seed(step))
    output = model(input_ids=ids)
    return output.logits if hasattr(output, "logits") else output[0]


def loss_of(model: nn.Module, step: int = 0) -> torch.Tensor:
    logits = logits_of(model, step).float()
    return nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % VOCAB)
