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

and one rounding to nearest even to the compute dtype ends it. Nothing is flushed to zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum


class Kind(IntEnum):
    """How a value is encoded. Those below FLOAT32 are codes of weights, in blocks of `PackedLayout.block` weights."""

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
    E8M0 = 19  # 2^(byte - 127); 255 is refused when a file is opened
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
        zero: z of each group, UINT8 or nibbles; without it z is `zero_point`.
        min, outer_min: m of each group. `min_sign` is 1 or -1.
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
    zero_point: int = 0
    min_sign: int = 1
    outer_divides: bool = False
    levels: tuple[float, ...] = ()
    head_dim: int = 0

    def moved(self, num_bytes: int) -> PackedLayout:
        """The same bytes `num_bytes` further on in a buffer."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        places = {name: value for name, value in values.items() if isinstance(value, Field)}
        return replace(self, **{n: replace(p, offset=p.offset + num_bytes) for n, p in places.items()})
