"""BlockFile from Python; faults and crashes are the C++ tests' subject (tests/cpp/runtime)."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from ring import SIZES, pattern

from distzo2_core import BlockFile


def test_block_file_round_trips_any_range(tmp_path: Path) -> None:
    file = BlockFile(str(tmp_path / "blocks"), SIZES, durable=True)
    data = pattern(4, 3)
    file.write(4, data.data_ptr(), SIZES[4], version=3)
    patch = torch.full((5000,), 255, dtype=torch.uint8)
    file.write(4, patch.data_ptr(), 5000, offset=12_345)
    data[12_345:17_345] = 255
    out = torch.zeros(SIZES[4], dtype=torch.uint8)
    file.read(4, out.data_ptr(), 50_001, offset=7)
    assert torch.equal(out[:50_001], data[7:50_008])
    file.sync()
    stats = file.stats()
    assert stats["direct"] or stats["direct_fallback"]
    assert stats["bytes_used"] == sum(SIZES) and stats["bytes_padded"] % 4096 == 0
    assert stats["bytes_padded"] == os.path.getsize(file.path) == BlockFile.file_bytes(SIZES, durable=True)
    assert stats["bytes_written"] == 2 * SIZES[4] and stats["map_bytes_written"] > 0 and stats["syncs"] > 4
    file.close()
    with pytest.raises(RuntimeError, match="is closed"):
        file.stats()
    again = BlockFile(file.path, SIZES, create=False)
    assert [again.version(block) for block in range(5)] == [0, 0, 0, 0, 3]
    assert again.stats()["durable"] and again.verify() == sum(SIZES)
    again.read(4, out.data_ptr(), SIZES[4])
    assert torch.equal(out, data)
    again.close(unlink=True)
    assert not os.path.exists(file.path)


def test_scratch_files_cannot_be_opened_again(tmp_path: Path) -> None:
    with closing(BlockFile(str(tmp_path / "blocks"), SIZES)) as file:
        stats = file.stats()
        assert not stats["durable"] and stats["bytes_padded"] == BlockFile.file_bytes(SIZES)
        assert BlockFile.file_bytes(SIZES) < BlockFile.file_bytes(SIZES, durable=True)
    with pytest.raises(RuntimeError, match="blocks: is a scratch file"):
        BlockFile(file.path, SIZES, create=False)
    assert BlockFile.file_bytes([1 << 20] * 24) == 4096 + (24 + 3) * (1 << 20)  # three to spare


def test_errors_are_of_pythons_types(tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    with pytest.raises(RuntimeError, match=r"blocks: needs \d+ bytes .* available: No space left"):
        BlockFile(str(path), [1 << 55])
    assert not path.exists()
    with closing(BlockFile(str(path), SIZES, durable=True)) as file:
        os.truncate(path, 90_000)
        out = torch.empty(SIZES[2], dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=r"blocks: is truncated: wanted \d+ bytes at offset \d+, got"):
            file.read(2, out.data_ptr(), SIZES[2])
        with pytest.raises(IndexError, match="no block 9"):
            file.read(9, out.data_ptr(), 1)
