"""Frozen blocks on disk stream from the checkpoint's own files, and are not copied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from same_bits import assert_same_tensors
from tiny_text import make_checkpoint
from transformers import AutoModelForCausalLM

import distzo2
from distzo2.errors import DistZO2Error

IDS = torch.arange(2, 26).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in one file, in shards, and pickled."""
    root = tmp_path_factory.mktemp("own")
    kinds = {"one": make_checkpoint(root / "one", layers=3)}
    model = AutoModelForCausalLM.from_pretrained(kinds["one"])
    kinds["shards"] = root / "shards"
    model.save_pretrained(kinds["shards"], max_shard_size="40KB")
    kinds["bin"] = root / "bin"
    model.config.save_pretrained(kinds["bin"])
    torch.save(model.state_dict(), kinds["bin"] / "pytorch_model.bin")
    return kinds


def load(path: Path, weights: str, directory: Path, trained: str, **options):
    def prepare(model, checkpoint_map):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        return model, checkpoint_map

    return distzo2.from_pretrained(path, weights=weights, directory=directory, prepare=prepare, **options)


def train(model, steps: int = 3) -> list[float]:
    opt = distzo2.ZOSGD(model, lr=1e-1, eps=1e-2, seed=3, num_probes=2)
    return [opt.step(lambda: model(input_ids=IDS, labels=IDS).loss).item() for _ in range(steps)]


@pytest.mark.parametrize("kind", ["one", "shards", "bin"])
@pytest.mark.parametrize("trained", ["norm", "layers.2."])
def test_it_trains_with_the_bits_of_host_memory(base, kind: str, trained: str, tmp_path: Path) -> None:
    options = {"dtype": torch.float32, "compute_dtype": torch.bfloat16} if kind == "shards" else {}
    there = load(base[kind], "host", tmp_path, trained, **options)
    losses, expected = train(there), distzo2.state_dict(there)
    model = load(base[kind], "disk", tmp_path, trained, **options)
    runtime = distzo2.runtime_of(model)
    fixed = [copy for copy in runtime.weights.copies if copy.is_fixed]
    assert [copy.unit.name for copy in fixed] == [f"model.layers.{i}" for i in range(2 if "2" in trained else 3)]
    assert train(model) == losses
    assert_same_tensors(distzo2.state_dict(model), expected)
    written = sum(copy.num_bytes for copy in runtime.weights.copies if copy.block >= 0 and not copy.is_fixed)
    assert bool(written) == ("2" in trained)  # the norms are resident
    assert runtime.weights.stats()["bytes_down"] == 3 * written


@pytest.mark.parametrize("kind", ["one", "gguf"])
def test_what_was_parsed_is_what_streams(base, kind: str, tmp_path: Path) -> None:
    """A file that is replaced, written or removed between its header being read and its blocks being opened."""
    if kind == "gguf":
        tiny_gguf = pytest.importorskip("tiny_gguf")
        path = file = tiny_gguf.write(tmp_path / "x.gguf", "llama", tiny_gguf.make_model("llama"), "Q4_0")
    else:
        path, file = tmp_path / "copy", tmp_path / "copy/model.safetensors"
        shutil.copytree(base["one"], path)
    data = file.read_bytes()

    def replaced() -> None:
        (tmp_path / "new").write_bytes(data)
        os.replace(tmp_path / "new", file)

    for change, reason in (
        (replaced, "its inode was"),
        (lambda: file.write_bytes(data + bytes(8)), f"its length in bytes was {len(data)} when it was opened and is"),
        (lambda: os.utime(file, ns=(0, 5)), r"its time of change in ns was \d+ when it was opened and is 5: nothing"),
        (file.unlink, "cannot be opened"),
    ):

        def prepare(model, checkpoint_map, change=change):
            change()
            return model.requires_grad_(False), checkpoint_map

        with pytest.raises(DistZO2Error, match=rf"{file.name}: {reason}"):
            distzo2.from_pretrained(path, weights="disk", directory=tmp_path, prepare=prepare)
        file.write_bytes(data)


def test_what_is_converted_is_copied(base, tmp_path: Path) -> None:
    """Where it is not a little of its block, as Gemma's norms are (test_packed.py)."""
    model = load(base["one"], "disk", tmp_path, "norm", dtype=torch.bfloat16)
    assert not any(copy.is_fixed for copy in distzo2.runtime_of(model).weights.copies)


def test_a_change_of_the_base_leaves_the_files_alone(base, tmp_path: Path) -> None:
    before = load_file(base["one"] / "model.safetensors")
    model = load(base["one"], "disk", tmp_path, "norm")
    with distzo2.edit(model):
        model.model.norm.weight.data += 1
    assert any(copy.is_fixed for copy in distzo2.runtime_of(model).weights.copies)
    model.load_state_dict(before, strict=False)  # the same weights
    other = before | {"model.layers.0.mlp.up_proj.weight": before["model.layers.0.mlp.up_proj.weight"] + 1}
    with pytest.raises(DistZO2Error, match=r"unit model\.layers\.0 is packed, or streams from its checkpoint's files"):
        model.load_state_dict(other, strict=False)
    with distzo2.edit(model):
        model.model.layers[0].mlp.up_proj.weight.data += 1
    assert not any(copy.is_fixed for copy in distzo2.runtime_of(model).weights.copies)
    changed = {"model.layers.0.mlp.up_proj.weight"}
    expected = {name: value + (name in changed) for name, value in before.items()}
    found = distzo2.state_dict(model)
    assert_same_tensors({name: found[name] for name in expected}, expected)
    assert_same_tensors(load_file(base["one"] / "model.safetensors"), before)
