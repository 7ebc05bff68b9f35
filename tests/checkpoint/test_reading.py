"""Reads of a checkpoint: the bytes of any range, through the page cache or past it, and clear errors."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hostile_files import refused
from safetensors.torch import save_file
from same_bits import same_bits

from distzo2.checkpoint import reading
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.reading import (
    CHUNK_BYTES,
    INDEX_FILE,
    CheckpointFiles,
    ParallelReader,
    Range,
    _batches,
    checkpoint_differences,
    digest_checkpoint,
    split,
)
from distzo2.checkpoint.tensor_files import PAGE, CheckpointError, TensorFile


def make_files(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint in one file, of tensors from bytes to chunks, none of which starts at a multiple of its item."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randint(0, 255, (3,), dtype=torch.uint8, generator=g),
        "b": torch.randn(7, 5, generator=g),
        "c": torch.randn(CHUNK_BYTES // 4 + 999, generator=g),
        "d": torch.randn(300, 401, generator=g).to(torch.bfloat16),
        "e": torch.randn(2500, 1000, generator=g),
        "f": torch.zeros(0, 4),
    }
    save_file(tensors, directory / "model.safetensors")
    data = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    header += b" " * (5 - len(header) % 8)  # the format asks for no alignment
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return tensors


@pytest.fixture(params=["cached", "direct", "no O_DIRECT"])
def how(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the files made by `make_files` are read."""
    make_files(tmp_path)
    if request.param == "cached":
        return request.param
    path = tmp_path / "model.safetensors"
    with TensorFile(path) as file, open(path, "rb") as opened:
        os.fsync(opened)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.is_cached():
            pytest.skip("this file system keeps its files in memory")
    if request.param == "no O_DIRECT":
        opened = os.open

        def refuse(path, flags, *args, **kwargs):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return opened(path, flags, *args, **kwargs)

        monkeypatch.setattr(reading.os, "open", refuse)
    return request.param


def test_every_tensor_has_its_bits(tmp_path: Path, how: str) -> None:
    files = CheckpointFiles(tmp_path)
    (tmp_path / "again").mkdir()
    number = {entry.name: i for i, entry in enumerate(files.entries)}
    jobs: list[tuple[Layout, torch.Tensor, torch.Tensor]] = []  # where, into what, and what is expected

    def add(where: Layout, expected: torch.Tensor) -> None:
        jobs.append((where, torch.full(expected.shape, 1, dtype=expected.dtype), expected))

    for name, tensor in make_files(tmp_path / "again").items():
        leaf = Layout.leaf(number[name], tensor.shape)
        add(leaf, tensor)
        if tensor.dim() == 2:  # transposed, in another dtype too, and sliced: what is rearranged
            turned, cols = leaf.strided(tensor.t().shape, tensor.t().stride(), 0), tensor.shape[1]
            add(turned, tensor.t())
            add(turned, tensor.t().half())
            if len(tensor) > 3:
                add(leaf.flat(cols, 3 * cols), tensor[1:4])
    assert (next(iter(files.files.values())).direct is not None) == (how == "direct")
    with ParallelReader(3) as reader:
        ranges = (r for where, out, _ in jobs for piece in where.pieces for r in files.ranges_of(piece, out.view(-1)))
        reader.finish(reader.start(ranges))
    for _, out, expected in jobs:
        assert same_bits(out, expected)
    files.close()


