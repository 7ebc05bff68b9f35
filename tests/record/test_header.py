"""The header of a journal: it holds what it should, or is refused with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from journal_cases import ROOT, make_entry, make_test_header

from distzo2.record.header import has_older_rules, table_difference, table_row, with_older_rules
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import JournalError, encode_line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 2**64}, "seed"),
        ({"base": {"name": "b", "files": {"../x": {"sha256": "0" * 64, "num_bytes": 0}}}}, "plain file name"),
        ({"base": {"name": "b", "files": {"x": {"sha256": "0" * 63, "num_bytes": 0}}}}, "SHA-256"),
        ({"base": {"name": "", "files": {}, "checksums": ["0" * 16] * 5}}, "no list of 2 checksums"),
        ({"base": {"name": "", "files": {}, "checksums": [0, 0]}}, "no list of 2 checksums"),
        ({"table": [table_row(1, "w", (2,), "float32", (1,), True, 0, "normal")]}, "index 1"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, 1, "normal")]}, "group"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, None, "normal")]}, "group"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, 0, "lowrank")]}, "lowrank"),
        ({"table": [table_row(0, "w", (-2,), "float32", (1,), True, 0, "normal")]}, "shape"),
        ({"data_hash": "0" * 63}, "data_hash '0+' is not a SHA-256"),
    ],
)
def test_header_refused_with_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(JournalError, match=reason):
        make_test_header(**changes)


@pytest.mark.parametrize(
    "change",
    [
        {"journal": 5},
        {"journal": 2},
        {"journal": 1},
        {"loss": "mean"},
        {"data_hash": "abc"},
        {"compute_dtype": 3},
        {"stored_formats": []},
        {"estimator_state": []},
        {"journal": True},
        {"noise": "n0"},
        {"rounding": ""},
        {"purposes": {"lowrank": 4}},
        {"purposes": {"normal": 1}},
        {"map": []},
        {"new": 1},
        {"seed": "0"},
    ],
)
def test_unknown_header_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(encode_line(make_test_header() | change, 1 << 20))
    for reader in (read_journal, Journal.open):
        with pytest.raises(JournalError, match=r"journal.jsonl: line 1: not the header"):
            reader(path)


def test_what_version_3_adds() -> None:
    header = make_test_header(data_hash="a" * 64)
    new = ("parents", "loss", "compute_dtype", "data_hash", "stored_formats", "estimator_state")
    assert [header[key] for key in new] == [[], "sum/count", "bfloat16", "a" * 64, None, None]
    mixed = [header["table"][0], header["table"][1] | {"dtype": "float32"}]
    assert make_test_header(table=mixed)["compute_dtype"] is None
    assert not has_older_rules(header)
    older = with_older_rules(header)
    assert older.keys() == header.keys() - set(new) | {"hash", "parents"} and older["journal"] == 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_journal_of_an_older_version_goes_on_in_it(version: int, tmp_path: Path) -> None:
    header = with_older_rules(make_test_header())
    if version == 1:
        header = {key: value for key, value in header.items() if key not in ("hash", "parents")} | {"journal": 1}
    path = tmp_path / "journal.jsonl"
    path.write_bytes(encode_line(header, 1 << 20) + make_entry(0).to_line())
    with Journal.open(path) as journal:
        assert journal.header == header and has_older_rules(header)
        for changes in ({"counts": [[3.0], [1.0]]}, {"unused": [[0, 1]]}):
            with pytest.raises(JournalError, match=f"counts and unused are not members of version {version}"):
                journal.append(make_entry(1, **changes))
        journal.append(make_entry(1))
    assert len(read_journal(path).entries) == 2
    path.write_bytes(path.read_bytes() + make_entry(2, unused=[[1, 1]]).to_line())
    with pytest.raises(JournalError, match=f"line 4: counts and unused are not members of version {version}"):
        read_journal(path)


def test_unused_parameters_are_those_of_the_table(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "journal.jsonl", make_test_header()) as journal:
        with pytest.raises(JournalError, match="unused is 2, expected an integer from 0 to 1"):
            journal.append(make_entry(0, unused=[[0, 2]]))
        journal.append(make_entry(0, unused=[[0, 1]], counts=[[0.0, 2.5], [4.0]], losses=[[1.0, 2.0], [3.0]]))
    (entry,) = read_journal(tmp_path / "journal.jsonl").entries
    assert entry.unused == [[0, 1]] and entry.counts == [[0.0, 2.5], [4.0]]
    assert entry.mean_loss == (1.0 + 2.5 * 2.0 + 4.0 * 3.0) / 6.5


@pytest.mark.parametrize("data", [b"", b"\n", b"\x00" * 100, b"\x80\x04K\x01.", b'{"journal":1}\n'])
def test_no_journal_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    with pytest.raises(JournalError, match="line 1"):
        Journal.open(path)
    assert path.read_bytes() == data


def test_the_first_difference_of_tables_is_named() -> None:
    table = make_test_header()["table"]
    assert table_difference(table, table) is None
    other = [table[0], table[1] | {"shape": [4, 8], "dtype": "float32"}]
    reason = "parameter 1 'layer.weight': shape is [4, 4] in the journal and [4, 8] in the model"
    assert table_difference(table, other) == reason
    assert table_difference(table, table[:1]) == "parameter 1 'layer.weight': only the journal has it"
    assert table_difference(table[:1], table) == "parameter 1 'layer.weight': only the model has it"


def test_documentation_example_reads_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python in docs/journal.md is run on the example line in docs/journal.md."""
    text = (ROOT / "docs" / "journal.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith('{"')]
    assert [json.loads(line).get("journal", json.loads(line).get("step")) for line in lines] == [3, 0]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert len(read_journal(path).entries) == 1
    code = text.split("```python\n", 1)[1].split("```", 1)[0].replace("run/journal.jsonl", os.fspath(path))
    exec(code, {})
    assert capsys.readouterr().out.startswith("0 ")
