"""Writes a checkpoint through a `CheckpointMap`, parameter by parameter, in the layout that its files had.

Everything is written into a hidden directory, made durable, and renamed at the end. Where the output directory is not
there, or is empty, that is one rename of the hidden directory beside it: whenever the process is killed, the checkpoint
is whole or not there. Where it holds other files, the hidden directory is inside it and the files are renamed one by
one: until `close` returns, what was there before is untouched or can be put back, but a kill between two renames leaves
some of both.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from distzo2.checkpoint.checkpoint_companions import copy_companions, copy_file, is_own_file
from distzo2.checkpoint.checkpoint_config import read_json
from distzo2.checkpoint.checkpoint_files import INDEX_FILE, SCRATCH_BYTES, SINGLE_FILE, scratch, strided_view
from distzo2.checkpoint.checkpoint_hidden import (
    can_take_name_of,
    make_hidden,
    make_place_for_replaced,
    remove_leftovers,
    sync_tree,
)
from distzo2.checkpoint.file_checksum import FileChecksum
from distzo2.checkpoint.layout import Layout, Piece
from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.weight_files import CheckpointError, SafetensorsWriter, TensorEntry, bytes_of, sync_directory

DEFAULT_SHARD_BYTES = 5_000_000_000
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DISK_SLACK_BYTES = 64 << 20  # configuration, tokenizer, and the file system's own needs


def holds_checkpoint(directory: str | os.PathLike) -> list[str]:
    """Names of the files in `directory` that make up a checkpoint."""
    path = Path(directory)
    if not path.is_dir():
        return []
    patterns = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "config.json")
    return sorted({file.name for pattern in patterns for file in path.glob(pattern) if not file.name.startswith(".")})


class CheckpointWriter:
    """Streams parameters into `out_dir`; a context manager that gives everything up if its block raises.

    `max_shard_bytes` bounds the tensors of one file (a larger tensor gets a file of its own). Persistent buffers that
    are not written are copied from the map's own files. Raises CheckpointError, before anything is written, if
    `out_dir` holds a checkpoint and `overwrite` is false, if its disk has too little room, or if the model's tensors
    do not make up whole checkpoint tensors.
    """

    def __init__(
        self,
        checkpoint_map: CheckpointMap,
        out_dir: str | os.PathLike,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ):
        self.map = checkpoint_map
        self.out_dir = Path(out_dir)
        self.checksums: dict[str, FileChecksum] = {}  # of the files of weights, by name, once it is closed
        self._shards: list[SafetensorsWriter] = []
        self._tmp: Path | None = None
        self._made: list[Path] = []
        self._lock: int | None = None  # a descriptor that tells others that `_tmp` is in use
        held = holds_checkpoint(self.out_dir)
        if held and not overwrite:
            raise CheckpointError(f"{self.out_dir}: already holds {held[0]}; name another directory or overwrite=True")
        source = checkpoint_map.directory
        if source is not None and self.out_dir.exists() and source.exists() and source.samefile(self.out_dir):
            raise CheckpointError(f"{self.out_dir}: the checkpoint that the model came from cannot be overwritten")
        planned = self._plan()
        plan = _shard(planned, max_shard_bytes)
        self._weight_map = {name: file for file, tensors in plan.items() for name in tensors}
        self._num_bytes = sum(entry.num_bytes for entry in planned)
        self._missing = {name: tensor.numel for name, tensor in checkpoint_map.mapped.items() if tensor.pieces}

        self._check_room()
        self._made = [path for path in (self.out_dir, *self.out_dir.parents) if not path.exists()]  # innermost first
        try:
            if self.out_dir.is_dir():
                remove_leftovers(self.out_dir)
            self._is_alone = can_take_name_of(self.out_dir)
            home = self._target.parent if self._is_alone else self.out_dir
            home.mkdir(parents=True, exist_ok=True)
            for path in self._made:
                if path.exists():
                    sync_directory(path.parent)
            if self._is_alone:
                remove_leftovers(home)
            self._tmp, self._lock = make_hidden(home)
            self._write_companions(self._tmp, len(plan))
            self._place: dict[str, tuple[SafetensorsWriter, TensorEntry]] = {}
            for file, tensors in plan.items():
                shard = SafetensorsWriter(self._tmp / file, tensors)
                self._shards.append(shard)
                self._place |= {name: (shard, entry) for name, entry in shard.tensors.items()}
        except BaseException:
            self.abort()
            raise

    def _plan(self) -> list[TensorEntry]:
        """The checkpoint tensors to write, in the order in which the model's parameters reach them."""
        covered: dict[int, int] = {}
        dtypes: dict[int, torch.dtype] = {}
        runs: dict[int, list[tuple[int, int]]] = {}
        for mapped in self.map.mapped.values():
            for piece in mapped.pieces:
                number = piece.source
                covered[number] = covered.get(number, 0) + piece.numel
                dtypes[number] = torch.promote_types(dtypes.get(number, mapped.dtype), mapped.dtype)
                if piece.is_run:
                    runs.setdefault(number, []).append((piece.src_offset, piece.src_offset + piece.numel))
        for number, numel in covered.items():
            entry = self.map.tensors[number]
            spans = sorted(runs.get(number, []))
            overlap = any(a[1] > b[0] for a, b in pairwise(spans))
            if numel != entry.numel or overlap:
                raise CheckpointError(
                    f"checkpoint tensor {entry.name!r} cannot be written: the model's parameters hold {numel} elements "
                    f"of its {entry.numel}{' and some twice' if overlap else ''}"
                )
        return [
            TensorEntry(t.name, dtypes[number], t.shape, 0, t.numel * dtypes[number].itemsize)
            for number in covered
            for t in (self.map.tensors[number],)
        ]

    def _check_room(self) -> None:
        existing = next(path for path in (self.out_dir.absolute(), *self.out_dir.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise CheckpointError(f"{self.out_dir}: expected a directory, got the file {existing}")
        free = shutil.disk_usage(existing).free
        if free < self._num_bytes + DISK_SLACK_BYTES:
            raise CheckpointError(
                f"{self.out_dir}: too little room on its disk: the checkpoint needs {self._num_bytes} bytes "
                f"and {DISK_SLACK_BYTES} to spare, {free} are free"
            )

    def write_param(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a whole parameter or buffer, of the map's shape and dtype."""
        mapped = self.map.mapped[name]
        if tuple(tensor.shape) != mapped.shape:
            raise ValueError(f"{name}: expected shape {list(mapped.shape)}, got {list(tensor.shape)}")
        self._write(name, mapped.pieces, tensor)

    def write_range(self, name: str, row_begin: int, row_end: int, tensor: torch.Tensor) -> None:
        """Writes rows `row_begin` to `row_end` (of the first dimension) of a parameter; each row once."""
        mapped = self.map.mapped[name]
        if tuple(tensor.shape) != (row_end - row_begin, *mapped.shape[1:]):
            raise ValueError(f"{name}: rows {row_begin} to {row_end} do not have the shape {list(tensor.shape)}")
        part = Layout(mapped.shape, mapped.pieces).narrow(0, row_begin, row_end - row_begin)
        self._write(name, part.pieces, tensor)

    def _write(self, name: str, pieces: tuple[Piece, ...], tensor: torch.Tensor) -> None:
        if tensor.dtype != self.map.mapped[name].dtype:
            raise ValueError(f"{name}: expected {self.map.mapped[name].dtype}, got {tensor.dtype}")
        if not pieces:
            return  # no element, or a tensor that is not saved
        if self._missing.get(name, 0) < tensor.numel():
            raise ValueError(f"{name}: {tensor.numel()} elements more than it still lacks were written")
        flat = tensor.detach().cpu().contiguous().view(-1)
        for piece in pieces:
            self._write_piece(piece, flat)
        self._missing[name] -= tensor.numel()
        if not self._missing[name]:
            del self._missing[name]

    def _write_piece(self, piece: Piece, flat: torch.Tensor) -> None:
        shard, entry = self._place[self.map.tensors[piece.source].name]
        item = entry.dtype.itemsize
        if piece.is_run and entry.dtype == flat.dtype:
            run = flat[piece.dst_offset : piece.dst_offset + piece.numel]
            shard.write_bytes(bytes_of(run), entry.offset + piece.src_offset * item)
            return
        for block in piece.blocks(SCRATCH_BYTES // item):
            begin = entry.offset + block.src_offset * item
            buffer = scratch(entry.dtype, block.src_span)
            if not block.src_is_dense:  # other pieces own the elements in between
                shard.read_into(bytes_of(buffer), begin)
            buffer.as_strided(block.sizes, block.src_strides, buffer.storage_offset()).copy_(strided_view(flat, block))
            shard.write_bytes(bytes_of(buffer), begin, is_last=block.src_is_dense)

    def close(self) -> None:
        """Adds what goes with the weights, makes all of it durable, and gives the files their names."""
        if self._tmp is None:
            return
        try:
            for name in self.map.buffer_names:
                if name in self._missing and self.map.files is not None:
                    mapped = self.map.mapped[name]
                    where = Layout(mapped.shape, mapped.pieces)
                    self.write_param(name, self.map.files.read_layout(where, mapped.dtype))
            if self._missing:
                name, numel = next(iter(self._missing.items()))
                raise CheckpointError(
                    f"{self.out_dir}: {len(self._missing)} parameters were not written, {name!r} lacks {numel} elements"
                )
            for shard in self._shards:
                self.checksums[shard.path.name] = shard.checksum()
                shard.close()
            sync_tree(self._tmp)
            if self._is_alone:
                self._publish_alone()
            else:
                self._publish()
        except BaseException:
            self.abort()
            raise

    def _write_companions(self, tmp: Path, num_files: int) -> None:
        if num_files > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
            (tmp / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if self.map.directory is not None:
            copy_companions(self.map.directory, tmp, self._num_bytes)
        self._write_configs(tmp)

    def _write_configs(self, tmp: Path) -> None:
        """config.json with the dtype and the class of what is written; otherwise the source's own, as it stands."""
        config, generation = self.map.config, self.map.generation_config
        source = self.map.directory
        if config is not None:
            dtypes = [self.map.mapped[name].dtype for name in self.map.names]
            if source is not None and (source / CONFIG_FILE).is_file():
                fields = read_json(source / CONFIG_FILE)
            else:
                fields = json.loads(config.to_json_string())
            dtype = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
            for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
                if part is fields or "dtype" in part or "torch_dtype" in part:
                    part.pop("torch_dtype", None)  # the older name of dtype
                    part["dtype"] = dtype
            fields["architectures"] = [self.map.model_class]
            (tmp / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if source is not None and (source / GENERATION_FILE).is_file():
            fields = read_json(source / GENERATION_FILE)  # as long as it may be, and JSON
            if is_own_file(source / GENERATION_FILE, source):
                copy_file(source / GENERATION_FILE, tmp / GENERATION_FILE)
            else:
                (tmp / GENERATION_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        elif generation is not None:
            (tmp / GENERATION_FILE).write_text(generation.to_json_string(), encoding="utf-8")

    @property
    def _target(self) -> Path:
        """The output directory itself, where `out_dir` may be a link to it."""
        return Path(os.path.realpath(self.out_dir))

    def _publish_alone(self) -> None:
        """Gives the hidden directory the name of the output directory, which is not there or empty."""
        target, existed = self._target, self.out_dir.is_dir()
        if existed:
            shutil.copymode(target, self._tmp)
        try:
            os.rename(self._tmp, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise CheckpointError(f"{self.out_dir}: it was empty, and something was put there meanwhile") from None
            raise
        try:
            sync_directory(target.parent)
        except BaseException:
            os.rename(target, self._tmp)
            if existed:
                target.mkdir()
            raise
        self._tmp = None
        self._unlock()

    def _publish(self) -> None:
        """Renames everything into place; the files of a checkpoint that is replaced stay until the new ones stand."""
        tmp = self._tmp
        replaced = make_place_for_replaced(self.out_dir)
        moved: list[tuple[Path, Path]] = []
        try:
            new = sorted(tmp.iterdir())
            for name in {*holds_checkpoint(self.out_dir), *(path.name for path in new)}:
                if (self.out_dir / name).exists():
                    moved.append((self.out_dir / name, replaced / name))
                    os.rename(*moved[-1])
            for path in new:
                moved.append((path, self.out_dir / path.name))
                os.rename(*moved[-1])
            sync_directory(self.out_dir)
        except BaseException:
            for before, after in reversed(moved):
                if after.exists():
                    os.rename(after, before)
            replaced.rmdir()
            raise
        shutil.rmtree(replaced)
        tmp.rmdir()
        sync_directory(self.out_dir)
        self._tmp = None
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def abort(self) -> None:
        """Removes what was written so far."""
        for shard in self._shards:
            shard.close(sync=False)
        if self._tmp is not None:
            shutil.rmtree(self._tmp, ignore_errors=True)
            self._tmp = None
        self._unlock()
        for path in self._made:
            with suppress(OSError):  # it is not there, or someone else uses it by now
                path.rmdir()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()


def _shard(entries: list[TensorEntry], max_bytes: int) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """File names and their tensors, filled in order up to `max_bytes` each."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][entry.name] = (entry.dtype, entry.shape)
        filled += entry.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": tensors for i, tensors in enumerate(shards)}
