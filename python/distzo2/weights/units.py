"""Units: the parts of a model that are made present one at a time.

A unit is a set of parameters, packed into one buffer, together with the modules whose forward uses them (its windows).
Each transformer block is a unit, which may stream; the other modules that own parameters form resident units. A weight
shared by modules of different blocks is one parameter and belongs to a resident unit.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from distzo2.errors import DistZO2Error

ALIGNMENT = 256  # bytes; every tensor of a packed unit starts on such a boundary
TRAINABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS_WITHOUT_BLOCKS = 8  # a model without a block list streams in about this many groups


@dataclass(eq=False)
class ParamInfo:
    """One parameter as it was when the model was handed over; tied weights are one parameter."""

    index: int  # position in model.named_parameters()
    name: str
    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]
    trainable: bool
    tensor: nn.Parameter
    owners: list[nn.Module] = field(default_factory=list)
    byte_offset: int = 0  # in its unit's buffer

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the parameter seen as a matrix; a vector is one row."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.numel // max(rows, 1)


@dataclass(eq=False)
class Unit:
    """A set of parameters that is present, or not, as a whole."""

    index: int
    name: str
    params: list[ParamInfo]
    windows: list[nn.Module]  # modules whose forward uses the parameters
    resident: bool  # not a block, so it never streams
    num_bytes: int = 0  # of the packed buffer, padding included

    def __post_init__(self) -> None:
        offset = 0
        for param in self.params:
            param.byte_offset = offset
            offset += -(-param.num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = max(offset, ALIGNMENT)

    @property
    def trainable(self) -> bool:
        return any(p.trainable for p in self.params)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parameters as tensors over `buffer` (uint8, [num_bytes]), in the order of `params`."""
        return [
            buffer[p.byte_offset : p.byte_offset + p.num_bytes].view(p.dtype).view(p.shape)
            if p.numel
            else torch.empty(p.shape, dtype=p.dtype, device=buffer.device)
            for p in self.params
        ]


def collect_params(model: nn.Module) -> list[ParamInfo]:
    """Returns every parameter once, in the order of `model.named_parameters()`, with the modules that own it.

    Raises:
        DistZO2Error: a parameter is of a dtype or layout that cannot be streamed, or there is none.
    """
    _tie_shared_storage(model)
    params: dict[int, ParamInfo] = {}
    for index, (name, p) in enumerate(model.named_parameters()):
        if p.requires_grad and p.dtype not in TRAINABLE_DTYPES:
            raise DistZO2Error(
                f"parameter {name} is {p.dtype}; a trainable parameter must be float32, bfloat16 or float16 "
                "(freeze it with requires_grad_(False), or convert it before offload)"
            )
        if p.dtype.is_complex or p.is_sparse:
            raise DistZO2Error(f"parameter {name} is {p.dtype}, layout {p.layout}; dense real tensors are expected")
        params[id(p)] = ParamInfo(index, name, p.shape, p.dtype, tuple(p.stride()), p.requires_grad, p)
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                params[id(p)].owners.append(module)
    if not params:
        raise DistZO2Error(f"{type(model).__name__} has no parameters: there is nothing to stream")
    return list(params.values())


def _tie_shared_storage(model: nn.Module) -> None:
    """Makes parameters that are the same elements of one storage one parameter, as ties are.

    Raises:
        DistZO2Error: two parameters share a part of their elements; updates of one could not reach the other.
    """
    first: dict[tuple, tuple[str, nn.Parameter]] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for module_name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is None or p.is_meta or not p.numel():
                continue
            name = f"{module_name}.{key}".lstrip(".")
            place = (p.untyped_storage().data_ptr(), p.storage_offset(), p.shape, p.stride(), p.dtype)
            tied_to, other = first.setdefault(place, (name, p))
            if other is not p:
                if other.requires_grad != p.requires_grad:
                    raise DistZO2Error(f"parameters {tied_to} and {name} share their elements; one of them is frozen")
                module._parameters[key] = other
            elif tied_to == name:
                reach = sum((size - 1) * abs(step) for size, step in zip(p.shape, p.stride(), strict=True)) + 1
                begin = p.storage_offset() * p.itemsize
                spans.setdefault(place[0], []).append((begin, begin + reach * p.itemsize, name))
    for some in spans.values():
        some.sort()
        for (_, end, one), (begin, _, other) in pairwise(some):
            if begin < end:
                raise DistZO2Error(
                    f"parameters {one} and {other} are views that share a part of their elements: updates of one would "
                    "not reach the other. Make one of them a copy before offload."
                )


