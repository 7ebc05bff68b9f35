"""Checkpoints read through the map, bit for bit as transformers reads them, and what is refused by name."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_models import (
    MODELS,
    SMALL,
    T,
    assert_reads_as,
    assert_same_weights,
    edit_config,
    load,
    make,
    rewrite,
    stored,
    write_all,
)  # fmt: skip
from safetensors.torch import load_file, save_file

from distzo2.checkpoint import checkpoint_files
from distzo2.checkpoint.checkpoint_files import INDEX_FILE, SINGLE_FILE
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.mapping import CheckpointMap, persistent_buffers
from distzo2.checkpoint.pretrained import open_checkpoint
from distzo2.checkpoint.symbols import LayoutTensor, Trace
from distzo2.checkpoint.weight_files import CheckpointError
from distzo2.checkpoint.writing import CheckpointWriter


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
    plan = CheckpointMap.for_saving(reference, [(n, p.dtype, p.shape) for n, p in reference.named_parameters()])
    with CheckpointWriter(plan, out2) as writer:
        for key, tensor in (*reference.named_parameters(), *persistent_buffers(reference)):
            writer.write_param(key, tensor.detach())
    ours = stored(out2)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)

    # Built for a model that is there already, the map is the same, and plain data.
    assert json.loads(json.dumps(CheckpointMap.build(model, source).to_json())) == checkpoint.to_json()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "t5", "gpt2", "deepseek_v3"])
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
        checkpoint.read_range(key, 0, middle, out[:middle])
        checkpoint.read_range(key, middle, param.shape[0], out[middle:])
        assert torch.equal(out, param), key
    key = "lm_head.weight" if name == "mixtral" else "transformer.wte.weight"
    strided = torch.empty(reference[key].shape[::-1]).t()
    checkpoint.read_param(key, strided)
    assert torch.equal(strided, reference[key])
    with pytest.raises(ValueError, match=r"expected torch.float32 \[96, 32\], got torch.bfloat16"):
        checkpoint.read_param(key, strided.bfloat16())


def test_gpt2_without_its_prefix_and_with_the_old_masks(tmp_path: Path) -> None:
    expected = make("gpt2", tmp_path)

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        return tensors | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}

    rewrite(tmp_path, old)
    reference = load(T.GPT2LMHeadModel, tmp_path)
    assert_same_weights(reference, expected)
    _, checkpoint = open_checkpoint(tmp_path)
    assert_reads_as(checkpoint, reference)
    write_all(checkpoint, reference, tmp_path / "out")
    assert stored(tmp_path / "out").keys() == {n for n in stored(tmp_path) if not n.endswith(".attn.bias")}
    assert_same_weights(load(T.GPT2LMHeadModel, tmp_path / "out"), reference)


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


def test_legacy_names(tmp_path: Path) -> None:
    make("bert", tmp_path)

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, legacy in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            tensors = {name.replace(new, legacy): t for name, t in tensors.items()}
        return tensors | {
            "bert.embeddings.position_ids": torch.arange(4)[None],
            "cls.seq_relationship.bias": torch.ones(2),
        }

    rewrite(tmp_path, old)
    reference = load(T.BertForMaskedLM, tmp_path)
    _, checkpoint = open_checkpoint(tmp_path)
    assert any("gamma" in t.name for t in checkpoint.tensors)
    assert checkpoint.unexpected == ["cls.seq_relationship.bias"]
    assert_reads_as(checkpoint, reference)
    write_all(checkpoint, reference, tmp_path / "out")
    assert_same_weights(load(T.BertForMaskedLM, tmp_path / "out"), reference)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_pytorch_bin_files(tmp_path: Path, name: str, sharded: bool) -> None:
    model = make(name, tmp_path)
    tensors = model.state_dict()  # with the head, which shares its storage where it is tied
    legacy = load_file(tmp_path / SINGLE_FILE) | (
        {"lm_head.weight": tensors["lm_head.weight"]} if name == "opt" else {}
    )
    (tmp_path / SINGLE_FILE).unlink()
    parts = [dict(list(legacy.items())[i::2]) for i in range(2)] if sharded else [legacy]
    files = [f"pytorch_model-{i}.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, tmp_path / file)
    if sharded:
        weight_map = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    reference = load(type(model), tmp_path)
    loaded, checkpoint = open_checkpoint(tmp_path)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is (name == "opt")
    assert_reads_as(checkpoint, reference)
    write_all(checkpoint, reference, tmp_path / "out")
    assert_same_weights(load(type(model), tmp_path / "out"), reference)


@pytest.mark.parametrize("kept", ["both_equal", "both_differ", "head_only"])
def test_tied_weights(tmp_path: Path, kept: str) -> None:
    make("qwen3", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = tensors["model.embed_tokens.weight"].clone()
        if kept == "head_only":
            del tensors["model.embed_tokens.weight"]
        return tensors | {"lm_head.weight": head + 1 if kept == "both_differ" else head}

    rewrite(tmp_path, change)
    reference = load(T.Qwen3ForCausalLM, tmp_path)
    model, checkpoint = open_checkpoint(tmp_path)
    tied = kept != "both_differ"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert_reads_as(checkpoint, reference)
    write_all(checkpoint, reference, tmp_path / "out")
    assert_same_weights(load(T.Qwen3ForCausalLM, tmp_path / "out"), reference)


def conversions() -> list[tuple[str, Callable[[list[torch.Tensor]], Any]]]:
    """Each of transformers' own conversion operations as a function of tensors."""
    ops = transformers.core_model_loading
    config = T.LlamaConfig(**SMALL)

    def run(op: Any, tensors: list[torch.Tensor], sources: list[str], targets: list[str]) -> Any:
        given = {
            s: [t for t, name in zip(tensors, names, strict=True) if name == s]
            for s in sources
            for names in [sources * (len(tensors) // len(sources))]
        }
        made = op.convert(
            given, source_patterns=sources, target_patterns=targets, config=config, full_layer_name="w", model=None
        )
        return [made[key][0] if isinstance(made[key], list) else made[key] for key in made]

    one = partial(run, sources=["s"], targets=["t"])
    return [
        ("merge", lambda ts: one(ops.MergeModulelist(0), ts)),
        ("concatenate", lambda ts: run(ops.Concatenate(1), ts, ["s", "u"], ["t"])),
        ("chunk", lambda ts: run(ops.Chunk(0), ts[:1], ["s"], ["t", "u"])),
        ("split_list", lambda ts: run(ops.SplitModulelist(0), ts[:1], ["s"], ["t.*"])),
        ("transpose", lambda ts: one(ops.Transpose(0, 1), ts[:1])),
        ("interleave", lambda ts: one(ops.Interleave(1), ts[:1])),
        ("deinterleave", lambda ts: one(ops.Interleave(0, inverse=True), ts[:1])),
        ("rope", lambda ts: one(ops.PermuteForRope(), ts[:1])),
        ("ernie", lambda ts: run(ops.ErnieFuseAndSplitTextVisionExperts(), ts, ["s", "u"], ["t", "v"])),
    ]


@pytest.mark.parametrize("number", range(9))
def test_transformers_conversions(tmp_path: Path, number: int) -> None:
    name, convert = conversions()[number]
    tensors = [torch.randn(16, 24) for _ in range(4)]
    save_file({f"w{i}": t for i, t in enumerate(tensors)}, tmp_path / SINGLE_FILE)
    files = checkpoint_files.CheckpointFiles(tmp_path)
    trace = Trace([e.name for e in files.entries])
    where = {e.name: (i, e) for i, e in enumerate(files.entries)}
    symbols = [LayoutTensor(Layout.leaf(where[f"w{i}"][0], (16, 24)), torch.float32, trace) for i in range(4)]
    expected, got = convert(list(tensors)), convert(symbols)
    assert len(got) == len(expected) > 0, name
    for symbol, tensor in zip(got, expected, strict=True):
        assert torch.equal(files.read_layout(symbol.where, torch.float32), tensor), name


def test_a_conversion_that_computes_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", tmp_path)
    loading, mapping = (
        importlib.import_module(f"transformers.{name}") for name in ("core_model_loading", "conversion_mapping")
    )

    class Double(loading.ConversionOps):
        def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **_: Any) -> dict:
            return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}

    real = mapping.get_checkpoint_conversion_mapping

    def with_double(model_type: str) -> Any:
        if model_type == "llama":
            return [loading.WeightConverter("q_proj.weight", "q_proj.weight", operations=[Double()])]
        return real(model_type)

    monkeypatch.setattr(mapping, "get_checkpoint_conversion_mapping", with_double)
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.self_attn.q_proj.weight' cannot be mapped .*: aten.mul"
    ) as e:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def drop(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if name not in names}


