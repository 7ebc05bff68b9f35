"""Checkpoints in and out of models that stream, bit for bit, and what is refused in one line."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import MODELS, T, assert_same_weights, edit_config, load, make, rewrite, stored
from same_bits import assert_same_tensors
from tiny_text import make_checkpoint
from torch import nn

import distzo2
from distzo2.checkpoint import reading
from distzo2.checkpoint.reading import INDEX_FILE, SINGLE_FILE, digest_checkpoint
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.models import pretrained
from distzo2.models.pretrained import meta_model, open_checkpoint


@pytest.mark.parametrize(("name", "weights"), [("opt", "host"), ("mixtral", "disk"), ("deepseek_v3", "host")])
def test_from_pretrained_and_back(tmp_path: Path, name: str, weights: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    make(name, source)
    reference = load(getattr(T, MODELS[name][0]), source)
    model = distzo2.from_pretrained(source, weights=weights, directory=tmp_path)
    base = distzo2.runtime_of(model).base
    assert not model.training and base.directory == source and base.digest() == digest_checkpoint(source)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    runtime = distzo2.runtime_of(model)
    with runtime.access.writing(runtime.units[-1], keep=True) as views:
        changed = next(iter(views))
        views[changed].add_(1)
    assert distzo2.save_pretrained(model, out) is None
    expected = dict(reference.named_parameters())
    with torch.no_grad():
        expected[changed].add_(1)
    assert_same_weights(load(T.AutoModelForCausalLM, out), reference)
    with pytest.raises(CheckpointError, match="already holds"):
        distzo2.save_pretrained(model, out)
    distzo2.save_pretrained(model, out, overwrite=True, max_shard_bytes=30_000)
    assert_same_weights(load(T.AutoModelForCausalLM, out), reference)
    runtime.close()
    trained = distzo2.from_pretrained(source, train=True)
    assert all(module.training for module in trained.modules())


class Classifier(nn.Module):
    """No language model: convolutions, a normalisation with buffers, a tied pair, and a scale without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.norm(self.conv(images)).mean((2, 3)))) * self.scale


