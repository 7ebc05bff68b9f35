"""Hugging Face checkpoints in and out of an offloaded model, one unit at a time.

Weights go from the files straight into the pool or the block file, and from there into new files. At no time is a
second copy of more than a few blocks (`reading.CHUNK_BYTES`) in memory.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.mapping import CheckpointMap, map_for_saving, persistent_buffers, trace_checkpoint
from distzo2.checkpoint.reading import CONFIG_FILE, CheckpointFiles, ParallelReader, adapter_in
from distzo2.checkpoint.symbols import creation_bound
from distzo2.checkpoint.tensor_files import CheckpointError, read_json
from distzo2.checkpoint.writing import DEFAULT_SHARD_BYTES, GENERATION_FILE, CheckpointWriter
from distzo2.errors import one_line
from distzo2.streaming.offload import offload, runtime_of

_UNITS_AHEAD = 2
_MOST_TENSORS = 1 << 12  # of a configuration that comes without a checkpoint
QUANT_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config", "quantize_config")
_CODE_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")  # may name kernels of a hub

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
    prepare: Callable[[nn.Module, CheckpointMap], tuple[nn.Module, CheckpointMap]] | None = None,
    **offload_options: Any,
) -> nn.Module:
    """Loads the transformers model of a checkpoint directory and offloads it.

    Args:
        path: the checkpoint: config.json and safetensors or `pytorch_model.bin` files, in shards or not.
        device, weights, units, directory, offload_options: as for `distzo2.offload`.
        dtype: of the parameters; None or "auto" for the checkpoint's.
        auto_class: a transformers auto class or model class; None for the class that the checkpoint was saved from, or
            the causal language model if that was a bare base model.
        attn_implementation: as for transformers' `from_pretrained`.
        train: whether the model is in training mode; otherwise it is in `eval()` mode.
        prepare: called with the model, whose parameters are on meta, and the map that fills it, before it is handed
            over; returns those to take in their place. `distzo2.adapter(...)` makes one.

    Raises:
        CheckpointError: the directory holds no checkpoint, a file is truncated or corrupt, a parameter has no tensor
            in it, or a conversion cannot be expressed as ranges.
    """
    model, checkpoint_map = open_checkpoint(
        path, dtype=dtype, auto_class=auto_class, attn_implementation=attn_implementation
    )
    try:
        if prepare is not None:
            model, checkpoint_map = prepare(model, checkpoint_map)
        model = offload(
            model.train(train),
            device=device,
            weights=weights,
            units=units,
            directory=directory,
            train=train,
            files=checkpoint_map.lies_at,
            **offload_options,
        )
        fill(model, checkpoint_map)
    finally:
        checkpoint_map.close()
    runtime_of(model).base = checkpoint_map
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
    config = load_config(directory)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model, checkpoint_map = trace_checkpoint(
        CheckpointFiles(directory),
        class_of(directory, config, auto_class),
        config,
        dtype=dtype or "auto",
        **options,
    )
    checkpoint_map.generation_config = model.generation_config = _load_generation_config(directory, model)
    if checkpoint_map.unexpected:
        names = checkpoint_map.unexpected
        logger.warning("%s: %d tensors have no use in the model: %s", path, len(names), ", ".join(names[:5]))
    return model.eval(), checkpoint_map


def meta_model(directory: Path, dtype: torch.dtype | str | None = None) -> nn.Module:
    """The model of a directory's config.json with all of its tensors on meta; no weights are needed.

    `dtype` is that of the parameters; None for the configuration's, or float32.

    Raises:
        CheckpointError: there is no configuration that transformers knows, or its model has too many modules.
    """
    config = load_config(directory)
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
    params = [(names[id(p.tensor)], p.dtype, p.shape) for p in runtime.params if id(p.tensor) in names]
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
                        ranges = [checkpoint_map.ranges_of(n, v, kept[n]) for n, v in views.items() if kept[n]]
                        filling[-1][1].extend(reader.start(chain.from_iterable(ranges)))
                    while len(filling) > (_UNITS_AHEAD if unit is not None and access.fills_in_place(unit) else 0):
                        reader.finish(filling[0][1])
                        filling.popleft()[0].close()
        except BaseException:
            for stack, _ in filling:  # the reader's threads have ended: nothing writes there any more
                with suppress(BaseException):
                    stack.__exit__(*sys.exc_info())
            runtime.close()  # a model that lacks some of its weights is of no use
            raise


def parts_of(config: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects in a configuration, itself included."""
    todo: list[Any] = [config]
    while todo:
        part = todo.pop()
        todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict):
            yield part


def load_config(directory: Path, packed: bool = False) -> Any:
    """The transformers configuration of a directory. No code that comes with it, or from a hub, is run.

    With `packed`, its weights may be quantized.

    Raises:
        CheckpointError: there is none that transformers knows, or it asks for code, or its weights are quantized.
    """
    from transformers import AutoConfig

    path = directory / CONFIG_FILE
    if not path.is_file():
        found = adapter_in(directory) or "found none"
        raise CheckpointError(f"{directory}: expected a checkpoint directory with a config.json, {found}")
    for part in parts_of(read_json(path)):
        for key in _CODE_KEYS:
            if "/" in str(part.get(key)):
                raise CheckpointError(f"{path}: {key} names code from elsewhere, {str(part[key])[:80]!r}: not run")
        for key in () if packed else QUANT_KEYS:
            if part.get(key):
                raise CheckpointError(f"{path}: quantized weights ({key}) cannot be perturbed or updated")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{path}: not a configuration that transformers knows: {one_line(error)}") from error
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if getattr(part, "return_dict", True) is False:  # transformers' own forwards need the names of inner outputs
            part.return_dict = True
    return config


def _load_generation_config(directory: Path, model: nn.Module) -> Any:
    from transformers import GenerationConfig

    path = directory / GENERATION_FILE
    if not path.is_file():
        return getattr(model, "generation_config", None)
    read_json(path)  # checks its length
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error


def class_of(directory: Path, config: Any, auto_class: Any) -> Any:
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
    causal, base = resolve(transformers.AutoModelForCausalLM), resolve(transformers.AutoModel)
    names = getattr(config, "architectures", None)
    saved_from = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    chosen = getattr(transformers, saved_from, None)
    if chosen is None and saved_from and getattr(config, "auto_map", None):
        raise CheckpointError(f"{directory}: {saved_from} needs code that comes with the checkpoint, which is not run")
    if chosen in (None, base):
        chosen = causal or base
    if chosen is None:
        raise CheckpointError(f"{directory}: transformers has no model class for {type(config).__name__}")
    return chosen
