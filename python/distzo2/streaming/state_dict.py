"""What a model that was handed over does when its state is read, loaded or moved."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import nn

from distzo2.errors import DistZO2Error, UsageError
from distzo2.streaming.isolation import refuse_new_weights, watch_modules
from distzo2.streaming.runtime import StreamingRuntime
from distzo2.weights.units import ParamInfo


class StateHooks:
    """`state_dict` gives real, up-to-date weights; `load_state_dict` replaces them; moving and casting are refused.

    Hooks are on every module that owns parameters, so a part of the model may be saved and loaded as well.
    """

    def __init__(self, runtime: StreamingRuntime) -> None:
        self._runtime, self._access = runtime, runtime.access
        self._of = {id(p.tensor): (unit, p) for unit in runtime.units for p in unit.params}
        self._loading: dict[int, ParamInfo] = {}
        self._handles: list[Any] = []
        for module in runtime.model.modules():
            if any(p is not None for p in module._parameters.values()):
                # torch sets a mark on the hook, which a bound method does not allow.
                self._handles += [
                    module.register_state_dict_post_hook(functools.partial(self._fill)),
                    module.register_load_state_dict_pre_hook(self._make_room),
                    module.register_load_state_dict_post_hook(self._store),
                ]
        watch_modules()
        self.guard(True)

    def guard(self, on: bool) -> None:
        """Refuses, or lets happen, what would move, copy or restructure a part of the model."""
        for module in self._runtime.model.modules():
            refusing = {
                "_distzo2_streams": self._runtime,
                "_apply": functools.partial(_apply_nothing, module),
                "__reduce_ex__": _refuse_copy,
                "__deepcopy__": _refuse_copy,
                "__prepare_scriptable__": _refuse_copy,
                "add_module": functools.partial(_add, module, "_modules"),
                "register_parameter": functools.partial(_add, module, "_parameters"),
            }
            for name, value in refusing.items():
                if on:
                    module.__dict__[name] = value
                else:
                    module.__dict__.pop(name, None)

    def remove(self) -> None:
        """Makes the model an ordinary one again."""
        self.guard(False)
        for handle in self._handles:
            handle.remove()

    def _own(self, module: nn.Module) -> list[tuple[str, Any, ParamInfo]]:
        own = []
        for name, p in module._parameters.items():
            if p is not None and id(p) not in self._of:
                raise DistZO2Error(
                    f"parameter {name} of a {type(module).__name__} was added or replaced after the hand-over"
                )
            if p is not None:
                own.append((name, *self._of[id(p)]))
        return own

    def _fill(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict) -> None:
        """Post-hook of state_dict: puts real values in host memory in the place of placeholders."""
        for name, unit, param in self._own(module):
            if prefix + name in state:
                with self._access.reading(unit) as views:
                    state[prefix + name] = views[param.name].clone()

    def _make_room(
        self, module: nn.Module, state: dict, prefix: str, metadata: dict, strict: bool, missing, unexpected, errors
    ) -> None:
        """Pre-hook of load_state_dict: makes parameters real, so that they can be copied into."""
        if metadata.get("assign_to_params_buffers"):
            raise DistZO2Error("load_state_dict(assign=True) would take the parameters away from the streamed model")
        with self._access.replacing("load_state_dict"):  # no rank is in a forward
            pass
        for _, unit, param in self._own(module):
            with self._access.reading(unit) as views:
                self._runtime.parameters.show_each([param], [views[param.name].clone()])
            self._loading[param.index] = param

    def _store(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Post-hook of load_state_dict: stores what was loaded, as the base of the updates that follow."""
        own = [(unit, param) for _, unit, param in self._own(module) if param.index in self._loading]
        if not own:
            return
        with self._access.replacing("load_state_dict") as note:
            for unit, param in own:
                del self._loading[param.index]
                note(param.name, [param.tensor.data])
                with self._access.writing(unit, keep=True) as views:
                    views[param.name].copy_(param.tensor.data)
                self._runtime.parameters.hide_each([param])
            self._access.rebase()


def _apply_nothing(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`module._apply`: what leaves dtypes and devices as they are has nothing to do."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    for dtype, device, dims in {(t.dtype, t.device, t.dim()) for t in tensors}:
        probe = torch.empty((1,) * dims, dtype=dtype, device=device)
        result = fn(probe)
        if (result.dtype, result.device) != (dtype, device):
            raise DistZO2Error(
                f"{type(module).__name__}: weights that were handed over cannot be moved or cast (.to(), .half(), "
                f".cuda(), ...): they stream, as {dtype}, through {device}. Convert the model before offload."
            )
    return module


def _add(module: nn.Module, kind: str, name: str, value: Any) -> None:
    """`module.add_module` and `module.register_parameter`."""
    refuse_new_weights(module, name, value)
    add = nn.Module.add_module if kind == "_modules" else nn.Module.register_parameter
    add(module, name, value)


def _refuse_copy(*args: Any) -> NoReturn:
    raise UsageError(
        "a model that was handed over cannot be copied, pickled or scripted: its weights are not in its "
        "parameters. Save it with distzo2.save_pretrained(model, directory), or its model.state_dict()."
    )
