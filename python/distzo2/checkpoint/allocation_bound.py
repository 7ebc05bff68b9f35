"""How much memory the making of a model may take: what it makes is told by its config.json, which may come from anyone.

Parameters are symbols and take none. Buffers do, and some models have some of a size that is not that of any tensor in
the checkpoint: a mask of positions by positions, say. Modules do too, and numbers that are each small can multiply:
layers, groups in a layer, experts in a group.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from distzo2.checkpoint.weight_files import CheckpointError

FEW_MODULES = 1 << 12
MODULES_PER_TENSOR = 32  # those without parameters: dropouts, activations, containers


@contextmanager
def module_bound(num_tensors: int) -> Iterator[None]:
    """Refuses modules beyond those that a checkpoint of so many tensors can need, as soon as one is made."""
    most, count = max(FEW_MODULES, MODULES_PER_TENSOR * num_tensors), 0

    def on_module(parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError(
                f"config.json asks for a model of more than {most} modules ({type(parent).__name__} takes one more), "
                f"and the checkpoint has {num_tensors} tensors"
            )

    hook = register_module_module_registration_hook(on_module)
    try:
        yield
    finally:
        hook.remove()


class AllocationBound(TorchDispatchMode):
    """Refuses an operation whose results would, with those that are still there, take more than `max_bytes`.

    Tensors of subclasses and on meta take none. An operation whose results' sizes depend on values is counted once it
    has run.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if all(result.alias_info is not None for result in func._schema.returns) or not _is_real(tensors, kwargs):
            return func(*args, **kwargs)
        self._check(_sizes(func, args, kwargs), func)
        results = func(*args, **kwargs)
        for tensor in tree_leaves(results):
            if type(tensor) is torch.Tensor and not tensor.is_meta:
                self._num_bytes += tensor.nbytes
                weakref.finalize(tensor, self._let_go, tensor.nbytes).atexit = False
        self._check([], func)
        return results

    def _check(self, sizes: list[int], func: Any) -> None:
        total = self._num_bytes + sum(sizes)
        if total > self._max_bytes:
            raise CheckpointError(
                f"config.json asks for {total} bytes beside the parameters ({func}), at most {self._max_bytes} "
                "were expected"
            )

    def _let_go(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes


def _is_real(tensors: list[torch.Tensor], kwargs: dict) -> bool:
    """Whether an operation's results take memory."""
    if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors):
        return False  # symbols
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type != "meta"
    return not tensors or not all(tensor.is_meta for tensor in tensors)


def _sizes(func: Any, args: tuple, kwargs: dict) -> list[int]:
    """Bytes of an operation's results, made on meta."""

    def on_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(on_meta, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        results = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # it depends on values, or has no form on meta
        return []
    return [tensor.nbytes for tensor in tree_leaves(results) if isinstance(tensor, torch.Tensor)]
