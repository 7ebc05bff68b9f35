"""What a parameter is where its weights are not: its shape, dtype and device, and a named error for all else.

A unit's window is the forward of a module that uses its parameters, from entry to exit. Outside it a parameter's class
is `AbsentParameter`, over a stride-0 expand of NaN. Libraries may count it; what would read or write it raises and
names it. Inside its window it has its own class again, so that operations there cost nothing more.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.weights.units import ParamInfo, Unit
from distzo2_core import checksum, hide_parameters, show_parameters

# Questions about a tensor that do not read it, besides those named is_...
_METADATA = {
    "size", "dim", "numel", "nelement", "stride", "element_size", "data_ptr", "storage_offset", "__len__", "__hash__",
    "get_device", "ndimension", "untyped_storage", "type", "result_type",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
}  # fmt: skip
_READING_PROPERTIES = {"T", "mT", "H", "mH", "real", "imag"}
_SETTABLE = {"grad"}


class Presence(Protocol):
    """What an absent parameter asks of the runtime."""

    def value_of(self, param: ParamInfo) -> torch.Tensor | None:
        """The up-to-date weights of a parameter that may be read outside of its window; None for others."""

    def set_requires_grad(self, param: ParamInfo, value: bool) -> None:
        """Leaves a parameter to optimizers that are yet to be made, or not."""

    def in_forward(self) -> bool:
        """Whether a lane runs, or an ordinary forward."""

    def name_of(self, module: nn.Module) -> str | None:
        """The module's name in the model; None if it is no part of it."""


def _answer(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None) -> Any:
    """What a torch function gives for arguments some of which are absent."""
    kwargs = kwargs or {}
    name = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    absent = next(_absent_in([*args, *kwargs.values()]))
    if name == "__repr__":
        return _described(absent)
    param, presence = absent._distzo2
    if isinstance(absent, AbsentParameter) and (owner == "requires_grad" or name == "requires_grad_"):
        if name == "__get__":
            return param.requires_grad
        presence.set_requires_grad(param, bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True)))
        return args[0]
    with torch._C.DisableTorchFunctionSubclass():
        if name == "__get__" and owner not in _READING_PROPERTIES:
            result = func(*args, **kwargs)
            return _lent(result, absent) if owner == "data" else result
        if name == "detach":
            return _lent(func(*args, **kwargs), absent)
        if name in _METADATA or (name.startswith("is_") and name != "is_nonzero"):
            return func(*args, **kwargs)
        if name == "__set__" and owner in _SETTABLE:
            return func(*args, **kwargs)
        writes = name == "__set__" or name == "__setitem__" or "out" in kwargs or _is_in_place(name)
        return func(*_present(args, writes), **_present(kwargs, writes))


def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name.endswith("__"))


def _absent_in(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (AbsentParameter, AbsentTensor)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _absent_in(value)
        elif isinstance(value, dict):
            yield from _absent_in(value.values())


def _present(value: Any, writes: bool) -> Any:
    """`value` with weights in the place of absent parameters."""
    if isinstance(value, (AbsentParameter, AbsentTensor)):
        param, presence = value._distzo2
        weights = None if writes else presence.value_of(param)
        if weights is None:
            raise _used_outside(param, presence)
        return weights
    if isinstance(value, dict):
        return {key: _present(item, writes) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_present(item, writes) for item in value]
        return type(value)(items) if type(value) in (tuple, list) else type(value)(*items)
    return value


def _lent(tensor: torch.Tensor, absent: Any) -> torch.Tensor:
    result = tensor.as_subclass(AbsentTensor)
    result._distzo2 = absent._distzo2
    return result


def _described(absent: Any) -> str:
    param, _ = absent._distzo2
    return (
        f"<parameter {param.name}: {tuple(param.shape)}, {param.seen}; its weights are not present outside of a "
        "forward: see distzo2.edit(model) or model.state_dict()>"
    )


class AbsentParameter(nn.Parameter):
    """A parameter whose window is not open."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _answer(func, args, kwargs)


class AbsentTensor(torch.Tensor):
    """`.data` and `.detach()` of such a parameter."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _answer(func, args, kwargs)


def _used_outside(param: ParamInfo, presence: Presence) -> DistZO2Error:
    error = (
        f"parameter {param.name} was used outside the forward of the module that owns it, where its weights are not "
        "present. Call that module instead, or read it inside `with distzo2.present(module):`"
    )
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
        name = presence.name_of(module) if isinstance(module, nn.Module) else None
        if name is not None and any(inner is owner for inner in module.modules() for owner in param.owners):
            alike = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1) or "."  # in all blocks
            return DistZO2Error(f'{error}, or hand the model over with units=["{alike}"], around the use.')
        frame = frame.f_back
    if presence.in_forward():
        return DistZO2Error(f"{error}.")
    return DistZO2Error(
        f"parameter {param.name}: its weights are not present outside of a forward. Read them with "
        "model.state_dict() or inside `with distzo2.present(module):`, and change them inside `with "
        "distzo2.edit(model):`."
    )


