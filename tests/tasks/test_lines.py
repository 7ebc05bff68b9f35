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
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"text": "ab', "not valid JSON: EOF while parsing a string at column 12"),
        ('{"text": "a \\ud800 b"}', "not valid JSON: unexpected end of hex escape at column 19"),
        ("[1, 2]", "an object with one of"),
        ('{"prompt": "a"}', "none of them"),
        ('{"completion": "a"}', "prompt: missing"),
        ('{"prompt": 3, "completion": "a"}', "prompt: expected a valid string"),
        ('{"prompt": "a", "completion": ""}', "completion: expected at least 1 character"),
        ('{"text": ""}', "text: expected at least 1 character"),
        ('{"text": "a", "messages": []}', "both 'messages' and 'text'"),
        ('{"prompt": "a", "choices": ["b"], "label": 0}', "choices: expected at least 2 items"),
        ('{"prompt": "a", "choices": ["b", ""], "label": 0}', "choices.1: expected at least 1 character"),
        ('{"prompt": "a", "choices": ["b", "b"], "label": 0}', "two choices are the same"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "label: missing"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": "0"}', "label: expected a valid integer"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": true}', "label: expected a valid integer"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 2}', "label 2 is out of range: there are 2 choices (0 to 1)"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": -1}', "label -1 is out of range"),
        ('{"messages": []}', "no message of the assistant"),
        ('{"messages": [{"role": "pope", "content": "a"}]}', "messages.0.role: expected 'system', "),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "user"}]}', "messages.0.content: missing"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    first = CHOICES if "choices" in line else GOOD
    path = write_jsonl(tmp_path / "d.jsonl", [first, "", line])
    with pytest.raises(DataError) as error:
        read_lines(path)
    assert f"{path}:3: " in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    no_text = b'{"text": "a"}\n{"text": "\xff"}\n'
    for content, reason in ((no_text, "f:2: not valid JSON"), (b"\n \n", "holds no examples")):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            read_lines(tmp_path / "f")
    with pytest.raises(DataError, match="No such file"):
        read_lines(tmp_path / "c")
    (tmp_path / "d").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert len(read_lines(tmp_path / "d")) == 1


LONG = "7" * 5000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f'{{"text": "a", "n": {LONG}}}', "not valid JSON: number out of range"),
        (
            f'{{"prompt": "a", "choices": ["b", "c"], "label": {LONG[:4200]}}}',
            "777 is out of range: there are 2 choices",
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 1e999}', "label: expected a valid integer"),
        ('{"text": ' * 5000, "not valid JSON: recursion limit exceeded"),
    ],
)
def test_numbers_and_nesting_beyond_measure(tmp_path: Path, line: str, reason: str) -> None:
    path = write_jsonl(tmp_path / "d", [CHOICES if "choices" in line else GOOD, line])
    with pytest.raises(DataError) as error:
        read_lines(path)
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps([GOOD, GOOD], indent=2), "an array"),
        (json.dumps([GOOD, GOOD]), "an array"),
        ("\n" + json.dumps([GOOD], indent="\t").replace("\n", "\r\n"), "an array"),
        (json.dumps(GOOD, indent=2), "an object of several lines"),
        ('{"data": [\n{"text": "a"}\n]}', "an object of several lines"),
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
