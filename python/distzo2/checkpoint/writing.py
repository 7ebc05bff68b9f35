"""Writes a checkpoint through a `CheckpointMap`, parameter by parameter, in the layout that its files had.

All files are written into a hidden directory inside the output directory, synced, and then renamed into place one by
one: weights first, the index and config.json last. Other files there stay. So a checkpoint that is being replaced has
no config.json between the first rename and the last, and a writer that fails or is killed never leaves a mixture that
loads. The hidden directory that it leaves tells the next writer that the weights there are unfinished.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.reading import CHUNK_BYTES, CONFIG_FILE, INDEX_FILE, SINGLE_FILE, scratch, strided_view
from distzo2.checkpoint.tensor_files import CheckpointError, SafetensorsWriter, TensorEntry, bytes_of, read_json
from distzo2.files import sync
from distzo2.text import dtype_name

DEFAULT_SHARD_BYTES = 5_000_000_000
GENERATION_FILE = "generation_config.json"
DISK_SLACK_BYTES = 64 << 20  # configuration, tokenizer, and the file system's own needs
HIDDEN = ".distzo2-checkpoint"  # the directory of files that are not renamed yet
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_FILE))  # but for the configuration
# Files that go with the weights and are copied as they are: tokenizers, processors, chat templates, licences.
_COMPANIONS = (
    "tokenizer* special_tokens_map.json added_tokens.json *vocab* merges.txt *.model *.spm *.tiktoken tekken.json "
    "LICENSE* *chat_template* additional_chat_templates/* *processor_config.json"
)

logger = logging.getLogger(__name__)


def holds_checkpoint(directory: str | os.PathLike) -> list[str]:
    """Names of the files in `directory` that make up a checkpoint."""
    path = Path(directory)
    patterns = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", CONFIG_FILE)
    return sorted({file.name for pattern in patterns for file in path.glob(pattern) if not file.name.startswith(".")})


class StagedFiles:
    """Files on their way into `out_dir`: written into `hidden` inside it, synced, and renamed into place by `close`. A
    context manager that removes what it wrote if its block raises. Only what a failed rename leaves stays, for the next
    writer to replace."""

    def __init__(self, out_dir: str | os.PathLike, source: Path | None):
        """`source` is what the files are made of, and never where they go."""
        self.out_dir = Path(out_dir)
        self.hidden = self.out_dir / HIDDEN
        self._renames = False  # whether files are being renamed into place
        self._made: list[Path] = []
        if source is not None and self.out_dir.exists() and source.exists() and source.samefile(self.out_dir):
            raise CheckpointError(f"{self.out_dir}: the checkpoint that the model came from cannot be overwritten")

    def begin(self, num_bytes: int) -> None:
        """Makes the directories.

        Raises:
            CheckpointError: the disk has too little room for `num_bytes`, or a file is in the way.
        """
        existing = next(path for path in (self.out_dir.absolute(), *self.out_dir.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise CheckpointError(f"{self.out_dir}: expected a directory, got the file {existing}")
        free = shutil.disk_usage(existing).free
        if free < num_bytes + DISK_SLACK_BYTES:
            raise CheckpointError(
                f"{self.out_dir}: too little room on its disk: the checkpoint needs {num_bytes} bytes "
                f"and {DISK_SLACK_BYTES} to spare, {free} are free"
            )
        self._made = [path for path in (self.out_dir, *self.out_dir.parents) if not path.exists()]  # innermost first
        with self.aborting():
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for path in self._made:
                sync(path.parent)
            if self.hidden.is_dir():  # a killed writer's
                shutil.rmtree(self.hidden)
            self.hidden.mkdir()

    def copy_companions(self, source: Path) -> None:
        """Copies what goes with the weights in `source`."""
        for path in _companions(source):
            target = self.hidden / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def finish(self) -> None:
        """Completes the files before they are synced."""

    def close(self) -> None:
        """Makes all files durable and renames them into place. Until the first rename, `out_dir` is as it was."""
        with self.aborting():
            self.finish()
            for path in (*self.hidden.rglob("*"), self.hidden):
                sync(path)
            self._publish()

    def _publish(self) -> None:
        self._renames = True
        new = {str(path.relative_to(self.hidden)) for path in self.hidden.rglob("*") if path.is_file()}
        last = [name for name in (INDEX_FILE, CONFIG_FILE) if name in new]
        old = {name for name in holds_checkpoint(self.out_dir) if _OURS.fullmatch(name)}
        if old:  # a checkpoint that is being replaced cannot be loaded before the last rename
            for name in (CONFIG_FILE, INDEX_FILE):
                (self.out_dir / name).unlink(missing_ok=True)
            sync(self.out_dir)
        for name in sorted(new - {*last}, key=lambda name: (_OURS.fullmatch(name) is None, name)):
            (self.out_dir / name).parent.mkdir(exist_ok=True)
            os.rename(self.hidden / name, self.out_dir / name)
        for name in old - new:
            (self.out_dir / name).unlink(missing_ok=True)
        sync(self.out_dir)
        for name in last:
            os.rename(self.hidden / name, self.out_dir / name)
        shutil.rmtree(self.hidden, ignore_errors=True)
        sync(self.out_dir)

    def abort(self) -> None:
        """Removes what was written so far, unless some of it may have its final name."""
        if not self._renames:
            shutil.rmtree(self.hidden, ignore_errors=True)
        for path in self._made:
            with suppress(OSError):  # not there, or someone else's by now
                path.rmdir()

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """A block that removes what was written so far if it raises."""
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: Any, *_: object) -> None:
        self.close() if exc_type is None else self.abort()


class CheckpointWriter(StagedFiles):
    """Streams parameters into `out_dir`.

    `max_shard_bytes` bounds the tensors of one file (a larger tensor gets its own file). Persistent buffers that are
    not written are copied from the map's own files. With `overwrite`, files of weights that a `CheckpointWriter` made
    before are replaced; so are those that a killed one left.

    Raises CheckpointError, before anything is written, if `out_dir` holds a checkpoint that may not be replaced, if its
    disk has too little room, or if the model's tensors do not make up whole checkpoint tensors.
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
        self._shards: list[SafetensorsWriter] = []
        self._place: dict[str, tuple[SafetensorsWriter, TensorEntry]] = {}
        if not overwrite:
            check_out_dir(Path(out_dir), "name another directory or overwrite=True")
        super().__init__(out_dir, checkpoint_map.directory)
        tensors = self._plan()
        self._num_bytes = sum(entry.num_bytes for entry in tensors)
        self._missing = {name: tensor.numel for name, tensor in checkpoint_map.mapped.items() if tensor.pieces}
        self.begin(self._num_bytes)
        with self.aborting():
            for file, part in _shard(tensors, max_shard_bytes).items():
                shard = SafetensorsWriter(self.hidden / file, {e.name: (e.dtype, e.shape) for e in part})
                self._shards.append(shard)
                self._place |= {name: (shard, entry) for name, entry in shard.tensors.items()}
            self._write_settings()

    def _plan(self) -> list[TensorEntry]:
        """The checkpoint tensors to write, in the order in which the model's parameters reach them."""
        covered: Counter[int] = Counter()
        dtypes: dict[int, torch.dtype] = {}
        for mapped in self.map.mapped.values():
            for piece in mapped.pieces:
                covered[piece.source] += piece.numel
                dtypes[piece.source] = torch.promote_types(dtypes.get(piece.source, mapped.dtype), mapped.dtype)
        for number, numel in covered.items():
            entry = self.map.tensors[number]
            if numel != entry.numel:
                raise CheckpointError(
                    f"checkpoint tensor {entry.name!r} cannot be written: the model's parameters hold {numel} elements "
                    f"of its {entry.numel}"
                )
        for number, entry in enumerate(self.map.tensors):  # a tensor without elements has no pieces
            if not entry.numel:
                dtypes[number] = self.map.mapped[entry.name].dtype if entry.name in self.map.mapped else entry.dtype
        return [replace(self.map.tensors[number], dtype=dtype) for number, dtype in dtypes.items()]

    def write(self, name: str, tensor: torch.Tensor, begin: int = 0) -> None:
        """Writes a parameter or buffer of the map's shape and dtype, or its rows from `begin` on; each row once."""
        pieces = self.map.pieces_of(name, tensor, begin)
        if not pieces:
            return  # no element, or a tensor that is not saved
        flat = tensor.detach().cpu().contiguous().view(-1)
        for piece in pieces:
            shard, entry = self._place[self.map.tensors[piece.source].name]
            item = entry.dtype.itemsize
            if piece.is_run and entry.dtype == flat.dtype:
                run = flat[piece.dst_offset : piece.dst_offset + piece.numel]
                shard.write_bytes(bytes_of(run), entry.offset + piece.src_offset * item)
                continue
            for block in piece.blocks(CHUNK_BYTES // item):
                begin = entry.offset + block.src_offset * item
                buffer = scratch(entry.dtype, block.src_span)
                if block.numel < block.src_span:  # other pieces own the elements in between
                    shard.read_into(bytes_of(buffer), begin)
                source = buffer.as_strided(block.sizes, block.src_strides, buffer.storage_offset())
                source.copy_(strided_view(flat, block))
                shard.write_bytes(bytes_of(buffer), begin)
        self._missing[name] -= tensor.numel()
        if not self._missing[name]:
            del self._missing[name]

    def _write_settings(self) -> None:
        """Writes the index and the settings, and copies what goes with the weights."""
        if len(self._shards) > 1:
            files = {name: shard.path.name for name, (shard, _) in sorted(self._place.items())}
            self._write_json(INDEX_FILE, {"metadata": {"total_size": self._num_bytes}, "weight_map": files})
        config, generation, source = self.map.config, self.map.generation_config, self.map.directory
        if config is not None:  # with the dtype and the class of what is written
            # That of packed weights says how these are packed, and decoded ones are written.
            has_file = source is not None and (source / CONFIG_FILE).is_file() and not self.map.is_packed
            fields = read_json(source / CONFIG_FILE) if has_file else json.loads(config.to_json_string())
            numel: Counter = Counter()  # by dtype: small parameters may be stored wider than their blocks
            for t in self.map.mapped.values():
                numel[t.dtype] += 0 if t.is_buffer or t.is_gain else t.numel
            dtype = dtype_name(numel.most_common(1)[0][0])
            for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
                if part is fields or "dtype" in part or "torch_dtype" in part:
                    part.pop("torch_dtype", None)  # the older name of dtype
                    part["dtype"] = dtype
            self._write_json(CONFIG_FILE, fields | {"architectures": [self.map.model_class]})
        if source is not None and (source / GENERATION_FILE).is_file():
            self._write_json(GENERATION_FILE, read_json(source / GENERATION_FILE))
        elif generation is not None:
            self._write_json(GENERATION_FILE, json.loads(generation.to_json_string()))
        if source is not None and source.is_dir():
            self.copy_companions(source)

    def _write_json(self, name: str, fields: dict[str, Any]) -> None:
        (self.hidden / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def finish(self) -> None:
        for name, mapped in self.map.mapped.items():
            if mapped.is_buffer and name in self._missing and self.map.files is not None:
                value = torch.empty(mapped.shape, dtype=mapped.dtype)
                self.map.read(name, value)
                self.write(name, value)
        if self._missing:
            name, numel = next(iter(self._missing.items()))
            raise CheckpointError(
                f"{self.out_dir}: {len(self._missing)} parameters were not written, {name!r} lacks {numel} elements"
            )
        for shard in self._shards:
            shard.close()

    def abort(self) -> None:
        for shard in self._shards:
            shard.close()
        super().abort()


def check_out_dir(out_dir: Path, advice: str = "name another directory") -> None:
    """Refuses a directory that holds a checkpoint, unless a writer left it unfinished.

    Raises:
        CheckpointError: it does; the message ends with `advice`.
    """
    held = holds_checkpoint(out_dir)
    unfinished = (out_dir / HIDDEN).is_dir() and CONFIG_FILE not in held and all(map(_OURS.fullmatch, held))
    if held and not unfinished:
        raise CheckpointError(f"{out_dir}: already holds {held[0]}; {advice}")


def _shard(entries: list[TensorEntry], max_bytes: int) -> dict[str, list[TensorEntry]]:
    """File names and their tensors, filled in order up to `max_bytes` each."""
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards)}


