"""The vocabulary of an update and of a perturbation, and its encoding for the `materialize` op.

A ZO step is fully described by a few scalars. A `Term` names one noise tensor and its coefficient; an `Update` is an
ordered list of terms with (lr, weight decay) for each parameter group; an `Emit` is one perturbed copy to be written.
A `SegmentTable` says where the tensors of a packed buffer lie and which elements of which parameters they hold. All
of these are plain data: they travel through journals and between ranks, and are turned into small CPU tensors here.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

# Noise families. The number's low four bits are the kind of its normals or signs, dense noise's Philox purpose; the
# bits above are the rank, 0 for dense noise. Low-rank noise is z = A B^T / sqrt(rank).
NORMAL = 0
RADEMACHER = 1
FAMILIES: dict[str, int] = {"normal": NORMAL, "rademacher": RADEMACHER}
FAMILIES |= {f"{kind}-r{rank}": code + 16 * rank for kind, code in (("sign", 1), ("normal", 0)) for rank in (1, 4)}

# Philox purposes that are not families of noise.
PURPOSE_ROUNDING = 2
PURPOSE_DATA_ORDER = 3
PURPOSE_ROWS, PURPOSE_COLS = 4, 5  # the factors A and B of low-rank noise

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Formats that weights may be stored in besides: integer codes with scales, and float32 that stays at or above 0.
CODE8, CODE16, NONNEGATIVE = 3, 4, 5
LARGEST_CODES: dict[int, int] = {CODE8: 127, CODE16: 32767}
CODE_DTYPES: dict[int, torch.dtype] = dict(enumerate((*DTYPE_CODES, torch.int8, torch.int16, torch.float32)))
SCALE_GROUPS = (32, 64, 128, 256)  # elements that may share a scale

# Limits set by the widths of the Philox counter's fields. A normal's group index is element / 4 and has 36 bits.
MAX_SEED = 2**64 - 1
MAX_STEP = 2**32 - 1
MAX_PARAM = 2**32 - 1
MAX_PROBE = 2**20 - 1
MAX_ELEMENTS = 2**38

FROZEN = -1  # the group of a segment that is never changed

_COLUMNS = 12  # of a segment table

_FLOAT32_MAX = 3.4028234663852886e38


def check_int(name: str, value: object, low: int, high: int) -> int:
    """Returns `value` as an int if low <= value <= high.

    Raises:
        TypeError: it is not an integer (a bool is not one).
        ValueError: it is out of range.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {number}")
    return number


