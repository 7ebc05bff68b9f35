"""Checkpoints read through the map, bit for bit as transformers reads them, and what is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from checkpoint_models import (
    MODELS,
    T,
    assert_reads_as,
    assert_same_weights,
    load,
    make,
    rewrite,
    stored,
    write_all,
)  # fmt: skip
from safetensors.torch import load_file

from distzo2.checkpoint.mapping import map_for_saving, persistent_buffers
from distzo2.checkpoint.reading import INDEX_FILE, SINGLE_FILE
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.checkpoint.writing import CheckpointWriter
from distzo2.models.pretrained import open_checkpoint


@pytest.mark.parametrize("name", MODELS)
def test_loads_and_writes_as_transformers_does(tmp_path: Path, name: str) -> None:
    source, out, out2 = tmp_path / "in", tmp_path / "out", tmp_path / "plain"
    make(name, source)
    reference = load(getattr(T, MODELS[name][0]), source)
    model, checkpoint = open_checkpoint(source)
    assert type(model) is type(reference) and not model.training and checkpoint.unexpected == []
    assert all(param.is_meta for param in model.parameters())
    assert_reads_as(checkpoint, reference)
    for (key, buffer), (other, expected) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert key == other and buffer.dtype == expected.dtype and torch.equal(buffer, expected), key

    # Written back: the same tensors under the same names, in shards, and transformers reads them as its own.
    write_all(checkpoint, reference, out, max_shard_bytes=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / INDEX_FILE).is_file()
    ours, theirs = stored(out), stored(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert_same_weights(load(type(reference), out), reference)
    _, again = open_checkpoint(out)
    assert_reads_as(again, reference)

    # A model that came from elsewhere is written as transformers would write it.
    plan = map_for_saving(reference, [(n, p.dtype, p.shape) for n, p in reference.named_parameters()])
    with CheckpointWriter(plan, out2) as writer:
        for key, tensor in (*reference.named_parameters(), *persistent_buffers(reference)):
            writer.write(key, tensor.detach())
    ours = stored(out2)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mixtral", torch.bfloat16), ("t5", torch.float16), ("gpt2", torch.float16), ("deepseek_v3", torch.bfloat16)],
)
def test_converts_dtypes_as_transformers_does(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    make(name, tmp_path / "in")
    reference = load(getattr(T, MODELS[name][0]), tmp_path / "in", dtype=dtype)
    model, checkpoint = open_checkpoint(tmp_path / "in", dtype=dtype)
    assert_reads_as(checkpoint, reference)  # T5 keeps some in float32 for float16
    assert [b.dtype for b in model.buffers()] == [b.dtype for b in reference.buffers()]
    write_all(checkpoint, reference, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert_same_weights(load(type(reference), tmp_path / "out"), reference)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_reads_rows_of_a_parameter(tmp_path: Path, name: str) -> None:
    make(name, tmp_path)
    reference = dict(load(getattr(T, MODELS[name][0]), tmp_path).named_parameters())
    _, checkpoint = open_checkpoint(tmp_path)
    for key, param in reference.items():
        middle = param.shape[0] // 2
        out = torch.empty(param.shape)
        checkpoint.read(key, out[:middle])
        checkpoint.read(key, out[middle:], middle)
        assert torch.equal(out, param), key
    key = "lm_head.weight" if name == "mixtral" else "transformer.wte.weight"
    with pytest.raises(ValueError, match=r"expected torch.float32 \[96, 32\] or rows of it, got torch.bfloat16"):
        checkpoint.read(key, reference[key].bfloat16())


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen3"])
def test_a_bare_base_model_becomes_a_language_model(tmp_path: Path, name: str) -> None:
    base = make(name).base_model
    base.config.architectures = None
    base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(base).__name__]
    model, checkpoint = open_checkpoint(tmp_path)
    assert type(model).__name__ == MODELS[name][0]
    assert_reads_as(checkpoint, load(type(model), tmp_path))
    model, checkpoint = open_checkpoint(tmp_path, auto_class=T.AutoModel)
    assert type(model) is type(base)
    assert_reads_as(checkpoint, load(type(base), tmp_path))


def old_gpt2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix, and with the masks that were saved."""
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    return tensors | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}


