"""Quantized checkpoints opened as models: each weight to the bit what the format's own decoder makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import T
from packed_decode import decode
from packed_forms import FORMS, Form, compressed, fp8_blocks, gpt_oss
from safetensors.torch import load_file, save_file
from same_bits import same_bits
from torch import nn

from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.packed_param import Piece
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.formats import repacking
from distzo2.formats.packed_checkpoint import find_settings, open_packed
from distzo2.models import pretrained

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
    model, checkpoint = open_packed(tmp_path)
    assert checkpoint.packed.keys() == decoded.keys() and sum(t.numel() for t in decoded.values()) >= 1_000_000
    for name, param in checkpoint.packed.items():
        assert param.shape == decoded[name].shape
        assert_decodes(decode(param), decoded[name], name)
    assert_raw(model, checkpoint, load_file(tmp_path / "model.safetensors"))


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
    model, checkpoint = open_packed(tmp_path)

    plain = tmp_path / "plain"
    kept = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if name in checkpoint.mapped}
    model.config.save_pretrained(plain)
    dtype = next(iter(decoded.values())).dtype
    save_file({n: t.to(dtype).contiguous() for n, t in (kept | decoded).items()}, plain / "model.safetensors", PT)
    expected = type(model).from_pretrained(plain, dtype=dtype).state_dict()
    experts = [param for name, param in checkpoint.packed.items() if name.endswith("experts.gate_up_proj")]
    for name, param in checkpoint.packed.items():
        assert param.shape == expected[name].shape and param.transposed == (case == "gpt-oss")
        assert_decodes(decode(param), expected[name], name)
    assert experts and all(sum(piece.make is None for piece in param.pieces) == num_ranges for param in experts)
    checkpoint.close()


def assert_raw(model: nn.Module, checkpoint: CheckpointMap, tensors: dict[str, torch.Tensor]) -> None:
    """Parameters that are not packed are read as before."""
    params = dict(model.named_parameters())
    assert {*checkpoint.names} == params.keys()
    for name in params.keys() - checkpoint.packed.keys():
        out = torch.empty(params[name].shape, dtype=params[name].dtype)
        checkpoint.read(name, out)
        assert same_bits(out, tensors[name]), name
    checkpoint.close()


AWQ, GPTQ, KEY = CONFIGS["awq"], CONFIGS["gptq"], "quantization_config"
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # config.json, files beside it, and what is found
    "the top": ({KEY: CONFIGS["gptq_v2"]}, {}, "gptq"),
    "the text model": ({"text_config": {KEY: AWQ}}, {}, "awq"),
    "an older key": ({"compression_config": CONFIGS[""]}, {}, "compressed-tensors"),
    "both": ({KEY: AWQ, "text_config": {KEY: AWQ}}, {}, "awq"),
    "AutoGPTQ's file": ({}, {"quantize_config.json": {"bits": 4}}, "gptq"),
    "AutoAWQ's file": ({}, {"quant_config.json": {"w_bit": 4, "version": "GEMM"}}, "awq"),
    "ModelOpt's file": ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "None"),
    "nowhere": ({}, {}, "None"),
}  # fmt: skip


def write_settings(directory: Path, config: dict[str, Any], files: dict[str, Any]) -> None:
    for name, content in {"config.json": config, **files}.items():
        (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize("case", SETTINGS)
def test_the_quantisation_is_found_wherever_it_is_told(tmp_path: Path, case: str) -> None:
    config, files, method = SETTINGS[case]
    write_settings(tmp_path, config, files)
    assert str(find_settings(tmp_path).get("quant_method")) == method


def test_blocks_of_compressed_tensors_are_found(tmp_path: Path) -> None:
    groups = {"a": {"weights": {"block_structure": [64, 32]}}, "b": {"weights": {"num_bits": 8}}}
    write_settings(tmp_path, compressed_config(config_groups=groups), {})
    assert find_settings(tmp_path)["weight_block_size"] == [64, 32]


def compressed_config(**fields: Any) -> dict[str, Any]:
    return {KEY: CONFIGS[""] | fields}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "aqlm": ({KEY: {"quant_method": "aqlm"}}, "quantized by 'aqlm' cannot be decoded"),
    "hqq": ({"text_config": {KEY: {"quant_method": "hqq"}}}, "quantized by 'hqq'"),
    "gptq of marlin": (
        {KEY: GPTQ | {"checkpoint_format": "marlin"}}, "format among gptq, gptq_v2",
    ),
    "awq gemv": ({KEY: AWQ | {"version": "GEMV"}}, "version among gemm, GEMM, got 'GEMV'"),
    "sparse": (compressed_config(format="marlin-24"), "expected format among .*, got 'marlin-24'"),
    "a group": (compressed_config(config_groups={"a": {"format": "mxfp6"}}), "got 'mxfp6'"),
    "two blocks": (
        compressed_config(config_groups={n: {"weights": {"block_structure": [n, 8]}} for n in (8, 16)}),
        "rows and columns as weight_block_size",
    ),
    "rotations": (compressed_config(transform_config={"config_groups": {"u": {}}}), "transform_config is not decoded"),
    "two": (
        {KEY: AWQ, "text_config": {KEY: GPTQ}}, "expected one",
    ),
    "no blocks": (
        {KEY: CONFIGS["fp8"] | {"weight_block_size": [128, 0]}}, "rows and columns as weight_block",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_decoded_are_refused_by_name(tmp_path: Path, case: str) -> None:
    config, why = REFUSED[case]
    write_settings(tmp_path, config, {})
    with pytest.raises(CheckpointError, match=f"config.json: .*{why}"):
        find_settings(tmp_path)


def test_names_of_tensors_are_enough(tmp_path: Path) -> None:
    decoded = save(tmp_path, "Llama", LLAMA, FORMS["gptq int4 g128"], None)
    _, checkpoint = open_packed(tmp_path)
    assert find_settings(tmp_path) == {} and checkpoint.packed.keys() == decoded.keys()
    checkpoint.close()


def test_headers_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the numbers that decide between forms, here g_idx."""
    save(tmp_path, "Llama", LLAMA, FORMS["gptq int4 g128"], CONFIGS["gptq"])
    sizes = []
    read = Piece.read_into
    note = lambda piece: sizes.append(piece.num_bytes if piece.make is None else 0)  # noqa: E731
    monkeypatch.setattr(Piece, "read_into", lambda piece, out: note(piece) or read(piece, out))
    _, checkpoint = open_packed(tmp_path)
    assert sum(sizes) == 4 * (6 * 256 + 1152)
    monkeypatch.setattr(repacking, "CHUNK_BYTES", 1 << 14)
    sizes.clear()
    checkpoint.packed["model.layers.0.mlp.down_proj.weight"].pieces[0].read()
    assert max(sizes) <= 1 << 14 and sum(sizes) == 256 * 1152 // 2
    checkpoint.close()


