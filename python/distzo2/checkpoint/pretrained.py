"""Hugging Face checkpoints in and out of an offloaded model, one unit at a time.

Weights go from the files straight into the pool or the block file, and from there into new files; at no time is there a
second copy of more than one piece (`checkpoint_files.SCRATCH_BYTES`) in memory.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.checkpoint_config import check_config_file, read_json
from distzo2.checkpoint.checkpoint_files import INDEX_FILE, CheckpointFiles
from distzo2.checkpoint.file_checksum import FileChecksum
from distzo2.checkpoint.mapping import CheckpointMap, persistent_buffers, trace_checkpoint
from distzo2.checkpoint.reading import ParallelReader
from distzo2.checkpoint.symbols import one_line
from distzo2.checkpoint.weight_files import CheckpointError, sha256_file
from distzo2.checkpoint.writing import DEFAULT_SHARD_BYTES, CheckpointWriter
from distzo2.streaming.offload import offload, runtime_of
from distzo2.streaming.runtime import StreamingRuntime

_UNITS_AHEAD = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSource:
    """Where a model came from: set as `model.distzo2_source` by `from_pretrained`. Also a path, of the directory."""

    directory: Path
    map: CheckpointMap

    def __fspath__(self) -> str:
        return os.fspath(self.directory)

    def digest(self) -> dict[str, Any]:
        """What a journal's header records of the files, all of which are read."""
        return digest_checkpoint(self.directory)


def from_pretrained(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    weights: str = "host",
    *,
    dtype: torch.dtype | str | None = None,
    auto_class: Any = None,
    attn_implementation: str | None = None,
    units: Sequence[str] | None = None,
    directory: str | os.PathLike | None = None,
    train: bool = False,
    **offload_options: Any,
) -> nn.Module:
    """A transformers model from the checkpoint directory `path`, offloaded; in `eval()` mode unless `train`.

    `device`, `weights`, `units`, `directory` and `offload_options` are those of `distzo2.offload`. `dtype` is that of
    the parameters: None or "auto" for the checkpoint's own. `auto_class` is a transformers auto class or model class;
    None takes the class that the checkpoint was saved from, or the causal language model if that was a bare base model.

    Raises CheckpointError (one line) if the directory holds no checkpoint, a file of it is truncated or corrupt, a
    parameter has no tensor in it, or a conversion of it cannot be expressed as ranges.
    """
    model, checkpoint_map = open_checkpoint(
        path, dtype=dtype, auto_class=auto_class, attn_implementation=attn_implementation
    )
    try:
        model = offload(
            model.train(train),
            device=device,
            weights=weights,
            units=units,
            directory=directory,
            train=train,
            **offload_options,
        )
        fill(model, checkpoint_map)
    finally:
        checkpoint_map.close()
    model.distzo2_source = CheckpointSource(Path(path), checkpoint_map)
    return model


def open_checkpoint(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    auto_class: Any = None,
    attn_implementation: str | None = None,
) -> tuple[nn.Module, CheckpointMap]:
    """The model of a checkpoint with its parameters on meta and its buffers real, and the map that fills it."""
    directory = Path(path)
    config = _load_config(directory)
    files = CheckpointFiles(directory)
    try:
        check_config_file(directory / "config.json", len(files.entries))
    except CheckpointError:
        files.close()
        raise
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model, checkpoint_map = trace_checkpoint(files, _model_class(directory, config, auto_class), config, **options)
    checkpoint_map.generation_config = model.generation_config = _load_generation_config(directory, model)
    if checkpoint_map.unexpected:
        names = checkpoint_map.unexpected
        logger.warning("%s: %d tensors have no use in the model: %s", path, len(names), ", ".join(names[:5]))
    return model.eval(), checkpoint_map


