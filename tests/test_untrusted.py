"""Journals and checkpoints from anyone: they run no code, write nowhere else, and take no more memory than their bytes
account for."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from journal_cases import make_entry, make_test_header
from safetensors.torch import load_file, save_file
from test_replay import make_llama, make_table, make_updates, named_weights, write_run

import distzo2
from distzo2.checkpoint_config import check_config_file
from distzo2.checkpoint_files import CheckpointFiles
from distzo2.data import load_tokenizer
from distzo2.journal import Journal, JournalError, StepEntry, make_header, read_journal
from distzo2.journal_audit import audit_journal
from distzo2.journal_line import MAX_HEADER_BYTES, MAX_STEP_BYTES, seal_line
from distzo2.metrics import peak_bytes
from distzo2.pickle_records import read_records
from distzo2.replay import digest_checkpoint, replay
from distzo2.safetensors_io import MAX_SMALL_HEADER_BYTES, CheckpointError, SafetensorsFile
from distzo2.torch_archive import TorchArchive

ROOT = Path(__file__).resolve().parent.parent
PER_BYTE = (
    40  # of memory for each byte of JSON: `{},` makes a dictionary and a place for it in a list, twice for a moment
)


def refused(read: Callable[[], Any], kind: type[Exception] | tuple[type[Exception], ...], reason: str = "") -> int:
    """Checks that `read` raises an error of one short line; returns the most memory that python took meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert reason in text and "\n" not in text and len(text) < 2000, text[:3000]
    return peak


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


def archive_of(path: Path, stream: bytes, members: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/byteorder", "little")
        for name, content in (members or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


TOUCH = b"X\x0c\x00\x00\x00touch it-ran"
STREAMS = {
    "reduce": b"\x80\x02cos\nsystem\n" + TOUCH + b"\x85R.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + TOUCH + b"\x85R.",
    "inst": b"(" + TOUCH + b"ios\nsystem\n.",
    "obj": b"(cos\nsystem\n" + TOUCH + b"o.",
    "newobj": b"\x80\x02cos\nsystem\n" + TOUCH + b"\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n" + TOUCH + b"\x85}\x92.",
    "builtin eval": b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
    "dotted": b"\x80\x04\x8c\x0btorch._utils\x8c\x14_rebuild_tensor_v2.x\x93)R.",
    "extension": b"\x80\x02\x82\x01.",
    "build on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "build on a dict": b"\x80\x02}}b.",
    "arguments for a dict": b"\x80\x02ccollections\nOrderedDict\n]]a\x85R.",
    "call of a value": b"\x80\x02K\x01)R.",
    "text id": b"Pabc\n.",
    "append to a tuple": b"\x80\x02)K\x01a.",
    "items of a list": b"\x80\x02]K\x01K\x01s.",
    "list as key": b"\x80\x02}]K\x01s.",
    "tuple as key": b"\x80\x02})K\x01s.",
    "no mark": b"\x80\x02K\x01t.",
    "empty stack": b"\x80\x02R.",
    "short tuple": b"\x80\x02K\x01\x87.",
    "unknown memo": b"\x80\x02h\x07.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "long text": b"\x80\x02X\xff\xff\xff\x7fab.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7fab.",
    "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00ab.",
    "not a dictionary": b"\x80\x02K\x01.",
    "storage of no kind": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x01tQ.",
}


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


def test_a_pickle_takes_memory_in_proportion_to_its_length(tmp_path: Path) -> None:
    def read(stream: bytes) -> Any:
        return read_records(stream, lambda function, arguments: None, lambda pid: None)

    # One instruction makes the standard memo as long as it says: 32 GiB for these six bytes.
    assert read(b"\x80\x02}r\xff\xff\xff\x7f.") == {}
    # Tuples of tuples of one tuple: 2^60 items to whoever prints or compares them.
    laughs = b"\x80\x02)" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60))
    for end in (b"Q.", b".", b"}q\x7f0h\x7fh\x3bK\x01s."):
        path = archive_of(tmp_path / "pytorch_model.bin", laughs + end)
        assert refused(lambda path=path: TorchArchive(path), CheckpointError) < 1 << 20
    # What torch itself writes is read, with the same values as torch reads.
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    for content in (values, torch.nn.Linear(2, 3).state_dict(), torch.nn.ParameterDict(values).state_dict()):
        for protocol in (2, 3, 4, 5):
            torch.save(content, path, pickle_protocol=protocol)
            with TorchArchive(path) as file:
                assert file.tensors.keys() == content.keys()
                for name, value in content.items():
                    out = torch.empty_like(value)
                    file.read(name, out)
                    assert torch.equal(out, value)


TENSOR = (
    b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ%s%s%s\x89}tRs."
)


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


# No more memory than the bytes account for


def sealed(record: bytes) -> bytes:
    return seal_line(record, None)[0]


