"""Quantized checkpoints opened as models: each weight to the bit what the format's own decoder makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import T
from packed_decode import decode
from packed_forms import FORMS, Form, compressed, fp8_blocks, gpt_oss
from safetensors.torch import load_file, save_file
from same_bits import same_bits

from distzo2.formats.packed_checkpoint import PackedCheckpoint, open_packed

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "version": "gemm"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "nvfp4 of": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "mxfp4"},
    "": {"quant_method": "compressed-tensors"},
}
PT = {"format": "pt"}
LLAMA = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 1152, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
MIXTRAL = {**LLAMA, "num_local_experts": 3, "intermediate_size": 512}
DEEPSEEK = {
    **LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 64, "v_head_dim": 32,
    "qk_nope_head_dim": 32, "first_k_dense_replace": 0, "num_hidden_layers": 1,
}  # fmt: skip
GPT_OSS = {
    **LLAMA, "num_local_experts": 4, "intermediate_size": 96, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "layer_types": ["full_attention"],
}  # fmt: skip


def save(
    directory: Path, kind: str, fields: dict[str, Any], form: Form, quantization: dict[str, Any] | None
) -> dict[str, torch.Tensor]:
    """A checkpoint whose linear layers are quantized; returns the decoded tensors by their names in files."""
    model = getattr(T, f"{kind}ForCausalLM")(getattr(T, f"{kind}Config")(**fields)).to(torch.bfloat16)
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors, g = load_file(file), torch.Generator().manual_seed(1)
    decoded = {}
    for name, tensor in list(tensors.items()):
        wanted = "experts" in name and tensor.dim() == 3 if kind == "GptOss" else "proj" in name or "experts" in name
        if not wanted:
            continue
        made, decoded[name] = form(tuple(tensor.shape), g)
        del tensors[name]
        tensors |= {name.removesuffix(".weight") + end: t for end, t in made.items()}
    save_file(tensors, file, metadata=PT)
    config = json.loads((directory / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    return decoded


def assert_decodes(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To the bit, in the dtype of the format's own decoder; a NaN is a NaN."""
    found = found.to(expected.dtype)
    assert torch.equal(found.isnan(), expected.isnan()), name
    assert same_bits(found.nan_to_num(7.0, torch.inf, -torch.inf), expected.nan_to_num(7.0, torch.inf, -torch.inf)), (
        name
    )


@pytest.mark.parametrize("case", FORMS)
def test_each_weight_is_what_the_format_decodes(tmp_path: Path, case: str) -> None:
    quantization = next(config for start, config in CONFIGS.items() if case.startswith(start))
    decoded = save(tmp_path, "Llama", LLAMA, FORMS[case], quantization)
    checkpoint = open_packed(tmp_path)
    assert checkpoint.packed.keys() == decoded.keys() and sum(t.numel() for t in decoded.values()) >= 1_000_000
    for name, param in checkpoint.packed.items():
        assert param.shape == decoded[name].shape
        assert_decodes(decode(param), decoded[name], name)
    assert_raw(checkpoint, load_file(tmp_path / "model.safetensors"))


def blocks_or_channels(shape: tuple[int, ...], g: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return (FORMS["float-quantized tensor"] if shape[1] % 128 else fp8_blocks)(shape, g)


EXPERTS = {  # the kind of model, its fields, the form, what config.json says, and how many pieces of files experts have
    "int4 as files have it": ("Mixtral", MIXTRAL, compressed("pack-quantized", torch.bfloat16, 32, bits=4), "", 12),
    "int4, few scales": ("Mixtral", MIXTRAL | {"intermediate_size": 128}, FORMS["pack-quantized int4 g128"], "", 6),
    "int4 gptq": ("Mixtral", MIXTRAL, FORMS["gptq int4 g128"], "gptq", 0),
    "nvfp4": ("Mixtral", MIXTRAL, FORMS["nvfp4-pack-quantized"], "", 12),
    "float8": ("Mixtral", MIXTRAL, FORMS["float-quantized channel"], "", 6),
    "half a block": ("Mixtral", MIXTRAL | {"intermediate_size": 192}, blocks_or_channels, "fp8", 6),
    "deepseek": ("DeepseekV3", DEEPSEEK, fp8_blocks, "fp8", 8),
    "gpt-oss": ("GptOss", GPT_OSS, gpt_oss, "mxfp4", 2),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_lie_as_transformers_has_them(tmp_path: Path, case: str) -> None:
    """Against the decoded tensors as transformers loads them."""
    kind, fields, form, quantization, num_ranges = EXPERTS[case]
    decoded = save(tmp_path, kind, fields, form, CONFIGS[quantization])
    checkpoint = open_packed(tmp_path)

    plain = tmp_path / "plain"
    kept = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if name in checkpoint.raw.mapped}
    checkpoint.model.config.save_pretrained(plain)
    dtype = next(iter(decoded.values())).dtype
    save_file({n: t.to(dtype).contiguous() for n, t in (kept | decoded).items()}, plain / "model.safetensors", PT)
    expected = type(checkpoint.model).from_pretrained(plain, dtype=dtype).state_dict()
    experts = [param for name, param in checkpoint.packed.items() if name.endswith("experts.gate_up_proj")]
    for name, param in checkpoint.packed.items():
        assert param.shape == expected[name].shape and param.transposed == (case == "gpt-oss")
        assert_decodes(decode(param), expected[name], name)
    assert experts and all(sum(piece.make is None for piece in param.pieces) == num_ranges for param in experts)
    checkpoint.raw.close()


def assert_raw(checkpoint: PackedCheckpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Parameters that are not packed are read as before."""
    params = dict(checkpoint.model.named_parameters())
    assert {*checkpoint.raw.names, *checkpoint.packed} == params.keys()
    for name in checkpoint.raw.names:
        out = torch.empty(params[name].shape, dtype=params[name].dtype)
        checkpoint.raw.read(name, out)
        assert same_bits(out, tensors[name]), name
    checkpoint.raw.close()
