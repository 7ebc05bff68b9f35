"""A base checkpoint and an adapter become a whole checkpoint, one adapted layer in memory at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.writing import CheckpointWriter
from distzo2.errors import DistZO2Error, blaming
from distzo2.models.pretrained import open_checkpoint
from distzo2.models.replay import NO_STEPS, PIECE_BYTES, apply_updates, plan_pieces
from distzo2.peft.adapters import AdapterTensors, wrap
from distzo2.peft.library import read_config

# Of the formats of a base.
NO_MERGE = (
    "an adapter is not merged into packed weights ({}), which would round it away: load it beside them (--adapter, or "
    "peft's PeftModel), or merge it into the checkpoint that they were packed from (distzo2.merge_adapter)"
)


@torch.no_grad()
def merge_adapter(
    base_dir: str | os.PathLike,
    adapter_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the base checkpoint with an adapter merged into it, with the bits of peft's `merge_and_unload`. Memory is
    the adapter and two copies of the largest layer that it changes.

    Args:
        dtype: that of the base's weights, as for `distzo2.from_pretrained`.
        overwrite: as for `distzo2.save_pretrained`.

    Raises:
        DistZO2Error: the adapter does not merge into weights, or only into a weight that another module shares.
    """
    adapter = Path(adapter_dir)
    config = read_config(adapter)
    if config.is_prompt_learning:
        raise DistZO2Error(f"{adapter}: a prompt or prefix cannot be merged into weights; the adapter is all there is")
    model, base = open_checkpoint(base_dir, dtype=dtype)
    with closing(base):
        if base.is_packed:
            raise DistZO2Error(f"{base_dir}: {NO_MERGE.format(base.formats)}")
        names = {id(p): name for name, p in model.named_parameters()}
        wrapped = wrap(model, config)
        check_merges(wrapped, names)
        tensors = AdapterTensors(wrapped, base, names)
        values = tensors.read(adapter)
        trained: dict[str, torch.Tensor] = {}  # by name in the base: what stands in the place of its weights
        for name, key in tensors.keys.items():
            if (origin := tensors.origin(name)) is None:
                tensors.params[name].data = values[key]
            else:
                trained[origin] = values[key].to(base.mapped[origin].dtype)
        with CheckpointWriter(base, out_dir, overwrite=overwrite) as writer:
            written = set()
            for values in chain((_merged(layer, names, base, trained) for layer in _layers(wrapped)), [trained]):
                for name in [each for each in values if each not in written]:
                    writer.write(name, values[name])
                written |= values.keys()
            rows = [
                {"name": name, "index": 0, "group": None, "noise": "normal"}
                for name in base.names
                if name not in written
            ]
            apply_updates(base, writer.write, plan_pieces(base, rows, PIECE_BYTES), NO_STEPS, None, tqdm(disable=True))


def _layers(model: Any) -> list[Any]:
    """The outermost layers of peft in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(name.startswith(f"{outer}.") for outer, _ in found[-1:]):
            found.append((name, module))
    return [module for _, module in found]


def check_merges(wrapped: Any, names: Mapping[int, str]) -> None:
    """Checks that an adapter can be merged into its base.

    Args:
        wrapped: the `PeftModel`.
        names: the names of the base's parameters, by id.

    Raises:
        DistZO2Error: the adapter changes a weight that another module shares.
    """
    modules = list(wrapped.modules())
    users = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    inner = [getattr(m, name) for m in modules for name in ("base_layer", "original_module") if hasattr(m, name)]
    changed = [p for m in inner for p in m._parameters.values()]
    changed += [p for p in wrapped.parameters() if p.requires_grad]  # biases too, which stay where they are
    for key in map(id, changed):
        if key in names and users[key] > 1:
            raise DistZO2Error(
                f"the adapter is on {names[key]}, which another module shares: merged, it would change that too. Use "
                "it with --adapter instead"
            )


def _merged(
    layer: Any, names: Mapping[int, str], base: CheckpointMap, trained: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The base's weights in one layer, by name, after its adapter was merged into them. They are on meta again."""
    inner = layer.get_base_layer()
    own = {key: p for key, p in inner._parameters.items() if p is not None and id(p) in names}
    for key, p in own.items():
        if (value := trained.get(names[id(p)])) is None:
            base.read(names[id(p)], value := torch.empty(p.shape, dtype=p.dtype))
        inner._parameters[key] = nn.Parameter(value, requires_grad=False)
    where = next(iter(names[id(p)] for p in own.values()), type(inner).__name__)
    with blaming(f"merging into {where}"):
        if hasattr(layer, "unload_and_optionally_merge_module"):
            layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
    result = {}
    for key, p in own.items():
        result[names[id(p)]] = inner._parameters[key].data
        inner._parameters[key] = p
    return result
