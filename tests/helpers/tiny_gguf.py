"""Tiny GGUF files of many architectures, written as llama.cpp's converter would, and random blocks of each type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoint_models import T
from gguf import GGMLQuantizationType as Type

BASE = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MOE = {**BASE, "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2}
# By `general.architecture`, or a name of our own: the class in transformers and its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**BASE, "tie_word_embeddings": True}),
    "llama wide heads": ("Llama", {**BASE, "head_dim": 96, "tie_word_embeddings": False, "rope_theta": 1e6}),
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 4}),
    "qwen2": ("Qwen2", {**BASE, "rope_theta": 1e6}),
    "qwen2moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 512}),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 128, "tie_word_embeddings": True}),
    "qwen3moe": ("Qwen3Moe", {**MOE, "head_dim": 128, "norm_topk_prob": True}),
    "gemma2": ("Gemma2", {**BASE, "head_dim": 64, "query_pre_attn_scalar": 64, "final_logit_softcapping": 20.0}),
    "gemma3": ("Gemma3", {**BASE, "head_dim": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": 7}),
}
# Where the 16-bit scales and minima of a block are.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q6_K": [208],
}  # fmt: skip
ODD = np.array([0.0, -0.0, 2**-24, -(2**-24), 2**-14, 65504, -65504, 1, -1], np.float16)


def random_blocks(kind: str, rows: int, cols: int, seed: int = 0, scale: float | None = None) -> np.ndarray:
    """uint8 [rows, row_bytes]: any codes; scales of every finite value, negative, zero and subnormal ones too, or such
    that weights are up to about `scale`."""
    rng = np.random.default_rng(seed)
    block, num_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    data = rng.integers(0, 256, (rows * cols // block, num_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        values = rng.integers(0, 1 << 16, len(data), dtype=np.uint16).view(np.float16)
        values = np.where(np.isfinite(values), values, np.float16(0.5))
        values[: len(ODD)] = ODD[: len(values)]
        if scale is not None:  # codes are up to 16, 128, or 63 * 16 with those of scales
            top = {"Q8_0": 128, "Q4_K": 1008, "Q5_K": 2016, "Q6_K": 4096}.get(kind, 16)
            values = (rng.uniform(-1, 1, len(data)) * scale / top).astype(np.float16)
        data[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def make_model(name: str, **more: Any) -> torch.nn.Module:
    """A model with seeded weights in float32. Those of norms are multiples of 2^-10, so that 1 can be added and taken
    away again."""
    kind, values = MODELS[name]
    config = getattr(T, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")(**values | more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(T, f"{kind}ForCausalLM")(config).float().eval()
        for key, param in model.named_parameters():
            with torch.no_grad():
                if key.endswith("norm.weight"):
                    param.copy_(torch.randint(-512, 2048, param.shape) / 1024)
                else:
                    param.add_(torch.randn_like(param) * 0.05)
    return model


def write(
    path: Path, name: str, model: torch.nn.Module, kind: str = "F32", *, metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None, tokenizer: bool = True, quantized: bool = False,
    **writer_options: Any,
) -> Path:  # fmt: skip
    """A GGUF file of a model.

    Args:
        kind: of matrices: F32, F16 and BF16 hold the model's values, any other random blocks, or with `quantized`
            blocks of some 0.05, as the model's weights are.
        metadata: values to put there, after the architecture's name if they begin with a dot; None leaves one out.
        tensors: to put there too; None leaves one out.
    """
    config = model.config
    arch = {"mixtral": "llama", "llama wide heads": "llama"}.get(name, name)
    values = hyperparameters(arch, config) | ({"tokenizer.ggml.tokens": TOKENS, **SPM} if tokenizer else {})
    writer = gguf.GGUFWriter(path, arch, **writer_options)
    for key, value in (values | {f"{arch}{k}" if k[0] == "." else k: v for k, v in (metadata or {}).items()}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    changed = tensors or {}
    number = next(number for number, own in gguf.MODEL_ARCH_NAMES.items() if own == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for i, (key, param) in enumerate(model.named_parameters()):
        for to, value in converted(arch, key, param.detach(), config, names).items():
            if to in changed:
                continue
            if value.dim() == 1 or "ffn_gate_inp" in to or kind == "F32":
                writer.add_tensor(to, value.numpy())
            elif kind in ("F16", "BF16"):
                data = value.to(torch.float16 if kind == "F16" else torch.bfloat16)
                data = data.numpy() if kind == "F16" else data.view(torch.uint8).numpy()
                writer.add_tensor(to, data, raw_dtype=Type[kind])
            else:
                scale = 0.05 if quantized else None
                blocks = random_blocks(kind, value.shape[:-1].numel(), value.shape[-1], 1000 + i + len(to), scale)
                writer.add_tensor(to, blocks.reshape(*value.shape[:-1], -1), raw_dtype=Type[kind])
    for to, value in changed.items():
        if value is not None:
            writer.add_tensor(to, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hyperparameters(arch: str, config: Any) -> dict[str, Any]:
    def own(name: str) -> Any:
        return getattr(config, name, None)

    head_dim = own("head_dim") or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "feed_forward_length": own("intermediate_size"),
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": float(rope["rope_theta"]),
        "attention.key_length": head_dim, "attention.value_length": head_dim,
        "expert_count": own("num_experts") or own("num_local_experts"), "expert_used_count": own("num_experts_per_tok"),
        "expert_feed_forward_length": own("moe_intermediate_size"),
        "expert_shared_feed_forward_length": own("shared_expert_intermediate_size"),
        "attn_logit_softcapping": own("attn_logit_softcapping"),
        "final_logit_softcapping": own("final_logit_softcapping"),
        "attention.sliding_window": own("sliding_window") if arch.startswith("gemma") else None,
        "rope.dimension_count": head_dim if arch == "llama" else None,
    }  # fmt: skip
    return {f"{arch}.{key}": value for key, value in values.items() if value is not None}


def converted(
    arch: str, key: str, value: torch.Tensor, config: Any, names: gguf.TensorNameMap
) -> dict[str, torch.Tensor]:
    """The tensors that a parameter becomes."""
    base, leaf = re.fullmatch(r"(.*?)((?:\.weight|\.bias)?)", key).groups()
    if base.endswith("gate_up_proj"):
        to = names.get_name(base.replace("gate_up", "down"))
        gate, up = value.chunk(2, dim=1)
        parts = {"gate": gate.contiguous(), "up": up.contiguous()}
        return {to.replace("down", way) + ".weight": part for way, part in parts.items()}
    to = names.get_name(base) + (leaf or ".weight")
    if arch == "llama" and (".attn_q." in to or ".attn_k." in to):
        heads = config.num_attention_heads if ".attn_q." in to else config.num_key_value_heads
        value = value.view(heads, 2, value.shape[0] // heads // 2, -1).transpose(1, 2).reshape(value.shape)
    if arch.startswith("gemma") and to.endswith("norm.weight"):
        value = value + 1
    return {to: value.squeeze(0).contiguous()}


TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(30)), *"▁abcdefghijklmnopqrstuvwxyz"]
TOKENS += ["▁a", "an", "▁an", "th"]
SPM = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [-float(i) for i in range(len(TOKENS))],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 30, *[1] * (len(TOKENS) - 33)], "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
}  # fmt: skip