def test_tensors_of_other_strides(tmp_path: Path) -> None:
    """Whatever the order of a stored tensor's elements: whole, its rows, and what is moved on from there."""
    base = torch.randn(60, 50)
    tensors = {
        "turned": base.t(), "steps": base[::2, 1:40], "part": base[3:, :7], "same": torch.ones(1).expand(3),
        "rows": torch.arange(5.0).expand(4, 5), "columns": torch.arange(5.0)[:, None].expand(5, 4),
        "windows": torch.arange(90.0).unfold(0, 30, 3), "half": base.half()[:, ::7].t(),
        "four": torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1), "wide": torch.randn(1200, 1100).t(), "plain": base,
        "last": torch.randn(3, 8, 5, 5).to(memory_format=torch.channels_last),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    files = CheckpointFiles(tmp_path)
    with ParallelReader(2) as reader:
        for number, entry in enumerate(files.entries):
            expected, leaf = tensors[entry.name], Layout.leaf(number, entry.shape)
            turned = expected.transpose(0, -1)
            where = leaf.strided(turned.shape, torch.empty(entry.shape).transpose(0, -1).stride(), 0)
            cut = len(expected) // 3, expected[0].numel()
            rows = leaf.flat(cut[0] * cut[1], cut[1])
            for layout, value in ((leaf, expected), (where, turned), (rows, expected[cut[0]].reshape(-1))):
                for dtype in (value.dtype, torch.float64):
                    out = torch.full(value.shape, -1, dtype=dtype)
                    files.read_pieces(layout.pieces, out)
                    assert torch.equal(out, value.to(dtype)), entry.name
                    out.fill_(-1)
                    flat = out.view(-1)
                    reader.finish(reader.start(r for p in layout.pieces for r in files.ranges_of(p, flat)))
                    assert torch.equal(out, value.to(dtype)), entry.name
    files.close()


def test_neighbours_are_read_at_once(tmp_path: Path) -> None:
    make_files(tmp_path)
    with TensorFile(tmp_path / "model.safetensors") as file:
        ranges = [Range(file, at, 1000) for at in range(0, 40_000, 1000)]
        ranges += split(file, 50_000, torch.empty(3 * CHUNK_BYTES + 1, dtype=torch.uint8))
        ranges += [Range(file, 10, 5), Range(file, 1 << 20, 5)]
        batches = list(_batches(ranges))
        assert [r for batch in batches for r in batch] == ranges
        assert [len(batch) for batch in batches] == [41, 1, 1, 1, 1, 1]
        for batch in batches:
            assert batch[0].offset // CHUNK_BYTES == (batch[-1].end - 1) // CHUNK_BYTES
            assert all(b.offset >= a.end for a, b in pairwise(batch))
    assert list(_batches([])) == []


@pytest.mark.parametrize("damage", ["cut", "broken"])
def test_a_read_that_fails_names_the_file_and_the_byte(tmp_path: Path, how: str, monkeypatch, damage: str) -> None:
    path, read = tmp_path / "model.safetensors", os.preadv

    def broken(descriptor, buffers, offset, *flags):
        if offset >= 8_000_000 and not flags:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, offset, *flags)

    with TensorFile(path) as file:
        if damage == "cut":
            os.truncate(path, 10_000_001)
            reason = r"model\.safetensors: truncated while it was read: expected"
        else:
            monkeypatch.setattr(os, "preadv", broken)
            reason = r"safetensors: cannot be read at byte 8\d+: Input/output error"
        with ParallelReader() as reader:
            futures = reader.start(split(file, 1000, torch.zeros(12_000_000, dtype=torch.uint8)))
            with pytest.raises(CheckpointError, match=reason):
                reader.finish(futures)
    assert not any(thread.name.startswith("distzo2-read") for thread in threading.enumerate())


def test_a_name_that_belongs_to_another_file_by_now(tmp_path: Path, how: str) -> None:
    """Shards that a download replaces meanwhile: what was checked is what is read."""
    path = tmp_path / "model.safetensors"
    with TensorFile(path) as file:
        entry = file.tensors["b"]
        (tmp_path / "new").write_bytes(bytes(file.num_bytes))
        os.replace(tmp_path / "new", path)
        out = torch.zeros(entry.shape)
        with ParallelReader() as reader:
            reader.finish(reader.start(split(file, entry.offset, out)))
    (tmp_path / "again").mkdir()
    assert torch.equal(out, make_files(tmp_path / "again")["b"])