HOSTILE_VALUES = {
    "empty lists": b"[" + b"[]," * 30_000 + b"[]]",
    "empty objects": b"[" + b"{}," * 30_000 + b"{}]",
    "floats": b"[" + b"1e1," * 25_000 + b"1]",
    "texts": b"[" + b'"\\u00e9x",' * 10_000 + b"1]",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(10_000)) + b"}",
    "nested": b"[" * 50_000 + b"]" * 50_000,
    "nested objects": b'{"a":' * 20_000 + b"0" + b"}" * 20_000,
    "a long number": b"9" * 100_000,
    "numbers": b"[" + b",".join(b"9" * 4000 for _ in range(25)) + b"]",
    "a long text": b'"' + b"x" * 100_000 + b'"',
    "infinity": b"1e400",
}


@pytest.mark.parametrize("case", HOSTILE_VALUES)
def test_a_journal_takes_memory_in_proportion_to_its_length(tmp_path: Path, case: str) -> None:
    value = HOSTILE_VALUES[case]
    path = tmp_path / "journal.jsonl"
    good = Journal.create(path, make_test_header())
    good.close()
    header = path.read_bytes()
    body = make_entry(0).to_record()
    for key in (b'"terms":', b'"losses":', b'"groups":', b'"eps":', b'"tokens":', b'"skipped":'):
        begin = body.index(key)
        record = body[:begin] + key + value + b',"' + body[begin + 1 :]  # the key is there twice, or
        path.write_bytes(header + sealed(record) + b"\n")
        assert refused(lambda: read_journal(path), JournalError) < PER_BYTE * len(record) + (1 << 20)
    record = header[: header.index(b',"crc"')]
    for key in ("table", "groups", "options", "base", "purposes", "seed"):
        text = json.loads(header)
        text.pop("crc")
        text[key] = "HERE"
        record = json.dumps(text, separators=(",", ":")).encode().replace(b'"HERE"', value)[:-1]
        path.write_bytes(sealed(record))
        if (key, case) in (("options", "keys"), ("groups", "empty objects")):
            assert read_journal(path).entries == []  # these may be anything of the kind
            continue
        assert refused(lambda: read_journal(path), JournalError) < PER_BYTE * len(record) + (1 << 20)
        assert audit_journal(path).findings


def test_a_line_without_an_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.create(path, make_test_header()).close()
    header = path.read_bytes()
    for content, limit in ((b"", MAX_HEADER_BYTES), (header, MAX_STEP_BYTES)):
        with path.open("wb") as file:
            file.write(content)
            file.truncate(1 << 30)  # a hole: one line of zeros, a gibibyte long
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        assert refused(lambda: read_journal(path), JournalError) < 3 * limit + (1 << 20)
    assert audit_journal(path).findings


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
        {"dtype": "float64"},
        {"dtype": "Tensor"},
        {"dtype": "x" * 100_000},
        {"name": "x" * 100_000},
        {"noise": ["normal"]},
        {"noise": {}},
        {"shape": [2**62, 2**62, 96], "stride": [1, 1, 1]},
        {"shape": [2**63, 32]},
        {"stride": [-1, 1]},
        {"index": [0]},
        {"group": {}},
    ],
)
def test_a_table_that_is_not_the_bases_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = make_llama(tmp_path / "base")
    table = make_table(named_weights(base))
    header = make_header(seed=0, base=digest_checkpoint(base), table=table, groups=[{}, {}])
    header["table"][0] |= changes
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(sealed(json.dumps(header).encode()[:-1]) + make_entry(0).to_line())
    refused(lambda: replay(base, journal, tmp_path / "out", progress=False), (JournalError, CheckpointError))
    assert not (tmp_path / "out").exists()


