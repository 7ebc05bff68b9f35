"""What the fuzzers try: damaged and forged files, and what a reader may make of them.

A reader has three ways out: what the file said before it was damaged, a clear refusal, or, of a forgery that is a file
of its kind, what that file says, within its bounds. Any other exception, and any other result, is a find.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from checkpoint_models import read_tensor
from hostile_files import STREAMS, TENSOR, archive_of
from hypothesis import strategies as st
from journal_cases import bits, json_values, make_entry, make_test_header, step_entries
from safetensors.torch import save_file

from distzo2.checkpoint.reading import CheckpointFiles
from distzo2.checkpoint.tensor_files import DTYPES, CheckpointError, TensorFile, bytes_of
from distzo2.record.entry import StepEntry
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import JournalError, encode_line, seal_line


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some of them flipped, cut out, doubled, moved or replaced, in up to three places."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(out)))
        kind = draw(st.sampled_from(["flip", "cut", "end", "copy", "insert", "text"]))
        length = draw(st.integers(1, 64))
        if kind == "flip" and at < len(out):
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del out[at : at + length]
        elif kind == "end":
            del out[at:]
        elif kind == "copy":
            out[at:at] = out[max(0, at - length) : at]
        elif kind == "insert":
            out[at:at] = draw(st.binary(max_size=16))
        elif kind == "text":
            out[at : at + length] = draw(st.sampled_from(_TOKENS))
    return bytes(out)


_TOKENS = [
    b"{", b"}", b"[", b"]", b",", b'"', b"\n", b"\0", b"0x1p-1", b"nan", b"NaN", b"Infinity", b"-0", b"1e309",
    b"\\u0000", b"9" * 30, b'"crc":"', b'"chain":"', b"9223372036854775808", b"-1", b"true", b"null", b"\xff\xfe",
    b"[[[[",
]  # fmt: skip


def one_line(error: Exception) -> None:
    assert "\n" not in str(error) and len(str(error)) < 4000, str(error)[:4000]


# ---- journals


def journal_bytes(path: Path, num_steps: int) -> bytes:
    path.unlink(missing_ok=True)
    Journal.create(path, make_test_header(), [make_entry(step) for step in range(num_steps)]).close()
    return path.read_bytes()


def findings_of(path: Path) -> list[str]:
    """What `journal verify` finds in the lines of a journal."""
    findings: list[str] = []
    try:
        torn = read_journal(path, findings=findings).torn
    except JournalError as error:
        return [str(error)]
    return findings + ([torn] if torn else [])


def check_damaged_journal(path: Path, data: bytes) -> None:
    """A journal of `make_entry`s that was damaged: its first steps and a word on the rest, or a refusal."""
    path.write_bytes(data)
    findings = findings_of(path)
    for finding in findings:
        one_line(Exception(finding))
    try:
        contents = read_journal(path)
    except JournalError as error:
        one_line(error)
        assert findings
        return
    assert contents.header == make_test_header()
    assert [bits(entry) for entry in contents.entries] == [bits(make_entry(e.step)) for e in contents.entries]
    assert [entry.step for entry in contents.entries] == list(range(len(contents.entries)))
    assert (contents.torn is None) == (contents.num_bytes == len(data)) == (not findings)
    assert contents.num_bytes == sum(1 + len(line) for line in data.split(b"\n")[: 1 + len(contents.entries)])


@st.composite
def forged_journals(draw: st.DrawFn) -> bytes:
    """Lines with right CRCs that hold almost what they should."""
    header: dict[str, Any] = make_test_header()
    if draw(st.booleans()):
        header = _changed(draw, header)
    lines = []
    records = [header]
    for step in range(draw(st.integers(0, 3))):
        entry = draw(step_entries()) if draw(st.booleans()) else make_entry(step)
        record = json.loads(entry.to_line())
        del record["crc"]
        records.append(_changed(draw, record) if draw(st.booleans()) else record)
    for record in records:
        try:
            lines.append(encode_line(record, 1 << 20))
        except JournalError:  # cannot be written at all
            continue
    return b"".join(lines)


def _changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one place in it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return {name: child for name, child in value.items() if name != key}
        if kind == 1:
            return value | {draw(st.text(max_size=5)): draw(json_values)}
        return value | {key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(value) - 1))
        if draw(st.integers(0, 3)) == 0:
            return value + value[at : at + 1]
        return [*value[:at], _changed(draw, value[at]), *value[at + 1 :]]
    return draw(
        json_values | st.sampled_from([2**31, 2**63, 2**64, -1, "0x1p-1", "nan", "0x0.0p+0", "-0x0.0p+0", "../x"])
    )


def check_forged_journal(path: Path, data: bytes) -> None:
    """Whatever is read of it would be written as the same line."""
    path.write_bytes(data)
    findings = findings_of(path)
    try:
        contents = read_journal(path)
    except JournalError as error:
        one_line(error)
        assert findings
        return
    assert bool(findings) == (contents.torn is not None)
    lines = [encode_line(contents.header, 1 << 20), *(entry.to_line() for entry in contents.entries)]
    assert data.startswith(b"".join(lines))


# ---- safetensors


@st.composite
def safetensors_headers(draw: st.DrawFn) -> dict[str, Any]:
    """Headers of files with 64 bytes of data: almost right ones."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    end = 0
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        num_bytes = DTYPES[dtype].itemsize
        for size in shape:
            num_bytes *= size
        header[draw(st.sampled_from(["a", "b", "../c", "\n", "x" * 300])) + str(number)] = {
            "dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes],
        }  # fmt: skip
        end += num_bytes
    return _changed(draw, header) if draw(st.booleans()) else header


