"""The tensors in the files of a checkpoint directory, and pieces of them read.

A piece is read into a parameter by one thread, with one scratch block of `SCRATCH_BYTES` where elements change their
order or dtype, or as ranges that several threads read.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from distzo2.checkpoint.checkpoint_config import MAX_JSON_BYTES, read_json
from distzo2.checkpoint.layout import Layout, Piece
from distzo2.checkpoint.reading import CHUNK_BYTES, Range, split
from distzo2.checkpoint.symbols import LayoutTensor
from distzo2.checkpoint.torch_archive import open_weights
from distzo2.checkpoint.weight_files import CheckpointError, RangeFile, TensorEntry, bytes_of

_SAMPLED_PAGES = 16
SCRATCH_BYTES = 16 << 20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LEGACY_FILE = "pytorch_model.bin"
_LEGACY_INDEX = "pytorch_model.bin.index.json"

_scratch = threading.local()


def scratch(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """This thread's scratch block as `numel` elements of `dtype`, contents undefined."""
    num_bytes = numel * dtype.itemsize
    block = getattr(_scratch, "block", None)
    if block is None or block.numel() < num_bytes:
        block = _scratch.block = torch.empty(max(num_bytes, SCRATCH_BYTES), dtype=torch.uint8)
    return block[:num_bytes].view(dtype)