def check_float(name: str, value: object) -> float:
    """Returns `value` as a float if it is finite and stays finite in float32.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is NaN, infinite, or beyond the largest float32.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}") from None
    if not abs(number) <= _FLOAT32_MAX:  # true of NaN; torch.compile cannot trace math.isfinite of a float that changes
        raise ValueError(f"{name} must be finite in float32, got {number}")
    return number


def check_seed(seed: object) -> int:
    """Returns a seed of [0, 2^64) as the int64 with the same 64 bits (two's complement), as torch ops carry it."""
    number = check_int("seed", seed, 0, MAX_SEED)
    return number - 2**64 if number >= 2**63 else number


def family_code(family: str | int) -> int:
    """The number of a noise family given by name or number.

    Raises:
        ValueError: the family is unknown; a newer version may know it, this one must not guess.
    """
    if isinstance(family, str):
        if family in FAMILIES:
            return FAMILIES[family]
    elif not isinstance(family, bool) and family in FAMILIES.values():
        return int(family)
    known = ", ".join(f"{name} ({code})" for name, code in FAMILIES.items())
    raise ValueError(f"unknown family of noise {family!r}; known: {known}")


def dense_family(family: str) -> str:
    """The family of what has no columns, such as a vector, where matrices have noise of `family`."""
    return "normal" if FAMILIES[family] % 16 == NORMAL else "rademacher"


def matrix_shape(shape: Sequence[int], is_convolution: bool = False) -> tuple[int, int, int]:
    """(rows, cols, number) of the matrices that a parameter of this shape is for low-rank noise: itself, or one for
    each expert. cols is 0, and rows the number of elements, where it is none: a vector, or a convolution's weight."""
    if len(shape) in (2, 3) and not is_convolution and math.prod(shape):
        return shape[-2], shape[-1], math.prod(shape[:-2])
    return math.prod(shape), 0, 1


def check_matrix(rows: object, cols: object, number: object = 1, where: str = "") -> tuple[int, int, int]:
    """The three as ints, if the elements of low-rank noise's factors can be counted.

    Raises:
        TypeError, ValueError: one is no integer or out of range.
    """
    cols = check_int(where + "cols", cols, 0, MAX_ELEMENTS // 4)
    number = check_int(where + "matrices", number, 1, MAX_ELEMENTS // 4 // max(cols, 1))
    most = MAX_ELEMENTS // 4 // number if cols else MAX_ELEMENTS
    return check_int(where + "rows", rows, 0, most), cols, number


def dtype_code(dtype: torch.dtype) -> int:
    """The number of a weight dtype in segment tables.

    Raises:
        TypeError: the dtype is none of float32, bfloat16, float16.
    """
    if dtype not in DTYPE_CODES:
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    return DTYPE_CODES[dtype]


class Term(NamedTuple):
    """One noise tensor z(family; seed, step, param, probe) with its coefficient.

    Attributes:
        family: a number of `FAMILIES`. Where it is of low rank, segments without columns have noise of its dense kind.
        step: that the noise is drawn for, in [0, 2^32).
        probe: in [0, 2^20).
        sub: for families that need several tensors for one parameter; 0 for those that exist.
        c: the coefficient, rounded to float32 when used.
    """

    family: int
    step: int
    probe: int
    sub: int
    c: float


class GroupScalars(NamedTuple):
    """The scalars of one parameter group in one update, each rounded to float32 when used.

    Attributes:
        lr: learning rate.
        weight_decay: pull towards 0, times lr.
        perturb_scale: factor on the coefficients of emits.
        update_scale: factor on the coefficient of each term of an update.
        anchor: pull towards the weights at the start, w0, times lr.
    """

    lr: float
    weight_decay: float
    perturb_scale: float = 1.0
    update_scale: float = 1.0
    anchor: float = 0.0


class Update(NamedTuple):
    """w <- round(w - lr * (weight_decay * w + anchor * (w - w0) + sum of c * z)).

    Attributes:
        step: of the update itself, which the rounding bits are drawn for; terms name their own steps.
        groups: one `GroupScalars` for each parameter group.
        terms: in the order in which they are added.
    """

    step: int
    groups: tuple[GroupScalars, ...]
    terms: tuple[Term, ...]


class Emit(NamedTuple):
    """One perturbed copy: rne(w + sum of c * perturb_scale * z), rounded to each segment's `out_dtype`; to float32 that
    is exact.

    Attributes:
        terms: with +eps or -eps as `c`.
        perturb_scales: one for each parameter group.
    """

    terms: tuple[Term, ...]
    perturb_scales: tuple[float, ...]


class Segment(NamedTuple):
    """Elements [element_offset, element_offset + numel) of parameter `param`, packed at `byte_offset` of a buffer.

    A segment of int8 or int16 holds codes q: the value of an element i of the parameter is float32(q * s), s the scale
    of the elements [i // scale_group * scale_group, ... + scale_group). Scales are finite, not negative, and only read.

    Attributes:
        byte_offset: in the buffer, a multiple of the dtype's size.
        numel: number of elements.
        dtype: float32, bfloat16 or float16; int8 or int16 for codes.
        param: index of the parameter, in [0, 2^32).
        element_offset: first element, in row-major order within the whole parameter.
        group: of the parameter; `FROZEN` for what no update and no perturbation reaches: it is emitted, and never
            written back.
        rows, cols: shape of the whole parameter as it is stored, or of each of its `matrices`, whatever part is here;
            low-rank noise depends on it. A parameter without columns, such as a vector, has `rows` elements and 0 cols.
        out_offset: where in each emit's buffer the elements go, in bytes; None: as stored.
        out_dtype: what the copies are rounded to, float32, bfloat16 or float16; None: as stored.
        scale_offset: of codes, where in the buffer the scale of the first element lies, as float32; those of the groups
            that follow lie behind it. A multiple of 4.
        scale_group: of codes, how many elements share a scale: 32, 64, 128 or 256. It divides element_offset.
        nonnegative: of float32, whether each update ends with w = max(w, 0), -0 becoming +0 and NaN staying.
        matrices: how many of rows x cols the parameter holds one after another, as one of experts does.
        start_offset: of a float dtype, where in the buffer the elements' weights at the start lie, which are only read;
            a multiple of the dtype's size. 0: nowhere, and no update may have an anchor for the group.
    """

    byte_offset: int
    numel: int
    dtype: torch.dtype
    param: int
    element_offset: int
    group: int
    rows: int
    cols: int
    out_offset: int | None = None
    out_dtype: torch.dtype | None = None
    scale_offset: int = 0
    scale_group: int = 0
    nonnegative: bool = False
    matrices: int = 1
    start_offset: int = 0


class SegmentTable:
    """A checked, immutable table of segments, built once for a packed buffer and used at every visit.

    Attributes:
        segments: the segments as given.
        tensor: int64 [num_segments, 12] on the CPU; columns are byte_offset, numel, dtype code, param, element_offset,
            group, rows, cols, out_offset, out dtype code, scale_offset (or start_offset), scale_group.
        num_bytes: smallest size of a buffer that holds every segment as it is stored.
        out_bytes: smallest size of a buffer that an emit is written to.
        num_groups: number of groups that updates and emits must give scalars for (largest group index + 1).
        unanchored: groups with a segment that has no weights at the start.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range, a segment is not aligned to its dtype, lies
            beyond `num_bytes`, or overlaps another, as stored or as emitted; the message names the segment's position
            in the list.
    """

    def __init__(self, segments: Iterable[Segment], num_bytes: int | None = None) -> None:
        self.segments: tuple[Segment, ...] = tuple(Segment(*segment) for segment in segments)
        rows = [_encode_segment(index, segment) for index, segment in enumerate(self.segments)]
        self.tensor: torch.Tensor = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), _COLUMNS)
        self.num_groups: int = max((segment.group + 1 for segment in self.segments), default=0)
        stored = [(row[0], row[1] * CODE_DTYPES[row[2]].itemsize, index) for index, row in enumerate(rows)]
        stored += [(row[10], -(-row[1] // row[11]) * 4, index) for index, row in enumerate(rows) if row[11]]
        started = [(index, row) for index, row in enumerate(rows) if row[10] and not row[11]]
        stored += [(row[10], row[1] * CODE_DTYPES[row[2]].itemsize, index) for index, row in started]
        self.unanchored = {each.group for each in self.segments if not each.start_offset} - {FROZEN}
        emitted = [(row[8], row[1] * CODE_DTYPES[row[9]].itemsize, index) for index, row in enumerate(rows)]
        self.num_bytes: int = _check_layout(stored, num_bytes)
        self.out_bytes: int = _check_layout(emitted, None, ", as emitted,")

    def __len__(self) -> int:
        return len(self.segments)

    def __repr__(self) -> str:
        out = "" if self.out_bytes == self.num_bytes else f", {self.out_bytes} bytes emitted"
        return f"SegmentTable({len(self)} segments, {self.num_bytes} bytes{out}, {self.num_groups} groups)"


def _encode_segment(index: int, segment: Segment) -> list[int]:
    where = f"segment {index}: "
    code = next((code for code in LARGEST_CODES if segment.dtype == CODE_DTYPES[code]), None)
    scales = _check_scales(where, segment, code is not None)
    if code is None:
        code = NONNEGATIVE if segment.nonnegative else dtype_code(segment.dtype)
    numel = check_int(where + "numel", segment.numel, 0, MAX_ELEMENTS)
    byte_offset = _check_place(where, "byte_offset", segment.byte_offset, segment.dtype)
    out_dtype = segment.dtype if segment.out_dtype is None else segment.out_dtype
    out_code = dtype_code(out_dtype)
    out = byte_offset if segment.out_offset is None else segment.out_offset
    out_offset = _check_place(where, "out_offset", out, out_dtype)
    offset = check_int(where + "element_offset", segment.element_offset, 0, MAX_ELEMENTS - numel)
    param = check_int(where + "param", segment.param, 0, MAX_PARAM)
    group = check_int(where + "group", segment.group, FROZEN, 2**31 - 1)
    rows, cols, matrices = check_matrix(segment.rows, segment.cols, segment.matrices, where)
    if offset + numel > matrices * rows * max(cols, 1):
        shape = " x ".join(map(str, ((matrices,) if matrices > 1 else ()) + ((rows, cols) if cols else (rows,))))
        raise ValueError(f"{where}elements {offset} to {offset + numel} do not lie in a parameter of {shape} elements")
    if segment.start_offset:
        if scales[1] or segment.nonnegative:
            raise TypeError(f"{where}start_offset is for plain weights, not for codes or nonnegative ones")
        scales = _check_place(where, "start_offset", segment.start_offset, segment.dtype), 0
    return [byte_offset, numel, code, param, offset, group, rows, cols, out_offset, out_code, *scales]


def _check_scales(where: str, segment: Segment, codes: bool) -> tuple[int, int]:
    """scale_offset and scale_group of a segment."""
    each, offset = segment.scale_group, segment.element_offset
    if (each not in SCALE_GROUPS or offset % each) if codes else (each or segment.scale_offset):
        expected = f"one of {SCALE_GROUPS} and divide element_offset {offset}" if codes else f"0 for {segment.dtype}"
        raise ValueError(f"{where}scale_group must be {expected}, got {each}")
    if segment.nonnegative and segment.dtype != torch.float32:
        raise TypeError(f"{where}nonnegative is for torch.float32, got {segment.dtype}")
    if codes and segment.out_dtype is None:
        raise TypeError(f"{where}codes need an out_dtype: torch.float32, torch.bfloat16 or torch.float16")
    return _check_place(where, "scale_offset", segment.scale_offset, torch.float32), each


def _check_place(where: str, name: str, value: object, dtype: torch.dtype) -> int:
    offset = check_int(where + name, value, 0, 2**62)
    if offset % dtype.itemsize:
        raise ValueError(f"{where}{name} {offset} is not aligned to {dtype}")
    return offset


def _check_layout(places: Sequence[tuple[int, int, int]], num_bytes: int | None, what: str = "") -> int:
    """Checks that no two places of segments, given as offset and size in bytes and the segment's index, overlap and
    that all lie in the buffer; returns the buffer's least size in bytes."""
    spans = sorted((begin, begin + size, index) for begin, size, index in places if size)
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(
                f"segments {first} and {second}{what} overlap: one ends at byte {end}, the other begins at {begin}"
            )
    needed = spans[-1][1] if spans else 0
    if num_bytes is not None and needed > check_int("num_bytes", num_bytes, 0, 2**62):
        raise ValueError(f"segment {spans[-1][2]} ends at byte {needed}, beyond the buffer of {num_bytes} bytes")
    return needed


class Program(NamedTuple):
    """Updates and emits as the op's small CPU tensors, in the order of its arguments. Made by `encode_program`, once
    for all the packed buffers that the same updates and emits are for."""

    terms: torch.Tensor  # int64 [T, 4]: family, step, probe, sub
    coefs: torch.Tensor  # float32 [T]
    updates: torch.Tensor  # int64 [U, 3]: step, first_term, num_terms
    update_groups: torch.Tensor  # float32 [U, G, 4]: lr, weight_decay, anchor, update_scale
    emits: torch.Tensor  # int64 [E, 2]: first_term, num_terms
    emit_scales: torch.Tensor  # float32 [E, G]

    @property
    def num_updates(self) -> int:
        return self.updates.shape[0]

    @property
    def num_emits(self) -> int:
        return self.emits.shape[0]

    @property
    def num_groups(self) -> int:
        """For how many parameter groups there are scalars."""
        return self.update_groups.shape[1]

    @property
    def anchored(self) -> set[int]:
        """The parameter groups that an update pulls towards the weights at the start."""
        return set(self.update_groups[:, :, 2].any(0).nonzero().flatten().tolist())


def encode_program(updates: Sequence[Update], emits: Sequence[Emit], num_groups: int) -> Program:
    """Encodes updates (applied in order) and emits (after all updates) for a table that uses `num_groups` groups.

    Updates and emits may give scalars for more groups than the table uses, but all of them for the same number.

    Raises:
        TypeError, ValueError: a number is of the wrong type, out of range or not finite in float32; a family is
            unknown; `sub` is not 0; groups are missing. The message says in which update or emit.
    """
    counts = [len(update.groups) for update in updates] + [len(emit.perturb_scales) for emit in emits]
    width = counts[0] if counts else num_groups
    if any(count != width for count in counts):
        raise ValueError(f"updates and emits give scalars for different numbers of groups: {sorted(set(counts))}")
    if width < num_groups:
        raise ValueError(f"updates and emits give scalars for {width} groups, the segments use {num_groups}")

    terms: list[tuple[int, int, int, int]] = []
    coefs: list[float] = []

    def append_terms(where: str, items: Sequence[Term]) -> tuple[int, int]:
        first = len(terms)
        for index, term in enumerate(items):
            row, coef = _check_term(where, index, term)
            terms.append(row)
            coefs.append(coef)
        return first, len(terms) - first

    update_rows: list[tuple[int, int, int]] = []
    group_rows: list[list[tuple[float, ...]]] = []
    for index, update in enumerate(updates):
        where = f"update {index}"
        step = check_int(f"{where}: step", update.step, 0, MAX_STEP)
        update_rows.append((step, *append_terms(where, update.terms)))
        group_rows.append([_check_scalars(where, group, scalars) for group, scalars in enumerate(update.groups)])
    emit_rows: list[tuple[int, int]] = []
    scale_rows: list[list[float]] = []
    for index, emit in enumerate(emits):
        emit_rows.append(append_terms(f"emit {index}", emit.terms))
        scale_rows.append([check_float(f"emit {index}: perturb_scale", scale) for scale in emit.perturb_scales])
    return Program(
        terms=_int64(terms, (len(terms), 4)),
        coefs=_float32(coefs, (len(terms),)),
        updates=_int64(update_rows, (len(updates), 3)),
        update_groups=_float32(group_rows, (len(updates), width, 4)),
        emits=_int64(emit_rows, (len(emits), 2)),
        emit_scales=_float32(scale_rows, (len(emits), width)),
    )


def in_place_ops(materialize: Callable[..., None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """The raw ops perturb_ and update_ of a backend: each is one visit, by `materialize`, to a contiguous tensor."""

    def visit(w: torch.Tensor, seed: int, param: int, offset: int, rows: int, cols: int, program: Program) -> None:
        code, flat = DTYPE_CODES[w.dtype], w.view(-1).view(torch.uint8)
        segments = _int64([0, w.numel(), code, param, offset, 0, rows, cols, 0, code, 0, 0], (1, _COLUMNS))
        materialize(flat, segments, seed, *program, [flat] * program.num_emits, program.num_updates > 0)

    def perturb_(
        w: torch.Tensor,
        scale: float,
        seed: int,
        step: int,
        param: int,
        probe: int,
        offset: int,
        family: int,
        rows: int = 0,
        cols: int = 0,
    ) -> None:
        emit = Emit((Term(family, step, probe, 0, scale),), (1.0,))
        visit(w, seed, param, offset, rows, cols, encode_program([], [emit], 1))

    def update_(
        w: torch.Tensor,
        lr: float,
        coef: float,
        weight_decay: float,
        seed: int,
        step: int,
        param: int,
        probe: int,
        offset: int,
        family: int,
        rows: int = 0,
        cols: int = 0,
    ) -> None:
        update = Update(step, (GroupScalars(lr, weight_decay),), (Term(family, step, probe, 0, coef),))
        visit(w, seed, param, offset, rows, cols, encode_program([update], [], 1))

    return perturb_, update_


def _check_term(where: str, index: int, term: Term) -> tuple[tuple[int, int, int, int], float]:
    family, step, probe, sub, c = term
    plain = type(family) is type(step) is type(probe) is type(sub) is int and type(c) is float
    in_range = plain and 0 <= step <= MAX_STEP and 0 <= probe <= MAX_PROBE and -_FLOAT32_MAX <= c <= _FLOAT32_MAX
    if in_range and family in FAMILIES.values() and sub == 0:
        return (family, step, probe, 0), c  # the quick way, for a replay of very many terms
    at = f"{where}, term {index}: "
    try:
        family = family_code(family)
    except ValueError as error:
        raise ValueError(f"{at}{error}") from None
    step = check_int(at + "step", step, 0, MAX_STEP)
    probe = check_int(at + "probe", probe, 0, MAX_PROBE)
    if check_int(at + "sub", sub, 0, 255) != 0:
        raise ValueError(f"{at}sub must be 0, got {sub}")
    return (family, step, probe, 0), check_float(at + "c", c)


def _check_scalars(where: str, group: int, scalars: GroupScalars) -> tuple[float, ...]:
    scalars = GroupScalars(*scalars)
    if not all(type(value) is float and -_FLOAT32_MAX <= value <= _FLOAT32_MAX for value in scalars):
        items = scalars._asdict().items()
        scalars = GroupScalars(*(check_float(f"{where}, group {group}: {name}", value) for name, value in items))
    return scalars.lr, scalars.weight_decay, scalars.anchor, scalars.update_scale


def _int64(rows: Sequence[object], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(shape))


def _float32(rows: Sequence[object], shape: tuple[int, ...]) -> torch.Tensor:
    # Through float64, so that each number is rounded to float32 exactly once.
    return torch.from_numpy(np.array(rows, dtype=np.float64).astype(np.float32).reshape(shape))
