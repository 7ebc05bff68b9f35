"""Checkpoints of unknown origin run no code, write nowhere else, and take memory in proportion to their bytes."""

from __future__ import annotations

import ast
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hostile_files import STREAMS, TENSOR, archive_of, raw_file, refused
from journal_cases import make_entry
from replay_cases import make_llama, make_table, make_updates, named_weights, write_run
from safetensors.torch import load_file, save_file

import distzo2
from distzo2.checkpoint.reading import CheckpointFiles, digest_checkpoint
from distzo2.checkpoint.tensor_files import MAX_SMALL_HEADER_BYTES, CheckpointError, TensorFile
from distzo2.models.replay import replay
from distzo2.record.header import make_header
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import JournalError, seal_line
from distzo2.run.metrics import peak_bytes

ROOT = Path(__file__).resolve().parents[2]


# No code


FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {("np", "load"), ("numpy", "load")}


def test_no_source_can_unpickle_or_evaluate() -> None:
    """Pickles are read by `torch.load(weights_only=True)` alone, YAML by `yaml.safe_load` alone."""
    sources = [*(ROOT / "python").rglob("*.py"), *(ROOT / "distzo2_core").rglob("*.py")]
    assert len(sources) > 50
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [node.module or ""]
                assert "load" not in {alias.name for alias in node.names} and node.module != "yaml", (path, node.lineno)
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in CALLS, (path, node.lineno)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in METHODS, (path, node.lineno)
                assert node.value.id != "yaml" or node.attr in ("safe_load", "YAMLError"), (path, node.lineno)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert options.get("weights_only") == "True", path


@pytest.mark.parametrize("case", STREAMS)
def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive_of(tmp_path / "pytorch_model.bin", STREAMS[case])
    assert refused(lambda: TensorFile(path), CheckpointError) < 1 << 20
    assert not Path("it-ran").exists()


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
    with TensorFile(good) as file:
        assert file.tensors["w"].shape == (2,)
    bad = archive_of(tmp_path / "bad.bin", TENSOR % (numel, offset, shape, strides), {"data/0": bytes(8)})
    refused(lambda: TensorFile(bad), CheckpointError)


def test_a_description_takes_memory_in_proportion_to_its_length(tmp_path: Path) -> None:
    """What weights_only alone would run: memo entries without end, a bytearray and a tensor of any length."""
    laughs = b"\x80\x02)" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60))  # tuples of 2^60 items
    streams = {
        "a memo of 2147483647 entries": b"\x80\x02}r\xff\xff\xff\x7f.",
        "builtins.bytearray has no place": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.",
        "torch.Tensor has no place": b"\x80\x02ctorch\nTensor\n\x8a\x06\0\0\0\0\0\x01\x85R.",
        "pytorch_model.bin": laughs + b".",
    }
    for reason, stream in streams.items():
        path = archive_of(tmp_path / "pytorch_model.bin", stream)
        assert refused(lambda path=path: TensorFile(path), CheckpointError, reason) < 1 << 20
    for end in (b"Q.", b"}q\x7f0h\x7fh\x3bK\x01s."):
        path = archive_of(tmp_path / "pytorch_model.bin", laughs + end)
        assert refused(lambda path=path: TensorFile(path), CheckpointError) < 1 << 20


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
    (base / "tokenizer.json").write_text("plain")
    (base / "tokenizer_key").symlink_to(secret / "key")
    (base / "additional_chat_templates").symlink_to(secret)
    (base / "tokenizer_link").symlink_to(secret)
    os.mkfifo(base / "tokenizer_pipe")
    journal = write_run(tmp_path / "journal.jsonl", base, make_table(weights), make_updates())
    before = {name: content for name, content in tree(tmp_path).items()}
    replay(base, journal, tmp_path / "out" / "deep", progress=False)
    after = tree(tmp_path)
    new = {name for name in after if name not in before}
    assert new == {"out/deep/model.safetensors", "out/deep/tokenizer.json"}
    assert all(after[name] == content for name, content in before.items())
    assert load_file(tmp_path / "out" / "deep" / "model.safetensors").keys() == weights.keys()


