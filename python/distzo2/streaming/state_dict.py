"""What a model that was handed over does when its state is read, loaded or moved."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from distzo2.errors import DistZO2Error, UsageError
from distzo2.streaming.isolation import refuse_new_weights, watch_modules
from distzo2.streaming.runtime import StreamingRuntime
from distzo2.weights.units import ParamInfo, Unit


@dataclass
class _Call:
    """A call of state_dict or load_state_dict, which brings each unit once."""

    left: Counter[int]  # by parameter: how many visits of modules that own it are to come
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)  # by parameter: its clone, until the last of these
    is_bound: bool = False  # or of hooks alone, as `nn.Module.state_dict(model)` calls them
    has_entered: bool = False


class StateHooks:
    """`state_dict` gives real, up-to-date weights; `load_state_dict` replaces them; moving and casting are refused.

    Hooks are on every module that owns parameters, so a part of the model may be saved and loaded as well.
    """

    def __init__(self, runtime: StreamingRuntime) -> None:
        self._runtime, self._access = runtime, runtime.access
        self._of = {id(p.tensor): (unit, p) for unit in runtime.units for p in unit.params}
        self._calls: dict[str, _Call] = {}  # by method; those under way
        self._handles: list[Any] = []
        self._methods: list[tuple[dict[str, Any], str, Any]] = []
        for module in runtime.model.modules():
            for name in ("state_dict", "load_state_dict"):
                method = functools.partial(self._call, name, module)
                if module.__dict__.setdefault(name, method) is method:  # else the user's own, which hooks alone serve
                    self._methods.append((module.__dict__, name, method))
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
        for attributes, name, method in self._methods:
            if attributes.get(name) is method:
                del attributes[name]

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

    def _call(self, method: str, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """`module.state_dict` and `module.load_state_dict`: the hooks of all modules in it share a `_Call`."""
        plain = functools.partial(getattr(type(module), method), module)
        if method in self._calls and self._calls[method].is_bound:  # a module inside of the one that was asked
            return plain(*args, **kwargs)
        visits = (p for _, m in module.named_modules(remove_duplicate=False) for p in m._parameters.values())
        left = Counter(self._of[id(p)][1].index for p in visits if id(p) in self._of)
        call = self._calls[method] = _Call(left, is_bound=True)
        try:
            result = plain(*args, **kwargs)
            if method == "state_dict":
                self._give_as_stored(module, result, kwargs.get("prefix", ""))
            return result
        finally:
            self._calls.pop(method, None)
            if method == "load_state_dict":  # what an error has kept from being stored
                self._runtime.parameters.hide_each([p for _, p in self._of.values() if p.index in call.tensors])

    def _give_as_stored(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Gives buffers that modules compute with in float32 in the 16 bits that they had."""
        inside = self._runtime.name_of(module)
        for name, dtype in self._runtime.stored_buffers.items():
            key = prefix + name.removeprefix(f"{inside}." if inside else "")
            if key in state:
                state[key] = state[key].to(dtype)

    def _visit(self, method: str, module: nn.Module) -> tuple[_Call, list[tuple[str, Unit, ParamInfo]]]:
        """The call that visits `module`, or one for it alone, and the module's own parameters."""
        call, own = self._calls.get(method, _Call(Counter())), self._own(module)
        for _, _, param in own:
            call.left.setdefault(param.index, 1)
        return call, own

    def _clone(self, call: _Call, unit: Unit) -> list[ParamInfo]:
        """Clones the parameters of a unit that the call has yet to visit and not cloned; returns them."""
        params = [p for p in unit.params if p.index in call.left and p.index not in call.tensors]
        if params:
            with self._access.reading(unit) as views:
                call.tensors |= {p.index: views[p.name].clone() for p in params}
        return params

    def _fill(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict) -> None:
        """Post-hook of state_dict: puts real values in host memory in the place of placeholders."""
        call, own = self._visit("state_dict", module)
        for name, unit, param in own:
            if prefix + name in state:
                self._clone(call, unit)
                state[prefix + name] = call.tensors[param.index]
            _count(call, param)
            if param.index not in call.left:
                call.tensors.pop(param.index, None)

    def _make_room(
        self, module: nn.Module, state: dict, prefix: str, metadata: dict, strict: bool, missing, unexpected, errors
    ) -> None:
        """Pre-hook of load_state_dict: makes parameters real, so that they can be copied into."""
        if metadata.get("assign_to_params_buffers"):
            raise DistZO2Error("load_state_dict(assign=True) would take the parameters away from the streamed model")
        call, own = self._visit("load_state_dict", module)
        self._calls["load_state_dict"] = call
        if not call.has_entered:
            with self._access.replacing("load_state_dict"):  # no rank is in a forward
                call.has_entered = True
        for _, unit, _ in own:
            params = self._clone(call, unit)
            self._runtime.parameters.show_each(params, [call.tensors[p.index] for p in params])

    def _store(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Post-hook of load_state_dict: stores units that are loaded, as the base of the updates that follow."""
        call, own = self._visit("load_state_dict", module)
        for _, _, param in own:
            _count(call, param)
        for unit in sorted(dict.fromkeys(unit for _, unit, _ in own), key=lambda unit: unit.has_gains):  # after gains
            loaded = [p for p in unit.params if p.index in call.tensors]
            if not loaded or any(p.index in call.left for p in loaded):
                continue
            with self._access.replacing("load_state_dict") as note:
                note(unit.name, [p.tensor.data for p in loaded])
                if self._access.is_replaceable(unit):
                    with self._access.writing(unit, keep=len(loaded) < len(unit.params)) as views:
                        for param in loaded:
                            views[param.name].copy_(param.tensor.data)
                elif not self._access.holds(unit, {p.name: p.tensor.data for p in loaded}):
                    raise DistZO2Error(
                        f"unit {unit.name} is packed, or streams from its checkpoint's files: load_state_dict cannot "
                        "give it other weights"
                    )
                self._runtime.weights.restart()
            self._runtime.parameters.hide_each(loaded)
            for param in loaded:
                del call.tensors[param.index]
        if not call.left:
            self._calls.pop("load_state_dict", None)


def _count(call: _Call, param: ParamInfo) -> None:
    """Counts one visit of a module that owns `param`."""
    call.left[param.index] -= 1
    if not call.left[param.index]:
        del call.left[param.index]


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
