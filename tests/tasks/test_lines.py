"""JSONL lines: what is accepted, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_text import write_jsonl

from distzo2.errors import DataError
from distzo2.tasks.lines import read_lines

GOOD = {"prompt": "the cat", "completion": " sat"}
CHOICES = {"prompt": "the cat is", "choices": [" good", " bad"], "label": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"text": "ab', "not valid JSON: Unterminated string starting at column 10"),
        ('{"text": "a \\ud800 b"}', r"'text' holds \ud800, half of a surrogate pair, at character 2"),
        ('{"prompt": "\\udfff", "completion": "b"}', r"'prompt' holds \udfff"),
        ('{"prompt": "a", "choices": ["b", "c\\ud800"], "label": 0}', r"choice 1 holds \ud800"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', r"message 0 holds \ud800"),
        ("[1, 2]", "a JSON object was expected, not an array"),
        ("3", "a JSON object was expected, not a number"),
        ('{"prompt": "a"}', "none of them"),
        ('{"completion": "a"}', "'prompt' is missing"),
        ('{"prompt": 3, "completion": "a"}', "'prompt' must be a string, not a number"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"prompt": "a", "completion": null}', "'completion' must be a string, not null"),
        ('{"text": ""}', "'text' is empty"),
        ('{"text": "a", "messages": []}', "both 'messages' and 'text'"),
        ('{"prompt": "a", "choices": ["b"], "label": 0}', "at least two"),
        ('{"prompt": "a", "choices": ["b", ""], "label": 0}', "choice 1"),
        ('{"prompt": "a", "choices": ["b", "b"], "label": 0}', "two choices are the same"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "'label' is missing"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": "0"}', "'label' must be an integer, not a string"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": true}', "'label' must be an integer, not a boolean"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 2}', "label 2 is out of range: there are 2 choices (0 to 1)"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": -1}', "label -1 is out of range"),
        ('{"messages": []}', "'messages' must be an array that is not empty"),
        ('{"messages": [{"role": "pope", "content": "a"}]}', "message 0: 'role' must be one of"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "user"}]}', "message 0: 'content' must be a string"),
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
    (tmp_path / "a").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a:2: not UTF-8"):
        read_lines(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="holds no examples"):
        read_lines(tmp_path / "b")
    with pytest.raises(DataError, match="No such file"):
        read_lines(tmp_path / "c")
    (tmp_path / "d").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert len(read_lines(tmp_path / "d")) == 1


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d", [GOOD, {"text": "a"}, CHOICES])
    with pytest.raises(DataError, match=r"d:3: a 'choices' line in a file that begins with a 'completion' line"):
        read_lines(path)
