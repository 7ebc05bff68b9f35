"""Placeholders: what a parameter is while its unit is not there.

A stride-0 expand of NaN with the right shape, dtype and device, so that code asks the parameter what it likes, and any
arithmetic outside the unit's window shows. `use_guard` names the parameter: it watches a closure's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from distzo2.errors import DistZO2Error
from distzo2.weights.units import ParamInfo

if TYPE_CHECKING:
    from distzo2.streaming.runtime import StreamingRuntime

# Questions about a tensor that do not read it.
_METADATA = {
    "size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "element_size", "data_ptr",
    "storage_offset", "is_contiguous", "__len__", "__hash__", "get_device", "ndimension", "requires_grad_", "is_signed",
    "untyped_storage", "is_same_size", "__repr__", "type", "result_type",
}  # fmt: skip
_READING_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}


class Placeholders:
    """Makes and places the placeholders of a model's parameters."""

    def __init__(self, params: Sequence[ParamInfo], device: torch.device) -> None:
        self._of: dict[int, torch.Tensor] = {}
        fills: dict[torch.dtype, torch.Tensor] = {}
        for p in params:
            if p.dtype not in fills:
                fills[p.dtype] = torch.full((), _poison(p.dtype), dtype=p.dtype, device=device)
            self._of[p.index] = fills[p.dtype].expand(p.shape)

    def take_over(self, param: ParamInfo) -> None:
        """Places the placeholder for the first time. A meta parameter is replaced by a real one in its owners."""
        if param.tensor.is_meta:
            fresh = nn.Parameter(self._of[param.index], requires_grad=False)
            for owner in param.owners:
                for name, p in owner._parameters.items():
                    if p is param.tensor:
                        owner._parameters[name] = fresh
            param.tensor = fresh
        param.tensor.requires_grad_(False)
        param.tensor.grad = None
        self.place(param)

    def place(self, param: ParamInfo) -> None:
        param.tensor.data = self._of[param.index]


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def use_guard(runtime: StreamingRuntime, closure: Callable[[], Any]) -> Callable[[], Any]:
    """The closure, with every torch function it calls watched for parameters whose window is not open.

    The wrapped closure raises DistZO2Error naming the parameter.
    """
    watched = {id(p.tensor): p for p in runtime.params}

    class Guard(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            reads = name not in _METADATA
            if name == "__get__":
                reads = getattr(func.__self__, "__name__", "") in _READING_PROPERTIES
            if reads and name != "__set__":
                for value in (*args, *(kwargs or {}).values()):
                    for item in value if isinstance(value, (tuple, list)) else (value,):
                        param = watched.get(id(item))
                        if param is not None and not runtime.is_open(param):
                            raise used_outside(runtime, param)
            return func(*args, **(kwargs or {}))

    def watched_closure() -> Any:
        with Guard():
            return closure()

    return watched_closure


def used_outside(runtime: StreamingRuntime, param: ParamInfo) -> DistZO2Error:
    return DistZO2Error(
        f"parameter {param.name} was used outside the forward of the module that owns it, where its weights are not "
        "present. Call the module instead, or name with units= a module whose forward contains the use "
        f'(units=["{_outer(param.name)}"]).'
    )


def _outer(name: str) -> str:
    return name.rsplit(".", 2)[0] if name.count(".") > 1 else "."
