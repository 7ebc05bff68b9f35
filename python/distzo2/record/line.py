"""One line of a journal: a record as JSON, floats in hex, a CRC-32, and a hash over all lines so far where asked for.

This is the layer below :mod:`distzo2.record.entry` and :mod:`distzo2.record.header`, which know what the records
hold. Whatever bytes come, reading them ends in a record of bounded depth or in a JournalError, and allocates no more
than a small multiple of their number. Nothing here evaluates or unpickles what it reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import reprlib
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distzo2.errors import DistZO2Error

# Bounds on what is read from a file that anyone may have written.
MAX_HEADER_BYTES = 32 << 20
MAX_STEP_BYTES = 4 << 20
MAX_DEPTH = 16
MAX_BRIEF = 80  # characters of a value in a message

MAX_INT64 = (1 << 63) - 1
_CRC_MARK = b',"crc":"'
_CRC_BYTES = len(_CRC_MARK) + 8 + len(b'"}')
_CHAIN_MARK = b',"chain":"'
_CHAIN_BYTES = len(_CHAIN_MARK) + 64 + len(b'"')
SEAL_BYTES = _CHAIN_BYTES + _CRC_BYTES + 1  # at most, of what follows a line's record


class JournalError(DistZO2Error, ValueError):
    """A journal, a line of it or an entry for it is not what it must be. The message is one line."""


def encode_line(record: Mapping[str, Any], max_bytes: int) -> bytes:
    """One line: the record as compact ASCII JSON with ``crc`` as its last member, the CRC-32 of all bytes before
    ``,"crc"``."""
    return seal_line(encode_record(record, max_bytes), None)[0]


def encode_record(record: Mapping[str, Any], max_bytes: int) -> bytes:
    """A line without what seals it: compact ASCII JSON without the closing brace."""
    try:
        text = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise JournalError(f"cannot be written as JSON: {error}") from None
    body = text[:-1].encode("ascii")
    if len(body) + SEAL_BYTES > max_bytes:
        raise JournalError(f"the line has {len(body) + SEAL_BYTES} bytes, at most {max_bytes} fit")
    return body


def seal_line(body: bytes, previous: str | None) -> tuple[bytes, str | None]:
    """The line of a record, and its hash: with ``previous``, the hash of the line before ("" for the header), it goes
    into the line as ``chain``."""
    chain = None
    if previous is not None:
        chain = hashlib.sha256(previous.encode("ascii") + body).hexdigest()
        body += _CHAIN_MARK + chain.encode("ascii") + b'"'
    return body + _CRC_MARK + b'%08x"}\n' % zlib.crc32(body), chain


def crc_matches(line: bytes) -> bool:
    """Whether the line ends in a newline and in the CRC of its other bytes."""
    body, tail = line[: -_CRC_BYTES - 1], line[-_CRC_BYTES - 1 :]
    return tail == _CRC_MARK + b'%08x"}\n' % zlib.crc32(body)


def stated_chain(line: bytes) -> str | None:
    """The hash that a line says it has, or None if it has none. It need not be right."""
    tail = line[: -_CRC_BYTES - 1][-_CHAIN_BYTES:]
    digits = tail[len(_CHAIN_MARK) : -1]
    if tail[: len(_CHAIN_MARK)] != _CHAIN_MARK or tail[-1:] != b'"' or set(digits) - set(b"0123456789abcdef"):
        return None
    return digits.decode("ascii")


def unchained(line: bytes) -> bytes:
    """The line without its hash, which is not checked, sealed by its CRC alone."""
    return seal_line(line[: -_CRC_BYTES - 1 - _CHAIN_BYTES], None)[0]


def decode_line(line: bytes, max_bytes: int, previous: str | None = None) -> dict[str, Any]:
    """The record of one line without ``crc`` and, with the hash of the line before, ``chain``.

    Raises JournalError if it is too long, damaged, no JSON object, or was not written after the line with that hash.
    """
    if len(line) > max_bytes:
        raise JournalError(f"longer than {max_bytes} bytes")
    if not line.endswith(b"\n"):
        raise JournalError("no newline at the end")
    if not crc_matches(line):
        raise JournalError("the CRC does not match")
    body = line[: -_CRC_BYTES - 1]
    if previous is not None:
        stated = stated_chain(line)
        if stated is None:
            raise JournalError("it has no chained hash, though the journal's lines have")
        body = body[:-_CHAIN_BYTES]
        if seal_line(body, previous)[1] != stated:
            raise JournalError("the chained hash does not match: this line, or one before it, was changed or removed")
    try:
        record = json.loads(body + b"}", object_pairs_hook=_unique_keys, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise JournalError(f"nested deeper than {MAX_DEPTH}") from None
    except JournalError:
        raise
    except ValueError as error:
        raise JournalError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise JournalError("not a JSON object")
    if encode_record(record, max_bytes) != body:  # one spelling for each record, so that equal ones are equal lines
        raise JournalError("the JSON is not spelled as it is written here: compact, in ASCII, each value in one way")
    return record


def brief(value: Any) -> str:
    """A value of a file from anyone in a message: its beginning, on one line."""
    text = reprlib.repr(value) if isinstance(value, (dict, list, tuple, int)) else repr(value)
    return text if len(text) <= MAX_BRIEF else text[:MAX_BRIEF] + "..."


def hex32(value: float, what: str) -> str:
    text = hex64(value, what)
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        rounded = math.inf
    if rounded != value:
        raise JournalError(f"{what} is {value!r}, which is no float32 value")
    return text


def hex64(value: float, what: str) -> str:
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
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not low <= number <= high:
        raise JournalError(f"{what} is {brief(value)}, expected an integer from {low} to {high}")
    return number


def a_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise JournalError(f"{what} must be a list")
    return value


def sized(value: Any, length: int, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise JournalError(f"a {what} must be a list of {length}")
    return value


def expect_keys(record: Any, keys: Iterable[str], what: str) -> None:
    if not isinstance(record, Mapping):
        raise JournalError(f"{what} must be an object")
    missing = sorted(set(keys) - set(record))
    unknown = sorted(set(record) - set(keys))
    if missing or unknown:
        raise JournalError(f"{what} lacks {brief(missing)} and has unknown {brief(unknown)}")


def check_depth(value: Any, depth: int) -> None:
    if depth < 0:
        raise JournalError(f"nested deeper than {MAX_DEPTH}")
    children: Callable[[], Iterable[Any]] | None = None
    if isinstance(value, dict):
        children = value.values
    elif isinstance(value, (list, tuple)):
        children = value.__iter__
    if children is not None:
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise JournalError(f"keys must be strings: {brief(list(value))}")
        for child in children():
            check_depth(child, depth - 1)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise JournalError("a key is given twice")
    return record


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JournalError(f"{text[:20]} is not a finite number")
    return value
