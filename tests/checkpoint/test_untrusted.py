"""Journals and checkpoints from anyone run no code and write nowhere else."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hostile_files import STREAMS, TENSOR, archive_of, refused
from journal_cases import make_test_header
from replay_cases import make_llama, make_table, make_updates, write_run
from safetensors.torch import load_file, save_file

import distzo2
from distzo2.checkpoint.checkpoint_files import CheckpointFiles
from distzo2.checkpoint.replay import replay
from distzo2.checkpoint.torch_archive import TorchArchive
from distzo2.checkpoint.weight_files import CheckpointError
from distzo2.record.journal import JournalError

ROOT = Path(__file__).resolve().parents[2]


# No code


FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch", "compile"), ("pickle", "loads")}


def test_no_source_can_unpickle_or_evaluate() -> None:
    sources = [*(ROOT / "python").rglob("*.py"), *(ROOT / "distzo2_core").rglob("*.py")]
    assert len(sources) > 50
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in CALLS, (path, node.lineno)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in METHODS - {("torch", "compile")}, (path, node.lineno)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


@pytest.mark.parametrize("case", STREAMS)
def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive_of(tmp_path / "pytorch_model.bin", STREAMS[case])
    assert refused(lambda: TorchArchive(path), CheckpointError) < 1 << 20
    assert not Path("it-ran").exists()


def test_the_pickles_that_would_run_code_do_where_they_are_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for case in ("reduce", "stack global", "inst", "obj"):
        pickle.loads(STREAMS[case])
        assert Path("it-ran").is_file(), case
        os.unlink("it-ran")


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides"),
    [
        (b"K\x02", b"K\x00", b"K\x03\x85", b"K\x01\x85"),
        (b"K\x02", b"K\x01", b"K\x02\x85", b"K\x01\x85"),
        (b"K\x02", b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"),
        (b"K\x02", b"K\x00", b"J\xfe\xff\xff\xff\x85", b"K\x01\x85"),
        (b"K\x02", b"K\x00", b"\x8a\x09" + b"\x00" * 8 + b"\x01\x85", b"K\x01\x85"),
        (b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"K\x00", b"K\x02\x85", b"K\x01\x85"),
        (b"K\x02", b"K\x00", b"K\x02\x85", b"K\x01K\x01\x86"),
        (b"K\x02", b"K\x00", b"(" + b"K\x01" * 65 + b"t", b"(" + b"K\x01" * 65 + b"t"),
        (b"K\x02", b"K\x00", b"K\x02", b"K\x01"),
        (b"N", b"K\x00", b"K\x02\x85", b"K\x01\x85"),
    ],
)
def test_a_tensor_that_is_not_in_its_storage_is_refused(
    tmp_path: Path, numel: bytes, offset: bytes, shape: bytes, strides: bytes
) -> None:
    good = archive_of(tmp_path / "pytorch_model.bin", TENSOR % (b"K\x02", b"K\x00", b"K\x02\x85", b"K\x01\x85"),
                      {"data/0": bytes(8)})  # fmt: skip
    with TorchArchive(good) as file:
        assert file.tensors["w"].shape == (2,)
    bad = archive_of(tmp_path / "bad.bin", TENSOR % (numel, offset, shape, strides), {"data/0": bytes(8)})
    refused(lambda: TorchArchive(bad), CheckpointError)


def test_code_beside_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))  # whoever would ask is told yes
    base = make_llama(tmp_path / "base")
    code = "import os\nos.system('touch it-ran')\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "custom_generate.py", "__init__.py"):
        (base / name).write_text(code)
    whole = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    for changes in (
        {"auto_map": auto_map, "model_type": "unheard-of", "architectures": ["X"]},
        {"auto_map": auto_map, "architectures": ["X"]},
        {"auto_map": auto_map, "model_type": "llama"},
        {"attn_implementation": "someone/kernels"},
        {"text_config": {"_attn_implementation": "someone/kernels"}},
    ):
        (base / "config.json").write_text(json.dumps(whole | changes))
        try:
            distzo2.from_pretrained(base)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert changes["auto_map"] and changes.get("architectures") is None  # the map has no say
        assert not Path("it-ran").exists()


# No path out of the directory


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", "x" * 300, "./x"]
)
def test_an_index_names_files_of_its_directory_only(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", base / "sub" / "x.safetensors"):
        save_file({"w": torch.ones(2)}, place)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refused(lambda: CheckpointFiles(base), CheckpointError, "index.json")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", "x" * 256])
def test_a_journal_names_files_of_its_base_only(name: str) -> None:
    base = {"name": "b", "files": {name: {"sha256": "0" * 64, "num_bytes": 0}}}
    refused(lambda: make_test_header(base=base), JournalError, "not a plain file name")


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_replay_writes_below_its_output_directory_only(tmp_path: Path) -> None:
    """Names of tensors, of parameters and of the files that go along may say anything; links lead nowhere."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    base = tmp_path / "base"
    base.mkdir()
    names = ("../../evil", "/tmp/evil", "a/../../b", "\n", "x\0y", "model.safetensors")
    weights = {name: torch.arange(6, dtype=torch.float32) + i for i, name in enumerate(names)}
    save_file(weights, base / "model.safetensors")
    (base / "tokenizer_plain").mkdir()
    (base / "tokenizer_plain" / "file").write_text("plain")
    (base / "tokenizer_plain" / "out").symlink_to(secret)
    (base / "tokenizer_plain" / "loop").symlink_to(base)
    (base / "tokenizer_plain" / "key").symlink_to(secret / "key")
    os.mkfifo(base / "tokenizer_plain" / "pipe")
    (base / "tokenizer_link").symlink_to(secret)
    os.mkfifo(base / "tokenizer_pipe")
    journal = write_run(tmp_path / "journal.jsonl", base, make_table(weights), make_updates())
    before = {name: content for name, content in tree(tmp_path).items()}
    replay(base, journal, tmp_path / "out" / "deep", progress=False)
    after = tree(tmp_path)
    new = {name for name in after if name not in before}
    assert new == {"out/deep/model.safetensors", "out/deep/tokenizer_plain/file"}
    assert all(after[name] == content for name, content in before.items())
    assert load_file(tmp_path / "out" / "deep" / "model.safetensors").keys() == weights.keys()
