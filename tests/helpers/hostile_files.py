"""Pickles, archives and JSON that were made to do harm, and the check that a file is refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def refused(read: Callable[[], Any], kind: type[Exception] | tuple[type[Exception], ...], reason: str = "") -> int:
    """Checks that `read` raises an error of one short line; returns the most memory that python took meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert reason in text and "\n" not in text and len(text) < 2000, text[:3000]
    return peak


def raw_file(header: object, data: bytes = bytes(24)) -> bytes:
    """A safetensors file of any header: JSON, or bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def archive_of(path: Path, stream: bytes, members: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in (members or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


TOUCH = b"X\x0c\x00\x00\x00touch it-ran"
STREAMS = {  # torch reads them: of each kind of refusal one
    "reduce": b"\x80\x02cos\nsystem\n" + TOUCH + b"\x85R.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + TOUCH + b"\x85R.",
    "obj": b"(cos\nsystem\n" + TOUCH + b"o.",
    "builtin eval": b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
    "build on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "long text": b"\x80\x02X\xff\xff\xff\x7fab.",
    "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00ab.",
    "not a dictionary": b"\x80\x02K\x01.",
    "storage of no kind": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x01tQ.",
}


TENSOR = (
    b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ%s%s%s\x89}tRs."
)

# Bytes of memory for a byte of JSON: `{},` makes a dictionary and a place for it in a list, twice for a moment.
PER_BYTE = 40
HOSTILE_VALUES = {
    "empty lists": b"[" + b"[]," * 30_000 + b"[]]",
    "empty objects": b"[" + b"{}," * 30_000 + b"{}]",
    "floats": b"[" + b"1e1," * 25_000 + b"1]",
    "texts": b"[" + b'"\\u00e9x",' * 10_000 + b"1]",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(10_000)) + b"}",
    "nested": b"[" * 50_000 + b"]" * 50_000,
    "nested objects": b'{"a":' * 20_000 + b"0" + b"}" * 20_000,
    "a long number": b"9" * 100_000,
    "numbers": b"[" + b",".join(b"9" * 4000 for _ in range(25)) + b"]",
    "a long text": b'"' + b"x" * 100_000 + b'"',
    "infinity": b"1e400",
}
