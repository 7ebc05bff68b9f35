"""Gains: what is trained over packed weights, a factor for each group of them.

A weight is rne(fl32(gain * value)), and a gain of 1 changes no bit. Gains are parameters of the module that owns the
weights: float32, in no file, from 1. An update leaves none below 0. Weights are saved with their gains applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.weights.units import GAIN, collect_params, find_units
from distzo2_core.packed import PackedLayout, PackedSegment, PackedTable

GAINED = " with gains"  # behind a format, as a journal's header has it


def gains(model: nn.Module, checkpoint_map: CheckpointMap) -> tuple[nn.Module, CheckpointMap]:
    """Trains a gain for each group of the packed weights of a model's blocks, and nothing else.

    Each packed matrix gets a parameter beside it, `weight_gain` for `weight`, float32 [groups], in the order of the
    stored groups. Packed embeddings and heads have none. Public as `distzo2.gains`, which is given to
    `distzo2.from_pretrained(path, prepare=distzo2.gains)`.

    Args:
        model: with its parameters on meta.
        checkpoint_map: what fills them; it is left as it is.

    Returns:
        the model, all of it frozen but the gains, and the map that fills it.

    Raises:
        CheckpointError: no block has packed weights, or one of its modules has a parameter of the gain's name.
    """
    layouts = {name: each.layout for name, each in checkpoint_map.packed.items()}
    packed = {}
    for name, layout in add_gains(model, layouts, str(checkpoint_map.directory)).items():
        found, num_groups = checkpoint_map.mapped[name], model.get_parameter(name + GAIN).numel()
        packed[name] = replace(found, packed=replace(found.packed, layout=layout, format=found.packed.format + GAINED))
        ones, shape = torch.ones(1).expand(num_groups), (num_groups,)
        packed[name + GAIN] = MappedTensor(name + GAIN, torch.float32, shape, (), made=ones, is_gain=True)
    known = checkpoint_map.mapped | packed
    mapped = {name: known[name] for name, _ in model.named_parameters()}
    return model, replace(checkpoint_map, mapped=mapped | known)


def add_gains(model: nn.Module, layouts: Mapping[str, PackedLayout], where: str) -> dict[str, PackedLayout]:
    """Freezes a model, and gives each packed matrix of its blocks a gain beside it. Of `layouts`, by names of
    parameters, returns those with a gain. `where` begins a message; raises as `gains`."""
    params, gained = collect_params(model), {}
    model.requires_grad_(False)
    for param in (p for unit in find_units(model, params) if not unit.resident for p in unit.params):
        if param.name not in layouts:
            continue
        gained[param.name] = layout = layouts[param.name].with_gain()
        num_groups = PackedTable([PackedSegment(layout, 0, torch.float32)]).gain_bytes // 4
        gain = nn.Parameter(torch.empty(num_groups, device="meta"))
        for owner in param.owners:
            key = next(key for key, p in owner._parameters.items() if p is param.tensor)
            if hasattr(owner, key + GAIN):
                raise CheckpointError(f"{where}: the model has a parameter {param.name + GAIN!r}")
            owner.register_parameter(key + GAIN, gain)
    if not gained:
        raise CheckpointError(
            f"{where}: gains are trained over packed weights, and no block has any: pack it at load (store='affine4' "
            "or 'table4', --store affine4), or name a GGUF file or a quantized checkpoint"
        )
    return gained
