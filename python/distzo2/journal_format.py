"""The journal's bytes: one line of JSON a step, floats in hex, a CRC-32 on each line (docs/journal.md).

This file turns a header and the entries of steps into lines and back, and refuses everything that it does not know.
It opens no file for writing; :mod:`distzo2.journal` does. Nothing here evaluates or unpickles what it reads.
"""

from __future__ import annotations

import json
import math
import operator
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distzo2.errors import DistZO2Error
from distzo2_core import NOISE_VERSION, ROUNDING_VERSION
from distzo2_core.types import (
    FAMILIES,
    MAX_PROBE,
    MAX_SEED,
    MAX_STEP,
    PURPOSE_DATA_ORDER,
    PURPOSE_ROUNDING,
    GroupScalars,
    Term,
    Update,
)

FORMAT_VERSION = 1
# Purposes of the noise's counter that this format can hold; a term's family is the purpose of its noise.
PURPOSES = {**FAMILIES, "rounding": PURPOSE_ROUNDING, "data order": PURPOSE_DATA_ORDER}

# Bounds on what is read from a file that anyone may have written.
MAX_HEADER_BYTES = 32 << 20
MAX_STEP_BYTES = 4 << 20
MAX_DEPTH = 16

_MAX_INT64 = (1 << 63) - 1
_CRC_MARK = b',"crc":"'
_CRC_BYTES = len(_CRC_MARK) + 8 + len(b'"}')
_GROUP_FIELDS = ("lr", "weight_decay", "perturb_scale", "update_scale")
_STEP_KEYS = {"step", "groups", "terms", "eps", "losses", "skipped", "tokens", "seconds", "extra"}
_HEADER_KEYS = {
    "journal", "noise", "rounding", "purposes", "seed", "base", "map", "table", "groups", "options", "software",
    "fingerprint",
}  # fmt: skip
_ROW_FIELDS = ("index", "name", "shape", "dtype", "stride", "trainable", "group", "noise")


class JournalError(DistZO2Error, ValueError):
    """A journal, a line of it or an entry for it is not what it must be. The message is one line."""


@dataclass(frozen=True)
class StepEntry:
    """What one step did. ``update`` alone decides the weights; the rest is told beside it.

    step: number of the step, 0 for the first; equal to ``update.step``.
    update: learning rates, weight decays and terms, float32 values.
    eps: perturbation scale, a float32 value.
    losses: one list for each evaluation of the step, one number for each micro-batch (or example); float64, may be
    nan or inf. skipped: None, or why the update was not made; a skipped step has lr 0 in every group. tokens: tokens
    that went through the forwards of the step. seconds: wall time of the step. extra: anything else, as JSON values
    with finite numbers.
    """

    step: int
    update: Update
    eps: float
    losses: list[list[float]]
    skipped: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """The entry as one line, newline included. Raises JournalError where a value cannot be kept exactly."""
        _check_entry(self)
        update = self.update
        record = {
            "step": int(self.step),
            "groups": [
                [_hex32(v, f"group {g} {name}") for name, v in zip(_GROUP_FIELDS, scalars, strict=True)]
                for g, scalars in enumerate(update.groups)
            ],
            "terms": [
                [int(t.family), int(t.step), int(t.probe), int(t.sub), _hex32(t.c, f"term {i} c")]
                for i, t in enumerate(update.terms)
            ],
            "eps": _hex32(self.eps, "eps"),
            "losses": [[float(v).hex() for v in row] for row in self.losses],
            "skipped": self.skipped,
            "tokens": int(self.tokens),
            "seconds": _hex64(self.seconds, "seconds"),
            "extra": self.extra,
        }
        return encode_line(record, MAX_STEP_BYTES)

    @classmethod
    def from_line(cls, line: bytes) -> StepEntry:
        """Reads a line written by :meth:`to_line`. Raises JournalError with the reason."""
        record = decode_line(line, MAX_STEP_BYTES)
        _expect_keys(record, _STEP_KEYS, "a step")
        groups = tuple(
            GroupScalars(*(_from_hex32(v, "group") for v in _sized(row, len(_GROUP_FIELDS), "group")))
            for row in _list(record["groups"], "groups")
        )
        terms = tuple(_read_term(row) for row in _list(record["terms"], "terms"))
        step = _int(record["step"], 0, MAX_STEP, "step")
        entry = cls(
            step=step,
            update=Update(step, groups, terms),
            eps=_from_hex32(record["eps"], "eps"),
            losses=[
                [_from_hex(v, "losses") for v in _list(row, "losses")] for row in _list(record["losses"], "losses")
            ],
            skipped=record["skipped"],
            tokens=record["tokens"],
            seconds=_from_hex(record["seconds"], "seconds"),
            extra=record["extra"],
        )
        _check_entry(entry)
        return entry


