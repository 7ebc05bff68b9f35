"""Units: the parts of a model that are made present one at a time.

A unit is a set of parameters, packed into one buffer, together with the modules whose forward uses them (its windows).
Each transformer block is a unit, which may stream; the other modules that own parameters form resident units. A weight
shared by modules of different blocks is one parameter and belongs to a resident unit.

Where a small part of a block is trained, as adapters of a frozen base are, the block is two units under the same
windows: what is frozen, which streams and is never written, and what is trained, which is resident. With the latter is
the little that is made when it is read (norms of another dtype than the file's), so that the rest streams from a file.

A frozen parameter may be stored packed, as a quantized checkpoint has it (`StoredAs`): modules see a copy of its unit,
decoded once a visit for all lanes. With gains, which are trained, it is decoded for each perturbation of these.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2_core import Kind, PackedLayout, PackedSegment, PackedTable, Segment, decode
from distzo2_core.types import SCALE_GROUPS, dense_family, matrix_shape

ALIGNMENT = 256  # bytes; every tensor of a packed unit starts on such a boundary
HALVES = (torch.bfloat16, torch.float16)
TRAINABLE_DTYPES = (torch.float32, *HALVES)
GROUPS_WITHOUT_BLOCKS = 8  # a model without a block list streams in about this many groups
GAIN = "_gain"  # behind the name of packed weights: that of their gains
SMALL_SHARE = 8  # trained parameters are small where they are at most an eighth of the bytes


@dataclass(frozen=True)
class StoredAs:
    """How the files of a checkpoint have a parameter, and so how it is stored while it is frozen.

    Attributes:
        num_bytes: of its bytes, padding between parts included.
        ranges: where they are (file, offset, bytes, place among them); None if they are made when they are read.
        dtype: of its elements; None: it is packed.
        layout: how packed bytes are decoded.
        transposed: decoding gives the parameter with its last two dimensions swapped.
        format: of what is packed, for people and for a journal's header.
    """

    num_bytes: int
    ranges: tuple[tuple[Path, int, int, int], ...] | None
    dtype: torch.dtype | None = None
    layout: PackedLayout | None = None
    transposed: bool = False
    format: str = ""

    @property
    def code_dtype(self) -> torch.dtype | None:
        """int8 or int16 where codes can be trained: they lie flat, with a float32 scale a group and nothing else, so
        that noise and updates know elements by their number. None for other formats."""
        at = self.layout
        if at is None or at.codes.kind not in _CODES:
            return None
        if any((at.outer, at.zero, at.min, at.gain, at.zero_point, at.head_dim)):
            return None
        dtype, group = _CODES[at.codes.kind], at.scale.cols
        places = (at.codes.row_stride, at.scale.row_stride, at.scale.stride, at.scale.rows, at.block, self.transposed)
        is_flat = places == (at.cols * dtype.itemsize, at.cols // group * 4, 4, 1, at.cols, False)
        is_known = at.scale.kind == Kind.FLOAT32 and group in SCALE_GROUPS and at.codes.offset == 0
        is_cut_whole = at.cols % group == 0 == ALIGNMENT % (group * dtype.itemsize)  # by rows, and by slices of a unit
        return dtype if is_flat and is_known and is_cut_whole else None


_CODES = {Kind.INT8: torch.int8, Kind.INT16: torch.int16}
# How the bytes of a parameter on meta are stored, by its name; None: as the module declares it, to be filled.
StoredBy = Callable[[str], StoredAs | None]


@dataclass(eq=False)
class ParamInfo:
    """One parameter as it was when the model was handed over; tied weights are one parameter."""

    index: int  # position in model.named_parameters()
    name: str
    shape: torch.Size
    dtype: torch.dtype  # of what is stored; of what is packed, as declared
    stride: tuple[int, ...]
    trainable: bool
    tensor: nn.Parameter
    owners: list[nn.Module] = field(default_factory=list)
    users: list[nn.Module] = field(default_factory=list)  # owners, and what holds those that have no forward
    requires_grad: bool = True  # whether optimizers yet to be made take it, if it is trainable
    byte_offset: int = 0  # in its unit's buffer
    seen: torch.dtype = torch.float32  # what modules compute with; set by the unit, at first as stored
    seen_offset: int = 0  # bytes, in a copy for modules
    stored: StoredAs | None = None  # of a frozen parameter that files have as it is stored
    declared: torch.dtype = None  # by the module; given where it is stored otherwise
    gain: ParamInfo | None = None  # what is trained over packed weights: float32, one a group, which multiplies it
    is_gain: bool = False
    narrow: torch.dtype | None = None  # of the module, where float32 is stored and counts as declared: see `find_units`

    def __post_init__(self) -> None:
        self.declared = self.declared or self.dtype

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def layout(self) -> PackedLayout | None:
        """How the stored bytes are decoded; None: they are the elements."""
        return None if self.stored is None else self.stored.layout

    @property
    def is_coded(self) -> bool:
        """Whether codes are trained."""
        return self.trainable and self.layout is not None

    @property
    def has_start(self) -> bool:
        """Whether an anchor can pull it to what it was at the start: it is trained, and no codes or gains."""
        return self.trainable and self.layout is None and not self.is_gain

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize if self.layout is None else self.stored.num_bytes

    @property
    def stored_itemsize(self) -> int:
        """Bytes of an element as it is stored; 1 of what is packed and frozen, which is counted by bytes."""
        if self.layout is None:
            return self.dtype.itemsize
        return self.stored.code_dtype.itemsize if self.is_coded else 1

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(rows, columns, number) of the matrices of low-rank noise; 0 columns where the noise is dense."""
        return matrix_shape(self.shape, any(isinstance(owner, nn.modules.conv._ConvNd) for owner in self.owners))

    def noise(self, family: str) -> str:
        """The family of its noise in a run with noise of `family`."""
        return family if self.matrix_shape[1] else dense_family(family)

    def bytes_in(self, place: range) -> range:
        """Which of its bytes are in `place` of the unit's buffer."""
        return range(*(min(max(at - self.byte_offset, 0), self.num_bytes) for at in (place.start, place.stop)))

    def scales_of(self, part: range) -> range:
        """Which bytes of the unit's buffer are the scales of codes `part`, whole groups."""
        scale = self.layout.scale
        start = self.byte_offset + scale.offset
        return range(*(start + 4 * (element // scale.cols) for element in (part.start, part.stop)))

    def segment(self, byte_offset: int, part: range, group: int, scale_offset: int, start_offset: int = 0) -> Segment:
        """Elements `part` in a buffer that holds them from `byte_offset` on, scales of codes from `scale_offset` on,
        and the weights at the start, where it does, from `start_offset` on."""
        dtype, each = (self.stored.code_dtype, self.layout.scale.cols) if self.is_coded else (self.dtype, 0)
        rows, cols, matrices = self.matrix_shape
        segment = Segment(byte_offset, len(part), dtype, self.index, part.start, group, rows, cols, matrices=matrices)
        more = {"scale_offset": scale_offset, "scale_group": each, "start_offset": start_offset}
        return segment._replace(**more, nonnegative=self.is_gain)

    def value(
        self, view: torch.Tensor, dtype: torch.dtype | None = None, gains: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The parameter in `dtype` (None: as the module declares it), of a view of what is stored; the view itself
        where it is stored so. `gains` are those of what is packed with gains; None: ones."""
        dtype = dtype or self.declared
        if self.layout is None:
            return view.to(dtype)
        layout = self.layout if gains is not None else replace(self.layout, gain=None)
        out = torch.empty(self.numel, dtype=dtype, device=view.device)
        decode(view, PackedTable([PackedSegment(layout, 0, dtype)]), out.view(torch.uint8), gains)
        return self.shaped(out).contiguous()

    def shaped(self, elements: torch.Tensor) -> torch.Tensor:
        """Decoded or raw elements [numel] as the parameter."""
        if self.stored is None or not self.stored.transposed:
            return elements.view(self.shape)
        return elements.view(*self.shape[:-2], self.shape[-1], self.shape[-2]).mT


@dataclass(eq=False)
class Unit:
    """A set of parameters that is present, or not, as a whole."""

    index: int
    name: str
    params: list[ParamInfo]
    windows: list[nn.Module]  # modules whose forward uses the parameters
    resident: bool  # not a block, so it never streams
    beside: Unit | None = None  # the other part of the block: what streams of it, or what is trained or made
    num_bytes: int = 0  # of the packed buffer, padding included
    seen_bytes: int = 0  # of a copy in the dtypes that modules compute with
    converts: bool = False  # those are not all as stored: modules see copies, perturbed or not
    keeps_start: bool = False  # behind what is stored of it lies what that was at the start, as far as it is trained

    def __post_init__(self) -> None:
        offset = 0
        for param in self.params:
            param.byte_offset = offset
            offset += aligned(param.num_bytes)
        self.num_bytes = max(offset, ALIGNMENT)
        self.compute_in({})

    def compute_in(self, dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
        """Sets what modules compute with in the place of some stored dtypes."""
        offset = 0
        for param in self.params:
            declared = param.narrow or param.declared
            param.seen = declared if param.is_gain else dtypes.get(declared, declared)
            param.seen_offset = offset
            offset += aligned(param.numel * param.seen.itemsize)
        self.seen_bytes = max(offset, ALIGNMENT)
        # Gains are read where copies have them, so that clean ones are copied too.
        self.converts = any(p.seen != p.dtype or p.layout is not None or p.is_gain for p in self.params)
        self.__dict__.pop("packed", None)

    @cached_property
    def packed(self) -> PackedTable | None:
        """Decodes what is packed and frozen of the unit into a copy for modules; None: nothing is."""
        found = [p for p in self.params if p.layout is not None and not p.is_coded]
        return PackedTable(PackedSegment(self._placed(p), p.seen_offset, p.seen) for p in found) if found else None

    def _placed(self, param: ParamInfo) -> PackedLayout:
        """How a packed parameter lies in the unit's buffer, and its gains in a copy of the unit beside."""
        layout = param.layout.moved(param.byte_offset)
        if param.gain is None:
            return layout
        assert self.beside is not None and param.gain in self.beside.params
        return replace(layout, gain=replace(layout.gain, offset=param.gain.seen_offset))

    @cached_property
    def has_gains(self) -> bool:
        """Whether what is trained in the unit beside multiplies weights of this one."""
        return any(p.gain is not None for p in self.params)

    @property
    def is_encoded(self) -> bool:
        """Whether stored bytes are not what modules declare."""
        return any(p.layout is not None or p.dtype != p.declared for p in self.params)

    @cached_property
    def scale_bytes(self) -> int:
        """Of the scales of codes, which all slices of the unit together keep in addition."""
        return sum(len(p.scales_of(range(p.numel))) for p in self.params if p.is_coded)

    @property
    def start_bytes(self) -> int:
        """Of the weights at the start, which all copies of the unit together keep in addition."""
        return sum(aligned(p.num_bytes) for p in self.params if p.has_start) if self.keeps_start else 0

    @property
    def stored_bytes(self) -> int:
        """Of a copy of the whole unit, with the weights at the start."""
        return self.num_bytes + self.start_bytes

    @property
    def trainable(self) -> bool:
        return any(p.trainable for p in self.params)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parameters as tensors over `buffer` (uint8, [num_bytes]), in the order of `params`; the bytes of those
        that are packed."""
        return [
            _view(buffer, p.byte_offset, p.dtype, p)
            if p.layout is None
            else buffer[p.byte_offset : p.byte_offset + p.num_bytes]
            for p in self.params
        ]

    def seen_views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parameters over a copy in the dtypes that modules compute with (uint8, [seen_bytes])."""
        return [_view(buffer, p.seen_offset, p.seen, p) for p in self.params]


def aligned(num_bytes: int) -> int:
    """Returns a number of bytes, rounded up to a multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _view(buffer: torch.Tensor, offset: int, dtype: torch.dtype, param: ParamInfo) -> torch.Tensor:
    if not param.numel:
        return torch.empty(param.shape, dtype=dtype, device=buffer.device)
    return param.shaped(buffer[offset : offset + param.numel * dtype.itemsize].view(dtype))


def main_dtype(params: Iterable[ParamInfo]) -> torch.dtype:
    """The dtype that most bytes of the parameters that may be trained, of which there is one at least, are stored in:
    beside adapters, the dtype of the frozen base."""
    num_bytes: Counter[torch.dtype] = Counter()
    for param in params:
        num_bytes[param.declared] += param.num_bytes if param.declared in TRAINABLE_DTYPES else 0
    return num_bytes.most_common(1)[0][0]


def dtypes_to_compute_in(params: Sequence[ParamInfo], dtype: torch.dtype | None) -> dict[torch.dtype, torch.dtype]:
    """What `compute_in` takes, for modules that are to compute in `dtype`; None: as stored. What is stored in float32
    beside narrower parameters is so for a reason, and stays."""
    if dtype is None:
        return {}
    stored = {p.narrow or p.declared for p in params if p.declared in TRAINABLE_DTYPES}
    narrower = stored - {torch.float32}
    return {one: dtype for one in (narrower if narrower and dtype != torch.float32 else stored)}


def ranges_of(indices: Iterable[int]) -> list[list[int]]:
    """Returns whole numbers as ascending ranges [first, last]."""
    ranges: list[list[int]] = []
    for index in sorted(indices):
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ranges


def collect_params(model: nn.Module, stored: StoredBy | None = None) -> list[ParamInfo]:
    """Returns every parameter once, in the order of `model.named_parameters()`, with the modules that own it.

    `stored` tells how frozen ones on meta are stored.

    Raises:
        DistZO2Error: a parameter is of a dtype or layout that cannot be streamed, or packed and not frozen, or there
            is none.
    """
    for name, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter):
            raise DistZO2Error(f"parameter {name} is of a lazy module and has no shape yet: run the model once before")
        if type(p).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise DistZO2Error(
                f"parameter {name} is a {type(p).__module__}.{type(p).__qualname__}, which wraps other tensors, as "
                "quantized weights of torchao do; a plain tensor is expected (dequantize it, or load a packed "
                "checkpoint with distzo2.from_pretrained)"
            )
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
        trains, told = p.requires_grad, stored(name) if stored is not None and p.is_meta else None
        if trains and told is not None and told.layout is not None and told.code_dtype is None:
            raise DistZO2Error(
                f"parameter {name} is packed ({told.format}), and cannot be perturbed or updated as it is: freeze it "
                "and train an adapter beside it, or pack 16-bit weights as affine8 or affine16, whose codes are trained"
            )
        info = ParamInfo(index, name, p.shape, p.dtype, tuple(p.stride()), trains, p, requires_grad=trains)
        if told is not None and (told.layout is not None or not trains):
            info.stored, info.dtype = told, told.dtype or p.dtype
        params[id(p)] = info
    users = _users(model)
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                params[id(p)].owners.append(module)
                params[id(p)].users += [user for user in users[module] if user not in params[id(p)].users]
    if not params:
        raise DistZO2Error(f"{type(model).__name__} has no parameters: there is nothing to stream")
    named = {info.name: info for info in params.values()}
    for info in params.values():
        if info.layout is not None and info.layout.gain is not None:
            info.gain = named.get(info.name + GAIN)
            if info.gain is None or not info.gain.trainable:
                raise DistZO2Error(
                    f"parameter {info.name} is packed with gains ({info.stored.format}), and {info.name}{GAIN} is not "
                    "trained: gains are trained all together, or left out"
                )
            info.gain.is_gain = True
    return list(params.values())


def _users(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """For each module, whose forward uses its parameters: its own, or, of a ParameterList and whatever else cannot be
    called, that of the modules which hold it."""
    users: dict[nn.Module, list[nn.Module]] = {model: [model]}
    for module in model.modules():  # what holds a module comes before it
        for child in module.children():
            found = users.setdefault(child, [])
            found += [user for user in ([child] if _can_be_called(child) else users[module]) if user not in found]
    return users


def _can_be_called(module: nn.Module) -> bool:
    """Whether a module has a forward, around which hooks run."""
    cls = type(module)
    has_forward = "forward" in vars(module) or getattr(cls, "forward", None) is not nn.Module.forward
    return has_forward and cls.__call__ is nn.Module.__call__


def _callable_parts(module: nn.Module) -> list[nn.Module]:
    """The module, or what is called in its place where it is a ModuleList, a ModuleDict or the like."""
    if _can_be_called(module):
        return [module]
    return list(dict.fromkeys(part for child in module.children() for part in _callable_parts(child)))


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
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, buffer in model.named_buffers():
        for begin, end, other in spans.get(buffer.untyped_storage().data_ptr(), ()) if buffer.numel() else ():
            first_byte = buffer.storage_offset() * buffer.itemsize
            if other in trainable and begin <= first_byte < end:
                raise DistZO2Error(
                    f"buffer {name} is a view of parameter {other}, whose updates would not reach it. Make it a copy, "
                    "or the same Parameter, before offload."
                )
    for some in spans.values():
        some.sort()
        for (_, end, one), (begin, _, other) in pairwise(some):
            if begin < end:
                raise DistZO2Error(
                    f"parameters {one} and {other} are views that share a part of their elements: updates of one would "
                    "not reach the other. Make one of them a copy before offload."
                )


def find_units(
    model: nn.Module, params: Sequence[ParamInfo], units: Iterable[str] | None = None, widen: bool = False
) -> list[Unit]:
    """Cuts the model into units.

    Args:
        model: any module.
        params: from `collect_params`.
        units: names of the modules to stream, as in `model.named_modules()`, with shell wildcards
            (`"decoder.layers.*"`). None: the children of the model's block lists; a model without one is grouped by
            bytes.
        widen: what is trained in 16 bits, and is small beside its block or a vector outside of blocks, is stored in
            float32, since updates that are small beside a weight are lost in 16 bits. Modules see what they declare.

    Raises:
        DistZO2Error: a name matches no module, or one streamed module holds another.
    """
    if units is not None:
        blocks = _named_blocks(model, units)
    else:
        blocks = _block_lists(model) or _groups_by_bytes(model, params)
    inside = {name: {m for outer in modules for m in outer.modules()} for name, modules in blocks.items()}
    times = Counter(m for modules in inside.values() for m in modules)  # one in several blocks belongs to none
    block_of = {m: name for name, modules in inside.items() for m in modules if times[m] == 1}
    streamed: dict[str, list[ParamInfo]] = {name: [] for name in blocks}
    residents: list[ParamInfo] = []
    for p in params:
        around = {block_of.get(m) for m in p.users}
        name = around.pop() if len(around) == 1 else None
        streamed.get(name, residents).append(p)
    result: list[Unit] = []
    for group in _by_shared_owner(residents):
        users = list(dict.fromkeys(m for p in group for m in p.users))
        name = group[0].name.rpartition(".")[0] or "(root)"
        result += _parts(len(result), name, group, users, resident=True, widen=widen)
    for name, members in streamed.items():
        if members:
            windows = [m for m in blocks[name] if times[m] == 1]
            result += _parts(len(result), name, members, windows, resident=False, widen=widen)
    return result


def _parts(
    index: int, name: str, params: list[ParamInfo], windows: list[nn.Module], *, resident: bool, widen: bool
) -> list[Unit]:
    """One unit; two, the one that streams first, where a small part of the parameters is trained, or is not as files
    have it while all others lie there. The first has `index`."""
    trained, frozen = ([p for p in params if p.trainable is which] for which in (True, False))
    small = _is_small(trained, params)
    for p in trained if widen and (small or (resident and all(len(p.shape) < 2 for p in trained))) else ():
        if p.declared in HALVES and p.layout is None:
            p.narrow, p.dtype, p.declared = p.declared, torch.float32, torch.float32
    is_packed = any(p.layout is not None for p in frozen)  # and decoded once for all lanes
    apart = trained if is_packed or small else []
    lies = [p.stored.ranges is not None for p in frozen if p.stored is not None]
    made = [p for p in frozen if p.stored is None]
    if apart == trained and not resident and lies and all(lies) and _is_small(made, frozen):
        apart = [p for p in params if p in trained or p in made]
    streamed = [p for p in params if p not in apart]
    if not (apart and streamed):
        return [Unit(index, name, params, windows, resident)]
    base = Unit(index, name, streamed, windows, resident)
    base.beside = Unit(index + 1, f"{name} ({'trained' if trained else 'made'})", apart, windows, True, beside=base)
    return [base, base.beside]


def _is_small(part: Sequence[ParamInfo], params: Sequence[ParamInfo]) -> bool:
    return SMALL_SHARE * sum(p.num_bytes for p in part) <= sum(p.num_bytes for p in params)


def _block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Returns the children of the outermost ModuleLists whose children all own parameters, by their names."""
    found: dict[str, list[nn.Module]] = {}
    taken: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in taken or not isinstance(module, nn.ModuleList):
            continue
        if all(next(child.parameters(), None) is not None for child in module):
            for child_name, child in module.named_children():
                if child not in taken:  # a block listed twice is one unit, visited twice
                    found[f"{name}.{child_name}" if name else child_name] = _callable_parts(child)
                    taken.update(child.modules())
    return found


def _named_blocks(model: nn.Module, patterns: Iterable[str]) -> dict[str, list[nn.Module]]:
    modules = dict(model.named_modules())
    found: dict[str, list[nn.Module]] = {}
    for pattern in patterns:
        matches = [n for n in modules if fnmatch.fnmatchcase(n, pattern) or (pattern == "." and n == "")]
        if not matches:
            raise DistZO2Error(f"units={pattern!r} matches no module of {type(model).__name__}")
        inner = {m for n in matches for m in modules[n].modules() if m is not modules[n]}
        matches = [n for n in matches if modules[n] not in inner]  # `*` reaches over dots: the outermost ones
        found.update((n or "(root)", _callable_parts(modules[n])) for n in matches)
    block_of: dict[nn.Module, str] = {}
    for name, parts in found.items():
        for m in {m for part in parts for m in part.modules()}:
            if m in block_of:
                raise DistZO2Error(f"units: {name} and {block_of[m]} overlap; a module can be in one unit only")
            block_of[m] = name
    return found


def _groups_by_bytes(model: nn.Module, params: Sequence[ParamInfo]) -> dict[str, list[nn.Module]]:
    """Groups consecutive modules that own parameters, each group about an eighth of the model; by its first module.

    Modules around others that own parameters are left out: their windows would hold slots that the inner ones need.
    """
    names = {m: n or "(root)" for n, m in model.named_modules()}
    users = {m for p in params for m in p.users}
    bytes_of: dict[nn.Module, int] = {}  # of the parameters that no other module owns
    for p in params:
        if len(p.users) == 1 and not any(m in users for m in p.users[0].modules() if m is not p.users[0]):
            bytes_of[p.users[0]] = bytes_of.get(p.users[0], 0) + p.num_bytes
    limit = max(sum(p.num_bytes for p in params) // GROUPS_WITHOUT_BLOCKS, 1)
    groups: dict[str, list[nn.Module]] = {}
    group, filled = [], 0
    for module, num_bytes in bytes_of.items():
        if not group or filled + num_bytes > limit:
            group = groups[names[module]] = []
            filled = 0
        group.append(module)
        filled += num_bytes
    return groups


def _by_shared_owner(params: Sequence[ParamInfo]) -> list[list[ParamInfo]]:
    """Groups parameters that are connected through common users, in the order of their indices."""
    groups: list[tuple[set[nn.Module], list[ParamInfo]]] = []
    for p in params:
        users, members, others = set(p.users), [p], []
        for group in groups:
            if group[0].isdisjoint(users):
                others.append(group)
            else:
                users, members = users | group[0], members + group[1]
        groups = [*others, (users, members)]
    ordered = [sorted(members, key=lambda p: p.index) for _, members in groups]
    return sorted(ordered, key=lambda group: group[0].index)