@pytest.mark.parametrize(
    ("case", "end", "role"),
    [
        ("gptq int4 g128", ".scales", "scale"),
        ("nf4 g64", ".absmax", "scale"),
        ("nvfp4-pack-quantized", ".weight_scale", "scale"),
        ("nvfp4-pack-quantized", ".weight_global_scale", "outer"),
        ("fp8", "_scale_inv", "scale"),
    ],
)
def test_scales_that_are_not_finite_are_refused_before_memory_is_taken(
    case: str, end: str, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(name for name in FORMS if name.startswith(case))
    quantization = next(config for start, config in CONFIGS.items() if case.startswith(start))
    save(tmp_path, "Llama", LLAMA, FORMS[case], quantization)
    monkeypatch.setattr(pretrained, "offload", lambda *_, **__: pytest.fail("weights were handed over"))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():  # of any bits so far
        if re.search(r"scales$|absmax$|_scale$|_scale_inv$", name):
            tensors[name] = torch.ones(tensor.shape).to(tensor.dtype)
            if re.search(rf"down_proj(\.weight)?{end}$", name):
                tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, file, metadata=PT)
    with pytest.raises(CheckpointError, match=rf"down_proj.weight \(.*expected finite numbers as {role}, got nan"):
        pretrained.from_pretrained(tmp_path)


def test_sizes_are_those_of_decoded_and_of_packed_weights(tmp_path: Path) -> None:
    for case, is_made in {"gptq int4 g128": True, "pack-quantized int4 g128": False}.items():
        place = tmp_path / case
        decoded = save(place, "Llama", LLAMA, FORMS[case], CONFIGS["gptq" if is_made else ""])
        found = [row for row in pretrained.sizes_of(place) if row[0] < 2 * row[1]]
        assert sum(numel for _, numel, *_ in found) == sum(t.numel() for t in decoded.values())
        assert {row[2:] for row in found} == {(torch.bfloat16, is_made)}
        _, checkpoint = open_packed(place)
        packed = sum(piece.num_bytes for param in checkpoint.packed.values() for piece in param.pieces)
        assert sum(row[0] for row in found) == packed
        checkpoint.close()


def test_plain_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    def codebook(shape: tuple[int, ...], g: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {".codes": torch.zeros(shape, dtype=torch.int16), ".codebooks": torch.zeros(4)}, torch.zeros(shape)

    save(tmp_path, "Llama", LLAMA, codebook, None)
    with pytest.raises(
        CheckpointError, match=r"packed or scaled, which cannot be decoded: tensor '.*(codes|codebooks)'"
    ):
        open_packed(tmp_path)
    save(tmp_path, "Llama", LLAMA, lambda shape, g: ({".weight": torch.zeros(shape)}, torch.zeros(shape)), None)
    with pytest.raises(CheckpointError, match="expected packed weights, found none"):
        open_packed(tmp_path)


def test_one_parameter_of_packed_and_raw_experts_is_refused(tmp_path: Path) -> None:
    def some(shape: tuple[int, ...], g: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        is_packed = torch.rand((), generator=g) < 0.5
        weight = torch.zeros(shape, dtype=torch.bfloat16)
        return FORMS["pack-quantized int4 g128"](shape, g) if is_packed else ({".weight": weight}, weight)

    save(tmp_path, "Mixtral", MIXTRAL, some, CONFIGS[""])
    with pytest.raises(CheckpointError, match=r"joins packed weights and others: 'model.*' and 'model"):
        open_packed(tmp_path)


def test_a_text_model_within_another_is_found(tmp_path: Path) -> None:
    text = {**LLAMA, "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    config = T.LlavaConfig(text_config=text, vision_config=vision | sizes, image_token_index=3)
    model = T.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    file, g = tmp_path / "model.safetensors", torch.Generator().manual_seed(1)
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("mlp.down_proj.weight"))
    made, decoded = FORMS["awq int4 g64"](tuple(tensors.pop(name).shape), g)
    save_file(tensors | {name.removesuffix(".weight") + end: t for end, t in made.items()}, file, metadata=PT)
    told = json.loads((tmp_path / "config.json").read_text())
    told["text_config"][KEY] = AWQ
    (tmp_path / "config.json").write_text(json.dumps(told))
    _, checkpoint = open_packed(tmp_path)
    (param,) = checkpoint.packed.values()
    assert param.name == "model.language_model.layers.0.mlp.down_proj.weight" and find_settings(tmp_path) == AWQ
    assert_decodes(decode(param), decoded, name)
    checkpoint.close()
