"""Windows: the hooks that tell the runtime when a module's forward begins and ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.weights.units import Unit

if TYPE_CHECKING:
    from distzo2.streaming.runtime import StreamingRuntime

_COMPILED_WHOLE = (
    "the whole model is compiled: torch.compile and CUDA graphs over it skip the hooks by which weights become "
    "present. Compile the blocks instead (for block in blocks: block.compile()) and hand over the plain model."
)


class Windows:
    """Hooks on every module whose forward uses a unit's parameters, and on the modules around them."""

    def __init__(self, runtime: StreamingRuntime) -> None:
        self._model = runtime.model
        units_of: dict[int, list[Unit]] = {}
        modules: dict[int, nn.Module] = {}
        for unit in runtime.units:
            for module in unit.windows:
                units_of.setdefault(id(module), []).append(unit)
                modules[id(module)] = module
        self._around = [
            m for m in self._model.modules() if any(id(inner) in modules for inner in m.modules() if inner is not m)
        ]
        self._around = [m for m in self._around if id(m) not in modules or m is self._model]
        self._handles = []
        for key, module in modules.items():
            before, after = _hooks(runtime, tuple(units_of[key]))
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


def _hooks(runtime: StreamingRuntime, units: tuple[Unit, ...]):
    """Hooks stay out of compiled graphs: they run between them."""

    @torch.compiler.disable
    def before(module, args) -> None:
        for unit in units:
            runtime.enter(unit)

    @torch.compiler.disable
    def after(module, args, output) -> None:
        for unit in reversed(units):
            runtime.exit(unit)

    return before, after


@torch.compiler.disable
def _refuse_compiled(module, args) -> None:
    """A module around the units must not itself run inside a compiled frame."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            raise DistZO2Error(_COMPILED_WHOLE)
        frame = frame.f_back
