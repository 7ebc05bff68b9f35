"""How a pass sees the model: hooks on its modules, placeholders for its parameters, and a guard of their use.

A unit's window is the forward of a module that uses its parameters, from entry to exit. Outside it a parameter is a
stride-0 expand of NaN with the right shape, dtype and device: code may ask it what it likes, and any arithmetic with it
shows. `use_guard` names the parameter: it watches the operations of a closure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from distzo2.errors import DistZO2Error
from distzo2.weights.units import ParamInfo, Unit

_COMPILED_WHOLE = (
    "the whole model is compiled: torch.compile and CUDA graphs over it skip the hooks by which weights become "
    "present. Compile the blocks instead (for block in blocks: block.compile()) and hand over the plain model."
)

# Questions about a tensor that do not read it.
_METADATA = {
    "size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "element_size", "data_ptr",
    "storage_offset", "is_contiguous", "__len__", "__hash__", "get_device", "ndimension", "requires_grad_", "is_signed",
    "untyped_storage", "is_same_size", "__repr__", "type", "result_type",
}  # fmt: skip
_READING_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}


class Passes(Protocol):
    """What hooks and guards ask of the runtime."""

    def enter(self, unit: Unit) -> None:
        """The forward of one of the unit's windows begins."""

    def exit(self, unit: Unit) -> None:
        """The forward of one of the unit's windows has ended, or has failed."""

    def is_open(self, param: ParamInfo) -> bool:
        """Whether the parameter may be used now: the window of its unit is open."""


class Windows:
    """Hooks on every module whose forward uses a unit's parameters, and on the modules around them."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], passes: Passes) -> None:
        self._model = model
        units_of: dict[nn.Module, list[Unit]] = {}
        for unit in units:
            for module in unit.windows:
                units_of.setdefault(module, []).append(unit)
        self._around = [
            m
            for m in model.modules()
            if (m not in units_of or m is model) and any(inner in units_of for inner in m.modules() if inner is not m)
        ]
        self._handles = []
        for module, inside in units_of.items():
            before, after = _hooks(passes, tuple(inside))
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        for module in self._around:
            self._handles.append(module.register_forward_pre_hook(_refuse_compiled, prepend=True))

    def check_not_compiled_whole(self) -> None:
        if any(m._compiled_call_impl is not None for m in self._around):
            raise DistZO2Error(_COMPILED_WHOLE)

    def has_compiled(self) -> bool:
        """Whether any part of the model is compiled (a function mode around it would be traced, too)."""
        from torch._dynamo.eval_frame import OptimizedModule

        return any(m._compiled_call_impl is not None or isinstance(m, OptimizedModule) for m in self._model.modules())

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hooks(passes: Passes, units: tuple[Unit, ...]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Makes hooks that stay out of compiled graphs: they run between them."""

    @torch.compiler.disable
    def before(module, args) -> None:
        for unit in units:
            passes.enter(unit)

    @torch.compiler.disable
    def after(module, args, output) -> None:
        for unit in reversed(units):
            passes.exit(unit)

    return before, after


@torch.compiler.disable
def _refuse_compiled(module, args) -> None:
    """Refuses that a module around the units runs inside a compiled frame."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            raise DistZO2Error(_COMPILED_WHOLE)
        frame = frame.f_back


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


def use_guard(passes: Passes, params: Sequence[ParamInfo], closure: Callable[[], Any]) -> Callable[[], Any]:
    """Wraps a closure: every torch function that it calls is watched for parameters whose window is not open.

    The wrapped closure raises DistZO2Error naming the parameter.
    """
    watched = {id(p.tensor): p for p in params}

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
                        if param is not None and not passes.is_open(param):
                            raise _used_outside(param)
            return func(*args, **(kwargs or {}))

    def watched_closure() -> Any:
        with Guard():
            return closure()

    return watched_closure


def _used_outside(param: ParamInfo) -> DistZO2Error:
    outer = param.name.rsplit(".", 2)[0] if param.name.count(".") > 1 else "."
    return DistZO2Error(
        f"parameter {param.name} was used outside the forward of the module that owns it, where its weights are not "
        "present. Call the module instead, or name with units= a module whose forward contains the use "
        f'(units=["{outer}"]).'
    )