class Parameters:
    """Points a model's parameters at weights, unit by unit, and hides them where none are present."""

    def __init__(self, units: Sequence[Unit], device: torch.device, presence: Presence) -> None:
        self._presence = presence
        self._classes = {p.index: nn.Parameter if p.tensor.is_meta else type(p.tensor) for u in units for p in u.params}
        self._fills: dict[torch.dtype, torch.Tensor] = {}
        self._device = device
        self._units: list[tuple[list, list, list]] = []  # of each: parameters, their classes, placeholders
        self._versions: dict[int, list[int]] = {}  # of units that are shown: torch's counters of writes
        self._sums: dict[int, list[int]] = {}  # of the weights that some units show
        self._by_sums: set[int] = set()  # units whose forwards move torch's counters and change nothing

    def take_over(self, unit: Unit) -> None:
        """Hides the parameters of the next unit for the first time. One on meta, or made in inference mode, is replaced
        in its owners."""
        placeholders = [self._placeholder(param) for param in unit.params]
        for param, placeholder in zip(unit.params, placeholders, strict=True):
            if param.tensor.is_meta or param.tensor.is_inference():
                fresh = nn.Parameter(placeholder, requires_grad=False)
                for owner in param.owners:
                    for name, p in owner._parameters.items():
                        if p is param.tensor:
                            owner._parameters[name] = fresh
                param.tensor = fresh
            param.tensor.requires_grad_(False)
            param.tensor.grad = None
            param.tensor._distzo2 = (param, self._presence)
        classes = [self._classes[param.index] for param in unit.params]
        tensors = [param.tensor for param in unit.params]
        self._units.append((tensors, classes, placeholders))
        hide_parameters(tensors, AbsentParameter, placeholders, [])

    def compute_anew(self, unit: Unit) -> None:
        """Hides a unit's parameters as ones of the dtypes that modules compute with now."""
        params, classes, _ = self._units[unit.index]
        self._units[unit.index] = params, classes, [self._placeholder(param) for param in unit.params]
        self.hide(unit)

    def _placeholder(self, param: ParamInfo) -> torch.Tensor:
        if param.seen not in self._fills:
            self._fills[param.seen] = torch.full((), _poison(param.seen), dtype=param.seen, device=self._device)
        return self._fills[param.seen].expand(param.shape)

    def show(self, unit: Unit, weights: list[torch.Tensor], *, summed: bool = False) -> None:
        """Points a unit's parameters at `weights`. With `summed`, `hide` finds every change of them, and not only those
        that torch counts."""
        params, classes, _ = self._units[unit.index]
        self._versions[unit.index] = show_parameters(params, classes, weights)
        if summed or unit.index in self._by_sums:
            self._sums[unit.index] = [checksum([value]) for value in weights]

    def show_each(self, params: Sequence[ParamInfo], weights: Sequence[torch.Tensor]) -> None:
        """Points some parameters at `weights`, of any units; `hide_each` hides them."""
        for param, value in zip(params, weights, strict=True):
            param.tensor.__class__ = self._classes[param.index]
            param.tensor.data = value

    def hide_each(self, params: Sequence[ParamInfo]) -> None:
        """Puts placeholders back."""
        for param in params:
            param.tensor.__class__ = self._classes[param.index]
            param.tensor.data = self._placeholder(param)
            param.tensor.__class__ = AbsentParameter

    def hide(self, unit: Unit) -> list[ParamInfo]:
        """Puts placeholders back; returns the parameters whose weights were written while they were shown."""
        sums = self._sums.pop(unit.index, None) if self._sums else None
        changed = [i for i, p in enumerate(unit.params) if checksum([p.tensor.detach()]) != sums[i]] if sums else []
        params, _, placeholders = self._units[unit.index]
        written = hide_parameters(params, AbsentParameter, placeholders, self._versions.pop(unit.index, []))
        if sums and written and not changed:  # as where a forward registers a parametrization
            self._by_sums.add(unit.index)
        return [unit.params[i] for i in (changed if sums else written)]


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
