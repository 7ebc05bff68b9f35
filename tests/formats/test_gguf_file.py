"""Headers of GGUF files that are not what they say, and each type of blocks against the decoder of `gguf`."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")

from hostile_files import refused  # noqa: E402
from packed_decode import decode  # noqa: E402
from same_bits import same_bits  # noqa: E402
from tiny_gguf import HALVES, random_blocks  # noqa: E402

from distzo2.checkpoint.packed_param import PackedParam  # noqa: E402
from distzo2.checkpoint.tensor_files import CheckpointError  # noqa: E402
from distzo2.errors import DistZO2Error  # noqa: E402
from distzo2.formats.gguf_file import GgufFile, GgufTensor  # noqa: E402


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("head_dim", [0, 64])
def test_blocks_decode_to_the_bits_of_gguf(kind: str, head_dim: int, tmp_path: Path):
    rows, cols = 4096 if head_dim == 0 else 128, 256
    data = random_blocks(kind, rows, cols)
    (tmp_path / "x").write_bytes(b"front" + data.tobytes())
    tensor = GgufTensor("t", kind, (rows, cols), tmp_path / "x", 5, data.nbytes)
    param = PackedParam("t", (rows, cols), kind, (tensor.piece(0, rows),), tensor.layout(rows, head_dim))
    expected = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    if head_dim:  # llama.cpp has (i, half) where transformers has (half, i)
        expected = expected.view(-1, head_dim // 2, 2, cols).transpose(1, 2).reshape(rows, cols)
    assert same_bits(decode(param), expected)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 8, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


ARCHITECTURE = value("general.architecture", 8, text("llama"))


def file_of(
    values: tuple[bytes, ...] = (ARCHITECTURE,), entries: tuple[bytes, ...] = (entry(),), data: int = 34, *,
    version: int = 3, num_values: int | None = None, num_entries: int | None = None,
) -> bytes:  # fmt: skip
    counts = (len(entries) if num_entries is None else num_entries, len(values) if num_values is None else num_values)
    header = struct.pack("<4sIQQ", b"GGUF", version, *counts) + b"".join(values) + b"".join(entries)
    return header + bytes(-len(header) % 32) + bytes(range(data))


HOSTILE = {
    "no GGUF": (b"PK\3\4" + bytes(40), "expected a GGUF file"),
    "empty": (b"", "truncated"),
    "version": (file_of(version=1), "version 1"),
    "big-endian": (file_of(version=3 << 24), "little-endian, got version 50331648"),
    "many values": (file_of(num_values=1 << 60), "1152921504606846976 values"),
    "many tensors": (file_of(num_entries=1 << 60), "1152921504606846976 tensors"),
    "long key": (file_of((struct.pack("<Q", (1 << 64) - 1),)), "18446744073709551615 bytes"),
    "long numbers": (file_of((value("k", 9, struct.pack("<IQ", 4, 1 << 62)),)), "truncated"),
    "long strings": (file_of((value("k", 9, struct.pack("<IQ", 8, 1 << 62)),)), "4611686018427387904 strings"),
    "arrays in an array": (file_of((value("k", 9, struct.pack("<IQ", 9, 1)),)), "type 9"),
    "kind of value": (file_of((value("k", 99, b""),)), "type 99"),
    "key twice": (file_of((ARCHITECTURE, ARCHITECTURE)), "there twice"),
    "no UTF-8": (file_of((struct.pack("<Q2s", 2, b"\xff\xfe"),)), "UTF-8"),
    "alignment": (file_of((value("general.alignment", 4, struct.pack("<I", 3)),)), "power of two"),
    "many dimensions": (file_of(entries=(entry(shape=(1,) * 99),)), "dimensions, got 99"),
    "no dimension": (file_of(entries=(entry(shape=()),)), "dimensions, got 0"),
    "size zero": (file_of(entries=(entry(shape=(0, 32)),)), "got shape (0, 32)"),
    "half a block": (file_of(entries=(entry(shape=(2, 16)),)), "blocks of 32 weights (Q8_0)"),
    "large": (file_of(entries=(entry(shape=(1 << 40, 1 << 40)),)), "got shape"),
    "type": (file_of(entries=(entry(kind=4),)), "type 4, which is not known"),
    "beyond the end": (file_of(entries=(entry(shape=(1 << 30,)),)), "truncated: tensor 't' is in bytes 128 to"),
    "far offset": (file_of(entries=(entry(offset=1 << 63),)), "truncated"),
    "not aligned": (file_of(entries=(entry(offset=1),), data=40), "aligned"),
    "name twice": (file_of(entries=(entry(), entry())), "different names"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path):
    data, reason = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(data)
    assert refused(lambda: GgufFile(tmp_path / "x.gguf"), CheckpointError, reason) < 1 << 20


def test_each_prefix_of_a_file_is_refused(tmp_path: Path):
    data, path = file_of(), tmp_path / "x.gguf"
    path.write_bytes(data)
    with GgufFile(path) as file:
        assert file.tensors["t"] == GgufTensor("t", "Q8_0", (32,), path, len(data) - 34, 34)
        assert file.metadata == {"general.architecture": "llama"}
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated|expected a GGUF"):
            GgufFile(path)


def test_arrays_are_kept_where_they_are_short(tmp_path: Path):
    numbers = struct.pack("<IQ3i", 5, 3, 1, -2, 3)
    words = struct.pack("<IQ", 8, 2) + text("a") + text("bc")
    long = struct.pack("<IQ2000B", 0, 2000, *[7] * 2000)
    flag = struct.pack("<?", True)
    values = (value("n", 9, numbers), value("w", 9, words), value("l", 9, long), value("b", 7, flag))
    (tmp_path / "x").write_bytes(file_of((*values, ARCHITECTURE)))
    with GgufFile(tmp_path / "x") as file:
        assert file.metadata == {"n": [1, -2, 3], "w": 2, "l": 2000, "b": True, "general.architecture": "llama"}


def test_the_package_is_asked_for_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").write_bytes(file_of())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DistZO2Error, match="pip install"):
        GgufFile(tmp_path / "x")
