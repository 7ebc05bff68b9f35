"""A packed checkpoint with the gains of a run applied: the same files, in which scales are changed and nothing else.

A group's weights are decoded from its scale and minimum, so that its gain g belongs into these: s' = fl32(g * s), m' =
fl32(g * m). That is possible where the type that the file has for them holds each s' and m' exactly: always in float32,
as plain nf4 has them, and in 16 bits or fewer for gains such as 1 and 1/2. Of blocks with scales of 6 or 8 bits, as
Q4_K has them, the two halves in front change, for which the gains of a block must be one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.packed_param import VALUE_DTYPES, PackedParam, Values, values_of
from distzo2.checkpoint.reading import CONFIG_FILE, INDEX_FILE
from distzo2.checkpoint.tensor_files import CheckpointError, bytes_of
from distzo2.checkpoint.writing import GENERATION_FILE, HIDDEN, StagedFiles, check_out_dir
from distzo2.files import write_all
from distzo2.formats.packed_checkpoint import SETTINGS_FILES
from distzo2.models.pretrained import open_checkpoint
from distzo2.streaming.offload import runtime_of
from distzo2.streaming.runtime import StreamingRuntime
from distzo2.weights.units import GAIN

_INSTEAD = (
    "write decoded weights (distzo2.save_pretrained, or distzo2 replay without --packed), or keep the gains alone "
    "(distzo2.state_dict(model, trainable_only=True))"
)


def save_packed(model: nn.Module, out_dir: str | os.PathLike) -> None:
    """Writes the files that a model with gains came from into `out_dir`, with the gains in their scales and minima.

    Names, headers, codes and all other tensors stay. A new weight is decoded from fl32(gain * scale), the model's own
    is fl32(gain * value): they differ in the last bits of float32, before they are rounded to 16 bits, and not at all
    where gains are powers of two. At most a few MiB are in memory.

    Args:
        model: from `distzo2.from_pretrained(path, prepare=distzo2.gains)`. The files at `path` must be as they were.

    Raises:
        CheckpointError: there are no gains; other weights were replaced; scales do not lie in the files as they are
            used; a new scale or minimum is not a value of the type that the files have for it: the message says how
            many, and by how much rounding would change one; or `out_dir` holds a checkpoint or has too little room. A
            save that fails leaves `out_dir` as it was.
    """
    runtime = runtime_of(model)
    unit_of = {param.name: unit for unit in runtime.units for param in unit.params if param.is_gain}
    if not unit_of:
        raise CheckpointError(f"{type(model).__name__} trains no gains: its packed weights are those of its files")

    def gain_of(name: str) -> torch.Tensor:
        with runtime.access.reading(unit_of[name]) as views:
            return views[name].clone()

    if runtime.weights.epoch or any(param.trainable and not param.is_gain for param in runtime.params):
        _check_others(runtime)
    write_packed(runtime.base, gain_of, out_dir)


def _check_others(runtime: StreamingRuntime) -> None:
    """Refuses weights that were replaced since they were loaded, but for gains: those of the files are written."""
    dtype = next(param.declared for param in runtime.params if not param.is_gain)
    _, found = open_checkpoint(runtime.base.directory, dtype=dtype, auto_class=type(runtime.model))
    with closing(found):
        for unit in runtime.units:
            raw = {param.name for param in unit.params if param.layout is None and not param.is_gain}
            with runtime.access.reading(unit) if raw else nullcontext({}) as views:
                for name in raw:
                    stored = torch.empty_like(views[name])
                    found.read(name, stored)
                    if not torch.equal(*(each.view(-1).view(torch.uint8) for each in (stored, views[name]))):
                        raise CheckpointError(f"{name} was replaced, and only gains go into packed files: {_INSTEAD}")


def write_packed(
    checkpoint_map: CheckpointMap, gain_of: Callable[[str], torch.Tensor], out_dir: str | os.PathLike
) -> None:
    """As `save_packed`: `gain_of` returns a gain, float32 [groups] on the CPU, by its name in a map with gains."""
    check_out_dir(Path(out_dir))
    for file in checkpoint_map.files.files.values():
        file.check_same()
    params = [each.packed for name, each in checkpoint_map.mapped.items() if name + GAIN in checkpoint_map.mapped]
    _check_exact(params, gain_of)
    source, directory = checkpoint_map.directory, Path(checkpoint_map.directory)
    directory = directory if directory.is_dir() else directory.parent
    weights = [*checkpoint_map.files.files]
    names = (CONFIG_FILE, INDEX_FILE, GENERATION_FILE, *SETTINGS_FILES) if source.is_dir() else ()
    settings = [path for name in names if (path := directory / name).is_file()]
    with _Copies(out_dir, directory, [*weights, *settings]) as copies:
        if source.is_dir():
            copies.copy_companions(source)
        for param in params:
            gain = gain_of(param.name + GAIN)
            moved = [replace(piece, path=piece.path and copies.hidden / piece.path.name) for piece in param.pieces]
            for held, *_, new in _changes(replace(param, pieces=tuple(moved)), gain):
                held.places.copy_(new.view(torch.uint8).view(held.places.shape))
                copies.write(held)


class _Copies(StagedFiles):
    """Copies of files, which may be changed before they get their names."""

    def __init__(self, out_dir: str | os.PathLike, directory: Path, files: list[Path]):
        super().__init__(out_dir, directory)
        there = [file.name for file in files if (self.out_dir / file.name).exists()]
        if there and not (self.out_dir / HIDDEN).is_dir():  # else a killed writer's
            raise CheckpointError(f"{self.out_dir}: already holds {there[0]}; name another directory")
        self.begin(sum(file.stat().st_size for file in files))
        with self.aborting():
            for file in files:
                shutil.copyfile(file, self.hidden / file.name)

    def write(self, held: Values) -> None:
        """Puts changed bytes where they were read."""
        descriptor = os.open(held.piece.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_all(descriptor, bytes_of(held.data), held.piece.offset)
        finally:
            os.close(descriptor)


def _check_exact(params: list[PackedParam], gain_of: Callable[[str], torch.Tensor]) -> None:
    first, bad, total, most = None, 0, 0, 0.0
    for param in params:
        gain = gain_of(param.name + GAIN)
        is_bad = torch.zeros(gain.numel(), dtype=torch.bool)
        for held, part, wanted, new in _changes(param, gain):
            value = _decoded(new)[..., None]
            wrong = wanted != value
            is_bad[part] |= wrong.view(-1)
            if wrong.any():
                off = ((value - wanted) / wanted).abs()[wrong].nan_to_num(torch.inf)
                most, first = max(most, float(off.max())), first or (param, held.values.dtype)
        bad, total = bad + int(is_bad.sum()), total + gain.numel()
    if first is not None:
        param, dtype = first
        kind = "e8m0" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{param.name} ({param.format}): {kind} does not hold the scales of {bad} of {total} groups times their "
            f"gains, and rounding would change one by {most:.2g} of itself: {_INSTEAD}"
        )


def _changes(param: PackedParam, gain: torch.Tensor) -> Iterator[tuple[Values, slice, torch.Tensor, torch.Tensor]]:
    """The scales and minima of a parameter, part by part: as they lie there; whose gains theirs are; what they are to
    be, float32 [lines, values, gains of a value]; and what is nearest to that in their type.

    Raises:
        CheckpointError: they are not in the files as they are used.
    """
    layout = param.layout
    in_line = gain.numel() // -(-layout.rows // layout.scale.rows)
    is_coarse = layout.scale.kind not in VALUE_DTYPES
    scale, low = (layout.outer, layout.outer_min) if is_coarse else (layout.scale, layout.min)
    for place in (scale, low) if layout.min is not None else (scale,):
        if any(p.make is not None and at <= place.offset < at + p.num_bytes for p, at in param.placed()):
            raise CheckpointError(
                f"{param.name} ({param.format}): its scales are put into another order, or made, when the files are "
                f"read, and are not written back: {_INSTEAD}"
            )
        for held in values_of(param, place):
            begin = held.row // place.rows * in_line
            part = slice(begin, begin + len(held.values) * in_line)
            own, old = gain[part].view(*held.values.shape, -1), _decoded(held.values)
            middle = own.amin(-1) + (own.amax(-1) - own.amin(-1)) / 2  # of equal ones the gain itself
            yield held, part, own * old[..., None], _encoded(middle * old, held.values.dtype)


def _decoded(values: torch.Tensor) -> torch.Tensor:
    """Values of any type in float32; uint8 stands for e8m0, 2^(byte - 127)."""
    return values.float() if values.dtype != torch.uint8 else (2.0 ** (values.double() - 127)).float()


def _encoded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype != torch.uint8:
        return values.to(dtype)
    return (values.double().log2().round() + 127).nan_to_num(0, 254, 0).clamp(0, 254).to(torch.uint8)