def test_any_module_by_its_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, other = Classifier(), Classifier()
    plain.norm(torch.randn(3, 4, 5, 5))
    expected = {name: t.clone() for name, t in plain.state_dict().items()}
    model = distzo2.offload(plain, units=["conv", "first"])
    distzo2.save_pretrained(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SINGLE_FILE}
    written = stored(tmp_path / "out")
    assert written.keys() == expected.keys() - {"second.weight"}
    assert all(torch.equal(written[name], expected[name]) for name in written)
    other.load_state_dict(written | {"second.weight": written["first.weight"]})
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(other.eval()(images), model(images))


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_a_model_that_lacks_some_weights_is_closed(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("llama", tmp_path / "in")
    num_read, made = [], []
    read, offload = reading._read, pretrained.offload

    def noted(*args: Any, **options: Any) -> nn.Module:
        made.append(offload(*args, **options))
        return made[0]

    def broken(direct: int | None, batch: list) -> None:
        num_read.append(len(batch))
        if len(num_read) > 3:
            raise CheckpointError("a shard is gone")
        read(direct, batch)

    monkeypatch.setattr(reading, "_read", broken)
    monkeypatch.setattr(pretrained, "offload", noted)
    with pytest.raises(CheckpointError, match="a shard is gone"):
        distzo2.from_pretrained(tmp_path / "in", weights=weights, directory=tmp_path / "disk")
    with pytest.raises(distzo2.DistZO2Error, match="closed"):
        made[0].state_dict()
    assert not any(thread.name.startswith("distzo2-read") for thread in threading.enumerate())
    if weights == "disk":
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_model_on_meta_is_the_one_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("mixtral", tmp_path)
    model, _ = open_checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    for dtype in (None, torch.bfloat16):
        plan = meta_model(tmp_path, dtype)
        assert type(plan) is type(model) and all(t.is_meta for t in (*plan.parameters(), *plan.buffers()))
        assert {n: p.shape for n, p in plan.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
        assert {p.dtype for p in plan.parameters()} == {dtype or torch.float32}
    edit_config(tmp_path, num_hidden_layers=10**6)
    monkeypatch.setattr(pretrained, "_MOST_TENSORS", 100)
    with pytest.raises(CheckpointError, match="asks for a model of more than 4096 modules"):
        meta_model(tmp_path)


def weights_named(path: Path, name: str, weight_map: dict[str, str]) -> None:
    """Renames the only file of weights, and writes an index."""
    (path / SINGLE_FILE).rename(path / name)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def only_adapter(path: Path, *kept: str, **fields: Any) -> None:
    """Leaves an adapter in a directory, and the files `kept`."""
    for file in path.iterdir():
        if file.name not in kept:
            file.unlink()
    (path / "adapter_config.json").write_text(json.dumps(fields))
    (path / "adapter_model.safetensors").write_bytes(b"")


SHARD = "model-1.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        lambda path: rewrite(path, lambda t: {name: t[name] for name in t if name != "model.norm.weight"}),
        "no tensor in the checkpoint fills 'model.norm.weight'",
    ),
    "another shape": (
        lambda path: rewrite(path, lambda t: t | {"model.norm.weight": torch.ones(31)}),
        r"'model.norm.weight': expected shape \[32\] as config.json says, got \[31\]",
    ),
    "no such shard": (
        lambda path: weights_named(path, SHARD, {"a": "gone.safetensors"}), "names this file, but it is not there",
    ),
    "not in the shard": (lambda path: weights_named(path, SHARD, {"ghost": SHARD}), "expected tensor 'ghost'"),
    "no config": (lambda path: (path / "config.json").unlink(), "expected a checkpoint directory with a config.json"),
    "unknown type": (lambda path: edit_config(path, model_type="nemo_17"), "not a configuration"),
    "quantized": (
        lambda path: edit_config(path, quantization_config={"quant_method": "fp8"}), "expected packed weights",
    ),
    "quantized text": (
        lambda path: edit_config(path, text_config={"quantization_config": {"quant_method": "gptq"}}),
        "this checkpoint cannot be mapped",
    ),
    "compressed": (lambda path: edit_config(path, compression_config={"format": "int"}), "found none"),
    "quantized for mlx": (lambda path: edit_config(path, quantization={"bits": 4}), "found none"),
    "an adapter alone": (
        lambda path: only_adapter(path, base_model_name_or_path="acme/base-7b", peft_type="LORA"),
        "found only an adapter .*'LORA'.* for the base model 'acme/base-7b': name that model, and this with --adapter",
    ),
    "an adapter with a config": (
        lambda path: only_adapter(path, "config.json", base_model_name_or_path="b", peft_type="IA3"), "base model 'b'",
    ),
    "an adapter of nothing": (lambda path: only_adapter(path, base_model_name_or_path=None), "does not say which"),
    "a damaged adapter": (
        lambda path: (only_adapter(path), (path / "adapter_config.json").write_text("[]")), "expected a JSON object",
    ),
    "nothing at all": (shutil.rmtree, "expected a checkpoint directory with a config.json"),
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


def test_parameters_without_elements_survive(tmp_path: Path) -> None:
    config = T.BertConfig(**MODELS["bert"][2], type_vocab_size=0)
    T.BertForMaskedLM(config).save_pretrained(tmp_path / "in")
    reference = load(T.BertForMaskedLM, tmp_path / "in")
    assert 0 in (empty := reference.get_parameter("bert.embeddings.token_type_embeddings.weight")).shape
    for dtype in (torch.float32, torch.bfloat16):
        model = distzo2.from_pretrained(tmp_path / "in", dtype=dtype)
        distzo2.save_pretrained(model, tmp_path / "out", overwrite=True)
        assert {(t.dtype, t.shape) for t in stored(tmp_path / "out").values() if not t.numel()} == {
            (dtype, empty.shape)
        }
        assert_same_weights(load(T.BertForMaskedLM, tmp_path / "out"), reference.to(dtype))
    model = distzo2.offload(reference)  # a transformers model that came from no checkpoint of ours
    distzo2.save_pretrained(model, tmp_path / "plain")
    assert stored(tmp_path / "plain").keys() == stored(tmp_path / "out").keys()


@pytest.mark.parametrize("name", ["opt", "mixtral", "t5"])
def test_outputs_have_names_whatever_the_config_says(tmp_path: Path, name: str) -> None:
    make(name, tmp_path)
    ids = torch.arange(12).reshape(2, 6) + 3
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    reference = load(getattr(T, MODELS[name][0]), tmp_path).eval()
    with torch.no_grad():
        expected = reference(**inputs).logits
    edit_config(tmp_path, return_dict=False)
    model = distzo2.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected) and torch.equal(model(**inputs)[0], expected)
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "decoder_start_token_id": 0}
    assert torch.equal(model.generate(ids, **generate), reference.generate(ids, **generate))
    distzo2.save_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["return_dict"] is False


def test_a_model_rebuilt_in_edit_is_no_longer_the_checkpoints(tmp_path: Path) -> None:
    model = distzo2.from_pretrained(make_checkpoint(tmp_path / "in"))
    with distzo2.edit(model):
        inner = model.model.layers[0].mlp
        inner.up_proj = nn.Linear(inner.up_proj.in_features, inner.up_proj.out_features, bias=False)
    opt = distzo2.ZOSGD(model, lr=1e-3, journal=tmp_path / "journal.jsonl")
    assert opt.journal.header["base"]["files"] == {} and opt.journal.header["map"] is None
    opt.close()
    distzo2.save_pretrained(model, tmp_path / "out")
    saved = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert_same_tensors(saved, model.state_dict())
