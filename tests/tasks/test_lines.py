"""JSONL lines: what is accepted, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_text import write_jsonl

from distzo2.errors import DataError
from distzo2.tasks.lines import BadLines, read_lines

GOOD = {"prompt": "the cat", "completion": " sat"}
CHOICES = {"prompt": "the cat is", "choices": [" good", " bad"], "label": 1}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps([GOOD, GOOD], indent=2), "an array"),
        ("\n" + json.dumps([GOOD], indent="\t").replace("\n", "\r\n"), "an array"),
        ("[]", "an array"),
        (json.dumps(GOOD, indent=2), "an object of several lines"),
        ('{"data": [\n{"text": "a"}\n]}', "an object of several lines"),
        ('{"train":\n[]}', "an object of several lines"),
        ('{"text": "a",\n"n": 1}', "an object of several lines"),
    ],
)
def test_json_that_is_not_jsonl(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "d").write_text(text)
    for allowed in (0, 9):
        with pytest.raises(
            DataError, match=f"d: JSONL was expected, an object on each line; the file begins with {what}$"
        ):
            read_lines(tmp_path / "d", BadLines(allowed))


def test_a_first_line_that_was_cut_is_a_bad_line(tmp_path: Path) -> None:
    for cut in ('{"text": ', '{"text": "a", ', '{"text": "a'):
        path = write_jsonl(tmp_path / "d", [cut, GOOD])
        with pytest.raises(DataError, match=r"d:1: not valid JSON: EOF"):
            read_lines(path)
        bad = BadLines(1)
        assert len(read_lines(path, bad)) == 1 and bad.count == 1 and ":1: not valid" in bad.first


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d", [GOOD, {"text": "a"}, CHOICES])
    with pytest.raises(DataError, match=r"d:3: a 'choices' line in a file that begins with a 'completion' line"):
        read_lines(path)
