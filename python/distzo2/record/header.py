"""The journal's first line: what the scalars of its steps refer to (docs/journal.md).

:func:`make_header` builds it from plain values: the base checkpoint's digests and map from whoever loaded it, the index
table of the model's parameters (:func:`index_table`), the optimizer's groups and options.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.record.line import MAX_HEADER_BYTES, MAX_INT64, JournalError, decode_line, expect_members, whole
from distzo2.text import brief, dtype_name
from distzo2.version import __version__
from distzo2.weights.units import ParamInfo
from distzo2_core import NOISE_VERSION, ROUNDING_VERSION
from distzo2_core.types import FAMILIES, MAX_SEED, MAX_STEP, PURPOSE_DATA_ORDER, PURPOSE_ROUNDING

# Versions 1 and 2 are read forever. Version 2 is still written: for a branch of such a run, which keeps its rules.
FORMAT_VERSION = 3
ANCHOR_VERSION = 4  # as 3, and groups of steps may have an anchor; written where a group has one
LOSS_RULE = "sum/count"  # L of an evaluation: the sum of its closures' sums over the sum of their counts
CHAIN_HASH = "sha256"  # `hash` of older versions' journals, whose lines hold a hash that is not checked any more
MAX_NAME = 4096  # characters of a parameter's name
MAX_DIMS = 32
# Families of noise and other purposes of its counter that this format can hold.
PURPOSES = {**FAMILIES, "rounding": PURPOSE_ROUNDING, "data order": PURPOSE_DATA_ORDER}

_HEADER = {
    "journal": "integer", "noise": "string", "rounding": "string", "purposes": "object", "seed": "integer",
    "base": "object", "map": "object or null", "table": "list", "groups": "list", "options": "object",
    "software": "object", "fingerprint": "object",
}  # fmt: skip
_HEADER_2 = _HEADER | {"hash": "string or null", "parents": "list"}
_HEADER_3 = _HEADER | {
    "parents": "list", "loss": "string", "compute_dtype": "string or null", "data_hash": "string or null",
    "stored_formats": "object or null", "estimator_state": "null",
}  # fmt: skip
_PARENT = {
    "name": "string", "steps": "integer", "sha256": "string", "chain": "string or null", "options": "object",
    "noise": "string", "software": "object", "fingerprint": "object",
}  # fmt: skip
_ROW = {
    "index": "integer", "name": "string", "shape": "list", "dtype": "string", "stride": "list", "trainable": "boolean",
    "group": "integer or null", "noise": "string",
}  # fmt: skip


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
    """One row of the index table.

    Args:
        dtype: a torch dtype or its name.
        stride: in elements.
        group: parameter group; None for a frozen parameter.
        noise: a family of noise, by its name.
    """
    return {
        "index": int(index),
        "name": name,
        "shape": [int(size) for size in shape],
        "dtype": dtype_name(dtype),
        "stride": [int(step) for step in stride],
        "trainable": bool(trainable),
        "group": None if group is None else int(group),
        "noise": noise,
    }


def _purposes(table: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Those that a run with this index table uses; low-rank noise only where there is some, for older readers."""
    used = {row["noise"] for row in table}
    return {name: code for name, code in PURPOSES.items() if code < 16 or name in used}


def index_table(params: Iterable[ParamInfo], groups: Sequence[Mapping[str, Any]], noise: str) -> list[dict[str, Any]]:
    """The index table, on which the noise depends: one row for each parameter, in order.

    Args:
        groups: the optimizer's parameter groups; a parameter in none of them is frozen.
        noise: of matrices; what low-rank noise does not suit has dense noise of the same kind.
    """
    group_of = {id(tensor): i for i, group in enumerate(groups) for tensor in group["params"]}
    rows = ((p, group_of.get(id(p.tensor))) for p in params)
    return [
        table_row(p.index, p.name, p.shape, p.declared, p.stride, g is not None, g, p.noise(noise)) for p, g in rows
    ]


