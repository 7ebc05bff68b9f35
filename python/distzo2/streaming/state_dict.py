"""What a model that was handed over does when its state is read, loaded or moved."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn

from distzo2.errors import DistZO2Error
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
        for module in runtime.model.modules():
            if any(p is not None for p in module._parameters.values()):
                # torch sets a mark on the hook, which a bound method does not allow.
                module.register_state_dict_post_hook(functools.partial(self._fill))
                module.register_load_state_dict_pre_hook(self._make_room)
                module.register_load_state_dict_post_hook(self._store)
            object.__setattr__(module, "_apply", _refuse_apply)
        object.__setattr__(runtime.model, "__deepcopy__", _refuse_copy)

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
                param.tensor.data = views[param.name].clone()
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
                self._runtime.place_placeholder(param)
            self._access.rebase()


def _refuse_apply(fn: Any, recurse: bool = True) -> NoReturn:
    raise DistZO2Error(
        "a model that was handed over cannot be moved or cast (.to(), .half(), .cuda(), ...): its weights stream "
        "through the device that offload() was given. Convert it before offload."
    )


def _refuse_copy(memo: dict) -> NoReturn:
    raise DistZO2Error(
        "a model that was handed over cannot be copied; save it with distzo2.save_pretrained and load it"
    )
