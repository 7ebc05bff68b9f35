"""Blocks that are ranges of files as they lie there."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from distzo2_core import BlockFile, CopyEngine, RangeFiles, aligned_buffer

SIZES = (5 << 20, 70_001)  # of the files: several chunks, and less than one


def write_files(directory: Path) -> tuple[list[str], list[bytes]]:
    contents = [random.Random(i).randbytes(size) for i, size in enumerate(SIZES)]
    paths = [directory / f"{i}.bin" for i in range(len(SIZES))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths], contents


def make_blocks(contents: list[bytes], page_aligned: bool) -> tuple[list[list[tuple[int, int, int, int]]], list[bytes]]:
    """Ranges of five blocks with gaps between them, and what the blocks hold."""
    draw, blocks, expected = random.Random(5), [], []
    for _ in range(5):
        rows, data = [], b""
        for _ in range(draw.randrange(1, 6)):
            file = draw.randrange(2)
            offset = draw.randrange(len(contents[file]))
            offset -= offset % 4096 if page_aligned else 0
            num_bytes = draw.randrange(1, len(contents[file]) - offset + 1)
            data += bytes(-len(data) % 4096 if page_aligned else draw.randrange(300))
            rows.append((file, offset, num_bytes, len(data)))
            data += contents[file][offset : offset + num_bytes]
        blocks.append(rows)
        expected.append(data + bytes(draw.randrange(300)))
    return blocks, expected


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("page_aligned", [True, False])
def test_they_are_read_as_they_lie(direct: bool | None, page_aligned: bool, tmp_path: Path) -> None:
    paths, contents = write_files(tmp_path)
    blocks, expected = make_blocks(contents, page_aligned)
    sizes = [len(data) for data in expected]
    files = RangeFiles(paths, sizes, blocks, direct)
    for block, data in enumerate(expected):
        buffer = aligned_buffer(len(data) + 64)
        for begin, end, shift in [(0, len(data), 0), (len(data) // 3, len(data) // 2, 7), (len(data), len(data), 0)]:
            buffer.fill_(255)
            files.read(block, buffer.data_ptr() + shift, end - begin, begin)
            assert bytes(buffer[shift : shift + end - begin].numpy()) == data[begin:end]
            assert (buffer[shift + end - begin :] == 255).all()
    stats = files.stats()
    assert stats["direct"] == (direct is None and not stats["direct_fallback"]) and stats["bytes_used"] == sum(sizes)

    stored = BlockFile(str(tmp_path / "stored"), [1000])
    slots = [aligned_buffer(-(-max(sizes) // 4096) * 4096) for _ in range(2)]
    addresses = [slot.data_ptr() for slot in slots]
    engine = CopyEngine("cpu", (stored, files), addresses, slots[0].numel())
    stored.close(), files.close()
    for block, data in enumerate([bytes(1000), *expected]):
        slot = slots[engine.acquire(block)]
        assert bytes(slot[: len(data)].numpy()) == data
        engine.release(block)
    engine.acquire(3)
    with pytest.raises(RuntimeError, match="block 3 is of files that are only read"):
        engine.release(3, dirty=True)
    engine.close()


def test_what_does_not_fit(tmp_path: Path) -> None:
    paths, _ = write_files(tmp_path)
    for rows in ([(0, 0, 9, 0)], [(0, 0, 4, 0), (0, 0, 4, 3)], [(2, 0, 4, 0)], [(0, 0, 4, 9)]):
        with pytest.raises(ValueError, match="of block 0 of 8 bytes"):
            RangeFiles(paths, [8], [rows])
    with pytest.raises(RuntimeError, match=r"1\.bin: is truncated: 70001 bytes, expected at least 70002"):
        RangeFiles(paths, [2], [[(1, 70_000, 2, 0)]])
    with pytest.raises(RuntimeError, match="nowhere: cannot be opened: No such file"):
        RangeFiles([str(tmp_path / "nowhere")], [1], [[]])
    files = RangeFiles(paths, [70_001], [[(1, 0, 70_001, 0)]])
    os.truncate(paths[1], 60_000)
    target = torch.empty(70_001, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"1\.bin: has become shorter: wanted "):
        files.read(0, target.data_ptr(), 70_001)
    with pytest.raises(IndexError, match="no bytes 0 to 2"):
        files.read(1, target.data_ptr(), 2)
