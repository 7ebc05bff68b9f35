"""Checks made before anything is allocated or written: device, dtypes, room in memory and on the disk. And the loading
of what has passed them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.errors import DistZO2Error, UsageError
from distzo2.formats.gains import gains
from distzo2.formats.packing import packable, packed_as
from distzo2.models.pretrained import from_pretrained, meta_model, sizes_of
from distzo2.optim.selection import select
from distzo2.peft.adapters import adapter, known_config, new_config, virtual_tokens
from distzo2.run.options import DataReading, Placement, Trained
from distzo2.streaming.offload import check_computes, runtime_of, usable_device
from distzo2.tasks.kinds import ModelKind
from distzo2.text import gib
from distzo2.weights.residency import MemoryBudget, available_memory, free_disk_bytes
from distzo2.weights.units import HALVES, StoredAs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPARE = 0.05  # of what is free, left to others


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a checkpoint's tensors as the run stores them."""

    total: int
    decoded: int  # of all, as a checkpoint of them is written
    made: int  # that are made when they are read, and not in the files as they are stored
    largest: int  # of one tensor, decoded
    dtype: torch.dtype | None = None  # of most of its bytes, among floating-point ones


def model_size(directory: str | os.PathLike, dtype: torch.dtype | None) -> ModelSize:
    """Read from the headers of the checkpoint's files.

    Raises:
        CheckpointError: there is no checkpoint, or a file of it is truncated or corrupt.
    """
    floating: Counter[torch.dtype] = Counter()
    total, decoded, made, largest = 0, 0, 0, 0
    for num_bytes, numel, stored, is_made in sizes_of(Path(directory)):
        kept = dtype if dtype and stored.is_floating_point else stored
        is_packed = num_bytes < numel * stored.itemsize
        total += num_bytes if is_packed else numel * kept.itemsize
        decoded += numel * kept.itemsize
        made += numel * kept.itemsize if kept != stored and not is_packed else num_bytes if is_made else 0
        largest = max(largest, numel * kept.itemsize)
        floating[kept] += numel * kept.itemsize if kept.is_floating_point else 0
    return ModelSize(total, decoded, made, largest, max(floating, key=floating.get, default=None))


class Place(NamedTuple):
    """Where a command's model computes, and in what."""

    device: torch.device
    size: ModelSize
    compute_dtype: torch.dtype | None  # None: as stored


def placed(options: Placement, device: str) -> Place:
    """Checks that the model of `options` can be read and that `device` computes as they ask; sets threads and TF32.

    For --compute-dtype auto a CPU without instructions for stored 16 bits computes in float32, which is faster too.

    Raises:
        UsageError: --tf32 on a CPU. DistZO2Error: the model cannot be read, or the device does not compute so.
    """
    usable = usable_device(device)
    if options.threads:
        torch.set_num_threads(options.threads)
    size = model_size(options.model, DTYPES.get(options.dtype))
    if options.store is not None and size.dtype is not None:
        model = meta_model(Path(options.model), size.dtype)
        names = packable(model)
        shapes = [param.shape for name, param in model.named_parameters() if name in names]
        raw = sum(shape.numel() for shape in shapes) * size.dtype.itemsize
        if raw <= size.total:  # else it is packed already, which is refused when it is opened
            packed = sum(packed_as(shape, options.store).num_bytes for shape in shapes)
            size = replace(size, total=size.total - raw + packed, made=packed)
    compute_dtype, is_cpu = DTYPES.get(options.compute_dtype), usable.type == "cpu"
    if options.compute_dtype == "auto" and is_cpu and size.dtype in HALVES and not _cpu_computes_in(size.dtype):
        compute_dtype = torch.float32
    check_computes(usable, compute_dtype)
    if options.tf32 and is_cpu:
        raise UsageError(f"--tf32: {usable} multiplies float32 matrices as they are; TF32 is a GPU's")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    return Place(usable, size, compute_dtype)


def load_model(options: Placement, place: Place, widest: torch.dtype | None, **more: Any) -> nn.Module:
    """The model of `options`, handed over. It has room to compute in `widest`, and computes as `place` says. `more` is
    for `from_pretrained`."""
    model = from_pretrained(
        options.model,
        device=place.device,
        weights=options.weights,
        dtype=DTYPES.get(options.dtype),
        store=options.store,
        compute_dtype=widest,
        memory_budget=options.memory_budget,
        host_memory=options.host_memory,
        write_every=options.write_every,
        **more,
    )
    runtime_of(model).compute_in(place.compute_dtype)
    return model


