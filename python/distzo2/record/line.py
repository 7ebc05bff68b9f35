"""One line of a journal: a record as compact JSON that ends in its CRC-32, with floats in hex.

:mod:`distzo2.record.entry` and :mod:`distzo2.record.header` know what the records hold. Reading any bytes ends in a
record or in a JournalError, and takes memory in proportion to their number.
"""

from __future__ import annotations

import ctypes
import json
import math
import operator
import re
import zlib
from collections.abc import Mapping
from types import NoneType
from typing import Any

from distzo2.errors import DistZO2Error
from distzo2.text import brief

MAX_HEADER_BYTES = 32 << 20
MAX_STEP_BYTES = 4 << 20
MAX_DEPTH = 16  # of nested objects and lists
MAX_INT64 = (1 << 63) - 1
_KINDS = {dict: "object", list: "list", str: "string", int: "integer", bool: "boolean", NoneType: "null"}

_CRC_MARK = b',"crc":"'
_CRC_BYTES = len(_CRC_MARK) + 8 + len(b'"}\n')
# Older versions could chain the lines: a hash stands before the CRC. It is neither checked nor written.
_CHAIN = re.compile(rb',"chain":"[0-9a-f]{64}"\Z')
_CHAIN_BYTES = len(b',"chain":""') + 64


class JournalError(DistZO2Error, ValueError):
    """A journal, a line of it, or an entry for it is not what it must be. The message is one line."""


def encode_line(record: Mapping[str, Any], max_bytes: int) -> bytes:
    """The line of a record: compact ASCII JSON whose last member, `crc`, is the CRC-32 of all bytes before `,"crc"`.

    Raises:
        JournalError: the record is no JSON, is nested too deep, or makes a line longer than `max_bytes`.
    """
    return seal_line(_encode(record, max_bytes))


def seal_line(body: bytes) -> bytes:
    """The line of JSON without its closing brace."""
    return body + _crc_member(body)


def crc_matches(line: bytes) -> bool:
    """Whether the line ends in a newline and in the CRC of its other bytes."""
    return line[-_CRC_BYTES:] == _crc_member(memoryview(line)[:-_CRC_BYTES])


def decode_line(line: bytes, max_bytes: int) -> dict[str, Any]:
    """The record of a line, without `crc`.

    Raises:
        JournalError: the line is too long, damaged, no JSON object, or not spelled as `encode_line` spells it.
    """
    if len(line) > max_bytes:
        raise JournalError(f"longer than {max_bytes} bytes")
    if not line.endswith(b"\n"):
        raise JournalError("no newline at the end")
    if not crc_matches(line):
        raise JournalError("the CRC does not match")
    body = line[:-_CRC_BYTES]
    if _CHAIN.match(body, max(0, len(body) - _CHAIN_BYTES)):
        body = body[:-_CHAIN_BYTES]
    try:
        record = json.loads(body + b"}")
    except RecursionError:
        raise JournalError(f"nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise JournalError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise JournalError("not a JSON object")
    if _encode(record, max_bytes) != body:  # equal records are equal lines; a key that is there twice differs too
        raise JournalError("the JSON is not spelled as it is written here: compact, in ASCII, each value in one way")
    return record


def hex32(value: float, what: str) -> str:
    """A finite float32 value in hex."""
    text = hex64(value, what)
    if ctypes.c_float(value).value != value:
        raise JournalError(f"{what} is {value!r}, which is no float32 value")
    return text


def hex64(value: float, what: str) -> str:
    """A finite float64 value in hex."""
    value = float(value)
    if not math.isfinite(value):
        raise JournalError(f"{what} is {value!r}, only losses may be non-finite")
    return value.hex()


def from_hex(text: Any, what: str) -> float:
    try:
        value = float.fromhex(text)
    except (TypeError, ValueError, OverflowError):
        raise JournalError(f"{what}: {brief(text)} is not a number in hex") from None
    if value.hex() != text:  # one spelling for each value, so that equal entries are equal lines
        raise JournalError(f"{what}: {brief(text)} is not spelled as {value.hex()!r}")
    return value


def from_hex32(text: Any, what: str) -> float:
    value = from_hex(text, what)
    hex32(value, what)
    return value


def whole(value: Any, low: int, high: int, what: str) -> int:
    """`value` as an integer from `low` to `high`."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not low <= number <= high:
        raise JournalError(f"{what} is {brief(value)}, expected an integer from {low} to {high}")
    return number


def a_list(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise JournalError(f"{what} must be a list" + ("" if length is None else f" of {length}"))
    return value


def expect_members(record: Any, members: Mapping[str, str], what: str) -> None:
    """Raises JournalError unless `record` is an object with exactly these members, each of its kind."""
    if not isinstance(record, dict):
        raise JournalError(f"{what} must be an object")
    missing, unknown = sorted(members.keys() - record.keys()), sorted(record.keys() - members.keys())
    if missing or unknown:
        raise JournalError(f"{what} lacks {brief(missing)} and has unknown {brief(unknown)}")
    for key, kinds in members.items():  # such as "object or null"
        if _KINDS.get(type(record[key]), "number") not in kinds:
            raise JournalError(f"{key} of {what} is {brief(record[key])}, expected {kinds}")


def _check_depth(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raises JournalError if a value is nested deeper than `depth`, or has a key that is no string."""
    if depth < 0:
        raise JournalError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise JournalError(f"keys must be strings: {brief(list(value))}")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for child in value:
            _check_depth(child, depth - 1)


def _crc_member(body: bytes | memoryview) -> bytes:
    return _CRC_MARK + b'%08x"}\n' % zlib.crc32(body)


def _encode(record: Mapping[str, Any], max_bytes: int) -> bytes:
    """The JSON of a record without its closing brace."""
    _check_depth(record)
    try:
        text = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise JournalError(f"cannot be written as JSON: {error}") from None
    num_bytes = len(text) - 1 + _CRC_BYTES
    if num_bytes > max_bytes:
        raise JournalError(f"the line has {num_bytes} bytes, at most {max_bytes} fit")
    return text[:-1].encode("ascii")