class CheckpointFiles:
    """All tensors of a checkpoint directory, in one file or in shards with an index; safetensors before `.bin`.

    Raises CheckpointError if there is no checkpoint, an indexed tensor is in no file, or two files disagree.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.files: list[RangeFile] = []
        self.entries: list[TensorEntry] = []
        self.file_of: list[RangeFile] = []
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: expected a checkpoint directory, got no directory of that name")
        for single, index in ((SINGLE_FILE, INDEX_FILE), (_LEGACY_FILE, _LEGACY_INDEX)):
            if (self.directory / single).is_file() or (self.directory / index).is_file():
                break
        else:
            raise CheckpointError(f"{self.directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
        weight_map = {} if (self.directory / single).is_file() else self._weight_map(index)
        seen: dict[str, RangeFile] = {}
        for name in dict.fromkeys(weight_map.values()) or (single,):
            file = open_weights(self.directory / name)
            self.files.append(file)
            for entry in file.tensors.values():
                if weight_map.get(entry.name, name) != name:
                    continue  # the index takes this tensor from another file
                if entry.name in seen:
                    raise CheckpointError(f"{file.path}: tensor {entry.name!r} is in {seen[entry.name].path.name} too")
                seen[entry.name] = file
                self.entries.append(entry)
                self.file_of.append(file)
        lost = sorted(weight_map.keys() - seen.keys())
        if lost:
            where = self.directory / weight_map[lost[0]]
            raise CheckpointError(f"{where}: expected tensor {lost[0]!r} as {index} says, got none of that name")

    def _weight_map(self, index_name: str) -> dict[str, str]:
        """Tensor name to file name."""
        index = self.directory / index_name
        in_files = sum(file.stat().st_size for file in self.directory.iterdir() if file.is_file())
        content = read_json(index, max(MAX_JSON_BYTES, in_files // 64))
        try:
            weight_map = content["weight_map"]
            if not weight_map or not all(isinstance(name, str) for pair in weight_map.items() for name in pair):
                raise ValueError("weight_map is empty or does not map names to file names")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: expected JSON with a weight_map: {repr(error)[:200]}") from error
        for name in set(weight_map.values()):
            if Path(name).name != name or "\0" in name or len(name) > 255:
                raise CheckpointError(f"{index}: expected names of files in the same directory, got {name[:80]!r}")
            if not (self.directory / name).is_file():
                raise CheckpointError(f"{self.directory / name}: {index_name} names this file, but it is not there")
        return weight_map

    def close(self) -> None:
        for file in self.files:
            file.close()

    def sample(self) -> list[tuple[str, int, int]]:
        """Name, bytes and a CRC of pages here and there, of each file: what two ranks that load the same have alike."""
        result = []
        page = memoryview(bytearray(4096))
        for file in self.files:
            crc = 0
            for i in range(_SAMPLED_PAGES):
                part = page[: min(len(page), file.num_bytes)]
                file.read_into(part, (file.num_bytes - len(part)) * i // (_SAMPLED_PAGES - 1))
                crc = zlib.crc32(part, crc)
            result.append((file.path.name, file.num_bytes, crc))
        return result

    def read_piece(self, piece: Piece, flat: torch.Tensor) -> None:
        """Copies one piece into `flat`, the row-major elements of its parameter in CPU memory."""
        file, entry = self.file_of[piece.source], self.entries[piece.source]
        item = entry.dtype.itemsize
        if piece.is_run and entry.dtype == flat.dtype:
            run = flat[piece.dst_offset : piece.dst_offset + piece.numel]
            file.read_into(bytes_of(run), entry.offset + piece.src_offset * item)
            return
        for block in piece.blocks(SCRATCH_BYTES // item):
            buffer = scratch(entry.dtype, block.src_span)
            file.read_into(bytes_of(buffer), entry.offset + block.src_offset * item)
            strided_view(flat, block).copy_(buffer.as_strided(block.sizes, block.src_strides, buffer.storage_offset()))

    def ranges_of(self, piece: Piece, flat: torch.Tensor, within: range | None = None) -> Iterator[Range]:
        """What `read_piece` reads, as ranges for a `ParallelReader`, in the order of the file; of `flat` at least the
        elements `within`."""
        file, entry = self.file_of[piece.source], self.entries[piece.source]
        item = entry.dtype.itemsize
        within = range(flat.numel()) if within is None else within
        if piece.is_run and entry.dtype == flat.dtype:
            begin = max(piece.dst_offset, within.start)
            end = max(begin, min(piece.dst_offset + piece.numel, within.stop))
            source = piece.src_offset + begin - piece.dst_offset
            yield from split(file, entry.offset + source * item, flat[begin:end])
            return
        for block in piece.blocks(CHUNK_BYTES // item):
            last = block.dst_offset + sum((n - 1) * s for n, s in zip(block.sizes, block.dst_strides, strict=True))
            if block.dst_offset >= within.stop or last < within.start:
                continue
            fill = partial(_rearrange, block, entry.dtype, flat)
            yield Range(file, entry.offset + block.src_offset * item, block.src_span * item, fill=fill)

    def read_layout(self, where: Layout, dtype: torch.dtype) -> torch.Tensor:
        """A small layout as a tensor of its own."""
        out = torch.empty(where.shape, dtype=dtype)
        for piece in where.pieces:
            self.read_piece(piece, out.reshape(-1))
        return out

    def equal(self, a: LayoutTensor, b: LayoutTensor) -> bool:
        """Whether two symbols have equal values, compared a block of rows at a time."""
        if not a.shape or not a.numel():
            return torch.equal(self.read_layout(a.where, a.dtype), self.read_layout(b.where, b.dtype))
        rows = max(1, (4 << 20) // max(1, math.prod(a.shape[1:]) * a.dtype.itemsize))
        for begin in range(0, a.shape[0], rows):
            count = min(rows, a.shape[0] - begin)
            pair = [self.read_layout(s.where.narrow(0, begin, count), s.dtype) for s in (a, b)]
            if not torch.equal(*pair):
                return False
        return True


def _rearrange(block: Piece, dtype: torch.dtype, flat: torch.Tensor, data: torch.Tensor) -> None:
    """Puts a block whose source span is in `data`, as bytes, where it belongs in `flat`."""
    item = dtype.itemsize
    if data.data_ptr() % item != 0:  # a tensor may start at any byte of its file
        data = data.clone()
    source = data.view(dtype)
    strided_view(flat, block).copy_(source.as_strided(block.sizes, block.src_strides, source.storage_offset()))


def strided_view(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of `flat` that a piece's destination walk visits."""
    return flat.as_strided(piece.sizes, piece.dst_strides, flat.storage_offset() + piece.dst_offset)