def test_what_waits_behind_a_failure_is_not_read(tmp_path: Path, monkeypatch) -> None:
    make_files(tmp_path)
    begun = []

    def broken(direct, batch):
        begun.append(batch)
        time.sleep(0.01 if len(begun) == 1 else 0.3)  # what is begun once one has failed; a busy machine takes its time
        raise CheckpointError("a shard is gone")

    monkeypatch.setattr(reading, "_read", broken)
    with TensorFile(tmp_path / "model.safetensors") as file, ParallelReader(1) as reader:
        futures = reader.start([Range(file, at, 1) for at in range(0, 14_000_000, 140_000)])
        assert len(futures) == 100
        with pytest.raises(CheckpointError, match="a shard is gone"):
            reader.finish(futures)
        assert len(begun) < 50


def test_reading_in_one_thread_takes_a_block_at_a_time(tmp_path: Path, monkeypatch) -> None:
    asked: list[int] = []
    real = reading.scratch

    def watched(dtype: torch.dtype, numel: int) -> torch.Tensor:
        asked.append(numel * dtype.itemsize)
        return real(dtype, numel)

    monkeypatch.setattr(reading, "scratch", watched)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 16)
    weight = torch.randn(300, 500)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    files, where = CheckpointFiles(tmp_path), Layout.leaf(0, (300, 500))
    out = torch.empty(500, 300)
    files.read_pieces(where.strided((500, 300), (1, 500), 0).pieces, out)
    assert torch.equal(out, weight.t())
    assert len(asked) >= weight.numel() * 4 // (1 << 16) and max(asked) <= 1 << 16
    asked.clear()
    files.read_pieces(where.pieces, out)
    assert torch.equal(out.view(300, 500), weight) and not asked  # same layout and dtype: straight into its place


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", "x" * 300, "./x"]
)
def test_an_index_names_files_of_its_directory_only(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", base / "sub" / "x.safetensors"):
        save_file({"w": torch.ones(2)}, place)
    (base / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": name}}))
    refused(lambda: CheckpointFiles(base), CheckpointError, "index.json")


def test_a_tensor_is_in_one_file(tmp_path: Path) -> None:
    """The index may choose between two; a tensor that it does not name must be in one file only."""
    for name in ("a", "b"):
        save_file({"w": torch.full((2,), float(ord(name))), "v": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": "b.safetensors", "v": "a.safetensors"}}))
    files = CheckpointFiles(tmp_path)
    assert {entry.name: entry.path.name for entry in files.entries} == {
        "w": "b.safetensors",
        "v": "a.safetensors",
    }
    for name in ("a", "b"):
        save_file({name: torch.ones(2), "u": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    refused(lambda: CheckpointFiles(tmp_path), CheckpointError, "b.safetensors: tensor 'u' is in a.safetensors too")


def test_a_part_of_a_file_is_digested_with_its_whole_header(tmp_path: Path) -> None:
    """Also what lies beyond the first MiB of a header, between the pages that are read."""
    path, digested = tmp_path / "model.gguf", 1 << 20
    data = bytearray(os.urandom(4 << 20))
    path.write_bytes(data)
    record = digest_checkpoint(path, {"model.gguf": 2 << 20})
    known = record["files"]["model.gguf"]
    assert (known["part"], known["header_bytes"]) == ("samples", 2 << 20)
    assert not [*checkpoint_differences(path, record)]
    pages = {(len(data) - PAGE) * i // 255 for i in range(256)}
    at = next(at for at in range(digested, 2 << 20) if not any(page <= at < page + PAGE for page in pages))
    data[at] ^= 1
    path.write_bytes(data)
    (difference,) = checkpoint_differences(path, record)
    assert "SHA-256 of its header" in difference
    for key in ("header_bytes", "header_sha256"):  # as earlier versions recorded it
        del known[key]
    assert not [*checkpoint_differences(path, record)]
