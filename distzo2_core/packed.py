"""How quantized weights lie in a buffer of bytes, and what values they mean: the tables of the `decode` op.

A packed matrix [rows, cols] has a code for each weight and a few values for each group of weights: scales, zeros,
minima. A `PackedLayout` says where each of these lies, so that the bytes of a checkpoint are decoded as the file has
them: GGUF's interleaved blocks, and the separate tensors of safetensors files alike.

The value of a weight, every step in float32 and rounded once, is

    affine   fma(s, float(q - z), m)
    levels   levels[q] * s
    float8   float(q) * s

    s = outer * float(scale), or float(scale / outer) where `outer_divides`, or float(scale) without an outer scale
    m = min_sign * (outer_min * float(min)), or -0.0 without a minimum, which changes no product

and one rounding to nearest even to the compute dtype ends it. Nothing is flushed to zero. With gains, gain * value in
float32 is rounded. Gains lie in a buffer of their own: perturbed copies of the same packed bytes have different ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import NamedTuple

import torch

from .types import MAX_ELEMENTS, check_int, dtype_code

NUM_LEVELS = 16
ABSENT = -1  # the kind of a field that a matrix does not have
_MAX_SIDE = 2**31 - 1
_MAX_PLACE = 2**62  # of offsets and strides


class Kind(IntEnum):
    """How a value is encoded. Those below FLOAT32 are codes of weights, in blocks of `PackedLayout.block` weights; the
    kinds of one byte also serve as values of groups."""

    NIBBLES_32 = 0  # of each 32 weights, byte j holds j (low bits) and j + 16: GGUF's Q4_0 and Q4_1
    NIBBLES_64 = 1  # of each 64 weights, byte j holds j (low bits) and j + 32: Q4_K
    NIBBLES_LOW = 2  # byte j holds weights 2j (low bits) and 2j + 1: compressed-tensors, mxfp4, nvfp4
    NIBBLES_HIGH = 3  # byte j holds weights 2j (high bits) and 2j + 1: bitsandbytes
    UINT8 = 4
    INT8 = 5
    INT16 = 6
    Q5_K = 7  # a block of 256: 32 bytes with the fifth bits, then NIBBLES_64
    Q6_K = 8  # a block of 256: 128 bytes with the low four bits, then 64 with the high two; q is unsigned
    FLOAT8_E4M3 = 9  # without infinities ("fn")
    FLOAT8_E5M2 = 10
    FLOAT32 = 16
    BFLOAT16 = 17
    FLOAT16 = 18
    E8M0 = 19  # 2^(byte - 127); 255 is NaN
    K_SCALE = 20  # the 12 bytes of Q4_K and Q5_K: value i of 8 is the 6-bit scale i
    K_MIN = 21  # the same bytes: value i is the 6-bit minimum i


@dataclass(frozen=True)
class Field:
    """Values of one kind. That of the weight at (row, col) is at byte

        offset + row // rows * row_stride + col // block * block_stride + col % block // cols * stride

    of the buffer, `block` being the layout's; for K_SCALE and K_MIN, `stride` is 0 and col % block // cols is i. Codes
    have rows = cols = 1, and lie in a block as their kind says, from that byte of its first weight on.
    """

    kind: Kind
    offset: int
    row_stride: int = 0  # bytes
    block_stride: int = 0  # bytes
    stride: int = 0  # bytes
    rows: int = 1  # that share a value
    cols: int = 1  # that share a value


@dataclass(frozen=True)
class PackedLayout:
    """One packed matrix in a buffer.

    Attributes:
        rows, cols: of the matrix; leading dimensions of a parameter are folded into rows.
        block: weights of a row that lie together; cols where a row is not interleaved. It divides cols.
        codes: where the codes are.
        scale: s of each group.
        outer: what scales are multiplied by, or with `outer_divides` divided by.
        zero: z of each group, UINT8 or INT8; without it z is `zero_point`.
        min, outer_min: m of each group. `min_sign` is 1 or -1.
        gain: FLOAT32, one of each group; its bytes count in the buffer of gains. `with_gain` makes one.
        levels: 16 float32 that a code stands for; empty where codes are numbers.
        head_dim: rows of each head of so many are interleaved halves, as GGUF has q and k of Llama: row
            h * head_dim + half * head_dim / 2 + i is stored as row h * head_dim + 2 * i + half. 0: as they are.
    """

    rows: int
    cols: int
    block: int
    codes: Field
    scale: Field
    outer: Field | None = None
    zero: Field | None = None
    min: Field | None = None
    outer_min: Field | None = None
    gain: Field | None = None
    zero_point: int = 0
    min_sign: int = 1
    outer_divides: bool = False
    levels: tuple[float, ...] = ()
    head_dim: int = 0

    def moved(self, num_bytes: int) -> PackedLayout:
        """The same bytes `num_bytes` further on in a buffer; gains stay where they are in theirs."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "gain"}
        places = {name: value for name, value in values.items() if isinstance(value, Field)}
        return replace(self, **{n: replace(p, offset=p.offset + num_bytes) for n, p in places.items()})

    def with_gain(self, offset: int = 0, rows: int | None = None, cols: int | None = None) -> PackedLayout:
        """This matrix with a gain for each `rows` x `cols` weights of a block, those of the scale where None: float32
        one after another, along the stored rows, from byte `offset` of the buffer of gains on."""
        rows, cols = rows or self.scale.rows, min(cols or self.scale.cols, self.block)
        in_block = 4 * -(-self.block // cols)
        row = self.cols // self.block * in_block
        return replace(self, gain=Field(Kind.FLOAT32, offset, row, in_block, 4, rows, cols))


class PackedSegment(NamedTuple):
    """A packed matrix and where it is decoded to.

    Attributes:
        layout: how it lies in the buffer.
        out_offset: where in `out` its [rows, cols] weights go, in bytes, a multiple of the dtype's size.
        out_dtype: float32, bfloat16 or float16.
    """

    layout: PackedLayout
    out_offset: int
    out_dtype: torch.dtype


_BYTES = (Kind.UINT8, Kind.INT8)
_FLOAT8 = (Kind.FLOAT8_E4M3, Kind.FLOAT8_E5M2)
_NIBBLES = (Kind.NIBBLES_32, Kind.NIBBLES_64, Kind.NIBBLES_LOW, Kind.NIBBLES_HIGH)
_VALUES = (*_BYTES, *_FLOAT8, Kind.FLOAT32, Kind.BFLOAT16, Kind.FLOAT16, Kind.E8M0)
KINDS_OF: dict[str, tuple[Kind, ...]] = {  # of each field
    "codes": tuple(kind for kind in Kind if kind < Kind.FLOAT32),
    "scale": (*_VALUES, Kind.K_SCALE),
    "outer": _VALUES,
    "zero": _BYTES,
    "min": (*_VALUES, Kind.K_MIN),
    "outer_min": _VALUES,
    "gain": (Kind.FLOAT32,),
}
_VALUE_BYTES = {Kind.FLOAT32: 4, Kind.BFLOAT16: 2, Kind.FLOAT16: 2, Kind.K_SCALE: 12, Kind.K_MIN: 12}
# Weights of a block that a kind of codes needs: a multiple of the first, or that number where `True`.
_BLOCKS = {
    Kind.NIBBLES_32: (32, False),
    Kind.NIBBLES_64: (64, False),
    Kind.NIBBLES_LOW: (2, False),
    Kind.NIBBLES_HIGH: (2, False),
    Kind.Q5_K: (256, True),
    Kind.Q6_K: (256, True),
}
_CODE_BITS = {Kind.INT16: 16, Kind.Q5_K: 5, Kind.Q6_K: 6} | dict.fromkeys(_NIBBLES, 4)


class PackedTable:
    """A checked, immutable table of packed matrices, built once for a unit's buffer and used at every visit.

    Attributes:
        segments: as given.
        tensor: int64 [num_segments, 59] on the CPU: rows, cols, block, zero_point, min_sign, outer_divides, head_dim,
            whether there are levels, out_offset, out dtype code; then of codes, scale, outer, zero, min, outer_min and
            gain each kind (-1: absent), offset, row_stride, block_stride, stride, rows, cols.
        levels: float32 [num_segments, 16] on the CPU, zeros where there are none.
        num_bytes: smallest size of a buffer that holds every field but the gains.
        gain_bytes: smallest size of a buffer that holds all gains, 0 where no matrix has any.
        out_bytes: smallest size of a buffer that every matrix is decoded to.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range, its kind does not suit its place, or
            matrices overlap where they are decoded to; the message names the segment's position in the list.
    """

    def __init__(self, segments: Iterable[PackedSegment]) -> None:
        self.segments: tuple[PackedSegment, ...] = tuple(PackedSegment(*segment) for segment in segments)
        rows, ends, spans = [], [(0, 0)], []
        for index, segment in enumerate(self.segments):
            where = f"segment {index}: "
            row, end = _encode(where, segment)
            rows.append(row)
            ends.append(end)
            length = segment.layout.rows * segment.layout.cols * segment.out_dtype.itemsize
            spans.append((segment.out_offset, length, index))
        levels = [segment.layout.levels or (0.0,) * NUM_LEVELS for segment in self.segments]
        self.tensor: torch.Tensor = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), 59)
        self.levels: torch.Tensor = torch.tensor(levels, dtype=torch.float64, device="cpu").float().reshape(-1, 16)
        self.num_bytes: int = max(end for end, _ in ends)
        self.gain_bytes: int = max(end for _, end in ends)
        self.out_bytes: int = max((start + length for start, length, _ in spans if length), default=0)
        place = 0
        for start, length, index in sorted(spans):
            if length and start < place:
                raise ValueError(f"segment {index} overlaps another where it is decoded to, at byte {start} of out")
            place = max(place, start + length)