def raw_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize("case", HOSTILE_VALUES)
def test_a_safetensors_header_takes_memory_in_proportion_to_its_length(tmp_path: Path, case: str) -> None:
    value = HOSTILE_VALUES[case]
    for header in (
        b'{"t":%s}' % value,
        b'{"t":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}' % value,
        b'{"t":{"dtype":"F32","shape":[1],"data_offsets":%s}}' % value,
        b'{"t":{"dtype":%s,"shape":[1],"data_offsets":[0,4]}}' % value,
        b'{"__metadata__":%s,"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}' % value,
    ):
        path = raw_file(tmp_path / "model.safetensors", header, bytes(4))
        assert refused(lambda path=path: SafetensorsFile(path), CheckpointError) < PER_BYTE * len(header) + (1 << 20)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**62, 4], [0, 4]),
        ([2**32, 2**32], [0, 0]),
        ([2**61], [0, 4]),
        ([2**61], [0, 2**63]),
        ([2**64], [0, 0]),
        ([0, 2**62, 2**62], [0, 0]),
        ([1] * 65, [0, 4]),
        ([1], [2**62, 2**62 + 4]),
        ([1], [-4, 0]),
    ],
)
def test_shapes_beyond_the_file_are_refused(tmp_path: Path, shape: list[int], offsets: list[int]) -> None:
    header = json.dumps({"t": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    path = raw_file(tmp_path / "model.safetensors", header, bytes(4))
    assert refused(lambda: SafetensorsFile(path), CheckpointError, "model.safetensors") < 1 << 20


def test_a_header_is_not_longer_than_its_tensors_warrant(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "model.safetensors", b"{" + b" " * MAX_SMALL_HEADER_BYTES + b"}")
    assert refused(lambda: SafetensorsFile(path), CheckpointError, "it announces a header of") < 1 << 20
    path = raw_file(tmp_path / "model.safetensors", b"{}", length=2**63 + 5)
    assert refused(lambda: SafetensorsFile(path), CheckpointError) < 1 << 20
    # Of a file of a gibibyte (a hole), it may be as long as 1/32 of it.
    header = json.dumps({"t": {"dtype": "U8", "shape": [1 << 30], "data_offsets": [0, 1 << 30]}}).encode()
    raw_file(path, header + b" " * (5 << 20))
    os.truncate(path, 8 + len(header) + (5 << 20) + (1 << 30))
    with SafetensorsFile(path) as file:
        assert file.tensors["t"].num_bytes == 1 << 30


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000"),
        ({"num_hidden_layers": 500}, "at most 256"),
        ({"text_config": {"n_layer": 10**8}}, "n_layer is"),
        ({"depths": [2, 10**8]}, "depths is"),
        ({"num_local_experts": 10**8}, "num_local_experts is"),
    ],
)
def test_a_configuration_of_more_parts_than_the_checkpoint_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    assert refused(lambda: distzo2.from_pretrained(base), CheckpointError, reason) < 64 << 20


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_labels": 20_000_000}, "num_labels is 20000000, at most 65536"),
        ({"vision_config": {"num_labels": 20_000_000}}, "num_labels is"),
        (
            {"model_type": "gpt_neo", "attention_types": [[["global"], 200_000_000]], "num_layers": 2},
            "attention_types is 200000000, at most",
        ),
        ({"model_type": "albert", "inner_group_num": 20_000}, "inner_group_num is 20000, at most 256"),
        ({"rope_parameters": {"something_new": [[[1, [{"7": 257}]]]]}}, "something_new is 257"),
    ],
)
def test_every_number_of_a_configuration_is_bounded(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    assert refused(lambda: distzo2.from_pretrained(base), CheckpointError, reason) < 64 << 20
    (base / "tokenizer_config.json").write_text("{}")
    if "num_labels" in reason:
        refused(lambda: load_tokenizer(base), CheckpointError, reason)
    widths = {"num_labels": 1 << 16, "label2id": {"hidden": 10**6}, "n_inner": 10**6, "some_new_dims": [10**6]}
    (base / "config.json").write_text(json.dumps(config | widths))
    distzo2.from_pretrained(base)


def test_numbers_that_multiply_are_bounded_by_the_modules_they_make(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    albert = {"model_type": "albert", "num_hidden_groups": 250, "inner_group_num": 250}
    (base / "config.json").write_text(json.dumps(albert | {"architectures": ["AlbertForMaskedLM"]}))
    with pytest.raises(CheckpointError, match="a model of more than 4096 modules"):
        distzo2.from_pretrained(base)


def test_no_model_of_transformers_is_refused_for_its_numbers(tmp_path: Path) -> None:
    """The default configuration of each model type, with the tensors of a small checkpoint."""
    path, num_checked = tmp_path / "config.json", 0
    for name in transformers.CONFIG_MAPPING:
        try:
            text = transformers.CONFIG_MAPPING[name]().to_json_string(use_diff=False)
        except Exception:  # it needs arguments, or what is not installed
            continue
        path.write_text(text)
        check_config_file(path, 100)
        num_checked += 1
    assert num_checked > 300


def test_notes_of_a_checkpoints_author_are_not_its_numbers(tmp_path: Path) -> None:
    """No model reads them."""
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    notes = {"num_parameters": 7_000_000_000, "released": 20261123, "training": {"gpus": 4096, "flop": 10**23}}
    (base / "config.json").write_text(json.dumps(config | notes))
    distzo2.from_pretrained(base)
    (base / "config.json").write_text(json.dumps(config | notes | {"num_hidden_layers": 70_000}))
    refused(lambda: distzo2.from_pretrained(base), CheckpointError, "num_hidden_layers is 70000")


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


def test_entries_keep_what_a_line_says_and_no_more() -> None:
    """Every member of a step, each replaced by values of every kind: refused, or written again as it was."""
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        0.0,
        1.5,
        2**64,
        "x",
        "0x0.0p+0",
        "nan",
        [],
        [[]],
        [0],
        {},
        {"a": 1},
        [[[]]],
    ]
    record = json.loads(make_entry(0).to_record() + b"}")
    kept = 0
    for key in record:
        for value in values:
            line = sealed(json.dumps(record | {key: value}, separators=(",", ":")).encode()[:-1])
            try:
                entry = StepEntry.from_line(line)
            except JournalError:
                continue
            kept += 1
            assert entry.to_line() == line
    assert kept >= 10