def tokenizer_files(source: Path) -> set[str]:
    """Names that the tokenizer's class gives its files (`vocab_files_names`), and files that its settings name."""
    from transformers import AutoConfig
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, tokenizer_class_from_name

    settings, classes = {}, []
    with suppress(Exception):  # what cannot be read or found has no names
        settings = read_json(source / "tokenizer_config.json")
        classes.append(tokenizer_class_from_name(settings["tokenizer_class"].removesuffix("Fast")))
    with suppress(Exception):
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        classes.append(TOKENIZER_MAPPING[type(config)])
        classes.append(tokenizer_class_from_name(config.tokenizer_class.removesuffix("Fast")))
    names = [v for k, v in settings.items() if k.endswith("_file")]
    for tokenizer in classes:
        with suppress(Exception):  # a class that lacks a library raises whatever it is asked for
            names += tokenizer.vocab_files_names.values()
    return {name for name in names if isinstance(name, str) and name == Path(name).name and name not in ("", "..")}


def _companions(source: Path) -> Iterator[Path]:
    """The files in `source` that go with the weights. Left out, with a warning, are links to files that are neither the
    checkpoint's nor in its Hugging Face cache."""
    homes = [source.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    named = tokenizer_files(source) - {*holds_checkpoint(source), GENERATION_FILE}
    found = {path for pattern in _COMPANIONS.split() for path in source.glob(pattern)}
    for path in sorted(found | {source / name for name in named if (source / name).is_file()}):
        target = Path(os.path.realpath(path))
        if target.is_file() and any(target.is_relative_to(home) for home in homes):
            yield path
        elif not target.is_dir():
            logger.warning("%s: left out: not a file of this checkpoint", path)
