"""The CRC-32 of a file that is written in pieces, whatever their order."""

from __future__ import annotations

import itertools
import os
import random
import zlib
from pathlib import Path

import pytest
import torch
from checkpoint_models import assert_checksums
from safetensors.torch import save_file

from distzo2.checkpoint import file_checksum
from distzo2.checkpoint.checkpoint_files import CheckpointFiles
from distzo2.checkpoint.file_checksum import FileChecksum, WriteChecksum, joined
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.symbols import LayoutTensor, Trace
from distzo2.checkpoint.weight_files import SafetensorsWriter
from distzo2.checkpoint.writing import CheckpointWriter


class Memory:
    """A file in memory that counts the bytes that are read back."""

    def __init__(self, num_bytes: int) -> None:
        self.data = bytearray(num_bytes)
        self.num_read = 0
        self.written = WriteChecksum()

    def write(self, data: bytes, offset: int, is_noted: bool = True) -> None:
        self.data[offset : offset + len(data)] = data
        if is_noted:
            self.written.note(memoryview(data), offset)

    def finish(self) -> FileChecksum:
        def read_into(place: memoryview, offset: int) -> None:
            place[:] = self.data[offset : offset + len(place)]
            self.num_read += len(place)

        return self.written.finish(len(self.data), read_into)


def expected(file: Memory) -> FileChecksum:
    return FileChecksum(len(file.data), zlib.crc32(file.data))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_in_any_order_are_not_read_back(seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(rng.randrange(1, 5000))
    cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(30))})
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)
    file = Memory(len(data))
    for begin, end in pieces:
        file.write(data[begin:end], begin)
        file.write(b"", rng.randrange(len(data)))
    assert file.finish() == expected(file) and file.num_read == 0


@pytest.mark.parametrize("seed", range(20))
def test_what_was_written_twice_is_read_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_checksum, "CHUNK_BYTES", 7)
    rng = random.Random(seed)
    file = Memory(400)
    for _ in range(rng.randrange(12)):
        begin = rng.randrange(400)
        file.write(rng.randbytes(rng.randrange(400 - begin + 1)), begin)
    assert file.finish() == expected(file)


def test_what_was_not_noted_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_checksum, "CHUNK_BYTES", 7)
    data = random.Random(1).randbytes(400)
    file = Memory(400)
    file.write(data[300:380], 300)
    file.write(data[90:290], 90, is_noted=False)
    file.write(data[:100], 0)
    assert file.finish() == expected(file) and file.num_read == 220


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 255, 4097])
def test_joined(num_bytes: int) -> None:
    first, second = os.urandom(33), os.urandom(num_bytes)
    assert joined(zlib.crc32(first), zlib.crc32(second), num_bytes) == zlib.crc32(first + second)
    assert joined(0, zlib.crc32(second), num_bytes) == zlib.crc32(second)


def test_a_file_is_read_in_pieces_and_no_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(1).randbytes(1000)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for size in (1, 64, 4096):
        monkeypatch.setattr(file_checksum, "CHUNK_BYTES", size)
        assert file_checksum.file_checksum(tmp_path / "file") == FileChecksum(1000, zlib.crc32(data))
    assert file_checksum.file_checksum(tmp_path / "empty") == FileChecksum(0, 0)
    for name in ("link", "pipe", "none", "."):
        with pytest.raises(OSError):
            file_checksum.file_checksum(tmp_path / name)


def test_of_a_checkpoint_only_what_is_written_in_strides_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    save_file({"plain": torch.randn(64, 64), "y": torch.randn(4, 6, 2)}, tmp_path / "in" / "model.safetensors")
    files = CheckpointFiles(tmp_path / "in")
    trace = Trace([entry.name for entry in files.entries])
    symbols = {e.name: LayoutTensor(Layout.leaf(n, e.shape), e.dtype, trace) for n, e in enumerate(files.entries)}
    even, odd = symbols["y"].unbind(2)
    params = {"plain": symbols["plain"], "even": even, "odd": odd}
    mapped = {n: MappedTensor(n, torch.float32, tuple(s.shape), s.where.pieces) for n, s in params.items()}
    plan = CheckpointMap(files.entries, mapped, files=files)
    with CheckpointWriter(plan, tmp_path / "out") as writer:
        for name in params:
            value = torch.empty(mapped[name].shape)
            plan.read_param(name, value)
            writer.write_param(name, value)
        num_read, read_into = [], SafetensorsWriter.read_into

        def counted(self: SafetensorsWriter, buffer: memoryview, offset: int) -> None:
            num_read.append(len(buffer))
            read_into(self, buffer, offset)

        monkeypatch.setattr(SafetensorsWriter, "read_into", counted)
    assert 0 < sum(num_read) <= 4 * 6 * 2 * 4
    assert_checksums(writer.checksums, tmp_path / "out")
    files.close()
