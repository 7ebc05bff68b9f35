"""Data files: JSONL lines are read and checked. Errors name file and line number.

A line is one of
    {"prompt": str, "completion": str}             learn the completion
    {"prompt": str, "choices": [str], "label": i}  learn which of the choices follows the prompt
    {"messages": [{"role": str, "content": str}]}  learn every turn of the assistant
    {"text": str}                                  learn the whole text
Other keys are ignored. A file holds either lines with choices or lines without.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distzo2.errors import DataError

KINDS = ("completion", "choices", "messages", "text")
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Line:
    """A checked line: its kind, the parsed object, and where it stands."""

    kind: str
    record: dict[str, Any]
    where: str  # "file:line"


def read_lines(path: str | os.PathLike) -> list[Line]:
    """Reads and checks a JSONL file. Blank lines are skipped.

    Raises:
        DataError: the file cannot be read, holds no example, or a line is malformed (file, line number, reason).
    """
    path = os.fspath(path)
    try:
        raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    lines = []
    for number, content in enumerate(raw.splitlines(), start=1):
        if content.strip():
            lines.append(read_line(content, f"{path}:{number}"))
    if not lines:
        raise DataError(f"{path}: holds no examples")
    first = lines[0]
    for line in lines:
        if (line.kind == "choices") != (first.kind == "choices"):
            raise DataError(f"{line.where}: a {line.kind!r} line in a file that begins with a {first.kind!r} line")
    return lines


def read_line(content: bytes, where: str) -> Line:
    """Checks one line of a file; `where` names file and line in errors.

    Raises:
        DataError: the line is malformed.
    """
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise DataError(f"{where}: not valid JSON: {reason} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object was expected, not {_name(record)}")
    kinds = [kind for kind in KINDS if kind in record]
    if len(kinds) != 1:
        found = f"both {kinds[0]!r} and {kinds[1]!r}" if kinds else "none of them"
        raise DataError(f"{where}: one of {', '.join(map(repr, KINDS))} was expected, it has {found}")
    kind = kinds[0]
    if kind in ("completion", "choices"):
        _check_text(record, "prompt", where, allow_empty=True)
    if kind == "completion":
        _check_text(record, "completion", where)
    elif kind == "text":
        _check_text(record, "text", where)
    elif kind == "choices":
        _check_choices(record, where)
    else:
        _check_messages(record["messages"], where)
    return Line(kind, record, where)


def _name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def _check_text(record: dict[str, Any], key: str, where: str, *, allow_empty: bool = False) -> None:
    if key not in record:
        raise DataError(f"{where}: {key!r} is missing")
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, not {_name(value)}")
    if not value and not allow_empty:
        raise DataError(f"{where}: {key!r} is empty")
    _check_encodable(value, repr(key), where)


def _check_encodable(text: str, name: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell, and which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where}: {name} holds {half}, half of a surrogate pair, at character {error.start}"
        ) from error


def _check_choices(record: dict[str, Any], where: str) -> None:
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' must be an array of at least two strings")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise DataError(f"{where}: choice {i} must be a string that is not empty")
        _check_encodable(choice, f"choice {i}", where)
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: two choices are the same")
    if "label" not in record:
        raise DataError(f"{where}: 'label' is missing")
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(f"{where}: 'label' must be an integer, not {_name(label)}")
    if not 0 <= label < len(choices):
        raise DataError(
            f"{where}: label {label} is out of range: there are {len(choices)} choices (0 to {len(choices) - 1})"
        )


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be an array that is not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {i} must be an object, not {_name(message)}")
        if message.get("role") not in _ROLES:
            raise DataError(f"{where}: message {i}: 'role' must be one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {i}: 'content' must be a string")
        _check_encodable(message["content"], f"message {i}", where)
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise DataError(f"{where}: no message of the assistant, so there is nothing to learn")