def make_header(
    *,
    seed: int,
    table: Sequence[Mapping[str, Any]],
    groups: Iterable[Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    checkpoint_map: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    data_hash: str | None = None,
    computed: Iterable[str] | None = None,
    stored_formats: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A header, checked.

    Args:
        table: from `index_table`.
        groups: the optimizer's parameter groups; their numbers and strings are recorded.
        base: name and digests of the base checkpoint's files, as `digest_checkpoint` returns them; None for weights
            that came from no checkpoint, or were changed since.
        checkpoint_map: `CheckpointMap.to_json`, so that a replay under another version of transformers reads the base
            as the run did, or is refused.
        options: of the optimizer; a resumed run must have the same.
        fingerprint: what the bits of a forward depend on besides the weights.
        data_hash: SHA-256 of the examples as the model is given them; None if it is not known.
        computed: dtypes that forwards compute in; None: those of the table.
        stored_formats: of parameters that are packed, by name.

    Raises:
        JournalError: a value is not what a header holds.
    """
    versions = {"distzo2": __version__, "torch": torch.__version__, "python": platform.python_version()}
    dtypes = {row["dtype"] for row in table} if computed is None else set(computed)
    groups = [{k: v for k, v in group.items() if k != "anchor" or v} for group in groups]
    header = {
        "journal": ANCHOR_VERSION if any(group.get("anchor") for group in groups) else FORMAT_VERSION,
        "noise": NOISE_VERSION,
        "rounding": ROUNDING_VERSION,
        "purposes": _purposes(table),
        "seed": seed,
        "base": {"name": "", "files": {}} if base is None else dict(base),
        "map": None if checkpoint_map is None else dict(checkpoint_map),
        "table": [dict(row) for row in table],
        "groups": [{k: v for k, v in group.items() if isinstance(v, (int, float, str))} for group in groups],
        "options": dict(options or {}),
        "software": versions,
        "fingerprint": dict(fingerprint or {}),
        "parents": [],
        "loss": LOSS_RULE,
        "compute_dtype": dtypes.pop() if len(dtypes) == 1 else None,
        "data_hash": data_hash,
        "stored_formats": dict(stored_formats) if stored_formats else None,
        "estimator_state": None,
    }
    check_header(header)
    return header


def has_older_rules(header: Mapping[str, Any]) -> bool:
    """Whether the run began under version 1 or 2: the loss of a step is the mean of its micro-batches' means, and its
    update reaches what no lane entered."""
    return header["journal"] < FORMAT_VERSION


def with_older_rules(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header of version 3 as version 2 holds it."""
    return {**{key: header[key] for key in _HEADER}, "journal": 2, "hash": None, "parents": header["parents"]}


def parents_of(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that the header's run was branched from, the nearest last."""
    return header.get("parents", [])


def read_header(line: bytes, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The header in a journal's first line.

    Raises:
        JournalError: it is damaged, or not a header that this reader knows. The message names neither file nor line.
    """
    header = decode_line(line, max_bytes)
    check_header(header)
    return header


def check_header(header: Mapping[str, Any]) -> None:
    """Raises JournalError unless this version understands every part of the header and can make its noise."""
    version = header.get("journal")
    if type(version) is not int or not 1 <= version <= ANCHOR_VERSION:
        raise JournalError(f"format version {brief(version)}, this reader knows 1 to {ANCHOR_VERSION}")
    expect_members(header, (_HEADER, _HEADER_2, _HEADER_3, _HEADER_3)[version - 1], "the header")
    for key, known in (("noise", NOISE_VERSION), ("rounding", ROUNDING_VERSION)):
        if header[key] != known:
            raise JournalError(f"{key} version {brief(header[key])}, this reader makes {known!r}")
    if any(type(v) is not int or PURPOSES.get(k) != v for k, v in header["purposes"].items()):
        raise JournalError(f"purposes {brief(header['purposes'])}, this reader knows {PURPOSES}")
    whole(header["seed"], 0, MAX_SEED, "seed")
    if not all(isinstance(group, dict) for group in header["groups"]):
        raise JournalError("groups must be a list of objects")
    _check_base(header["base"], len(header["table"]))
    if version > 1:
        _check_lineage(header)
    for position, row in enumerate(header["table"]):
        _check_row(row, position, len(header["groups"]))


def table_difference(
    journal_table: Sequence[Mapping[str, Any]], model_table: Sequence[Mapping[str, Any]]
) -> str | None:
    """The first difference of two index tables in one line (parameter and field), or None where they are equal."""
    for theirs, ours in zip_longest(journal_table, model_table):
        row = theirs or ours
        where = f"parameter {row['index']} {row['name']!r}"
        if not theirs or not ours:
            return f"{where}: only the {'journal' if theirs else 'model'} has it"
        for key in theirs:
            if theirs[key] != ours[key]:
                return f"{where}: {key} is {theirs[key]!r} in the journal and {ours[key]!r} in the model"
    return None


def checksums_of(header: Mapping[str, Any]) -> list[str] | None:
    """One for each parameter as the run began; None where files tell what it began with, and in older journals."""
    return header["base"].get("checksums")


def known_members(files: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Records of a base's files without what those of an earlier version, `known`, do not say of them."""
    return {
        name: {key: value for key, value in record.items() if key in known.get(name, record)}
        for name, record in files.items()
    }


def check_base(
    path: str | os.PathLike[str], header: Mapping[str, Any], checksums: Callable[[], Sequence[str | None]]
) -> None:
    """Raises DistZO2Error if the header of the journal at `path` has checksums and the weights have others. `checksums`
    gives theirs, in the order of the index table; None: not known."""
    if (expected := checksums_of(header)) is None:
        return
    rows = zip(header["table"], expected, checksums(), strict=True)
    differing = [row["name"] for row, theirs, ours in rows if ours not in (None, theirs)]
    if differing:
        raise DistZO2Error(
            f"{os.fspath(path)}: the run began with other weights: {len(differing)} of {len(expected)} parameters "
            f"differ, first {differing[0]}. Make the model as it was then, from the same seed or checkpoint, without "
            "later training: the journal's steps are made again"
        )


def _check_lineage(header: Mapping[str, Any]) -> None:
    if header.get("hash") not in (None, CHAIN_HASH):
        raise JournalError(f"hash {brief(header['hash'])}, this reader knows {CHAIN_HASH!r}")
    if header.get("loss", LOSS_RULE) != LOSS_RULE:
        raise JournalError(f"loss {brief(header['loss'])}, this reader knows {LOSS_RULE!r}")
    if header.get("data_hash") is not None and not _is_sha256(header["data_hash"]):
        raise JournalError(f"data_hash {brief(header['data_hash'])} is not a SHA-256")
    for parent in header["parents"]:
        expect_members(parent, _PARENT, "a parent")
        whole(parent["steps"], 0, MAX_STEP, "steps of a parent")
        if not _is_sha256(parent["sha256"]) or not (parent["chain"] is None or _is_sha256(parent["chain"])):
            raise JournalError("sha256 or chain of a parent is not a SHA-256")
        if parent["noise"] not in FAMILIES:
            raise JournalError(f"unknown noise {brief(parent['noise'])} of a parent")


def _is_sha256(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def _check_base(base: Any, num_params: int) -> None:
    if not isinstance(base, dict) or not isinstance(base.get("name"), str) or not isinstance(base.get("files"), dict):
        raise JournalError("base must hold a name and files")
    for name, record in base["files"].items():
        # The names become paths below the base directory, so they may not lead out of it.
        if not 0 < len(name) <= 255 or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise JournalError(f"base file {brief(name)} is not a plain file name")
        digest = record.get("sha256") if isinstance(record, dict) else None
        if not _is_sha256(digest):
            raise JournalError(f"base file {name!r} has no SHA-256")
        for key in ("num_bytes", *(["header_bytes"] if "header_bytes" in record else [])):
            whole(record.get(key), 0, MAX_INT64, f"{key} of base file {name!r}")
    checksums = base.get("checksums", [""] * num_params)
    if not isinstance(checksums, list) or [type(text) for text in checksums] != [str] * num_params:
        raise JournalError(f"base has no list of {num_params} checksums")


def _check_row(row: Any, position: int, num_groups: int) -> None:
    expect_members(row, _ROW, f"table row {position}")
    name = row["name"]
    if len(name) > MAX_NAME:
        raise JournalError(f"table row {position} has a name of more than {MAX_NAME} characters")
    if row["index"] != position:
        raise JournalError(f"table row {position} ({name!r}) has index {brief(row['index'])}")
    for key in ("shape", "stride"):
        for value in row[key]:
            whole(value, 0, MAX_INT64, f"{key} of {name!r}")
    if len(row["shape"]) != len(row["stride"]) or len(row["shape"]) > MAX_DIMS:
        raise JournalError(f"shape and stride of {name!r} do not fit together")
    if row["noise"] not in FAMILIES:
        raise JournalError(f"unknown noise {brief(row['noise'])} of {name!r}")
    if row["group"] is not None or row["trainable"]:
        whole(row["group"], 0, num_groups - 1, f"group of {name!r}")
