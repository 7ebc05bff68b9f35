"""Journals of unknown origin take no more memory than their bytes account for, and name no other files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile_files import HOSTILE_VALUES, PER_BYTE, refused
from journal_cases import make_entry, make_test_header

from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import MAX_HEADER_BYTES, MAX_STEP_BYTES, JournalError, seal_line


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


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", "x" * 256])
def test_a_journal_names_files_of_its_base_only(name: str) -> None:
    base = {"name": "b", "files": {name: {"sha256": "0" * 64, "num_bytes": 0}}}
    refused(lambda: make_test_header(base=base), JournalError, "not a plain file name")