def forged_safetensors(header: dict[str, Any], spare: int) -> bytes:
    raw = json.dumps(header).encode()
    ends = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and _has_end(e)] if isinstance(
        header, dict) else []  # fmt: skip
    end = max([0, *(end for end in ends if 0 <= end < 10_000)])
    return struct.pack("<Q", len(raw)) + raw + bytes(max(0, end + spare))


def _has_end(entry: dict[str, Any]) -> bool:
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int


def check_safetensors(path: Path, data: bytes) -> None:
    """What is opened lies within the file, without holes, and can be read; the reference reader finds the same."""
    path.write_bytes(data)
    try:
        file = TensorFile(path)
    except CheckpointError as error:
        one_line(error)
        return
    with file:
        spans = sorted((e.offset, e.offset + e.num_bytes) for e in file.tensors.values())
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert not spans or spans[-1][1] == len(data)
        for name, entry in file.tensors.items():
            assert entry.num_bytes == entry.numel * entry.dtype.itemsize
            raw = bytes(bytes_of(read_tensor(file, name)))
            assert raw == data[entry.offset : entry.offset + entry.num_bytes]


def good_safetensors(path: Path) -> bytes:
    path.unlink(missing_ok=True)
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    save_file(tensors, path)
    return path.read_bytes()


# ---- .bin, indices


def good_streams() -> list[bytes]:
    tensor = TENSOR % (b"K\x02", b"K\x00", b"K\x02\x85", b"K\x01\x85")
    return [tensor, *STREAMS.values()]


def check_stream(path: Path, stream: bytes) -> None:
    """A description of tensors: what is opened lies within the archive."""
    archive_of(path, stream, {"data/0": bytes(8)})
    check_archive(path)


def check_archive(path: Path) -> None:
    try:
        file = TensorFile(path)
    except CheckpointError as error:
        one_line(error)
        return
    with file:
        for name, entry in file.tensors.items():
            assert 0 <= entry.offset <= entry.offset + entry.span_bytes <= file.num_bytes
            assert entry.num_bytes <= file.num_bytes
            if entry.strides is None:
                read_tensor(file, name)


def check_index(directory: Path, content: bytes) -> None:
    """An index: files of the directory alone are opened."""
    (directory / "model.safetensors.index.json").write_bytes(content)
    try:
        files = CheckpointFiles(directory)
    except CheckpointError as error:
        one_line(error)
        return
    assert {path.parent for path in files.files} <= {directory}
    files.close()


def check_line(data: bytes) -> None:
    """Any bytes as a step: refused, or written again as they were."""
    for line in (data, data + b"\n", seal_line(data)):
        try:
            entry = StepEntry.from_line(line)
        except JournalError as error:
            one_line(error)
        else:
            assert entry.to_line() == line
