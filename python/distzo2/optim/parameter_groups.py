"""Parameter groups of an optimizer: which parameters have their own rates, and what a step takes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distzo2.errors import DistZO2Error
from distzo2.weights.units import ParamInfo
from distzo2_core import GroupScalars


def default_groups(params: Iterable[ParamInfo], split: bool) -> list[dict[str, Any]]:
    """All trainable parameters; with `split`, those of fewer than 2 dimensions (biases, norms) in a group of their own,
    without weight decay."""
    trainable = [p for p in params if p.trainable]
    if not trainable:
        raise DistZO2Error("no parameter of the model is trainable")
    if not split:
        return [{"params": [p.tensor for p in trainable]}]
    groups = [
        {"params": [p.tensor for p in trainable if len(p.shape) > 1]},
        {"params": [p.tensor for p in trainable if len(p.shape) <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def group_of_each(params: Iterable[ParamInfo], groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The number of its group for each parameter's index; parameters in no group are left out."""
    known = {id(p.tensor): p for p in params}
    group_of: dict[int, int] = {}
    for number, group in enumerate(groups):
        for tensor in group["params"]:
            param = known.get(id(tensor))
            if param is None:
                raise DistZO2Error(
                    f"parameter group {number} holds a tensor of shape {tuple(tensor.shape)} that is no parameter "
                    "of the model; take parameters from the model after it was handed over"
                )
            if not param.trainable:
                raise DistZO2Error(
                    f"parameter {param.name} in group {number} was frozen when the model was handed over"
                )
            group_of[param.index] = number
    return group_of


def scalars_of(groups: Sequence[Mapping[str, Any]], lr: float | None = None) -> tuple[GroupScalars, ...]:
    """The groups' scalars of a step as float32 values; `lr`, where it is given, in the place of theirs."""

    def exact(value: Any, name: str, group: int) -> float:
        number = float(np.float32(float(value)))
        if not np.isfinite(number):
            raise DistZO2Error(f"{name} of parameter group {group} is {value!r}; a finite number was expected")
        return number

    return tuple(
        GroupScalars(
            *(
                exact(lr if lr is not None and key == "lr" else group[key], key, number)
                for key in ("lr", "weight_decay", "perturb_scale", "update_scale")
            )
        )
        for number, group in enumerate(groups)
    )
