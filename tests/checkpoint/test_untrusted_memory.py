"""Journals and checkpoints from anyone take no more memory than their bytes account for."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hostile_files import archive_of, refused
from journal_cases import make_entry, make_test_header
from replay_cases import make_llama, make_table, named_weights
from safetensors.torch import load_file, save_file

import distzo2
from distzo2.checkpoint.checkpoint_config import check_config_file
from distzo2.checkpoint.checkpoint_files import CheckpointFiles
from distzo2.checkpoint.pickle_records import read_records
from distzo2.checkpoint.pretrained import digest_checkpoint
from distzo2.checkpoint.replay import replay
from distzo2.checkpoint.torch_archive import TorchArchive
from distzo2.checkpoint.weight_files import MAX_SMALL_HEADER_BYTES, CheckpointError, SafetensorsFile
from distzo2.record.entry import StepEntry
from distzo2.record.header import make_header
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import MAX_HEADER_BYTES, MAX_STEP_BYTES, JournalError, seal_line
from distzo2.run.metrics import peak_bytes
from distzo2.tasks.tokenize import load_tokenizer

PER_BYTE = (
    40  # of memory for each byte of JSON: `{},` makes a dictionary and a place for it in a list, twice for a moment
)


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
    body = make_entry(0).to_line().partition(b',"crc":')[0]
    for key in (b'"terms":', b'"losses":', b'"groups":', b'"eps":', b'"tokens":', b'"skipped":'):
        begin = body.index(key)
        record = body[:begin] + key + value + b',"' + body[begin + 1 :]  # the key is there twice, or
        path.write_bytes(header + seal_line(record) + b"\n")
        assert refused(lambda: read_journal(path), JournalError) < PER_BYTE * len(record) + (1 << 20)
    record = header[: header.index(b',"crc"')]
    for key in ("table", "groups", "options", "base", "purposes", "seed"):
        text = json.loads(header)
        text.pop("crc")
        text[key] = "HERE"
        record = json.dumps(text, separators=(",", ":")).encode().replace(b'"HERE"', value)[:-1]
        path.write_bytes(seal_line(record))
        if (key, case) in (("options", "keys"), ("groups", "empty objects")):
            assert read_journal(path).entries == []  # these may be anything of the kind
            continue
        assert refused(lambda: read_journal(path), JournalError) < PER_BYTE * len(record) + (1 << 20)


def test_a_line_without_an_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.create(path, make_test_header()).close()
    header = path.read_bytes()

    def read_untorn() -> None:
        raise JournalError(read_journal(path).torn)  # zeros after the header are what a power cut leaves

    for content, limit in ((b"", MAX_HEADER_BYTES), (header, MAX_STEP_BYTES)):
        with path.open("wb") as file:
            file.write(content)
            file.truncate(1 << 30)  # a hole: one line of zeros, a gibibyte long
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        assert refused(read_untorn, JournalError) < 6 * limit + (1 << 20)  # several lines at once


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
    journal.write_bytes(seal_line(json.dumps(header).encode()[:-1]) + make_entry(0).to_line())
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
    record = json.loads(make_entry(0).to_line())
    del record["crc"]
    kept = 0
    for key in record:
        for value in values:
            line = seal_line(json.dumps(record | {key: value}, separators=(",", ":")).encode()[:-1])
            try:
                entry = StepEntry.from_line(line)
            except JournalError:
                continue
            kept += 1
            assert entry.to_line() == line
    assert kept >= 10
