"""What transformers does to a checkpoint while it loads it, found by letting it load symbols.

A `LayoutTensor` stands for a tensor that is never read: it knows its shape, its dtype, and from which ranges of which
checkpoint tensors its elements come. A model class's own `from_pretrained` is given a state dict of such symbols, so
that renamed keys, prefixes, tied weights and converted layouts (experts stacked and joined, chunks, transposes, rotary
permutations) are exactly those of the installed transformers. Operations that move elements are followed; one that
computes is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from distzo2.checkpoint.layout import Layout, LayoutError
from distzo2.checkpoint.tensor_files import CheckpointError

aten = torch.ops.aten

SMALL_BUFFER_BYTES = 256 << 20  # of buffers that are in no file, whatever the size of the checkpoint
_FEW_MODULES = 1 << 12
_MODULES_PER_TENSOR = 32  # most have no parameters: dropouts, activations, containers


@contextmanager
def creation_bound(num_tensors: int, num_bytes: int) -> Iterator[None]:
    """Bounds a model that transformers makes from a config.json of unknown origin, where numbers that are each small
    multiply: layers, groups in a layer, experts in a group.

    Transformers makes a model on meta first, so what is refused here has taken no memory for tensors yet.

    Args:
        num_tensors: of the checkpoint; a tensor may come with 32 modules (and any model may have 4096).
        num_bytes: of the checkpoint; the buffers may take as much (or 256 MiB).

    Raises:
        CheckpointError: the model asks for more.
    """
    max_modules = max(_FEW_MODULES, _MODULES_PER_TENSOR * num_tensors)
    max_bytes = max(SMALL_BUFFER_BYTES, num_bytes)
    num_modules = 0
    buffer_bytes: Counter[tuple[int, str]] = Counter()  # a buffer that is replaced counts once

    def on_module(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal num_modules
        num_modules += 1
        if num_modules > max_modules:
            raise CheckpointError(
                f"config.json asks for a model of more than {max_modules} modules ({type(parent).__name__} takes one "
                f"more), and the checkpoint has {num_tensors} tensors"
            )

    def on_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
        buffer_bytes[id(module), name] = 0 if buffer is None else buffer.nbytes
        if buffer_bytes.total() > max_bytes:
            raise CheckpointError(
                f"config.json asks for {buffer_bytes.total()} bytes beside the parameters "
                f"({type(module).__name__}.{name}), at most {max_bytes} were expected"
            )

    hooks = register_module_module_registration_hook(on_module), register_module_buffer_registration_hook(on_buffer)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Trace(NamedTuple):
    """What the symbols of one load share: the names of the sources, and how to compare the values of two symbols."""

    sources: Sequence[str]
    equal: Callable[[LayoutTensor, torch.Tensor], bool] | None = None


class LayoutTensor(torch.Tensor):
    """A tensor known by where its elements come from (`where`); `cast` if its dtype is no longer the source's.

    A symbol whose elements have no such place carries the reason as its `problem`, and so does everything made of it.
    Initial values, which are thrown away later, do no harm; a parameter with a problem is refused.
    """

    where: Layout
    trace: Trace
    cast: bool
    problem: str | None

    @staticmethod
    def __new__(
        cls, where: Layout, dtype: torch.dtype, trace: Trace, cast: bool = False, problem: str | None = None
    ) -> LayoutTensor:
        symbol = torch.Tensor._make_wrapper_subclass(cls, where.shape, dtype=dtype, device="cpu")
        symbol.where, symbol.trace, symbol.cast, symbol.problem = where, trace, cast, problem
        return symbol

    def __repr__(self, **_: Any) -> str:
        return f"LayoutTensor({list(self.shape)}, {self.dtype}, {self.problem or f'{len(self.where.pieces)} pieces'})"

    def moved(self, where: Layout) -> LayoutTensor:
        """A symbol of the same dtype with other places."""
        return LayoutTensor(where, self.dtype, self.trace, self.cast)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        symbols = [a for a in tree_leaves((args, kwargs)) if isinstance(a, LayoutTensor)]
        problem = next((symbol.problem for symbol in symbols if symbol.problem), None)
        if problem is None:
            try:
                if func.is_view:
                    return _view(func, *args, **kwargs)
                if func not in _RULES:
                    raise LayoutError(f"{func} computes, or is not known to only move elements")
                return _RULES[func](*args, **kwargs)
            except LayoutError as error:
                sources = sorted({piece.source for symbol in symbols for piece in symbol.where.pieces})
                names = ", ".join(symbols[0].trace.sources[source] for source in sources[:2])
                problem = f"{names}{', ...' if len(sources) > 2 else ''}: {error}"
                if func._schema.is_mutable:
                    raise LayoutError(problem) from error
        elif func._schema.is_mutable:
            return args[0]

        def with_problem(value: torch.Tensor) -> LayoutTensor:
            return LayoutTensor(Layout(tuple(value.shape), ()), value.dtype, symbols[0].trace, problem=problem)

        args, kwargs = tree_map(_on_meta, (args, {name: v for name, v in kwargs.items() if name != "device"}))
        try:
            return tree_map(with_problem, func(*args, **kwargs))
        except Exception as error:  # it looks at values
            raise LayoutError(problem) from error


def _on_meta(value: Any) -> Any:
    is_tensor = isinstance(value, torch.Tensor)
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if is_tensor else value


def _view(func: Any, symbol: LayoutTensor, *args: Any, **kwargs: Any) -> Any:
    """The results of an operation that only views: the strides that it gives a tensor on meta say where to look."""

    def seen(value: torch.Tensor) -> LayoutTensor:
        if value.dtype != symbol.dtype:
            raise LayoutError("takes bytes for another dtype")
        return symbol.moved(symbol.where.strided(value.shape, value.stride(), value.storage_offset()))

    try:
        return tree_map(seen, func(_on_meta(symbol), *args, **kwargs))
    except LayoutError as error:
        raise LayoutError(f"{func}: {error}") from error


def _copy(symbol: LayoutTensor, *, dtype: torch.dtype | None = None, **_: Any) -> LayoutTensor:
    if dtype is None or dtype == symbol.dtype:
        return symbol.moved(symbol.where)
    if symbol.cast:
        raise LayoutError(f"a second conversion, from {symbol.dtype} to {dtype}, is not expressed")
    return LayoutTensor(symbol.where, dtype, symbol.trace, cast=True)


def _cat(symbols: Sequence[LayoutTensor], dim: int = 0) -> LayoutTensor:
    if not all(isinstance(symbol, LayoutTensor) for symbol in symbols):
        raise LayoutError("a checkpoint tensor is joined with one that is in no checkpoint")
    if len({(symbol.dtype, symbol.cast) for symbol in symbols}) > 1:
        dtypes = sorted({f"{s.dtype}{', converted' if s.cast else ''}" for s in symbols})
        raise LayoutError(f"tensors of different dtypes are joined: {dtypes}")
    first = symbols[0]
    return first.moved(Layout.cat([symbol.where for symbol in symbols], dim % first.dim()))


def _stack(symbols: Sequence[LayoutTensor], dim: int = 0) -> LayoutTensor:
    return _cat([symbol.unsqueeze(dim) for symbol in symbols], dim % (symbols[0].dim() + 1))


def _equal(a: LayoutTensor, b: LayoutTensor) -> bool:
    if not (isinstance(a, LayoutTensor) and isinstance(b, LayoutTensor) and a.trace.equal):
        raise LayoutError("the values of a checkpoint are compared with others")
    return a.shape == b.shape and a.trace.equal(a, b)


def _overwrite(symbol: LayoutTensor, value: torch.Tensor, *_: Any) -> LayoutTensor:
    """A class that writes constants into what it loaded changes nothing where they are there already."""
    known = not isinstance(value, LayoutTensor) and not value.is_meta and isinstance(symbol, LayoutTensor)
    if not known or not symbol.trace.equal or not symbol.trace.equal(symbol, value.expand(symbol.shape)):
        raise LayoutError("other values are written over those of the checkpoint")
    return symbol


_RULES: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _copy,
    aten.lift_fresh.default: _copy,
    aten._to_copy.default: _copy,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.equal.default: _equal,
    aten.copy_.default: _overwrite,
    aten.fill_.Tensor: _overwrite,
    aten.fill_.Scalar: lambda symbol, value: _overwrite(symbol, torch.tensor(value)),
}


class _MissingStaysMissing(TorchDispatchMode):
    """Puts a symbol in the place of each missing parameter, which transformers would allocate and fill at random."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        allocates = func is aten.empty_like.default and torch.device(kwargs.get("device") or "meta").type != "meta"
        if allocates and isinstance(args[0], nn.Parameter) and args[0].is_meta:
            problem = "no tensor in the checkpoint fills it"
            return LayoutTensor(Layout(tuple(args[0].shape), ()), args[0].dtype, self.trace, problem=problem)
        return func(*args, **kwargs)


@contextmanager
def lenient_transformers(trace: Trace) -> Iterator[None]:
    """Lets transformers load a checkpoint of symbols that lacks some, in silence: the caller reports what was found."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with _MissingStaysMissing(trace):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