def _encode(where: str, segment: PackedSegment) -> tuple[list[int], tuple[int, int]]:
    """The row of the table, and the first byte of the buffer, and of that of gains, after all that the layout reads."""
    layout = segment.layout
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"{where}layout must be a PackedLayout, got {type(layout).__name__}")
    rows = check_int(where + "rows", layout.rows, 0, _MAX_SIDE)
    cols = check_int(where + "cols", layout.cols, 0, _MAX_SIDE)
    block = check_int(where + "block", layout.block, 1, _MAX_SIDE)
    out_offset = check_int(where + "out_offset", segment.out_offset, 0, _MAX_PLACE)
    code, itemsize = dtype_code(segment.out_dtype), segment.out_dtype.itemsize
    head_dim = check_int(where + "head_dim", layout.head_dim, 0, _MAX_SIDE)
    if rows * cols > MAX_ELEMENTS:
        raise ValueError(f"{where}rows * cols must be at most 2^38, got {rows} * {cols}")
    if cols % block:
        raise ValueError(f"{where}block must divide cols, got {block} and {cols}")
    if out_offset % itemsize:
        raise ValueError(f"{where}out_offset must be a multiple of {itemsize}, got {out_offset}")
    if head_dim % 2 or (head_dim and rows % head_dim):
        raise ValueError(f"{where}head_dim must be even and divide rows, got {head_dim} and {rows}")
    if layout.min_sign not in (1, -1):
        raise ValueError(f"{where}min_sign must be 1 or -1, got {layout.min_sign}")
    _check_kinds(where, layout)
    zero_point = check_int(where + "zero_point", layout.zero_point, -(2**16), 2**16)
    flags = [layout.min_sign, int(layout.outer_divides), head_dim, int(bool(layout.levels)), out_offset, code]
    row, ends = [rows, cols, block, zero_point, *flags], [0, 0]
    for name in KINDS_OF:
        field = getattr(layout, name)
        if field is None:
            row += [ABSENT, 0, 0, 0, 0, 1, 1]
        else:
            at = f"{where}{name}."
            place = [
                check_int(at + each, getattr(field, each), 0, _MAX_PLACE)
                for each in ("offset", "row_stride", "block_stride", "stride")
            ]
            shared = [check_int(at + each, getattr(field, each), 1, _MAX_SIDE) for each in ("rows", "cols")]
            row += [int(field.kind), *place, *shared]
            if rows and cols:
                ends[name == "gain"] = max(ends[name == "gain"], _end_of(layout, name, field))
    return row, (ends[False], ends[True])