def old_bert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the names of layer norms in TensorFlow, and what the model has no use for."""
    for new, legacy in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {name.replace(new, legacy): t for name, t in tensors.items()}
    return tensors | {"bert.embeddings.position_ids": torch.arange(4)[None], "cls.seq_relationship.bias": torch.ones(2)}


def with_head(tensors: dict[str, torch.Tensor], add: float = 0, drop: str = "") -> dict[str, torch.Tensor]:
    """With a head beside the embedding that it is tied to."""
    kept = {name: t for name, t in tensors.items() if name != drop}
    return kept | {"lm_head.weight": tensors["model.embed_tokens.weight"] + add}


REWRITTEN = {  # the model, what is changed, what is not used, and whether weights are tied
    "gpt2": ("gpt2", old_gpt2, [], True),
    "bert": ("bert", old_bert, ["cls.seq_relationship.bias"], True),
    "a head that is equal": ("qwen3", with_head, [], True),
    "a head that differs": ("qwen3", partial(with_head, add=1), [], False),
    "a head alone": ("qwen3", partial(with_head, drop="model.embed_tokens.weight"), [], True),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_what_others_saved(tmp_path: Path, case: str) -> None:
    name, change, unused, tied = REWRITTEN[case]
    make(name, tmp_path)
    rewrite(tmp_path, change)
    model_class = getattr(T, MODELS[name][0])
    reference = load(model_class, tmp_path)
    model, checkpoint = open_checkpoint(tmp_path)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert checkpoint.unexpected == unused
    assert_reads_as(checkpoint, reference)
    write_all(checkpoint, reference, tmp_path / "out")
    assert_same_weights(load(model_class, tmp_path / "out"), reference)
    left_out = {key for key in stored(tmp_path) if key.endswith((".attn.bias", "position_ids", *unused))}
    if tied and case.startswith("a head"):
        left_out.add("lm_head.weight" if case.endswith("equal") else "")
    assert stored(tmp_path / "out").keys() >= stored(tmp_path).keys() - left_out


@pytest.mark.parametrize(
    ("name", "sharded"),
    [("opt", False), ("mixtral", True), *((name, "turned") for name in ("opt", "mixtral", "deepseek_v3"))],
)
def test_pytorch_bin_files(tmp_path: Path, name: str, sharded: bool | str) -> None:
    model = make(name, tmp_path)
    tensors = model.state_dict()  # with the head, which shares its storage where it is tied
    legacy = load_file(tmp_path / SINGLE_FILE) | (
        {"lm_head.weight": tensors["lm_head.weight"]} if name == "opt" else {}
    )
    if sharded == "turned":
        legacy = {key: t.transpose(0, -1).contiguous().transpose(0, -1) for key, t in legacy.items()}
        assert any(not t.is_contiguous() for t in legacy.values())
    (tmp_path / SINGLE_FILE).unlink()
    parts = [dict(list(legacy.items())[i::2]) for i in range(2)] if sharded is True else [legacy]
    files = [f"pytorch_model-{i}.bin" for i in range(2)] if sharded is True else ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, tmp_path / file)
    if sharded is True:
        weight_map = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    reference = load(type(model), tmp_path)
    loaded, checkpoint = open_checkpoint(tmp_path)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is (name in ("opt", "gpt2"))
    assert_reads_as(checkpoint, reference)
    write_all(checkpoint, reference, tmp_path / "out")
    assert_same_weights(load(type(model), tmp_path / "out"), reference)


def linear(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that quantizers take, without their last part."""
    return [n.removesuffix(".weight") for n, t in tensors.items() if t.dim() == 2 and ("proj" in n or "experts" in n)]


def packed(
    tensors: dict[str, torch.Tensor], beside: Callable[[torch.Tensor], dict[str, torch.Tensor]], keep: bool = True
) -> dict[str, torch.Tensor]:
    """Each linear layer's weight (left out without `keep`) with what a quantizer stores, by what follows its name."""
    result = {n: t for n, t in tensors.items() if keep or n.removesuffix(".weight") not in linear(tensors)}
    for n in linear(tensors):
        result |= {n + end: tensor.clone() for end, tensor in beside(tensors[n + ".weight"]).items()}
    return result