def find_units(model: nn.Module, params: Sequence[ParamInfo], units: Iterable[str] | None = None) -> list[Unit]:
    """Cuts the model into units.

    Args:
        model: any module.
        params: from `collect_params`.
        units: names of the modules to stream, as in `model.named_modules()`, with shell wildcards
            (`"decoder.layers.*"`). None: the children of the model's block lists; a model without one is grouped by
            bytes.

    Raises:
        DistZO2Error: a name matches no module, or one streamed module holds another.
    """
    blocks = _named_blocks(model, units) if units is not None else _block_lists(model)
    shared = _in_several([block for _, block in blocks])
    if not blocks and units is None:
        blocks_of = {id(p): unit for p, unit in _groups_by_bytes(model, params)}
        names = list(dict.fromkeys(blocks_of.values()))
        windows: dict[str, list[nn.Module]] = {name: [] for name in names}
    else:
        scope = {id(m): name for name, block in blocks for m in block.modules()}
        blocks_of = {}
        for p in params:
            inside = {scope.get(id(m)) for m in p.owners}
            if any(id(m) in shared for m in p.owners):
                continue
            if len(inside) == 1 and None not in inside:
                blocks_of[id(p)] = inside.pop()
        names = [name for name, _ in blocks]
        windows = {name: [block] for name, block in blocks}

    streamed: dict[str, list[ParamInfo]] = {name: [] for name in names}
    residents: list[ParamInfo] = []
    for p in params:
        name = blocks_of.get(id(p))
        if name is None:
            residents.append(p)
        else:
            streamed[name].append(p)
            for m in p.owners:
                if not any(m is w or _contains(w, m) for w in windows[name]):
                    windows[name].append(m)

    result = []
    for group in _by_shared_owner(residents):
        owners = list({id(m): m for p in group for m in p.owners}.values())
        result.append(Unit(len(result), _parent_name(group[0].name), group, owners, resident=True))
    for name in names:
        if streamed[name]:
            result.append(Unit(len(result), name, streamed[name], windows[name], resident=False))
    return result


def _in_several(blocks: Sequence[nn.Module]) -> set[int]:
    """The ids of modules that are part of more than one of `blocks`."""
    counts = Counter(id(m) for block in blocks for m in block.modules())
    return {module for module, count in counts.items() if count > 1}


def _owns_inside(module: nn.Module) -> bool:
    """Whether a module inside this one owns parameters."""
    return any(p is not None for m in module.modules() if m is not module for p in m._parameters.values())


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(m is inner for m in outer.modules())


def _parent_name(param_name: str) -> str:
    return param_name.rpartition(".")[0] or "(root)"


def _block_lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the children of the outermost ModuleLists whose children all own parameters, with their names."""
    found: list[tuple[str, nn.Module]] = []
    taken: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in taken or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if all(any(True for _ in child.parameters()) for child in module):
            for child_name, child in module.named_children():
                if id(child) not in taken:  # a block listed twice is one unit, visited twice
                    found.append((f"{name}.{child_name}" if name else child_name, child))
                    taken.update(id(m) for m in child.modules())
    return found


def _named_blocks(model: nn.Module, patterns: Iterable[str]) -> list[tuple[str, nn.Module]]:
    if isinstance(patterns, str):
        patterns = [patterns]
    modules = dict(model.named_modules())
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = [n for n in modules if fnmatch.fnmatchcase(n, pattern) or (pattern == "." and n == "")]
        if not matches:
            raise DistZO2Error(f"units={pattern!r} matches no module of {type(model).__name__}")
        chosen.update((n or "(root)", modules[n]) for n in matches)
    inside: dict[int, str] = {}
    for name, block in chosen.items():
        for m in block.modules():
            if id(m) in inside:
                raise DistZO2Error(f"units: {name} and {inside[id(m)]} overlap; a module can be in one unit only")
            inside[id(m)] = name
    return list(chosen.items())


def _groups_by_bytes(model: nn.Module, params: Sequence[ParamInfo]) -> list[tuple[ParamInfo, str]]:
    """Groups consecutive modules that own parameters, each group about an eighth of the model.

    Tied weights are left out, and so are modules around others: their windows would hold slots that the inner ones
    need.
    """
    names = {id(m): n or "(root)" for n, m in model.named_modules()}
    owned: dict[str, list[ParamInfo]] = {}
    for p in params:
        if len(p.owners) == 1 and not _owns_inside(p.owners[0]):
            owned.setdefault(names[id(p.owners[0])], []).append(p)
    total = sum(p.num_bytes for p in params)
    limit = max(total // GROUPS_WITHOUT_BLOCKS, 1)
    result: list[tuple[ParamInfo, str]] = []
    group, filled = "", 0
    for name, mine in owned.items():
        num_bytes = sum(p.num_bytes for p in mine)
        if not group or filled + num_bytes > limit:
            group, filled = name, 0
        filled += num_bytes
        result.extend((p, group) for p in mine)
    return result


def _by_shared_owner(params: Sequence[ParamInfo]) -> list[list[ParamInfo]]:
    """Groups parameters that are connected through common owners, each group in the order of the parameters."""
    group_of: dict[int, int] = {}  # id(module) -> group
    groups: dict[int, list[ParamInfo]] = {}
    for p in params:
        touching = sorted({group_of[id(m)] for m in p.owners if id(m) in group_of})
        target = touching[0] if touching else p.index
        merged = [q for g in touching for q in groups.pop(g)]
        groups[target] = [*merged, p]
        for q in groups[target]:
            for m in q.owners:
                group_of[id(m)] = target
    return [sorted(g, key=lambda q: q.index) for _, g in sorted(groups.items())]
