"""Packed matrices of every format, over random bytes, that the tests of all backends share."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import numpy as np
import torch
from kernel_cases import DTYPES, assert_same_bits

import distzo2_core
from distzo2_core import Field, Kind, PackedLayout, PackedSegment, PackedTable

NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
WIDTHS = {Kind.FLOAT32: 4, Kind.BFLOAT16: 2, Kind.FLOAT16: 2, Kind.INT16: 2}
# float32 bits: zeros, subnormals, the largest, infinities, NaN, and values whose products are ties or near to none.
SPECIALS = [0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001,
            0x3F808000, 0x3F800000, 0xBF800000, 0x00008000, 0x33800000, 0x477FF000]  # fmt: skip


def interleaved(block: int, num_bytes: int, **fields: tuple[Kind, int, int, int]) -> Callable[..., tuple]:
    """A maker of layouts whose rows are blocks of `num_bytes`; a field is its kind, byte, stride and cols."""

    def make(rows: int, cols: int, **changes: object) -> tuple[PackedLayout, int]:
        row = cols // block * num_bytes
        places = {
            name: Field(kind, at, row, num_bytes, stride, 1, shared)
            for name, (kind, at, stride, shared) in fields.items()
        }
        return PackedLayout(rows, cols, block, **places, **changes), rows * row

    return make


def separate(code: Kind, bits: int, *more: tuple[str, Kind, int, int], **settings: object) -> Callable[..., tuple]:
    """A maker of layouts of tensors one after another: codes, then fields of a name, kind, rows and cols that share a
    value, 0 for all."""

    def make(rows: int, cols: int, **changes: object) -> tuple[PackedLayout, int]:
        at, row = 3 * 4, (cols * bits + 7) // 8  # codes begin at any multiple of 4
        places = {"codes": Field(code, at, row)}
        at += rows * row
        for name, kind, shared_rows, shared_cols in more:
            at += -at % 4
            width, across = WIDTHS.get(kind, 1), -(-cols // (shared_cols or cols))
            places[name] = Field(kind, at, across * width, 0, width, shared_rows or rows, shared_cols or cols)
            at += -(-rows // (shared_rows or rows)) * across * width
        return PackedLayout(rows, cols, cols, **places, **settings, **changes), at

    return make


# Of each format its maker of layouts, and columns that it can have.
HALF = (Kind.FLOAT16, 0, 0, 32)
K_FIELDS = {"scale": (Kind.K_SCALE, 4, 0, 32), "outer": (Kind.FLOAT16, 0, 0, 256),
            "min": (Kind.K_MIN, 4, 0, 32), "outer_min": (Kind.FLOAT16, 2, 0, 256)}  # fmt: skip
Q6_FIELDS = {"scale": (Kind.INT8, 192, 1, 16), "outer": (Kind.FLOAT16, 208, 0, 256)}
ODD, ODD_Q6 = ({"outer": (Kind.FLOAT16, at, 2, 100)} for at in (0, 204))
FORMATS: dict[str, tuple[Callable[..., tuple], tuple[int, ...]]] = {
    "q4_0": (interleaved(32, 18, codes=(Kind.NIBBLES_32, 2, 0, 1), scale=HALF), (32, 4160)),
    "q4_1": (
        interleaved(32, 20, codes=(Kind.NIBBLES_32, 4, 0, 1), scale=HALF, min=(Kind.FLOAT16, 2, 0, 32)), (96,),
    ),
    "q8_0": (interleaved(32, 34, codes=(Kind.INT8, 2, 0, 1), scale=HALF), (32, 320)),
    "q4_k": (interleaved(256, 144, codes=(Kind.NIBBLES_64, 16, 0, 1), **K_FIELDS), (256, 4608)),
    "q5_k": (interleaved(256, 176, codes=(Kind.Q5_K, 16, 0, 1), **K_FIELDS), (512,)),
    "q6_k": (interleaved(256, 210, codes=(Kind.Q6_K, 0, 0, 1), **Q6_FIELDS), (256, 2560)),
    "gptq": (separate(Kind.NIBBLES_32, 4, ("scale", Kind.FLOAT16, 1, 128), ("zero", Kind.UINT8, 1, 128)), (128, 416)),
    "int4": (separate(Kind.NIBBLES_LOW, 4, ("scale", Kind.BFLOAT16, 1, 32), zero_point=8), (32, 70)),
    "nf4": (separate(Kind.NIBBLES_HIGH, 4, ("scale", Kind.FLOAT32, 1, 64), levels=NF4), (64, 202)),
    "mxfp4": (separate(Kind.NIBBLES_LOW, 4, ("scale", Kind.E8M0, 1, 32), levels=FP4), (96,)),
    "nvfp4": (
        separate(Kind.NIBBLES_LOW, 4, ("scale", Kind.FLOAT8_E4M3, 1, 16), ("outer", Kind.FLOAT32, 0, 0), levels=FP4),
        (16, 48, 2080),
    ),
    "nvfp4, divided": (
        separate(
            Kind.NIBBLES_LOW, 4, ("scale", Kind.FLOAT8_E4M3, 1, 16), ("outer", Kind.FLOAT32, 0, 0), levels=FP4,
            outer_divides=True,
        ),
        (90, 96),
    ),
    "e4m3, blocks": (separate(Kind.FLOAT8_E4M3, 8, ("scale", Kind.FLOAT32, 3, 128)), (128, 300)),
    "e5m2, rows": (separate(Kind.FLOAT8_E5M2, 8, ("scale", Kind.BFLOAT16, 1, 0)), (1, 65)),
    "uint8": (
        separate(
            Kind.UINT8, 8, ("scale", Kind.FLOAT32, 1, 16), ("zero", Kind.INT8, 1, 16), ("min", Kind.FLOAT32, 1, 32),
            min_sign=-1,
        ),
        (16, 100),
    ),
    "int16": (separate(Kind.INT16, 16, ("scale", Kind.FLOAT32, 1, 64), zero_point=-3), (64, 131)),
    "odd groups": (separate(Kind.UINT8, 8, ("scale", Kind.FLOAT16, 2, 12), ("outer", Kind.FLOAT8_E5M2, 1, 7)), (45,)),
    "odd blocks": (interleaved(64, 68, codes=(Kind.UINT8, 4, 0, 1), scale=(Kind.FLOAT16, 0, 2, 48)), (192,)),
    # Interleaved codes weight by weight: their groups are no power of two.
    "odd q4_0": (interleaved(32, 18, codes=(Kind.NIBBLES_32, 2, 0, 1), scale=(Kind.FLOAT16, 0, 0, 12)), (32,)),
    "odd q4_k": (interleaved(256, 144, codes=(Kind.NIBBLES_64, 16, 0, 1), **K_FIELDS | ODD), (256,)),
    "odd q5_k": (interleaved(256, 176, codes=(Kind.Q5_K, 16, 0, 1), **K_FIELDS | ODD), (256,)),
    "odd q6_k": (interleaved(256, 210, codes=(Kind.Q6_K, 0, 0, 1), **Q6_FIELDS | ODD_Q6), (256,)),
}  # fmt: skip

GAINED = ("q4_0", "q4_k", "q6_k", "nf4", "nvfp4", "e4m3, blocks", "int16")  # whose hashes with gains are kept


def make_case(
    rng: np.random.Generator, name: str, rows: int, cols: int, usual: bool = False, **changes: object
) -> tuple[torch.Tensor, PackedLayout]:
    """Random bytes and a layout. Scales are any bits, a quarter of those of 32 bits being special; or, if `usual`, of a
    model's size."""
    layout, num_bytes = FORMATS[name][0](rows, cols, **changes)
    data = rng.integers(0, 256, num_bytes, dtype=np.uint8)
    if usual and layout.codes.kind == Kind.FLOAT8_E4M3:
        data[data & 0x7F == 0x7F] = 0  # no NaN
    for field in (layout.scale, layout.outer, layout.min, layout.outer_min):
        if field is None or field.kind not in (Kind.FLOAT32, Kind.FLOAT16, Kind.BFLOAT16):
            continue
        width = WIDTHS[field.kind]
        starts = np.arange(-(-rows // field.rows)) * field.row_stride
        blocks = np.arange(layout.cols // layout.block) * field.block_stride
        values = np.arange(-(-layout.block // field.cols)) * field.stride
        at = (field.offset + starts[:, None, None] + blocks[:, None] + values).reshape(-1)
        if usual:
            sizes = torch.from_numpy(rng.uniform(-0.02, 0.02, at.size)).float()
            types = {Kind.FLOAT32: torch.float32, Kind.FLOAT16: torch.float16, Kind.BFLOAT16: torch.bfloat16}
            data[at[:, None] + np.arange(width)] = sizes.to(types[field.kind])[:, None].view(torch.uint8).numpy()
        elif width == 4:
            special = rng.choice(np.array(SPECIALS, np.uint32), at.size)
            chosen = rng.random(at.size) < 0.25
            data[at[chosen, None] + np.arange(4)] = special[chosen, None].view(np.uint8)
    return torch.from_numpy(data), layout


def make_gains(rng: np.random.Generator, num: int) -> torch.Tensor:
    """float32 [num]: a half near 1 as in a run, a quarter any bits, a quarter special ones."""
    bits = rng.normal(1, 0.05, num).astype(np.float32).view(np.uint32)
    which = rng.integers(0, 4, num)
    bits = np.where(which == 2, rng.integers(0, 2**32, num, dtype=np.uint32), bits)
    return torch.from_numpy(np.where(which == 3, rng.choice(np.array(SPECIALS, np.uint32), num), bits).view(np.float32))


def decoded(
    data: torch.Tensor,
    layout: PackedLayout,
    dtype: torch.dtype,
    backend: str | None,
    gains: torch.Tensor | None = None,
) -> torch.Tensor:
    """One matrix [rows, cols]."""
    out = torch.zeros(layout.rows, layout.cols, dtype=dtype)
    table = PackedTable([PackedSegment(layout, 0, dtype)])
    distzo2_core.decode(data, table, out.view(-1).view(torch.uint8), gains, backend=backend)
    return out


def check_decode(
    rng: np.random.Generator,
    backend: str,
    names: list[str],
    max_rows: int = 4,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    gained: float = 0.5,
) -> int:
    """All these formats in one call, twice at each of their numbers of columns, to the dtypes in turn, at odd places of
    both buffers, against the reference. `gained` of the matrices have gains, of groups of the scale or larger ones.
    Returns the bits compared."""
    parts, segments, num_bytes, out_bytes, gain_bytes = [], [], 0, 0, 0
    every = itertools.cycle(dtypes)
    names = [name for name in names for _ in FORMATS[name][1] for _ in range(2)]
    for number, name in enumerate(names):
        cols = FORMATS[name][1][number // 2 % len(FORMATS[name][1])]
        gap, dtype = int(rng.integers(0, 3)) * 2, next(every)
        rows, head_dim = (4, 4) if rng.random() < 0.3 else (int(rng.integers(1, max_rows + 1)), 0)
        data, layout = make_case(rng, name, rows, cols, rng.random() < 0.3, head_dim=head_dim)
        out_bytes += int(rng.integers(0, 3)) * 4 + -out_bytes % 4
        if rng.random() < gained:
            shared = layout.scale.rows * int(rng.integers(1, 3)), layout.scale.cols * 2 ** int(rng.integers(0, 3))
            layout = layout.with_gain(gain_bytes + 4 * int(rng.integers(0, 3)), *shared)
            gain_bytes = max(gain_bytes, PackedTable([PackedSegment(layout, 0, dtype)]).gain_bytes)
        segments.append(PackedSegment(layout.moved(num_bytes + gap), out_bytes, dtype))
        parts += [torch.full((gap,), 0x5A, dtype=torch.uint8), data]
        num_bytes += gap + len(data)
        out_bytes += rows * cols * dtype.itemsize
    stored, table = torch.cat(parts).to(device), PackedTable(segments)
    assert (table.num_bytes, table.out_bytes, table.gain_bytes) == (num_bytes, out_bytes, gain_bytes)
    gains = make_gains(rng, gain_bytes // 4) if gain_bytes else None
    outs: list[torch.Tensor] = []
    for each, where in ((backend, device), ("reference", "cpu")):
        outs.append(torch.full((out_bytes + 8,), 0xA5, dtype=torch.uint8, device=where))
        placed = None if gains is None else gains.to(where)
        distzo2_core.decode(stored.to(where), table, outs[-1], placed, backend=each)
    for number, (layout, at, dtype) in enumerate(segments):
        end = at + layout.rows * layout.cols * dtype.itemsize
        one, other = (out[at:end].view(dtype).view(layout.rows, layout.cols) for out in outs)
        assert_same_bits(one, other, f"{names[number]} {layout.rows} x {layout.cols}, head_dim {layout.head_dim}")
    assert_same_bits(*outs, "between the matrices")
    return 8 * out_bytes


def make_golden() -> dict[str, str]:
    """A SHA-256 of each format's decoded bytes, over a million weights with scales of any bits, by native kernels; of
    some also with gains."""
    found = {}
    for index, name in enumerate(FORMATS):
        cols = FORMATS[name][1][-1]
        data, layout = make_case(np.random.default_rng(index), name, -(-(2**20) // cols), cols)
        gained = layout.with_gain()
        num = PackedTable([PackedSegment(gained, 0, torch.float32)]).gain_bytes // 4
        cases = {name: (layout, None), f"{name}, gains": (gained, make_gains(np.random.default_rng(index), num))}
        for key, (each, gains) in cases.items():
            if gains is not None and name not in GAINED:
                continue
            digest = hashlib.sha256()
            for dtype in DTYPES:
                digest.update(decoded(data, each, dtype, None, gains).view(torch.uint8).numpy().tobytes())
            found[key] = digest.hexdigest()
    return found