def _cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of 16 bits by instructions, and oneDNN may use them."""
    half, known = ("fp16", "FP16") if dtype == torch.float16 else ("bf16", "BF16")
    names = (f"_is_avx512_{half}_supported", "_is_amx_tile_supported" if half == "bf16" else "_is_amx_fp16_supported")
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    allowed = most in ("DEFAULT", "ALL") or known in most or "AMX" in most or most.startswith("AVX10")
    return allowed and any(getattr(torch.cpu, name, lambda: False)() for name in names)


def reading_of(options: DataReading, kind: ModelKind) -> dict[str, Any]:
    """How `load_examples`, or of a task `TaskReader`, is to read the data of a command, for a kind of model."""
    reading = {
        "kind": kind,
        "limit": kind.limit(options.max_length),
        "truncate": options.truncate,
        "split_special_tokens": options.split_special_tokens,
    }
    if not getattr(options, "task", None):
        return reading | {"truncate": options.truncate or "error", "skip_bad_lines": options.skip_bad_lines}
    if options.skip_bad_lines:
        raise UsageError("--skip-bad-lines: rows of a task are drawn by a seed, none is skipped")
    return reading


def adapter_config(options: Trained, model: str, kind: str, held: nn.Module | None = None) -> Any:
    """The `PeftConfig` of the adapter that `options` train, for the checkpoint `model` of a kind; None where they train
    none. `held` is the model on meta, if `model` names no checkpoint."""
    if options.adapter:
        return known_config(Path(options.adapter), kind)
    if not options.peft:
        return None
    return new_config(
        options.peft, kind, str(Path(model).absolute()), r=options.lora_r, alpha=options.lora_alpha,
        targets=options.lora_targets, virtual_tokens=options.virtual_tokens, held=held,
    )  # fmt: skip


def prepared(
    options: Trained, source: Any, config: Any, start: Path | None, seed: int, model: nn.Module, base: CheckpointMap
) -> tuple[nn.Module, CheckpointMap]:
    """A model and its map with the adapter of `source` (see `distzo2.peft.adapters.adapter`) or gains, and with the
    parameters frozen that `options` do not train.

    Raises:
        UsageError: packed weights are to be updated as they are.
    """
    if source is not None:
        model, base = adapter(source, start, seed=seed, config=config)(model, base)
    if options.tune == "gain":
        model, base = gains(model, base)
    elif options.train_only or options.freeze:
        select(model, options.train_only, options.freeze)
    check_packed(options, options.model, (packed.stored_as() for packed in base.packed.values()))
    return model, base


def freezes_base(options: Trained) -> bool:
    """Whether all weights of the checkpoint stay as they are."""
    return options.adapts or options.tune == "gain"


def widens(options: Trained) -> bool:
    """Whether small parts that are trained are stored in float32."""
    return not options.adapts and bool(options.train_only or options.freeze)


def check_packed(options: Trained, model: str, stored: Iterable[StoredAs]) -> None:
    """Raises UsageError where weights of `model` that are stored so, and cannot be updated, are to be trained."""
    formats = sorted({each.format for each in stored if each.layout is not None and each.code_dtype is None})
    if formats and not (options.adapts or options.train_only or options.freeze or options.tune == "gain"):
        raise UsageError(
            f"--model {model}: its weights are packed ({', '.join(formats)}), and cannot be updated as they are: "
            "--peft lora trains an adapter beside them, --tune gain their scales, --train-only what is not packed"
        )


def beside_prompt(kind: ModelKind, adapter: Any) -> ModelKind:
    """A kind of model without the positions that the prompt or prefix of an adapter's configuration takes."""
    taken = virtual_tokens(adapter)
    return replace(kind, positions=kind.positions - taken) if taken and kind.positions else kind


def check_output(**paths: str | None) -> None:
    """Raises UsageError unless each of the paths, by the option that it comes from, can be that of a file."""
    for name, path in paths.items():
        if path and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
            raise UsageError(f"--{name} {path}: expected a file in a directory that exists")


def check_memory(
    size: ModelSize,
    device: torch.device,
    weights: str,
    host_memory: MemoryBudget = None,
    *,
    compute_dtype: torch.dtype | None = None,
    num_ranks: int = 1,
    num_copies: int = 1,
) -> None:
    """Raises DistZO2Error unless the weights fit where they are to live, beside three copies of the largest tensor, two
    of them in what is computed with.

    `host_memory` is what the user lets weights take, in place of what is available; the copies do not count then.
    `num_ranks` of this machine have a device each, and keep `num_copies` of the weights together.
    """
    widens = compute_dtype.itemsize / size.dtype.itemsize if compute_dtype and size.dtype else 1
    scratch = size.largest + int(2 * size.largest * widens)
    on_host = size.total * num_copies if weights == "host" or (device.type == "cpu" and weights == "device") else 0
    asked = host_memory not in (None, "auto")
    if device.type == "cpu" and not asked:
        on_host += scratch * num_ranks
    free = available_memory(host_memory)
    if on_host > free * (1 if asked else 1 - _SPARE):
        hint = "" if weights == "disk" else "--weights disk needs little; "
        hint = f" ({hint}--host-memory sets what weights may take)"
        raise DistZO2Error(f"the run needs about {gib(on_host)} of memory, and {gib(free)} are available{hint}")
    if device.type == "cuda":
        on_device = scratch + (size.total if weights == "device" else 0)
        free = torch.cuda.mem_get_info(device)[0]
        if on_device > free * (1 - _SPARE):
            hint = "" if weights != "device" else " (--weights host needs little)"
            raise DistZO2Error(f"{device} has {gib(free)} free, and the run needs about {gib(on_device)} there{hint}")


def check_disk(directory: str | os.PathLike, needs: dict[str, int]) -> None:
    """Raises DistZO2Error unless the disk of `directory`, which need not exist, has room for `needs` (name: bytes)."""
    free = free_disk_bytes(directory)
    total = sum(needs.values())
    if total > free:
        parts = ", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in needs.items())
        raise DistZO2Error(f"{directory}: {gib(total)} are needed ({parts}), and {gib(free)} are free on its disk")
