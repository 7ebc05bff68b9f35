"""Checkpoints written: nothing is lost when it fails, and models that stream go out and come back bit for bit."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import MODELS, T, assert_same_weights, load, make, stored, write_all
from torch import nn

import distzo2
from distzo2.checkpoint import checkpoint_companions
from distzo2.checkpoint import writing as checkpoint_writer
from distzo2.checkpoint.checkpoint_files import SINGLE_FILE
from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.pretrained import load_weights, open_checkpoint
from distzo2.checkpoint.weight_files import CheckpointError
from distzo2.checkpoint.writing import CheckpointWriter


def test_an_existing_checkpoint_is_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    reference = make("mixtral", source)
    _, checkpoint = open_checkpoint(source)
    write_all(checkpoint, reference, out, max_shard_bytes=50_000)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for target in (out, source):
        with pytest.raises(CheckpointError, match=r"already holds config\.json"):
            CheckpointWriter(checkpoint, target)
    with pytest.raises(CheckpointError, match="cannot be overwritten"):
        CheckpointWriter(checkpoint, source, overwrite=True)
    with pytest.raises(RuntimeError, match="stopped"), CheckpointWriter(checkpoint, out, overwrite=True) as writer:
        writer.write_param("lm_head.weight", reference.lm_head.weight.detach() * 2)
        raise RuntimeError("stopped")
    with (
        pytest.raises(CheckpointError, match="parameters were not written"),
        CheckpointWriter(checkpoint, out, overwrite=True) as writer,
    ):
        writer.write_param("lm_head.weight", reference.lm_head.weight.detach() * 2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("fails_at", range(8))
def test_a_rename_that_fails_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    reference = make("opt", source)
    _, checkpoint = open_checkpoint(source)
    write_all(checkpoint, reference, out, max_shard_bytes=30_000)
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls, rename = [], os.rename

    def failing(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == fails_at + 1:
            raise OSError("the disk went away")
        rename(*paths)

    monkeypatch.setattr(checkpoint_writer.os, "rename", failing)
    with pytest.raises(OSError, match="went away"):
        write_all(checkpoint, reference, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # And without the failure no shard of before is left.
    write_all(checkpoint, reference, out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {SINGLE_FILE, "config.json", "generation_config.json", "notes.txt"}


def test_too_little_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("opt", tmp_path / "in")
    _, checkpoint = open_checkpoint(tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"too little room on its disk: .* needs \d+ bytes and 67108864 to spare, 1048576 are"
    ):
        CheckpointWriter(checkpoint, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a directory, got the file"):
        CheckpointWriter(checkpoint, tmp_path / "file" / "out")


def test_companions_go_along(tmp_path: Path) -> None:
    source = tmp_path / "in"
    reference = make("opt", source)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "spiece.model", "LICENSE"):
        (source / name).write_text(name)
    for name in ("README.md", "training_args.bin", "pytorch_model.bin", "secrets.txt"):
        (source / name).write_text(name)
    edit = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.25, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(edit))
    _, checkpoint = open_checkpoint(source)
    write_all(checkpoint, reference, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "spiece.model", "LICENSE",
        "config.json", "generation_config.json", SINGLE_FILE,
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25
    with (
        pytest.raises(ValueError, match="elements more than it still lacks"),
        CheckpointWriter(checkpoint, tmp_path / "twice") as writer,
    ):
        writer.write_param("model.decoder.final_layer_norm.bias", torch.ones(32))
        writer.write_param("model.decoder.final_layer_norm.bias", torch.ones(32))
    assert not (tmp_path / "twice").exists()


def test_what_goes_along_is_the_checkpoints_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Links out of the checkpoint, and more than goes with weights, are left out and told; a cache's links are not."""
    monkeypatch.setattr(checkpoint_companions, "MAX_BYTES", 1 << 20)
    cache = tmp_path / "models--x"
    source = cache / "snapshots" / "abc"
    reference = make("opt", source)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1234").write_text("merges")
    (tmp_path / "secret").write_text("secret")
    (source / "merges.txt").symlink_to("../../blobs/1234")
    (source / "vocab.json").write_text("{}")
    (source / "vocab.own").symlink_to("vocab.json")
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    (source / "vocab.up").symlink_to("../../blobs/../../secret")
    (source / "vocab.loop").symlink_to("vocab.loop")
    (source / "vocab.gone").symlink_to("nowhere")
    with (source / "LICENSE").open("wb") as file:
        file.truncate(3 << 30)
    os.rename(source / "generation_config.json", tmp_path / "generation.json")
    (source / "generation_config.json").symlink_to(tmp_path / "generation.json")
    _, checkpoint = open_checkpoint(source)
    write_all(checkpoint, reference, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    settings = {"config.json", "generation_config.json"}
    assert names == {"merges.txt", "vocab.json", "vocab.own", SINGLE_FILE, *settings}
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    told = [record.getMessage().partition(": left out")[0] for record in caplog.records]
    left_out = ("LICENSE", "vocab.gone", "vocab.loop", "vocab.txt", "vocab.up")
    assert told == [str(source / name) for name in left_out]
    # Outside a cache, the same links lead elsewhere.
    plain = tmp_path / "plain"
    os.rename(source, plain)
    (plain / "merges.txt").unlink()
    (plain / "merges.txt").symlink_to(cache / "blobs" / "1234")
    _, checkpoint = open_checkpoint(plain)
    write_all(checkpoint, reference, tmp_path / "out2")
    assert {path.name for path in (tmp_path / "out2").iterdir()} == names - {"merges.txt"}


@pytest.mark.parametrize("there", ["nothing", "an empty directory", "a link to one"])
def test_a_checkpoint_has_its_name_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    """Everything in it is synced before, and the names above it after."""
    reference = make("opt", tmp_path / "in")
    (tmp_path / "in" / "tokenizer_more").mkdir()
    (tmp_path / "in" / "tokenizer_more" / "file").write_text("more")
    _, checkpoint = open_checkpoint(tmp_path / "in")
    out = real = tmp_path / "a" / "b" / "out"
    if there != "nothing":
        out.mkdir(parents=True, mode=0o750)
    if there == "a link to one":
        out = tmp_path / "link"
        out.symlink_to(real)
    calls: list[tuple[str, str]] = []
    rename, fsync = os.rename, os.fsync

    def noted_rename(before: Any, after: Any) -> None:
        calls.append(("rename", str(after)))
        rename(before, after)

    def noted_fsync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    write_all(checkpoint, reference, out)
    assert [call for call in calls if call[0] == "rename"] == [("rename", str(real))]
    at = calls.index(("rename", str(real)))
    (hidden,) = {Path(path).parent for _, path in calls[:at] if path.endswith("config.json")} - {real}
    assert hidden.parent == real.parent and hidden.name.startswith(".distzo2-checkpoint-")
    synced = {path for _, path in calls[:at]}
    written = [path for path in real.rglob("*")]
    assert len(written) >= 4 and synced >= {str(hidden / path.relative_to(real)) for path in written} | {str(hidden)}
    assert ("sync", str(real.parent)) in calls[at:]
    if there == "nothing":
        assert {("sync", str(tmp_path)), ("sync", str(tmp_path / "a"))} <= set(calls[:at])
        assert real.stat().st_mode == (tmp_path / "in").stat().st_mode
    else:
        assert real.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in real.parent.iterdir()] == ["out"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    reference = make("opt", tmp_path / "in")
    _, checkpoint = open_checkpoint(tmp_path / "in")
    out = tmp_path / "out"
    ours = [".distzo2-checkpoint-0123456789abcdef", ".distzo2-checkpoint-fedcba9876543210"]
    theirs = [
        ".checkpoint-abc", ".distzo2-checkpoint-mine", ".distzo2-checkpoint-0123456789abcdef0", ".replaced-x",
        "x.distzo2-checkpoint-0123456789abcdef",
    ]  # fmt: skip
    for home, more in ((tmp_path, []), (out, ["notes.txt"])):
        for name in (*ours, *theirs, *more):
            (home / name).mkdir(parents=True)
            (home / name / "file").write_text("x")
        living = os.open(home / ours[1], os.O_RDONLY)
        fcntl.flock(living, fcntl.LOCK_EX)
        target = out if more else tmp_path / "new"
        write_all(checkpoint, reference, target)
        left = {path.name for path in home.iterdir()}
        assert left >= {*theirs, ours[1], *more} and ours[0] not in left
        assert (home / ours[1] / "file").exists()
        os.close(living)
    # An empty directory but for leftovers is as good as empty.
    (tmp_path / "last" / ours[0]).mkdir(parents=True)
    write_all(checkpoint, reference, tmp_path / "last")
    assert (tmp_path / "last" / "config.json").exists() and not (tmp_path / "last" / ours[0]).exists()


# With the runtime


@pytest.mark.parametrize("weights", ["host", "disk"])
@pytest.mark.parametrize("name", ["opt", "mixtral", "deepseek_v3"])
def test_from_pretrained_and_back(tmp_path: Path, name: str, weights: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    make(name, source)
    reference = load(getattr(T, MODELS[name][0]), source)
    model = distzo2.from_pretrained(source, weights=weights, directory=tmp_path)
    assert not model.training and model.distzo2_source.directory == source
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    runtime = distzo2.runtime_of(model)
    with runtime.access.writing(runtime.units[-1], keep=True) as views:
        changed = next(iter(views))
        views[changed].add_(1)
    distzo2.save_pretrained(model, out)
    expected = dict(reference.named_parameters())
    with torch.no_grad():
        expected[changed].add_(1)
    assert_same_weights(load(T.AutoModelForCausalLM, out), reference)
    with pytest.raises(CheckpointError, match="already holds"):
        distzo2.save_pretrained(model, out)
    distzo2.save_pretrained(model, out, overwrite=True, max_shard_bytes=30_000)
    assert_same_weights(load(T.AutoModelForCausalLM, out), reference)
    runtime.close()


def test_training_mode_is_a_choice(tmp_path: Path) -> None:
    make("opt", tmp_path)
    model = distzo2.from_pretrained(tmp_path, train=True)
    assert all(module.training for module in model.modules())


def test_a_model_from_elsewhere_is_saved_as_transformers_would(tmp_path: Path) -> None:
    reference = make("mixtral", tmp_path / "plain")
    model = distzo2.offload(make("mixtral"))
    distzo2.save_pretrained(model, tmp_path / "out")
    assert_same_weights(load(T.AutoModelForCausalLM, tmp_path / "out"), reference)
    assert load_weights(model, tmp_path / "plain") == []


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
    distzo2.offload(other, units=["conv", "first"])
    assert load_weights(other, tmp_path / "out") == []
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(other(images), model(images))
    with pytest.raises(CheckpointError, match=r"no tensor in the checkpoint fills 'extra.weight'"):
        other.extra = nn.Linear(2, 2)
        CheckpointMap.build(other, tmp_path / "out")