def break_missing(path: Path) -> None:
    rewrite(path, lambda t: drop(t, "model.norm.weight"))


def break_shape(path: Path) -> None:
    rewrite(path, lambda t: t | {"model.norm.weight": torch.ones(31)})


def break_truncate(path: Path) -> None:
    os.truncate(path / SINGLE_FILE, 5000)


def break_index(path: Path) -> None:
    (path / SINGLE_FILE).unlink()
    (path / INDEX_FILE).write_text("{")


def break_index_file(path: Path) -> None:
    (path / SINGLE_FILE).unlink()
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def break_index_escape(path: Path) -> None:
    (path / SINGLE_FILE).rename(path.parent / "elsewhere")
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))


def break_index_tensor(path: Path) -> None:
    (path / SINGLE_FILE).rename(path / "model-1.safetensors")
    names = [*load_file(path / "model-1.safetensors"), "ghost"]
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))


def break_weights(path: Path) -> None:
    (path / SINGLE_FILE).rename(path / "pytorch_model.bin")


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (break_missing, "no tensor in the checkpoint fills 'model.norm.weight'"),
    "another shape": (break_shape, r"'model.norm.weight': expected shape \[32\] as config.json says, got \[31\]"),
    "truncated": (break_truncate, r"model.safetensors: truncated"),
    "broken index": (break_index, f"{INDEX_FILE}: expected JSON"),
    "no such shard": (break_index_file, "names this file, but it is not there"),
    "file elsewhere": (break_index_escape, "expected names of files in the same directory"),
    "not in the shard": (break_index_tensor, "expected tensor 'ghost'"),
    "no archive": (break_weights, "pytorch_model.bin: expected an archive that torch.save wrote"),
    "no config": (lambda path: (path / "config.json").unlink(), "expected a checkpoint with a config.json"),
    "broken config": (break_config, "config.json: (expected JSON|not a configuration)"),
    "unknown type": (lambda path: edit_config(path, model_type="nemo_17"), "not a configuration"),
    "quantized": (
        lambda path: edit_config(path, quantization_config={"quant_method": "fp8"}), "quantized weights",
    ),
    "nothing at all": (shutil.rmtree, "no directory of that name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model"
    make("llama", path)
    damage, message = BROKEN[case]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_not_allocated(tmp_path: Path) -> None:
    """20 GB of parameters that no tensor fills are named, not filled with random values."""
    make("llama", tmp_path)
    rewrite(tmp_path, lambda t: {"model.norm.weight": t["model.norm.weight"]})
    edit_config(tmp_path, vocab_size=80_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"no tensor in the checkpoint fills 'lm_head.weight' and 19 more"):
        open_checkpoint(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