def load_weights(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Fills an offloaded model, of any kind, from the checkpoint in directory `path`.

    A transformers model is filled as transformers would, any other module by parameter and buffer names. Returns the
    names of the checkpoint's tensors that the model has no use for.
    """
    checkpoint_map = CheckpointMap.build(model, path)
    try:
        fill(model, checkpoint_map)
        runtime = runtime_of(model)
        if runtime.owner is not None or runtime.replaced:  # in the middle of a run
            runtime.rebase()
        buffers = dict(model.named_buffers())
        for name in checkpoint_map.buffer_names:
            mapped = checkpoint_map.mapped[name]
            value = torch.empty(mapped.shape, dtype=mapped.dtype)
            checkpoint_map.read_param(name, value)
            buffers[name].copy_(value)
    finally:
        checkpoint_map.close()
    return checkpoint_map.unexpected


def save_pretrained(
    model: nn.Module,
    out_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> dict[str, FileChecksum]:
    """Writes an offloaded model, with every update made so far, as a safetensors checkpoint into `out_dir`.

    A model from `from_pretrained` is written under the names and in the layout of its checkpoint, with its
    configuration, generation settings and tokenizer files; another transformers model as transformers would write it;
    any other module by parameter and buffer names. Files are of at most `max_shard_bytes` of tensors, or one tensor.
    Returns length and CRC-32 of each, by name.

    Raises CheckpointError if `out_dir` already holds a checkpoint and `overwrite` is false, or if its disk has too
    little room; a save that fails leaves `out_dir` as it was.
    """
    runtime = runtime_of(model)
    source = getattr(model, "distzo2_source", None)
    if source is not None:
        checkpoint_map = source.map
    else:
        checkpoint_map = CheckpointMap.for_saving(model, [(p.name, p.dtype, p.shape) for p in runtime.params])
    with CheckpointWriter(checkpoint_map, out_dir, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
        for unit in runtime.units:
            with runtime.reading(unit) as views:
                for name, view in views.items():
                    writer.write_param(name, view)
        for name, buffer in persistent_buffers(model):
            if name in checkpoint_map.mapped:
                writer.write_param(name, buffer)
    return writer.checksums


def fill(model: nn.Module, checkpoint_map: CheckpointMap) -> None:
    """Unit by unit; where they are filled in place, the reads of the next ones go on while one is waited for."""
    runtime = runtime_of(model)
    with runtime.replacing("loading a checkpoint", source=checkpoint_map.files.sample):
        _fill(runtime, checkpoint_map)


def _fill(runtime: StreamingRuntime, checkpoint_map: CheckpointMap) -> None:
    filling: deque[tuple[ExitStack, list[Future[None]]]] = deque()
    try:
        with ParallelReader() as reader:
            for unit in runtime.units:
                stack = ExitStack()
                views = stack.enter_context(runtime.writing(unit))
                filling.append((stack, []))
                kept = runtime.kept_elements(unit)
                ranges = [checkpoint_map.ranges_of(n, v, kept[n]) for n, v in views.items() if kept[n]]
                filling[-1][1].extend(reader.start(chain.from_iterable(ranges)))
                while len(filling) > (_UNITS_AHEAD if runtime.fills_in_place(unit) else 0):
                    _settle(reader, filling)
            while filling:
                _settle(reader, filling)
    except BaseException:
        for stack, _ in filling:  # the reader's threads have ended: nothing writes there any more
            with suppress(BaseException):
                stack.__exit__(*sys.exc_info())
        runtime.close()  # weights of which some are missing are no model
        raise


def _settle(reader: ParallelReader, filling: deque[tuple[ExitStack, list[Future[None]]]]) -> None:
    """The unit that was begun first is full, and is stored."""
    reader.finish(filling[0][1])
    filling.popleft()[0].close()


def _load_config(directory: Path) -> Any:
    from transformers import AutoConfig

    if not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a checkpoint directory, got no directory of that name")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: expected a checkpoint with a config.json, found none")
    check_config_file(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{directory / 'config.json'}: not a configuration that transformers knows: {one_line(error)}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{directory}: quantized weights (quantization_config) cannot be perturbed or updated")
    return config


def _load_generation_config(directory: Path, model: nn.Module) -> Any:
    from transformers import GenerationConfig

    if not (directory / "generation_config.json").is_file():
        return getattr(model, "generation_config", None)
    read_json(directory / "generation_config.json")
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{directory / 'generation_config.json'}: {one_line(error)}") from error


def _model_class(directory: Path, config: Any, auto_class: Any) -> Any:
    """The concrete model class for a checkpoint (see `from_pretrained`)."""
    import transformers

    def resolve(auto: Any) -> Any:
        known = auto._model_mapping.get(type(config), None)
        return known[0] if isinstance(known, (list, tuple)) else known

    if auto_class is not None:
        chosen = resolve(auto_class) if hasattr(auto_class, "_model_mapping") else auto_class
        if chosen is None:
            raise CheckpointError(f"{directory}: {auto_class.__name__} has no model for {type(config).__name__}")
        return chosen
    saved_from = (getattr(config, "architectures", None) or [None])[0]
    causal = resolve(transformers.AutoModelForCausalLM)
    base = resolve(transformers.AutoModel)
    chosen = getattr(transformers, saved_from, None) if saved_from else None
    if chosen is None and saved_from and getattr(config, "auto_map", None):
        raise CheckpointError(f"{directory}: {saved_from} needs code that comes with the checkpoint, which is not run")
    if chosen is None or (chosen is base and causal is not None):
        chosen = causal or base
    if chosen is None:
        raise CheckpointError(f"{directory}: transformers has no model class for {type(config).__name__}")
    return chosen


def digest_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The journal header's record of a base checkpoint: `{"name", "files": {file: {"sha256", "num_bytes"}}}`.

    The files are those that decide the weights: safetensors, their index, and config.json.

    Raises:
        CheckpointError: there is no checkpoint in `directory`.
    """
    path = Path(directory)
    files = CheckpointFiles(path)
    try:
        names = {file.path.name for file in files.files}
    finally:
        files.close()
    names |= {name for name in (INDEX_FILE, "config.json") if (path / name).is_file()}
    return {"name": path.resolve().name, "files": digest_files(path, sorted(names))}


def digest_files(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """SHA-256 and length of files, by name."""

    def digest(name: str) -> dict[str, Any]:
        return {"sha256": sha256_file(directory / name), "num_bytes": (directory / name).stat().st_size}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "sha256") as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
