"""Checkpoints in and out of an offloaded model, one unit at a time.

A checkpoint is a directory of Hugging Face's, quantized or not, or a GGUF file. Weights go from the files straight into
the pool or the block file, packed as they are, and from there into new files. At no time is a second copy of more than
a few blocks (`reading.CHUNK_BYTES`) in memory.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.config import class_of, load_config, load_generation_config
from distzo2.checkpoint.mapping import CheckpointMap, map_for_saving, persistent_buffers, trace_checkpoint
from distzo2.checkpoint.reading import CheckpointFiles, ParallelReader
from distzo2.checkpoint.symbols import creation_bound
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.checkpoint.writing import DEFAULT_SHARD_BYTES, CheckpointWriter
from distzo2.formats.gguf import gguf_config, gguf_tensors, is_gguf, open_gguf
from distzo2.formats.gguf_config import gguf_tokenizer
from distzo2.formats.gguf_file import RAW_DTYPES
from distzo2.formats.packed_checkpoint import DecodedFiles, is_quantized, open_packed
from distzo2.formats.packing import pack_map
from distzo2.streaming.offload import offload, runtime_of

_UNITS_AHEAD = 2
_MOST_TENSORS = 1 << 12  # of a configuration that comes without a checkpoint

logger = logging.getLogger(__name__)


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
    store: str | None = None,
    prepare: Callable[[nn.Module, CheckpointMap], tuple[nn.Module, CheckpointMap]] | None = None,
    **offload_options: Any,
) -> nn.Module:
    """Loads the transformers model of a checkpoint and offloads it.

    Packed weights stay packed, wherever they live, and are decoded once a visit, for all evaluations of a step; they
    are frozen. What is trained beside them is an adapter, for example.

    Args:
        path: the checkpoint: a directory with config.json and safetensors or `pytorch_model.bin` files, in shards or
            not, whose weights may be quantized (docs/packed.md); or a GGUF file, or the first of a split one.
        device, weights, units, directory, offload_options: as for `distzo2.offload`.
        dtype: of the parameters, where they are packed of decoded ones; None or "auto" for the checkpoint's.
        auto_class: a transformers auto class or model class; None for the class that the checkpoint was saved from, or
            the causal language model if that was a bare base model.
        attn_implementation: as for transformers' `from_pretrained`.
        train: whether the model is in training mode; otherwise it is in `eval()` mode.
        store: packs the matrices of blocks while they are read, a group of 64 columns at a time, round to nearest:
            "affine16" and "affine8" as codes of 16 and 8 bits, which can be trained (docs/packed.md); "affine4" and
            "table4" in 4 bits, frozen. None: as they are.
        prepare: called with the model, whose parameters are on meta, and the map that fills it, before it is handed
            over; returns those to take in their place. `distzo2.adapter(...)` makes one, `distzo2.gains` is one.

    Raises:
        CheckpointError: the directory holds no checkpoint, a file is truncated or corrupt, a parameter has no tensor
            in it, or a conversion cannot be expressed as ranges.
    """
    model, checkpoint_map = open_checkpoint(
        path, dtype=dtype, auto_class=auto_class, attn_implementation=attn_implementation
    )
    error = None
    try:
        if store is not None:
            checkpoint_map, error = pack_map(model, checkpoint_map, store, None if units is None else list(units))
            freeze_packed(model, checkpoint_map)
        if prepare is not None:
            model, checkpoint_map = prepare(model, checkpoint_map)
        checkpoint_map.check_scales()
        model = offload(
            model.train(train),
            device=device,
            weights=weights,
            units=units,
            directory=directory,
            train=train,
            stored=checkpoint_map.stored_as,
            **offload_options,
        )
        mapped = checkpoint_map.mapped
        mapped |= {p.name: replace(mapped[p.name], dtype=p.dtype) for p in runtime_of(model).params if p.narrow}
        fill(model, checkpoint_map)
    finally:
        checkpoint_map.close()
    runtime_of(model).base = checkpoint_map
    if error is not None and error.sums:
        runtime_of(model).told = f"packed as {store}: {error.report()}"
    return model


def open_checkpoint(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    auto_class: Any = None,
    attn_implementation: str | None = None,
) -> tuple[nn.Module, CheckpointMap]:
    """The model of a checkpoint with its parameters on meta and its buffers real, and the map that fills it."""
    path, from_file = Path(path), is_gguf(path)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config, files = (None, None) if from_file else (load_config(path), CheckpointFiles(path))
    if from_file or is_quantized(path, files):
        if files is not None:
            files.close()
        opened = open_gguf if from_file else open_packed
        model, checkpoint_map = opened(path, dtype=dtype, auto_class=auto_class, **options)
        freeze_packed(model, checkpoint_map)
    else:
        model_class = class_of(path, config, auto_class)
        model, checkpoint_map = trace_checkpoint(files, model_class, config, dtype=dtype or "auto", **options)
    if not path.is_file():
        checkpoint_map.generation_config = model.generation_config = load_generation_config(path, model)
    if checkpoint_map.unexpected:
        names = checkpoint_map.unexpected
        logger.warning("%s: %d tensors have no use in the model: %s", path, len(names), ", ".join(names[:5]))
    return model.eval(), checkpoint_map


def clamped(model: nn.Module) -> float:
    """The share of trained codes at an end of their range, where updates are clamped; 0 without codes. Reads all units
    that have some."""
    runtime, at_end, total = runtime_of(model), 0, 0
    units = [unit for unit in runtime.units if any(param.is_coded for param in unit.params)]
    for unit, views in runtime.access.visit(units) if units else ():
        for param, view in zip(unit.params, views, strict=True):
            if param.is_coded:
                dtype = param.stored.code_dtype
                codes, top = view[: param.numel * dtype.itemsize].view(dtype), torch.iinfo(dtype).max
                at_end += int((codes >= top).sum() + (codes <= -top).sum())
                total += param.numel
    return at_end / total if total else 0.0


def freeze_packed(model: nn.Module, checkpoint_map: CheckpointMap) -> None:
    """Freezes the parameters whose packed form cannot be trained."""
    for name, packed in checkpoint_map.packed.items():
        if packed.stored_as().code_dtype is None:
            model.get_parameter(name).requires_grad_(False)


def config_of(path: Path) -> Any:
    """The transformers configuration of a checkpoint, as of one whose weights are not packed.

    Raises:
        CheckpointError: there is none that transformers knows.
    """
    return gguf_config(path) if is_gguf(path) else load_config(path)


def sizes_of(path: Path) -> list[tuple[int, int, torch.dtype, bool]]:
    """Bytes, as they are stored, elements and dtype of each tensor of a checkpoint's files, and whether its bytes are
    made when they are read; of what is packed, the elements and the dtype that it is decoded to.

    Raises:
        CheckpointError: there is no checkpoint, or a file of it is truncated, corrupt or in a form that is not decoded.
    """
    if is_gguf(path):
        tensors = gguf_tensors(path)
        rows = [(t.piece(0, t.rows), math.prod(t.shape), RAW_DTYPES.get(t.kind, torch.bfloat16)) for t in tensors]
        return [(piece.num_bytes, numel, dtype, piece.make is not None) for piece, numel, dtype in rows]
    is_packed = is_quantized(path)
    with closing(DecodedFiles(path) if is_packed else CheckpointFiles(path)) as files:
        found = [(entry.num_bytes, entry.numel, entry.dtype, False) for entry in files.entries]
        for number, matrix in files.matrices.items() if is_packed else ():
            is_made = any(piece.make for piece in matrix.pieces)
            found[number] = (sum(piece.num_bytes for piece in matrix.pieces), *found[number][1:3], is_made)
        return found


def meta_model(directory: Path, dtype: torch.dtype | str | None = None) -> nn.Module:
    """The model of a checkpoint's configuration with all of its tensors on meta; no weights are needed.

    `dtype` is that of the parameters; None for the configuration's, or float32.

    Raises:
        CheckpointError: there is no configuration that transformers knows, or its model has too many modules.
    """
    config = config_of(directory)
    model_class = class_of(directory, config, None)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"), creation_bound(_MOST_TENSORS, sys.maxsize):
        return model_class._from_config(config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype).eval()


def save_pretrained(
    model: nn.Module,
    out_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes an offloaded model, with every update made so far, as a safetensors checkpoint into `out_dir`.

    A model from `from_pretrained` is written under the names and in the layout of its checkpoint, with its
    configuration, generation settings and tokenizer files; another transformers model as transformers would write it;
    any other module by parameter and buffer names. Files hold at most `max_shard_bytes` of tensors, or one tensor.
    Other files in `out_dir` stay. A part of such a model, as peft's `merge_and_unload` inside `distzo2.edit` leaves the
    one that was adapted, is written as a model.

    Raises:
        CheckpointError: `out_dir` already holds a checkpoint and `overwrite` is false, or its disk has too little
            room. A save that fails while it writes leaves `out_dir` as it was; one that fails later can be repeated.
    """
    runtime = model.__dict__.get("_distzo2_streams") or runtime_of(model)
    if hasattr(model, "peft_config"):
        advice = "its adapter with distzo2.save_adapter, or what merge_and_unload returned inside distzo2.edit"
        raise CheckpointError(f"{type(model).__name__} is a model with an adapter: save {advice}")
    names = {id(p): name for name, p in model.named_parameters()}
    params = [
        (names[id(p.tensor)], p.declared, p.shape) for p in runtime.params if id(p.tensor) in names and not p.is_gain
    ]
    checkpoint_map = (runtime.base if model is runtime.model else None) or map_for_saving(model, params)
    with CheckpointWriter(checkpoint_map, out_dir, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
        for unit in runtime.units:
            own = [p for p in unit.params if id(p.tensor) in names]
            with runtime.access.reading(unit) if own else nullcontext() as views:
                for param in own:
                    writer.write(names[id(param.tensor)], views[param.name])
        for name, buffer in persistent_buffers(model):
            if name in checkpoint_map.mapped:
                writer.write(name, buffer)
        if checkpoint_map.directory is not None and is_gguf(checkpoint_map.directory):
            gguf_tokenizer(checkpoint_map.directory).save_pretrained(writer.hidden)


def fill(model: nn.Module, checkpoint_map: CheckpointMap) -> None:
    """Fills an offloaded model unit by unit. Where units are filled in place, the reads of the next ones overlap."""
    runtime = runtime_of(model)
    access = runtime.access
    filling: deque[tuple[ExitStack, list[Future[None]]]] = deque()  # windows, and what is read into them
    with access.replacing("loading a checkpoint", source=checkpoint_map.files.sample):
        try:
            with ParallelReader() as reader:
                for unit in [*(unit for unit in runtime.units if not runtime.is_filled(unit)), None]:
                    if unit is not None:
                        filling.append((ExitStack(), []))
                        views = filling[-1][0].enter_context(access.writing(unit))
                        kept = access.kept_elements(unit)
                        ranges = [checkpoint_map.ranges_of(n, v, part) for n, v in views.items() for part in kept[n]]
                        filling[-1][1].extend(reader.start(chain.from_iterable(ranges)))
                        for name, view in views.items():
                            filling[-1][1].extend(reader.submit(make) for make in checkpoint_map.made_of(name, view))
                    while len(filling) > (_UNITS_AHEAD if unit is not None and access.fills_in_place(unit) else 0):
                        reader.finish(filling[0][1])
                        filling.popleft()[0].close()
            for file in checkpoint_map.files.files.values():  # what streams from them was opened by their names
                file.check_same()
        except BaseException:
            for stack, _ in filling:  # the reader's threads have ended: nothing writes there any more
                with suppress(BaseException):
                    stack.__exit__(*sys.exc_info())
            runtime.close()  # a model that lacks some of its weights is of no use
            raise