# No more memory than the bytes account for


def test_a_header_must_be_in_proportion_to_the_base(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    journal = tmp_path / "journal.jsonl"
    header = make_header(
        seed=0,
        base=digest_checkpoint(base),
        table=make_table(named_weights(base)),
        groups=[{}, {}],
        options={"x": [0] * (MAX_SMALL_HEADER_BYTES // 2)},
    )
    Journal.create(journal, header).close()
    read_journal(journal)
    peak = refused(lambda: replay(base, journal, tmp_path / "out", progress=False), JournalError, "line 1")
    assert peak < 3 * MAX_SMALL_HEADER_BYTES and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "load"},
        {"name": "x" * 100_000},
        {"shape": [2**62, 2**62, 96], "stride": [1, 1, 1]},
        {"stride": [-1, 1]},
        {"group": {}},
    ],
)
def test_a_table_that_is_not_the_bases_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = make_llama(tmp_path / "base")
    table = make_table(named_weights(base))
    header = make_header(seed=0, base=digest_checkpoint(base), table=table, groups=[{}, {}])
    header["table"][0] |= changes
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(seal_line(json.dumps(header).encode()[:-1]) + make_entry(0).to_line())
    refused(lambda: replay(base, journal, tmp_path / "out", progress=False), (JournalError, CheckpointError))
    assert not (tmp_path / "out").exists()


def test_a_header_may_be_long_in_a_long_file(tmp_path: Path) -> None:
    """Of a gibibyte (a hole), it may be as long as 1/32 of it."""
    path = tmp_path / "model.safetensors"
    header = json.dumps({"t": {"dtype": "U8", "shape": [1 << 30], "data_offsets": [0, 1 << 30]}}).encode()
    path.write_bytes(raw_file(header + b" " * (5 << 20), b""))
    os.truncate(path, path.stat().st_size + (1 << 30))
    with TensorFile(path) as file:
        assert file.tensors["t"].num_bytes == 1 << 30


def test_numbers_that_multiply_are_bounded_by_the_modules_they_make(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    albert = {"model_type": "albert", "num_hidden_groups": 250, "inner_group_num": 250}
    (base / "config.json").write_text(json.dumps(albert | {"architectures": ["AlbertForMaskedLM"]}))
    with pytest.raises(CheckpointError, match="a model of more than 4096 modules"):
        distzo2.from_pretrained(base)


def test_buffers_are_in_proportion_to_the_checkpoint(tmp_path: Path) -> None:
    """GPT-Neo has a mask of positions by positions in each layer: here of 400 MB, for a checkpoint of 80 kB."""
    config = transformers.GPTNeoConfig(
        vocab_size=8, hidden_size=1, num_heads=1, num_layers=1, attention_types=[[["global"], 1]],
        intermediate_size=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    distzo2.from_pretrained(tmp_path)
    most = 20_000
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.wpe.weight"] = torch.zeros(most, 1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": most}))
    before = peak_bytes()
    refused(lambda: distzo2.from_pretrained(tmp_path), CheckpointError, "config.json asks for ")
    assert peak_bytes() - before < most * most // 4


def test_files_of_settings_are_bounded(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    good = (base / "config.json").read_bytes()
    for content in (b"[" * 100_000, b"[]", b"{", b"\xff", b" " * (17 << 20), b'{"a":' * 5000 + b"1" + b"}" * 5000):
        (base / "config.json").write_bytes(content)
        assert refused(lambda: distzo2.from_pretrained(base), CheckpointError, "config.json") < 64 << 20
    (base / "config.json").write_bytes(good)
    os.rename(base / "model.safetensors", base / "x.safetensors")
    index = base / "model.safetensors.index.json"
    for content in (b"[" * 100_000, b"[]", b"{}", b'{"weight_map":[]}', b'{"weight_map":{"a":1}}', b" " * (17 << 20)):
        index.write_bytes(content)
        assert refused(lambda: CheckpointFiles(base), CheckpointError, "index.json") < 64 << 20