F8, ONE = torch.float8_e4m3fn, torch.ones(1)
INTS, BYTES = torch.ones(4, 4, dtype=torch.int32), torch.ones(64, 1, dtype=torch.uint8)
PACKED: dict[str, tuple[Callable, str]] = {  # what a quantizer makes of the tensors, and which of them is named
    "fp8 scaled beside": (lambda t: packed(t, lambda w: {".weight": w.to(F8), ".scale_weight": ONE}), "scale_weight"),
    "fp8 scaled elsewhere": (lambda t: packed(t, lambda w: {".weight": w.to(F8)}) | {"scales": ONE}, "scales'"),
    "bitsandbytes 4": (
        lambda t: packed(t, lambda w: {".weight": BYTES, ".weight.absmax": ONE, ".weight.quant_state.nf4": BYTES}),
        "weight.absmax",
    ),
    "bitsandbytes 8": (lambda t: packed(t, lambda w: {".weight": w.to(torch.int8), ".SCB": ONE}), r"\(int8\)"),
    "int8 alone": (lambda t: packed(t, lambda w: {".weight": w.to(torch.int8)}), r"\(int8\) would fill a parameter"),
    "bits": (lambda t: packed(t, lambda w: {".weight": w > 0}), r"\(bool\) would fill a parameter"),
    "mlx": (lambda t: packed(t, lambda w: {".weight": INTS, ".scales": ONE, ".biases": ONE}), "scales"),
    "mxfp4": (lambda t: packed(t, lambda w: {"_blocks": BYTES, "_scales": BYTES}, keep=False), "_blocks"),
    "nvfp4": (
        lambda t: packed(t, lambda w: {".weight": BYTES, ".weight_scale": ONE.to(F8), ".weight_scale_2": ONE}),
        "weight_scale",
    ),
    "hqq": (lambda t: packed(t, lambda w: {".W_q": BYTES, ".scale": ONE, ".zero": ONE}, keep=False), "W_q"),
    "a scale beside floats": (lambda t: packed(t, lambda w: {".scale": ONE}), r"\.scale'"),
}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_are_refused_by_name(tmp_path: Path, name: str, case: str) -> None:
    """With no word about them in config.json."""
    make(name, tmp_path)
    change, tensor = PACKED[case]
    rewrite(tmp_path, change)
    with pytest.raises(
        CheckpointError, match=f"packed or scaled, which cannot be decoded: tensor '.*{tensor}"
    ) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_eight_bit_floats_without_a_scale_are_values(tmp_path: Path, name: str) -> None:
    make(name, tmp_path)
    rewrite(tmp_path, lambda t: packed(t, lambda w: {".weight": w.to(F8)}))
    rewrite(tmp_path, lambda t: t | {"vision.blocks.0.layer_scale": ONE, "logit_scale": ONE[0].to(F8).float()})
    if name == "mixtral":
        rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if "scale" not in n})
    else:
        with pytest.raises(CheckpointError, match="packed or scaled"):
            open_checkpoint(tmp_path)
        rewrite(tmp_path, lambda t: {n: v.float() for n, v in t.items()})  # scales of other models do no harm
    _, checkpoint = open_checkpoint(tmp_path)
    assert_reads_as(checkpoint, load(getattr(T, MODELS[name][0]), tmp_path))


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {change(name): t for name, t in tensors.items()}


def inside(*words: str) -> Callable[[str], str]:
    """Puts words behind the number of each layer."""
    return lambda name: re.sub(r"\.(\d+)\.", rf".\1.{'.'.join(words)}.", name, count=1)


PREFIXES = ("_orig_mod.", "module.", "_forward_module.", "module._orig_mod.", "model.model.", "state_dict.", "net.")
WRAPPED = {prefix: (lambda name, prefix=prefix: prefix + name, f"strip '{prefix}' from") for prefix in PREFIXES} | {
    "compiled layers": (inside("_orig_mod"), "strip '_orig_mod.' from"),
    "sharded layers": (inside("_fsdp_wrapped_module", "x"), "strip '_fsdp_wrapped_module.', 'x.' from"),
    "both": (lambda name: inside("_orig_mod")("_orig_mod." + name), "strip '_orig_mod.' from"),
    "too little": (lambda name: name.replace("model.", "").replace("transformer.h", "h.x"), "no tensor .* fills"),
    "an adapter": (
        lambda name: "base_model.model." + name.replace("_proj.", "_proj.base_layer.").replace("c_fc", "base_layer.c"),
        r"base_layer\..* is of an adapter \(LoRA\) that is not merged",
    ),
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", WRAPPED)
def test_an_error_says_what_to_strip_from_the_names(tmp_path: Path, name: str, case: str) -> None:
    reference = make(name, tmp_path)
    change, message = WRAPPED[case]
    before = stored(tmp_path).keys()
    rewrite(tmp_path, renamed(change))
    if case == "too little" and name != "gpt2":  # transformers finds the model's own prefix by itself
        assert_reads_as(open_checkpoint(tmp_path)[1], load(type(reference), tmp_path))
        return
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    if "strip" in message:  # what the error says helps
        words = re.findall("'([^']*)'", re.search("strip (.*) from", str(error.value)).group(1))
        rewrite(tmp_path, renamed(lambda name: reduce(lambda n, word: n.replace(word, ""), words, name)))
        if "model." not in words[0]:
            assert stored(tmp_path).keys() == before
            assert_reads_as(open_checkpoint(tmp_path)[1], reference)
