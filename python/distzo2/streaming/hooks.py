"""Hooks on a model's modules, by which the runtime learns where a forward is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.weights.units import Unit

_COMPILED_WHOLE = (
    "the whole model is compiled: torch.compile and CUDA graphs over it skip the hooks by which weights become "
    "present. Compile the blocks instead (for block in blocks: block.compile()) and hand over the plain model."
)


class Passes(Protocol):
    """What hooks tell the runtime."""

    def begin(self, module: nn.Module) -> None:
        """The forward of a module begins that is, or holds, a window of a unit."""

    def end(self) -> None:
        """Such a forward has ended, or has failed."""

    def enter(self, unit: Unit) -> None:
        """The forward of one of the unit's windows begins."""

    def exit(self, unit: Unit) -> None:
        """The forward of one of the unit's windows has ended, or has failed."""


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
        for module in dict.fromkeys([*units_of, *self._around]):
            before, after = _hooks(passes, tuple(units_of.get(module, ())))
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
        passes.begin(module)
        for unit in units:
            passes.enter(unit)

    @torch.compiler.disable
    def after(module, args, output) -> None:
        for unit in reversed(units):
            passes.exit(unit)
        passes.end()

    return before, after


def in_generate() -> bool:
    """Whether a module's method `generate`, of transformers, peft or a model's own, has called what runs."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False


@torch.compiler.disable
def _refuse_compiled(module, args) -> None:
    """Refuses that a module around the units runs inside a compiled frame."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            raise DistZO2Error(_COMPILED_WHOLE)
        frame = frame.f_back
