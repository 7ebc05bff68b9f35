"""The header of a journal: it holds what it should, or is refused with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from journal_cases import ROOT, make_test_header, run_python

from distzo2.record.header import table_difference, table_row
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import JournalError, encode_line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 2**64}, "seed"),
        ({"base": {"name": "b", "files": {"../x": {"sha256": "0" * 64, "num_bytes": 0}}}}, "plain file name"),
        ({"base": {"name": "b", "files": {"x": {"sha256": "0" * 63, "num_bytes": 0}}}}, "SHA-256"),
        ({"table": [table_row(1, "w", (2,), "float32", (1,), True, 0, "normal")]}, "index 1"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, 1, "normal")]}, "group"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, None, "normal")]}, "group"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, 0, "lowrank")]}, "lowrank"),
        ({"table": [table_row(0, "w", (-2,), "float32", (1,), True, 0, "normal")]}, "shape"),
    ],
)
def test_header_refused_with_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(JournalError, match=reason):
        make_test_header(**changes)


@pytest.mark.parametrize(
    "change",
    [
        {"journal": 3},
        {"journal": 2},
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


def test_documentation_example_reads_a_journal(tmp_path: Path) -> None:
    """The Python in docs/journal.md is run on the example line in docs/journal.md."""
    text = (ROOT / "docs" / "journal.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith('{"')]
    assert [json.loads(line).get("journal", json.loads(line).get("step")) for line in lines] == [1, 0]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert len(read_journal(path).entries) == 1
    code = text.split("```python\n", 1)[1].split("```", 1)[0].replace("run/journal.jsonl", os.fspath(path))
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 ")
