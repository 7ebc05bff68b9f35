"""Whether lanes that share a pass see each other: through a dict that a hook fills, a list that grows, a global.

Random streams, buffers and attributes of modules are swapped between lanes. What else a forward or a closure keeps is
not; a lane that reads it has another result in company than alone.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.streaming.lanes import Lane
from distzo2_core import checksum

LANE_ALONE = (
    "the lane that failed does not fail when it runs alone. Lanes see each other through something that the forward or "
    "the closure keeps elsewhere than in attributes of modules; with max_lanes=1 they run one after another."
)
_MOST_NAMED = 5
_OF_MODULES = set(vars(nn.Module()))  # attributes that torch keeps in every module
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def code_of(closure: Callable[[], Any]) -> Hashable:
    """What closures that do the same have in common: their code, and that of the functions that they are given."""
    given: list[Any] = []
    while isinstance(closure, functools.partial):
        given += [*closure.args, *closure.keywords.values()]
        closure = closure.func
    for cell in getattr(closure, "__closure__", None) or ():
        with suppress(ValueError):  # empty
            given.append(cell.cell_contents)
    codes = [code for function in given if (code := getattr(function, "__code__", None)) is not None]
    return getattr(closure, "__code__", type(closure)), *codes


def check_alike(model: nn.Module, lanes: Sequence[Lane], alone: Callable[[int], Any]) -> None:
    """Runs the first and the last of `lanes`, which have run together, once more, each with `alone(its number)`, and
    compares the results' bits. The first lane reads what others have overwritten, the last what others have cached.

    Raises:
        DistZO2Error: they differ, and two runs alone do not.
    """
    perturbed = [i for i, lane in enumerate(lanes) if not lane.emission.clean] or range(len(lanes))
    for i in dict.fromkeys((perturbed[0], perturbed[-1])):
        _check_lane(model, lanes, alone, i)


def _check_lane(model: nn.Module, lanes: Sequence[Lane], alone: Callable[[int], Any], i: int) -> None:
    together, first = _bits(lanes[i].result), alone(i)
    if together == _bits(first):
        return
    before = dict(_kept(model, lanes[i].closure))
    if _bits(alone(i)) != _bits(first):
        warnings.warn(
            "the forward is not deterministic: the same weights, batch and random stream gave different results, and a "
            "difference of two losses is made of that",
            stacklevel=6,
        )
        return
    changed = [name for name, what in _kept(model, lanes[i].closure) if before.get(name) != what]
    where = f" (it changed {', '.join(changed[:_MOST_NAMED])})" if changed else ""
    raise DistZO2Error(
        f"a lane of batch {lanes[i].batch} gave {_shown(lanes[i].result)} beside {len(lanes) - 1} other lanes and "
        f"{_shown(first)} alone: lanes see each other through something that the forward or the closure keeps{where}. "
        "Only what is set as an attribute of a module is kept apart. Keep it there, or give max_lanes=1 "
        "(--max-lanes 1): lanes then run one after another."
    )


def _bits(result: Any) -> list[Any]:
    """The bits of the numbers in a closure's result."""
    if isinstance(result, torch.Tensor):
        return [result.dtype, result.shape, checksum([result.detach().contiguous()])]
    if isinstance(result, float):
        return [result.hex()]
    if isinstance(result, (int, str, bool)):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    return [bits for item in result for bits in _bits(item)] if isinstance(result, (list, tuple)) else []


def _shown(result: Any) -> str:
    number = isinstance(result, (float, int)) or (isinstance(result, torch.Tensor) and result.numel() == 1)
    return f"{float(result):.9g}" if number else "one result"


def _kept(model: nn.Module, closure: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """What Python code may keep between calls, by name, with something that changes with it."""
    functions: dict[str, Any] = {"the closure": closure}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in _OF_MODULES and not k.startswith("_distzo2")}
        for key, value in own.items():
            yield from _changing(f"{name or 'model'}.{key}", value)
        functions[f"the forward of {name or 'the model'}"] = type(module).forward
        for hooks in _HOOKS:
            for i, hook in enumerate(getattr(module, hooks).values()):
                functions[f"a hook of {name or 'the model'}" + (f" ({i})" if i else "")] = hook
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        for key, value in vars(cls).items():
            yield from _changing(f"{cls.__name__}.{key}", value)
    for name, function in functions.items():
        while isinstance(function, functools.partial):
            function = function.func
        owner = getattr(function, "__self__", None if hasattr(function, "__code__") else function)
        for key, value in getattr(owner, "__dict__", {}).items() if not isinstance(owner, nn.Module) else ():
            yield from _changing(f"{type(owner).__name__}.{key} of {name}", value)
        function = getattr(function, "__func__", None) or (function if owner is None else type(function).__call__)
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
        for variable, cell in cells:
            try:
                yield from _changing(f"{variable!r} of {name}", cell.cell_contents)
            except ValueError:  # empty
                continue
        for variable in code.co_names:
            yield from _changing(f"the global {variable!r}", function.__globals__.get(variable))


class _Objects:
    """Objects, equal to the same ones. They are kept, since another could take the place of one that is gone."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self.objects = list(objects)

    def __eq__(self, other: object) -> bool:
        mine, theirs = self.objects, getattr(other, "objects", ())
        return len(mine) == len(theirs) and all(map(operator.is_, mine, theirs))

    __hash__ = None


def _changing(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield name, (_Objects([value]), value._version)
    elif isinstance(value, Mapping):
        yield name, _Objects([*value.keys(), *value.values()])
    elif isinstance(value, (list, set)) or type(value).__name__ == "deque":
        yield name, _Objects(value)
    elif isinstance(value, (int, float)):
        yield name, value
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
        yield name, _Objects(vars(value).values())
