"""Checkpoints written: every element in its place, nothing lost when it fails or is killed, other files untouched."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import assert_same_weights, edit_config, load, make, write_all
from safetensors.torch import load_file, save_file

import distzo2
from distzo2.checkpoint import reading, writing
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.reading import INDEX_FILE, SINGLE_FILE, CheckpointFiles
from distzo2.checkpoint.symbols import LayoutTensor, Trace
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.checkpoint.writing import HIDDEN, CheckpointWriter, tokenizer_files
from distzo2.models.pretrained import open_checkpoint


@pytest.mark.parametrize("seed", range(10))
def test_writing_runs_the_pieces_backwards(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 64)
    monkeypatch.setattr(writing, "CHUNK_BYTES", 64)
    (tmp_path / "in").mkdir()
    stored = {"x": torch.randn(8, 6), "y": torch.randn(4, 6, 2), "z": torch.randn(8, 6)}
    save_file(stored, tmp_path / "in" / "model.safetensors")
    files = CheckpointFiles(tmp_path / "in")
    trace = Trace([e.name for e in files.entries])
    x, y, z = (
        LayoutTensor(Layout.leaf(n, e.shape), e.dtype, trace)
        for n, e in sorted(enumerate(files.entries), key=lambda item: item[1].name)
    )
    # A split and transposed source, an interleaved one, and two joined, as in converted checkpoints.
    left, right = x.t().contiguous().split([2, 4])
    params = {
        "left": left,
        "joined": torch.cat([z.reshape(4, 2, 6).transpose(0, 1).reshape(8, 6), right.reshape(8, 4)], 1),
        "even": y.unbind(2)[0],
        "odd": y.unbind(2)[1].t(),
    }
    mapped = {n: MappedTensor(n, torch.float32, tuple(s.shape), s.where.pieces) for n, s in params.items()}
    plan = CheckpointMap(files.entries, mapped, files=files)
    order = list(params)
    rng.shuffle(order)
    with CheckpointWriter(plan, tmp_path / "out") as writer:
        for name in order:
            value = torch.empty(mapped[name].shape)
            plan.read(name, value)
            if rng.random() < 0.5:
                writer.write(name, value)
            else:
                middle = rng.randrange(1, len(value))
                writer.write(name, value[middle:], middle)
                writer.write(name, value[:middle])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys() and all(torch.equal(written[n], stored[n]) for n in stored)


def test_an_existing_checkpoint_is_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    reference = make("mixtral", source)
    _, checkpoint = open_checkpoint(source)
    write_all(checkpoint, reference, out, max_shard_bytes=50_000)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for target in (out, source):
        with pytest.raises(CheckpointError, match=r"already holds config\.json; name another directory or overwrite"):
            CheckpointWriter(checkpoint, target)
    with pytest.raises(CheckpointError, match="cannot be overwritten"):
        CheckpointWriter(checkpoint, source, overwrite=True)
    with pytest.raises(RuntimeError, match="stopped"), CheckpointWriter(checkpoint, out, overwrite=True) as writer:
        writer.write("lm_head.weight", reference.lm_head.weight.detach() * 2)
        raise RuntimeError("stopped")
    with (
        pytest.raises(CheckpointError, match="parameters were not written"),
        CheckpointWriter(checkpoint, out, overwrite=True) as writer,
    ):
        writer.write("lm_head.weight", reference.lm_head.weight.detach() * 2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_too_little_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("opt", tmp_path / "in")
    _, checkpoint = open_checkpoint(tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"too little room on its disk: .* needs \d+ bytes and 67108864 to spare, 1048576 are"
    ):
        CheckpointWriter(checkpoint, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a directory, got the file"):
        CheckpointWriter(checkpoint, tmp_path / "file" / "out")


def test_what_goes_along_is_the_checkpoints_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokenizers and the like are copied, also from the cache of a hub; other links lead nowhere."""
    source = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = source.parents[1] / "blobs"
    reference = make("opt", source)
    blobs.mkdir()
    (source / "additional_chat_templates").mkdir()
    edit_config(source, "generation_config.json", temperature=0.25, do_sample=True)
    own = ("tokenizer.json", "vocab.json", "chat_template.jinja", "spiece.model", "LICENSE",
           "additional_chat_templates/tools.jinja")  # fmt: skip
    for path in (*(source / name for name in own), tmp_path / "secret", blobs / "1234"):
        path.write_text(path.name)
    for name in ("README.md", "training_args.bin", "pytorch_model.bin", "secrets.txt"):
        (source / name).write_text(name)
    links = {"merges.txt": blobs / "1234", "vocab.own": "vocab.json", "vocab.txt": tmp_path / "secret",
             "vocab.up": blobs / "../../secret", "vocab.loop": "vocab.loop", "vocab.gone": "nowhere"}  # fmt: skip
    for name, target in links.items():
        (source / name).symlink_to(target)

    def saved(source: Path) -> set[str]:
        out = tmp_path / f"out-{source.name}"
        write_all(open_checkpoint(source)[1], reference, out)
        assert not any(path.is_symlink() for path in out.iterdir())
        assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.25
        return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}

    names = {*own, "merges.txt", "vocab.own", SINGLE_FILE, "config.json", "generation_config.json"}
    assert saved(source) == names
    told = [record.getMessage().partition(": left out")[0] for record in caplog.records]
    assert told == [str(source / f"vocab.{name}") for name in ("gone", "loop", "txt", "up")]
    assert saved(source.rename(tmp_path / "plain")) == names - {"merges.txt"}  # outside a cache, it leads elsewhere


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_weights_are_renamed_first_and_the_configuration_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is synced before it is renamed, and the names are synced after it."""
    reference = make("opt", tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    _, checkpoint = open_checkpoint(tmp_path / "in")
    out = tmp_path / "a" / "out"
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
    write_all(checkpoint, reference, out, max_shard_bytes=30_000)
    renamed = [Path(path).name for kind, path in calls if kind == "rename"]
    num_shards = len(list(out.glob("*.safetensors")))
    assert num_shards > 1 and all(name.endswith(".safetensors") for name in renamed[:num_shards])
    assert renamed[num_shards:] == ["generation_config.json", "tokenizer.json", INDEX_FILE, "config.json"]
    first = next(number for number, (kind, _) in enumerate(calls) if kind == "rename")
    synced = {path for _, path in calls[:first]}
    assert synced >= {str(out / HIDDEN / name) for name in renamed} | {str(out / HIDDEN)}
    assert synced >= {str(tmp_path), str(tmp_path / "a")}  # new directories
    assert calls[-1] == ("sync", str(out)) and calls[-4] == ("sync", str(out))  # at the end, and before the last two
    assert names_in(out) == set(renamed)


@pytest.mark.parametrize("shards", ["one to many", "many to one", "many to many"])
@pytest.mark.parametrize("fails_at", [0, 1, 2, -1, None])
def test_a_checkpoint_that_is_replaced_never_loads_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str, fails_at: int | None
) -> None:
    """A writer that ends between two renames leaves no config.json, or has written it last. Other files stay."""
    source, out = tmp_path / "in", tmp_path / "out"
    reference = make("opt", source)
    _, checkpoint = open_checkpoint(source)
    before, after = (100_000 if size == "one" else 30_000 for size in shards.split(" to "))
    write_all(checkpoint, reference, out, max_shard_bytes=before)
    others = {"notes.txt": "mine", "other.safetensors": "theirs", "pytorch_model.bin": "theirs"}
    for name, text in others.items():
        (out / name).write_text(text)
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(1)
    calls, rename = [], os.rename
    write_all(checkpoint, reference, tmp_path / "twin", max_shard_bytes=after)
    num_files = len(names_in(tmp_path / "twin"))

    def failing(*paths: Any) -> None:
        calls.append(paths)
        if fails_at is not None and len(calls) == fails_at % num_files + 1:
            raise OSError("the disk went away")
        rename(*paths)

    if fails_at is not None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", failing)
            with pytest.raises(OSError, match="went away"):
                write_all(checkpoint, reference, out, overwrite=True, max_shard_bytes=after)
        assert not (out / "config.json").exists() and (out / HIDDEN).exists()
        with pytest.raises(CheckpointError):
            open_checkpoint(out)
    write_all(checkpoint, reference, out, overwrite=True, max_shard_bytes=after)
    assert {name: (out / name).read_text() for name in others} == others
    assert names_in(out) == names_in(tmp_path / "twin") | others.keys()
    for name in others:
        (out / name).unlink()
    assert_same_weights(load(type(reference), out), reference)


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    reference = make("opt", tmp_path / "in")
    _, checkpoint = open_checkpoint(tmp_path / "in")
    out = tmp_path / "out"
    (out / HIDDEN).mkdir(parents=True)
    (out / HIDDEN / "config.json").write_text("half")
    (out / "model-00001-of-00003.safetensors").write_text("renamed before the kill")
    (out / ".distzo2-checkpoint-mine").mkdir()
    write_all(checkpoint, reference, out)
    assert names_in(out) == {SINGLE_FILE, "config.json", "generation_config.json", ".distzo2-checkpoint-mine"}
    assert_same_weights(load(type(reference), out), reference)
    # Weights that no writer of ours left, and a whole checkpoint, are not replaced.
    for name in ("other.safetensors", "config.json"):
        there = tmp_path / name
        (there / HIDDEN).mkdir(parents=True)
        (there / name).write_text("theirs")
        with pytest.raises(CheckpointError, match=f"already holds {name}"):
            CheckpointWriter(checkpoint, there)
        assert (there / HIDDEN).is_dir()


def test_parameters_that_do_not_make_whole_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"x": torch.randn(8, 6)}, tmp_path / "in" / SINGLE_FILE)
    files = CheckpointFiles(tmp_path / "in")
    rows = {name: Layout.leaf(0, (8, 6)).flat(6 * begin, 24) for name, begin in (("a", 0), ("b", 2), ("c", 4))}
    params = {name: MappedTensor(name, torch.float32, where.shape, where.pieces) for name, where in rows.items()}
    for names, reason in (("a", "hold 24 elements of its 48"), ("abc", "hold 72 elements of its 48")):
        plan = CheckpointMap(files.entries, {name: params[name] for name in names}, files=files)
        with pytest.raises(CheckpointError, match=f"'x' cannot be written: .* {reason}"):
            CheckpointWriter(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


TOKENIZERS: dict[str, tuple[str, ...]] = {  # a tokenizer's class, and files that it names
    "MarianTokenizer": ("source.spm", "target.spm", "target_vocab.json"),
    "PhobertTokenizer": ("bpe.codes",),
    "WhisperTokenizerFast": ("normalizer.json",),
    "ByT5Tokenizer": (),
    "NoSuchTokenizer": (),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_files_of_any_tokenizer_go_along(tmp_path: Path, kind: str) -> None:
    make("opt", tmp_path / "in")
    settings = {"tokenizer_class": kind, "words_file": "my.words", "eos_token": "notes.txt", "odd_file": "../secret"}
    settings |= {"n_file": 3, "x_file": "linked.words", "y_file": "config.json", "z_file": "model.safetensors"}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in (*TOKENIZERS[kind], "my.words", "notes.txt"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "secret").write_text("s")
    (tmp_path / "in" / "linked.words").symlink_to(tmp_path / "secret")
    distzo2.save_pretrained(distzo2.from_pretrained(tmp_path / "in"), tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    assert found == {*TOKENIZERS[kind], "my.words", "tokenizer_config.json"} | weights
    assert all((tmp_path / "out" / name).read_text() == name for name in (*TOKENIZERS[kind], "my.words"))


def test_a_tokenizer_named_by_the_configuration_alone(tmp_path: Path) -> None:
    make("bert", tmp_path / "in")
    edit_config(tmp_path / "in", tokenizer_class="BertJapaneseTokenizer")
    (tmp_path / "in" / "spiece.model").write_text("s")
    edit_config(tmp_path / "in", model_type="bert")
    assert {"vocab.txt", "spiece.model"} <= tokenizer_files(tmp_path / "in")
    assert tokenizer_files(tmp_path) == set()