def _check_kinds(where: str, layout: PackedLayout) -> None:
    for name, kinds in KINDS_OF.items():
        field = getattr(layout, name)
        if field is None and name not in ("codes", "scale"):
            continue
        if not isinstance(field, Field):
            raise TypeError(f"{where}{name} must be a Field, got {type(field).__name__}")
        if field.kind not in kinds:
            raise ValueError(f"{where}{name} cannot be of kind {field.kind!r}")
    codes = layout.codes
    multiple, exact = _BLOCKS.get(codes.kind, (1, False))
    if layout.block % multiple or (exact and layout.block != multiple):
        raise ValueError(
            f"{where}codes of {codes.kind.name} need a block of {'' if exact else 'a multiple of '}{multiple} weights, "
            f"got {layout.block}"
        )
    if (codes.rows, codes.cols) != (1, 1):
        raise ValueError(f"{where}codes are not shared: their rows and cols must be 1")
    for name in ("scale", "min"):
        field = getattr(layout, name)
        six_bits = field is not None and field.kind in (Kind.K_SCALE, Kind.K_MIN)
        if six_bits and (field.stride or layout.block != 8 * field.cols):
            raise ValueError(f"{where}{name} of {field.kind.name} needs stride 0 and cols of an eighth of the block")
    if layout.levels and (len(layout.levels) != NUM_LEVELS or codes.kind not in _NIBBLES):
        raise ValueError(f"{where}levels must be {NUM_LEVELS} numbers, for codes of 4 bits")
    if (layout.levels or codes.kind in _FLOAT8) and (layout.zero or layout.zero_point or layout.min):
        raise ValueError(f"{where}codes that are levels or float8 have neither zeros nor minima")
    if (layout.outer_divides and layout.outer is None) or (layout.outer_min and layout.min is None):
        raise ValueError(f"{where}an outer scale of nothing")


def _end_of(layout: PackedLayout, name: str, field: Field) -> int:
    """The first byte after the field's last value."""
    last = field.offset + (layout.rows - 1) // field.rows * field.row_stride
    last += (layout.cols // layout.block - 1) * field.block_stride
    if name == "codes":
        return last + layout.block * _CODE_BITS.get(field.kind, 8) // 8
    return last + (layout.block - 1) // field.cols * field.stride + _VALUE_BYTES.get(field.kind, 1)
