"""The tensors of a checkpoint directory, and many byte ranges of its files read by a few threads.

A file that the page cache holds is read through it; any other with O_DIRECT, so that a checkpoint larger than memory
drives nothing out of the cache. Direct reads need aligned offsets and memory, which tensors in a file do not have: each
thread reads into its own block (`scratch`), on huge pages (a read is then a few segments and not a thousand), and
copies from there. That block is all the memory that reading takes, whatever is read.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from distzo2.checkpoint.layout import Layout, Piece, row_major_strides
from distzo2.checkpoint.symbols import LayoutTensor
from distzo2.checkpoint.tensor_files import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    PAGE,
    CheckpointError,
    TensorEntry,
    TensorFile,
    bytes_of,
    read_json,
)
from distzo2.text import brief
from distzo2_core import aligned_buffer

CHUNK_BYTES = 4 << 20  # of one read
NUM_THREADS = 6
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_FILE, ADAPTER_WEIGHTS, "adapter_model.bin")
_FIRST_FILES = (SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")  # the first one counts
_HUGE_PAGE = 2 << 20
_GAP_BYTES = 64 << 10  # may be read in vain to save a read
_SAMPLED_PAGES = 16
SAMPLES = "samples"  # `part` of a record: the SHA-256 is of the first bytes and of pages at equal distances
_DIGESTED_BYTES, _DIGESTED_PAGES = 1 << 20, 256

_scratch = threading.local()


def scratch(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """This thread's scratch block as `numel` elements of `dtype`, contents undefined."""
    num_bytes = numel * dtype.itemsize
    block = getattr(_scratch, "block", None)
    if block is None or block.numel() < num_bytes:
        block = _scratch.block = aligned_buffer(max(num_bytes, CHUNK_BYTES + _HUGE_PAGE))
    return block[:num_bytes].view(dtype)


class Range(NamedTuple):
    """Bytes [offset, offset + num_bytes) of a file, at most `CHUNK_BYTES`, and where they go.

    They are copied to `place`, or `fill` is called with them as a uint8 tensor, in one of the reading threads.
    """

    file: TensorFile
    offset: int
    num_bytes: int
    place: torch.Tensor | None = None  # uint8, contiguous, on the CPU
    fill: Callable[[torch.Tensor], None] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    def read(self) -> None:
        """Reads through the page cache, in the calling thread."""
        data = self.place if self.place is not None else scratch(torch.uint8, self.num_bytes)
        self.file.read_into(bytes_of(data), self.offset)
        if self.fill is not None:
            self.fill(data)


def split(file: TensorFile, offset: int, place: torch.Tensor) -> Iterator[Range]:
    """The ranges of a long run of bytes that belongs at `place`, cut where the file's chunks end."""
    flat = place.detach().reshape(-1).view(torch.uint8)
    begin = 0
    while begin < flat.numel():
        end = min(flat.numel(), begin + CHUNK_BYTES - (offset + begin) % CHUNK_BYTES)
        yield Range(file, offset + begin, end - begin, flat[begin:end])
        begin = end


def adapter_in(directory: Path) -> str | None:
    """What to say of a directory that is not there, or holds an adapter (LoRA, ...) of a model and not the model; None
    of any other."""
    if not directory.exists():
        return "found no such file or directory (a model of a hub must be downloaded first)"
    if inside := sorted(directory.glob(f"snapshots/*/{CONFIG_FILE}")):
        return f"found a hub's cache: name {inside[-1].parent}"
    if not (directory / ADAPTER_FILE).is_file():
        return None
    fields = read_json(directory / ADAPTER_FILE)
    base, kind = fields.get("base_model_name_or_path"), fields.get("peft_type")
    return (
        f"found only an adapter ({ADAPTER_FILE}, {brief(kind or 'of no type')}) for the base model "
        f"{brief(base) if base else '(it does not say which)'}: name that model, and this with --adapter"
    )