def encode_line(record: Mapping[str, Any], max_bytes: int) -> bytes:
    """One line: the record as compact ASCII JSON with ``crc`` as its last member, the CRC-32 of all bytes before
    ``,"crc"``."""
    try:
        text = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise JournalError(f"cannot be written as JSON: {error}") from None
    body = text[:-1].encode("ascii")
    line = body + _CRC_MARK + b'%08x"}\n' % zlib.crc32(body)
    if len(line) > max_bytes:
        raise JournalError(f"the line has {len(line)} bytes, at most {max_bytes} fit")
    return line


def crc_matches(line: bytes) -> bool:
    """Whether the line ends in a newline and in the CRC of its other bytes."""
    body, tail = line[: -_CRC_BYTES - 1], line[-_CRC_BYTES - 1 :]
    return tail == _CRC_MARK + b'%08x"}\n' % zlib.crc32(body)


def decode_line(line: bytes, max_bytes: int) -> dict[str, Any]:
    """The record of one line without its ``crc``. Raises JournalError if it is too long, damaged, or no JSON object."""
    if len(line) > max_bytes:
        raise JournalError(f"longer than {max_bytes} bytes")
    if not line.endswith(b"\n"):
        raise JournalError("no newline at the end")
    if not crc_matches(line):
        raise JournalError("the CRC does not match")
    try:
        record = json.loads(
            line[: -_CRC_BYTES - 1] + b"}",
            object_pairs_hook=_unique_keys,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError:
        raise JournalError(f"nested deeper than {MAX_DEPTH}") from None
    except JournalError:
        raise
    except ValueError as error:
        raise JournalError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise JournalError("not a JSON object")
    return record


def table_row(
    index: int,
    name: str,
    shape: Sequence[int],
    dtype: object,
    stride: Sequence[int],
    trainable: bool,
    group: int | None,
    noise: str,
) -> dict[str, Any]:
    """One row of the index table. ``dtype`` is a torch dtype or its name; ``group`` may be None for a frozen
    parameter."""
    return {
        "index": int(index),
        "name": name,
        "shape": [int(v) for v in shape],
        "dtype": str(dtype).removeprefix("torch."),
        "stride": [int(v) for v in stride],
        "trainable": bool(trainable),
        "group": None if group is None else int(group),
        "noise": noise,
    }


def make_header(
    *,
    seed: int,
    base: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    noise_version: str = NOISE_VERSION,
    rounding_version: str = ROUNDING_VERSION,
    checkpoint_map: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    software: Mapping[str, Any] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A header, checked. ``base`` is what :func:`distzo2.replay.digest_checkpoint` returns, or ``{"name": ...,
    "files": {}}`` for a model that came from no checkpoint; ``checkpoint_map`` is
    :meth:`distzo2.checkpoint_map.CheckpointMap.to_json`, so that a replay under another version of transformers reads
    the base as the run did, or is refused; ``groups`` has one JSON object for each parameter group, in order."""
    header = {
        "journal": FORMAT_VERSION,
        "noise": noise_version,
        "rounding": rounding_version,
        "purposes": dict(PURPOSES),
        "seed": seed,
        "base": dict(base),
        "map": None if checkpoint_map is None else dict(checkpoint_map),
        "table": [dict(row) for row in table],
        "groups": [dict(group) for group in groups],
        "options": dict(options or {}),
        "software": dict(software or {}),
        "fingerprint": dict(fingerprint or {}),
    }
    check_header(header)
    return header


def check_header(header: Mapping[str, Any]) -> None:
    """Raises JournalError unless this version of the software understands every part of the header and can make its
    noise."""
    version = header.get("journal")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise JournalError(f"format version {version!r}, this reader knows {FORMAT_VERSION}")
    _expect_keys(header, _HEADER_KEYS, "the header")
    for key, known in (("noise", NOISE_VERSION), ("rounding", ROUNDING_VERSION)):
        if header[key] != known:
            raise JournalError(f"{key} version {header[key]!r}, this reader makes {known!r}")
    purposes = header["purposes"]
    if not isinstance(purposes, dict) or any(type(v) is not int or PURPOSES.get(k) != v for k, v in purposes.items()):
        raise JournalError(f"purposes {purposes!r}, this reader knows {PURPOSES}")
    _int(header["seed"], 0, MAX_SEED, "seed")
    for key in ("options", "software", "fingerprint"):
        if not isinstance(header[key], dict):
            raise JournalError(f"{key} must be an object")
    if header["map"] is not None and not isinstance(header["map"], dict):
        raise JournalError("map must be null or an object")
    groups = _list(header["groups"], "groups")
    if not all(isinstance(group, dict) for group in groups):
        raise JournalError("groups must be a list of objects")
    _check_base(header["base"])
    for position, row in enumerate(_list(header["table"], "table")):
        _check_row(row, position, len(groups))
    _check_depth(header, MAX_DEPTH)


def table_difference(
    journal_table: Sequence[Mapping[str, Any]], model_table: Sequence[Mapping[str, Any]]
) -> str | None:
    """The first difference of two index tables in one line (parameter and field), or None where they are equal."""
    for theirs, ours in zip(journal_table, model_table, strict=False):
        for name in _ROW_FIELDS:
            if theirs.get(name) != ours.get(name):
                where = f"parameter {theirs.get('index')} {theirs.get('name')!r}"
                return f"{where}: {name} is {theirs.get(name)!r} in the journal and {ours.get(name)!r} in the model"
    if len(journal_table) != len(model_table):
        longer, has = (journal_table, "journal") if len(journal_table) > len(model_table) else (model_table, "model")
        row = longer[min(len(journal_table), len(model_table))]
        return f"parameter {row.get('index')} {row.get('name')!r}: only the {has} has it"
    return None


def check_table(header: Mapping[str, Any], model_table: Sequence[Mapping[str, Any]]) -> None:
    """Raises JournalError naming the first difference between the header's index table and the model's."""
    difference = table_difference(header["table"], model_table)
    if difference is not None:
        raise JournalError(f"the journal is of another model: {difference}")


def _check_entry(entry: StepEntry) -> None:
    update = entry.update
    _int(entry.step, 0, MAX_STEP, "step")
    if update.step != entry.step:
        raise JournalError(f"step {entry.step} holds the update of step {update.step}")
    if not update.groups:
        raise JournalError("an entry needs at least one group")
    for term in update.terms:
        if isinstance(term.family, bool) or term.family not in FAMILIES.values():
            raise JournalError(f"unknown family {term.family!r} in a term")
        if isinstance(term.sub, bool) or term.sub != 0:
            raise JournalError(f"unknown sub {term.sub!r} in a term, only 0 is known")
        _int(term.step, 0, MAX_STEP, "a term's step")
        _int(term.probe, 0, MAX_PROBE, "a term's probe")
    if entry.skipped is not None:
        if not isinstance(entry.skipped, str):
            raise JournalError("skipped must be null or the reason as a string")
        if any(group.lr != 0 for group in update.groups):
            raise JournalError(f"step {entry.step} is skipped, so its lr must be 0 in every group")
    _int(entry.tokens, 0, _MAX_INT64, "tokens")
    if not math.isfinite(entry.seconds):
        raise JournalError("seconds must be finite")
    if not isinstance(entry.extra, dict):
        raise JournalError("extra must be an object")
    _check_depth(entry.extra, MAX_DEPTH - 1)


def _check_base(base: Any) -> None:
    if not isinstance(base, dict) or not isinstance(base.get("name"), str) or not isinstance(base.get("files"), dict):
        raise JournalError("base must hold a name and files")
    for name, record in base["files"].items():
        # The names become paths below the base directory, so they may not lead out of it.
        if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise JournalError(f"base file {name!r} is not a plain file name")
        digest = record.get("sha256") if isinstance(record, dict) else None
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise JournalError(f"base file {name!r} has no SHA-256")
        _int(record.get("num_bytes"), 0, _MAX_INT64, f"num_bytes of base file {name!r}")


def _check_row(row: Any, position: int, num_groups: int) -> None:
    _expect_keys(row, set(_ROW_FIELDS), f"table row {position}")
    name = row["name"]
    if not isinstance(name, str):
        raise JournalError(f"table row {position} has no name")
    if row["index"] != position or type(row["index"]) is not int:
        raise JournalError(f"table row {position} ({name!r}) has index {row['index']!r}")
    for key in ("shape", "stride"):
        for value in _list(row[key], f"{key} of {name!r}"):
            _int(value, 0, _MAX_INT64, f"{key} of {name!r}")
    if len(row["shape"]) != len(row["stride"]) or len(row["shape"]) > 32:
        raise JournalError(f"shape and stride of {name!r} do not fit together")
    if not isinstance(row["dtype"], str) or not isinstance(row["trainable"], bool):
        raise JournalError(f"dtype or trainable of {name!r} is of the wrong kind")
    if row["noise"] not in FAMILIES:
        raise JournalError(f"unknown noise {row['noise']!r} of {name!r}")
    if row["group"] is not None or row["trainable"]:
        _int(row["group"], 0, num_groups - 1, f"group of {name!r}")


def _read_term(row: Any) -> Term:
    family, step, probe, sub, coef = _sized(row, 5, "term")
    return Term(family, step, probe, sub, _from_hex32(coef, "a term's c"))


def _hex32(value: float, what: str) -> str:
    text = _hex64(value, what)
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        rounded = math.inf
    if rounded != value:
        raise JournalError(f"{what} is {value!r}, which is no float32 value")
    return text


def _hex64(value: float, what: str) -> str:
    value = float(value)
    if not math.isfinite(value):
        raise JournalError(f"{what} is {value!r}, only losses may be non-finite")
    return value.hex()


def _from_hex(text: Any, what: str) -> float:
    try:
        value = float.fromhex(text)
    except (TypeError, ValueError, OverflowError):
        raise JournalError(f"{what}: {text!r} is not a number in hex") from None
    if value.hex() != text:  # one spelling for each value, so that equal entries are equal lines
        raise JournalError(f"{what}: {text!r} is not spelled as {value.hex()!r}")
    return value


def _from_hex32(text: Any, what: str) -> float:
    value = _from_hex(text, what)
    _hex32(value, what)
    return value


def _int(value: Any, low: int, high: int, what: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not low <= number <= high:
        raise JournalError(f"{what} is {value!r}, expected an integer from {low} to {high}")
    return number


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise JournalError(f"{what} must be a list")
    return value


def _sized(value: Any, length: int, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise JournalError(f"a {what} must be a list of {length}")
    return value


def _expect_keys(record: Any, keys: Iterable[str], what: str) -> None:
    if not isinstance(record, Mapping):
        raise JournalError(f"{what} must be an object")
    missing = sorted(set(keys) - set(record))
    unknown = sorted(set(record) - set(keys))
    if missing or unknown:
        raise JournalError(f"{what} lacks {missing} and has unknown {unknown}")


def _check_depth(value: Any, depth: int) -> None:
    if depth < 0:
        raise JournalError(f"nested deeper than {MAX_DEPTH}")
    children: Callable[[], Iterable[Any]] | None = None
    if isinstance(value, dict):
        children = value.values
    elif isinstance(value, (list, tuple)):
        children = value.__iter__
    if children is not None:
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise JournalError(f"keys must be strings: {list(value)!r}")
        for child in children():
            _check_depth(child, depth - 1)


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