class CheckpointFiles:
    """All tensors of a checkpoint directory, in one file or in shards with an index; safetensors before `.bin`. With
    `only`, those of the file of that name.

    Raises CheckpointError if there is no checkpoint, an indexed tensor is in no file, or two files hold the same one.
    """

    def __init__(self, directory: str | Path, only: str | None = None):
        self.directory = Path(directory)
        self.files: dict[Path, TensorFile] = {}
        self.entries: list[TensorEntry] = []  # by the number that pieces name as their source
        first = only or next((name for name in _FIRST_FILES if (self.directory / name).is_file()), None)
        if first is None:
            expected = f"expected a checkpoint directory with {SINGLE_FILE} or {INDEX_FILE}"
            raise CheckpointError(f"{self.directory}: {expected}, {adapter_in(self.directory) or 'found neither'}")
        weight_map = self._weight_map(first) if first.endswith(".json") else {}
        seen: dict[str, Path] = {}
        for name in dict.fromkeys(weight_map.values()) or (first,):
            file = TensorFile(self.directory / name)
            self.files[file.path] = file
            for entry in file.tensors.values():
                if weight_map.get(entry.name, name) != name:
                    continue  # the index takes this tensor from another file
                if entry.name in seen:
                    raise CheckpointError(f"{file.path}: tensor {entry.name!r} is in {seen[entry.name].name} too")
                seen[entry.name] = file.path
                self.entries.append(entry)
        if lost := sorted(weight_map.keys() - seen.keys()):
            where = self.directory / weight_map[lost[0]]
            raise CheckpointError(f"{where}: expected tensor {lost[0]!r} as {first} says, got none of that name")

    def _weight_map(self, index_name: str) -> dict[str, str]:
        """Tensor names to file names."""
        index = self.directory / index_name
        num_bytes = sum(file.stat().st_size for file in self.directory.iterdir() if file.is_file())
        weight_map = read_json(index, max(MAX_JSON_BYTES, num_bytes // 64)).get("weight_map")
        is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
        if not is_map or not weight_map:
            raise CheckpointError(f"{index}: expected JSON with a weight_map from tensors to files")
        for name in set(weight_map.values()):
            if Path(name).name != name or "\0" in name or len(name) > 255:
                raise CheckpointError(f"{index}: expected names of files in the same directory, got {brief(name)}")
            if not (self.directory / name).is_file():
                raise CheckpointError(f"{self.directory / name}: {index_name} names this file, but it is not there")
        return weight_map

    def extend(self, other: CheckpointFiles) -> None:
        """Takes over the tensors of other files, behind its own."""
        self.files |= other.files
        self.entries += other.entries

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def sample(self) -> list[tuple[str, int, int]]:
        """Name, length and a CRC of some pages of each file, for ranks to agree that they load the same checkpoint."""
        result = []
        page = memoryview(bytearray(PAGE))
        for file in self.files.values():
            crc = 0
            for i in range(_SAMPLED_PAGES):
                part = page[: min(len(page), file.num_bytes)]
                file.read_into(part, (file.num_bytes - len(part)) * i // (_SAMPLED_PAGES - 1))
                crc = zlib.crc32(part, crc)
            result.append((file.path.name, file.num_bytes, crc))
        return result

    def ranges_of(self, piece: Piece, flat: torch.Tensor, within: range | None = None) -> Iterator[Range]:
        """The ranges that fill one piece of `flat`, the row-major elements of its parameter in CPU memory, in the
        order of the file. Elements outside `within` may be left out."""
        entry = self.entries[piece.source]
        file = self.files[entry.path]
        if entry.strides is not None:
            stored = Piece(piece.source, entry.shape, 0, entry.strides, 0, row_major_strides(entry.shape)).coalesced()
            for part in Layout(entry.shape, (stored,)).through(piece):
                yield from self._ranges_of(file, entry, part, flat, within)
        else:
            yield from self._ranges_of(file, entry, piece, flat, within)

    def _ranges_of(
        self, file: TensorFile, entry: TensorEntry, piece: Piece, flat: torch.Tensor, within: range | None
    ) -> Iterator[Range]:
        """The ranges of a piece whose source offset and strides are those of the file."""
        item = entry.dtype.itemsize
        within = range(flat.numel()) if within is None else within
        if piece.is_run and entry.dtype == flat.dtype:
            begin = max(piece.dst_offset, within.start)
            end = max(begin, min(piece.dst_offset + piece.numel, within.stop))
            source = piece.src_offset + begin - piece.dst_offset
            yield from split(file, entry.offset + source * item, flat[begin:end])
            return
        for block in piece.blocks(CHUNK_BYTES // item):
            if block.dst_offset >= within.stop or block.dst_offset + block.dst_span <= within.start:
                continue
            fill = partial(_rearrange, block, entry.dtype, flat)
            yield Range(file, entry.offset + block.src_offset * item, block.src_span * item, fill=fill)

    def read_pieces(self, pieces: Iterable[Piece], out: torch.Tensor) -> None:
        """Fills `out` (contiguous, on the CPU) from the pieces, in the calling thread."""
        flat = out.detach().view(-1)
        for piece in pieces:
            for part in self.ranges_of(piece, flat):
                part.read()

    def equal(self, a: LayoutTensor, b: torch.Tensor) -> bool:
        """Whether a symbol has the values of another, or of a tensor, of its shape; compared a chunk at a time."""
        if not isinstance(b, LayoutTensor):
            found = torch.empty(a.shape, dtype=a.dtype)
            self.read_pieces(a.where.pieces, found)
            return torch.equal(found, b.to(a.dtype))
        step = max(1, CHUNK_BYTES // a.dtype.itemsize)
        for begin in range(0, a.numel(), step):
            pair = []
            for symbol in (a, b):
                part = symbol.where.flat(begin, min(step, a.numel() - begin))
                pair.append(torch.empty(part.shape, dtype=symbol.dtype))
                self.read_pieces(part.pieces, pair[-1])
            if not torch.equal(*pair):
                return False
        return True


def _rearrange(block: Piece, dtype: torch.dtype, flat: torch.Tensor, data: torch.Tensor) -> None:
    """Puts a block, whose source span is in `data` as bytes, where it belongs in `flat`."""
    if data.data_ptr() % dtype.itemsize:  # a tensor may start at any byte of its file
        data = data.clone()
    source = data.view(dtype)
    strided_view(flat, block).copy_(source.as_strided(block.sizes, block.src_strides, source.storage_offset()))


def strided_view(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of `flat` that a piece's destination walk visits."""
    return flat.as_strided(piece.sizes, piece.dst_strides, flat.storage_offset() + piece.dst_offset)


class ParallelReader(ThreadPoolExecutor):
    """A few threads that read ranges. One thread at a time may use it.

    After an error, reads that are still queued are dropped, and `finish` raises the first error.
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        super().__init__(num_threads, "distzo2-read")

    def start(self, ranges: Iterable[Range]) -> list[Future[None]]:
        """Queues reads. Ranges that are neighbours in a file should be neighbours here."""
        return [self.submit(_read, batch[0].file.direct, batch) for batch in _batches(ranges)]

    def finish(self, futures: list[Future[None]]) -> None:
        """Waits for reads that `start` queued.

        Raises:
            CheckpointError: a file is truncated or unreadable (file, offset, what was expected).
        """
        _, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(waiting)
        for future in futures:
            if not future.cancelled():
                future.result()

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown(cancel_futures=True)


def _read(direct: int | None, batch: list[Range]) -> None:
    if direct is None:
        for part in batch:
            part.read()
        return
    begin = batch[0].offset // PAGE * PAGE  # a range may begin and end within a page
    num_bytes = batch[-1].end - begin
    block = scratch(torch.uint8, -(-num_bytes // PAGE) * PAGE)
    batch[0].file.read_into(bytes_of(block), begin, num_bytes, direct)
    for part in batch:
        data = block[part.offset - begin : part.end - begin]
        if part.place is not None:
            ctypes.memmove(part.place.data_ptr(), data.data_ptr(), part.num_bytes)  # releases the GIL
        if part.fill is not None:
            part.fill(data)


def read_ranges(ranges: Iterable[Range]) -> None:
    """Reads ranges in the calling thread as a `ParallelReader` does in its own."""
    for batch in _batches(ranges):
        _read(batch[0].file.direct, batch)


def _batches(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Ranges that one read covers: neighbours in one chunk of a file. Chunks begin at multiples of `CHUNK_BYTES`,
    since a read that is a page longer than a disk's largest request (4 MiB on many) takes two requests."""
    batch: list[Range] = []
    for part in ranges:
        fits = (
            batch
            and part.file is batch[0].file
            and 0 <= part.offset - batch[-1].end <= _GAP_BYTES
            and batch[0].offset // CHUNK_BYTES == (part.end - 1) // CHUNK_BYTES
        )
        if batch and not fits:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def digest_checkpoint(checkpoint: str | os.PathLike[str], headers: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The journal header's record of a base checkpoint: `{"name", "files": {file: {"sha256", "num_bytes"}}}`.

    The files are those that decide the weights: files of weights, their safetensors index, and config.json; or a GGUF
    file, with the others of a split one.

    Args:
        headers: bytes in front of the tensors of each file of weights. Given, only these, the beginning and some pages
            of such a file are read: packed weights stream as they are and are not read at the start. Its record has
            `"part": "samples"`, `header_bytes` and `header_sha256` too.

    Raises:
        CheckpointError: there is no checkpoint there.
    """
    path = Path(checkpoint)
    if path.is_file():
        split = re.sub(r"-00001-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", path.name)
        weights = {file.name for file in path.parent.glob(split)} if split != path.name else {path.name}
        others: set[str] = set()
    else:
        with closing(CheckpointFiles(path)) as files:
            weights = {file.name for file in files.files}
        others = {name for name in (INDEX_FILE, CONFIG_FILE) if (path / name).is_file()}
    names, directory = sorted(weights | others), path.parent if path.is_file() else path
    sampled = {} if headers is None else {name: headers.get(name, 0) for name in weights}
    return {"name": path.resolve().name, "files": digest_files(directory, names, sampled)}


def adapter_weights(directory: Path) -> str:
    """The name of an adapter's file of weights."""
    return next((name for name in ADAPTER_FILES[1:] if (directory / name).is_file()), ADAPTER_WEIGHTS)


def digest_adapter(directory: Path) -> dict[str, Any]:
    """What a journal's header records of an adapter's files."""
    return digest_files(directory, [ADAPTER_FILE, adapter_weights(directory)])


def checkpoint_differences(
    directory: str | os.PathLike[str], base: Mapping[str, Any], adapter: Path | None = None
) -> Iterator[str]:
    """Each difference between a directory and what `digest_checkpoint` returned for it, as a line that names the file.
    Missing files and other lengths come first, since they are found quickly. Files of an adapter are in `adapter`. In
    the place of the directory a GGUF file may be named."""
    path = Path(directory)
    path = path.parent if path.is_file() else path
    same_length: dict[Path, list[str]] = {}
    for name, record in base["files"].items():
        file = (path if adapter is None or name not in ADAPTER_FILES else adapter) / name
        if not file.is_file():
            yield f"{file}: the journal's base checkpoint has this file, but it is not there"
        elif file.stat().st_size != record["num_bytes"]:
            yield f"{file}: {file.stat().st_size} bytes, the journal's base checkpoint has {record['num_bytes']}"
        else:
            same_length.setdefault(file.parent, []).append(name)
    for place, names in same_length.items():
        known = {name: base["files"][name] for name in names}
        sampled = {name: each.get("header_bytes", 0) for name, each in known.items() if each.get("part") == SAMPLES}
        for name, record in digest_files(place, names, sampled).items():
            for key, what in (("header_sha256", "SHA-256 of its header"), ("sha256", "SHA-256")):
                expected = known[name].get(key, record.get(key))  # older records lack that of the header
                if record.get(key) != expected:
                    yield f"{place / name}: {what} {record.get(key)}, the journal's base checkpoint has {expected}"
                    break


def digest_files(
    directory: Path, names: list[str], sampled: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """SHA-256 and length of files, by name; of those in `sampled`, the SHA-256 of a part, and of as many bytes in front
    of the tensors."""

    def digest(name: str) -> dict[str, Any]:
        with open(directory / name, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if sampled and name in sampled:
                length = min(sampled[name], MAX_HEADER_BYTES)
                header = {"header_bytes": length, "header_sha256": hashlib.sha256(file.read(length)).hexdigest()}
                sha256 = _digest_samples(file, num_bytes)
                return {"sha256": sha256, "num_bytes": num_bytes, "part": SAMPLES} | header
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "num_bytes": num_bytes}

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _digest_samples(file: BinaryIO, num_bytes: int) -> str:
    """SHA-256 of the beginning of a file, its end, and pages at equal distances between."""
    file.seek(0)
    digest = hashlib.sha256(file.read(_DIGESTED_BYTES))
    for i in range(_DIGESTED_PAGES):
        file.seek(max(0, num_bytes - PAGE) * i // (_DIGESTED_PAGES - 1))
        digest.update(file.read(PAGE))
    return digest.hexdigest()
