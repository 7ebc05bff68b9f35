"""Decoding packed weights: the reference against exact arithmetic, every backend against the reference, golden hashes,
and what is refused."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import BACKENDS, assert_same_bits, needs_interpreter, needs_native, needs_triton, rounded
from packed_cases import FORMATS, check_decode, decoded, make_case, make_gains, make_golden

import distzo2_core
from distzo2_core import Field, Kind, PackedLayout, PackedSegment, PackedTable

GOLDEN = Path(__file__).with_name("golden_decode.json")
NAMES = list(FORMATS)
LEVELS = distzo2_core.build_info().get("simd", [])


# Exact arithmetic, weight by weight.


def value_at(data: bytes, layout: PackedLayout, field: Field, row: int, col: int) -> float:
    """A field's value by the sentence of its docstring."""
    at = field.offset + row // field.rows * field.row_stride + col // layout.block * field.block_stride
    index = col % layout.block // field.cols
    at += index * field.stride
    if field.kind in (Kind.K_SCALE, Kind.K_MIN):  # as GGUF's 96 bits are told: six-bit numbers, the last four split
        a, b, c = data[at : at + 4], data[at + 4 : at + 8], data[at + 8 : at + 12]
        own, low = (a, [x & 15 for x in c]) if field.kind == Kind.K_SCALE else (b, [x >> 4 for x in c])
        return float([*(x & 63 for x in own), *(x | y >> 6 << 4 for x, y in zip(low, own, strict=True))][index])
    if field.kind == Kind.E8M0:
        return float("nan") if data[at] == 255 else 2.0 ** (data[at] - 127)
    dtypes = {
        Kind.UINT8: torch.uint8, Kind.INT8: torch.int8, Kind.FLOAT8_E4M3: torch.float8_e4m3fn,
        Kind.FLOAT8_E5M2: torch.float8_e5m2, Kind.FLOAT32: torch.float32, Kind.BFLOAT16: torch.bfloat16,
        Kind.FLOAT16: torch.float16,
    }  # fmt: skip
    dtype = dtypes[field.kind]
    return torch.frombuffer(bytearray(data[at : at + dtype.itemsize]), dtype=dtype).double().item()


def code_at(data: bytes, layout: PackedLayout, row: int, col: int) -> float:
    codes, i = layout.codes, col % layout.block
    at = codes.offset + row * codes.row_stride + col // layout.block * codes.block_stride

    def nibble(byte: int, high: bool) -> int:
        return data[at + byte] >> 4 if high else data[at + byte] & 15

    match codes.kind:
        case Kind.NIBBLES_32:
            return nibble(i // 32 * 16 + i % 16, i % 32 >= 16)
        case Kind.NIBBLES_64:
            return nibble(i // 64 * 32 + i % 32, i % 64 >= 32)
        case Kind.NIBBLES_LOW:
            return nibble(i // 2, i % 2 == 1)
        case Kind.NIBBLES_HIGH:
            return nibble(i // 2, i % 2 == 0)
        case Kind.Q5_K:
            return nibble(32 + i // 64 * 32 + i % 32, i % 64 >= 32) + 16 * (data[at + i % 32] >> i // 32 & 1)
        case Kind.Q6_K:
            low = nibble(i // 128 * 64 + i % 64, i % 128 >= 64)
            return low + 16 * (data[at + 128 + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3)
        case Kind.INT16:
            return int.from_bytes(data[at + 2 * i : at + 2 * i + 2], "little", signed=True)
        case _:
            return value_at(data, layout, dataclasses.replace(codes, stride=1), row, col)


def exact_weight(data: bytes, gains: bytes, layout: PackedLayout, row: int, col: int) -> float | None:
    """A weight in float32, each step rounded once; None where a step meets NaN or infinity, whose rules are IEEE's."""

    def value(field: Field) -> Fraction:
        return Fraction(value_at(data, layout, field, row, col))

    try:
        scale, m = value(layout.scale), Fraction(0)
        if layout.outer:
            outer = value(layout.outer)
            scale = Fraction(rounded(scale / outer if layout.outer_divides else outer * scale))
        if layout.min:
            m = value(layout.min)
            m = layout.min_sign * (Fraction(rounded(value(layout.outer_min) * m)) if layout.outer_min else m)
        q = code_at(data, layout, row, col)
        if layout.levels:
            x = Fraction(float(np.float32(layout.levels[int(q)])))
        else:
            x = Fraction(q) - (value(layout.zero) if layout.zero else layout.zero_point)
        gain = Fraction(value_at(gains, layout, layout.gain, row, col))
        return rounded(gain * Fraction(rounded(scale * x + m)))
    except (OverflowError, ValueError, ZeroDivisionError):
        return None


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_exact(name: str) -> None:
    """Signs of zero are left to the other test."""
    rng = np.random.default_rng(0)
    num_finite = 0
    for cols in FORMATS[name][1]:
        data, layout = make_case(rng, name, 4, cols, head_dim=4)
        layout = layout.with_gain(8, rows=2)
        gains = make_gains(rng, PackedTable([PackedSegment(layout, 0, torch.float32)]).gain_bytes // 4)
        got = decoded(data, layout, torch.float32, "reference", gains)
        stored_row = [0, 2, 1, 3]  # of a head of four rows: the halves are interleaved
        for row, col in zip(rng.integers(0, 4, 150).tolist(), rng.integers(0, cols, 150).tolist(), strict=True):
            expected = exact_weight(data.numpy().tobytes(), gains.numpy().tobytes(), layout, stored_row[row], col)
            if expected is not None:
                num_finite += 1
                assert got[row, col].item() == expected, (row, col)
    assert num_finite > 80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_one_rounding_to_16_bits(name: str, dtype: torch.dtype) -> None:
    """torch rounds float32 to nearest even too; only its NaNs may be others."""
    data, layout = make_case(np.random.default_rng(1), name, 5, FORMATS[name][1][-1])
    exact, got = decoded(data, layout, torch.float32, "reference"), decoded(data, layout, dtype, "reference")
    nan = exact.isnan()
    assert_same_bits(torch.where(nan, 0, got), torch.where(nan, 0, exact).to(dtype))
    canonical = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    assert (got.view(torch.int16)[nan] == canonical).all() and (exact.view(torch.int32)[nan] == 0x7FC00000).all()


def test_zeros_keep_their_signs() -> None:
    """Without a minimum those of a product; with one, those of a sum."""
    scales = torch.tensor([1.0, -1.0, 0.0, -0.0])
    codes = torch.tensor([8, 7, 9, 8], dtype=torch.uint8).repeat(4)
    stored = torch.cat([scales.view(torch.uint8), torch.zeros(4).view(torch.uint8), codes])
    scale = Field(Kind.FLOAT32, 0, 4, cols=4)
    layout = PackedLayout(4, 4, 4, Field(Kind.UINT8, 32, 4), scale, zero_point=8)
    product = scales[:, None] * torch.tensor([0.0, -1.0, 1.0, 0.0])
    for backend in ["reference", *(["native"] if LEVELS else [])]:
        assert_same_bits(decoded(stored, layout, torch.float32, backend), product)
        plus = dataclasses.replace(layout, min=Field(Kind.FLOAT32, 16, 4, cols=4))
        assert_same_bits(decoded(stored, plus, torch.float32, backend), product + 0.0)


@pytest.mark.parametrize("backend", ["reference", *(["native"] if LEVELS else [])])
@pytest.mark.parametrize("name", NAMES)
def test_gains(name: str, backend: str) -> None:
    """Ones change no bit, NaN and signs of zero included, and others are one product in float32 before rounding."""
    rng = np.random.default_rng(2)
    data, layout = make_case(rng, name, 5, FORMATS[name][1][-1])
    with_gain = layout.with_gain(rows=5, cols=layout.block)
    num = layout.cols // layout.block
    exact = decoded(data, layout, torch.float32, backend).view(5, num, layout.block)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = decoded(data, with_gain, dtype, backend, torch.ones(num))
        assert_same_bits(got, decoded(data, layout, dtype, backend))
        for gains in (make_gains(rng, num), torch.zeros(num), -torch.zeros(num)):
            product = (gains[:, None] * exact).view(5, -1)
            nan = product.isnan()
            got = decoded(data, with_gain, dtype, backend, gains.view(torch.uint8))
            assert_same_bits(torch.where(nan, 0, got), torch.where(nan, 0, product).to(dtype))
            assert torch.equal(got.isnan(), nan)


# Backends, instruction sets, threads.


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_native_equals_the_reference(name: str) -> None:
    for seed in range(6):
        check_decode(np.random.default_rng(seed), "native", [name])


@needs_native
def test_all_formats_in_one_call_on_many_threads() -> None:
    torch.set_num_threads(5)
    for seed in range(3):
        check_decode(np.random.default_rng(seed), "native", NAMES, max_rows=40)


@needs_triton
@needs_interpreter
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, in the interpreter, of infinities
@pytest.mark.parametrize("name", NAMES)
def test_triton(name: str) -> None:
    check_decode(np.random.default_rng(0), "triton", [name], max_rows=2)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_on_a_gpu(backend: str) -> None:
    for seed in range(10):
        check_decode(np.random.default_rng(seed), backend, NAMES, max_rows=300, device="cuda")


@needs_native
def test_golden() -> None:
    """Written by running this file, with tests/helpers on PYTHONPATH: changed bits are another format's."""
    assert make_golden() == json.loads(GOLDEN.read_text())


# As torch sees it, and what is refused.


def arguments(**changes: object) -> dict[str, torch.Tensor]:
    """The raw op's: a matrix of 4 x 96 weights as Q4_0."""
    data, layout = make_case(np.random.default_rng(0), "q4_0", 4, 32, usual=True)
    table = PackedTable([PackedSegment(layout.with_gain(), 0, torch.float32)])
    out, gains = torch.zeros(table.out_bytes, dtype=torch.uint8), torch.ones(4).view(torch.uint8)
    return {"stored": data, "matrices": table.tensor, "levels": table.levels, "out": out, "gains": gains} | changes


@needs_native
def test_torch_op() -> None:
    torch.library.opcheck(torch.ops.distzo2.decode, tuple(arguments().values()))
    on_meta = [value.to("meta") if name[0] in "sog" else value for name, value in arguments().items()]  # the buffers
    assert torch.ops.distzo2.decode(*on_meta) is None


COLUMNS = {
    name: index
    for index, name in enumerate(("rows", "cols", "block", "zero_point", "min_sign", "outer_divides", "head_dim",
                                  "has_levels", "out_offset", "out_dtype"))
}  # fmt: skip
FIELD = ("kind", "offset", "row_stride", "block_stride", "stride", "rows", "cols")
COLUMNS |= {f"codes.{name}": 10 + index for index, name in enumerate(FIELD)}
COLUMNS |= {f"scale.{name}": 17 + index for index, name in enumerate(FIELD)}
COLUMNS |= {f"gain.{name}": 52 + index for index, name in enumerate(FIELD)}


@needs_native
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rows", -1, "-1 x 32"),
        ("rows", 5, "160 elements of 4 bytes at byte 0 of 512"),
        ("rows", 2**40, "x 32"),
        ("cols", 64, "256 elements"),
        ("block", 0, "block 0"),
        ("block", 16, "block 16"),
        ("head_dim", 3, "head_dim 3"),
        ("has_levels", 1, None),
        ("out_offset", 4, "128 elements of 4 bytes at byte 4 of 512"),
        ("out_dtype", 3, "dtype code 3"),
        ("codes.kind", 16, "kind 16"),
        ("codes.kind", -1, "kind -1"),
        ("codes.kind", 8, "block 32"),
        ("codes.offset", 3, "a field of kind 0 at byte 3 of 72"),
        ("codes.offset", -1, "offset -1"),
        ("codes.row_stride", 19, "a field of kind 0"),
        ("codes.row_stride", 2**62, "a field of kind 0"),
        ("codes.rows", 4, "codes are not shared"),
        ("scale.kind", -1, "no scale"),
        ("scale.kind", 11, "kind 11"),
        ("scale.offset", 17, "a field of kind 18 at byte 17 of 72"),
        ("scale.stride", -1, "strides 18 18 -1"),
        ("scale.rows", 0, "a value for 0 x 32"),
        ("scale.cols", 0, "a value for 1 x 0"),
        ("scale.rows", 2**32, "a value for 4294967296 x 32"),
        ("gain.kind", 18, "gains of kind 18"),
        ("gain.kind", 2, "gains of kind 2"),
        ("gain.offset", 4, "a field of kind 16 at byte 4 of 16"),
        ("gain.row_stride", 5, "a field of kind 16 at byte 0 of 16"),
        ("gain.cols", 0, "a value for 1 x 0"),
    ],
)
def test_the_op_reads_nothing_out_of_bounds(column: str, value: int, message: str | None) -> None:
    wrong = arguments()
    wrong["matrices"] = wrong["matrices"].clone()
    wrong["matrices"][0, COLUMNS[column]] = value
    if message is None:
        return torch.ops.distzo2.decode(*wrong.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.distzo2.decode(*wrong.values())
    assert not wrong["out"].any()


@needs_native
def test_the_op_refuses_other_tables_and_buffers() -> None:
    good = arguments()
    for name, value, message in (
        ("matrices", good["matrices"][:, :58].contiguous(), r"matrices must have shape \[1, 59\], got \[1, 58\]"),
        ("matrices", good["matrices"].int(), "matrices must be Long, got Int"),
        ("levels", good["levels"][:, :8].contiguous(), r"levels must have shape \[1, 16\]"),
        ("stored", good["stored"].view(torch.int16), "stored must be uint8"),
        ("out", good["out"][::2], "out must be a contiguous vector"),
        ("out", good["out"].to("meta"), "out must be on cpu as stored is, got meta"),
        ("gains", good["gains"].view(torch.float32), "gains must be uint8"),
        ("gains", good["gains"][::2], "gains must be a contiguous vector"),
        ("gains", good["gains"].to("meta"), "gains must be on cpu as stored is, got meta"),
        ("gains", None, "a field of kind 16 at byte 0 of 0"),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            torch.ops.distzo2.decode(*arguments(**{name: value}).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_function_refuses(backend: str) -> None:
    data, layout = make_case(np.random.default_rng(0), "q4_0", 4, 32)
    table, out = PackedTable([PackedSegment(layout, 4, torch.float32)]), torch.zeros(516, dtype=torch.uint8)
    both, gains = torch.zeros(600, dtype=torch.uint8), torch.ones(4)
    gained = PackedTable([PackedSegment(layout.moved(4).with_gain(), 4, torch.float32)])
    for error, message, arguments in (
        (TypeError, "table must be a PackedTable, got list", (data, [layout], out)),
        (TypeError, "stored must be a tensor of torch.uint8, got torch.int8", (data.view(torch.int8), table, out)),
        (ValueError, "stored has 71 bytes, 72 are needed", (data[:71], table, out)),
        (ValueError, "out has 515 bytes, 516 are needed", (data, table, out[:515])),
        (ValueError, "out must be on cpu as stored is, got meta", (data, table, out.to("meta"))),
        (ValueError, "out must begin at an address that is a multiple of 4", (data, table, both[1:])),
        (ValueError, "out and stored overlap in memory", (both[516 - 4 :], table, both[:516])),
        (ValueError, "the table needs 0 bytes of gains, got some", (data, table, out, gains)),
        (ValueError, "the table needs 16 bytes of gains, got None", (both[:76], gained, out)),
        (ValueError, "gains has 12 bytes, 16 are needed", (both[:76], gained, out, gains[:3])),
        (TypeError, "gains must be a tensor of torch.uint8, got torch.float64", (both, gained, out, gains.double())),
        (TypeError, "gains must be a tensor of torch.uint8, got list", (both, gained, out, [1.0] * 4)),
        (ValueError, "gains must be a contiguous vector", (both, gained, out, gains.view(torch.uint8)[::2])),
        (ValueError, "gains must be on cpu as stored is, got meta", (both, gained, out, gains.to("meta"))),
        (ValueError, "out and gains overlap in memory", (both[524:], gained, both[:520], both[504:520])),
    ):
        with pytest.raises(error, match=message):
            distzo2_core.decode(*arguments, backend=backend)


def test_an_empty_table_and_empty_matrices() -> None:
    empty = PackedLayout(0, 32, 32, Field(Kind.NIBBLES_32, 0), Field(Kind.FLOAT16, 0, cols=32))
    for table in (PackedTable([]), PackedTable([PackedSegment(empty, 0, torch.float32)])):
        assert (table.num_bytes, table.out_bytes) == (0, 0)
        distzo2_core.decode(torch.zeros(0, dtype=torch.uint8), table, torch.zeros(0, dtype=torch.uint8))


def test_what_a_table_refuses() -> None:
    _, layout = make_case(np.random.default_rng(0), "gptq", 4, 128)
    _, k_layout = make_case(np.random.default_rng(0), "q4_k", 4, 256)
    _, levels = make_case(np.random.default_rng(0), "nf4", 4, 64)

    def codes(**changes: object) -> dict[str, Field]:
        return {"codes": dataclasses.replace(layout.codes, **changes)}

    for error, message, base, changes in (
        (ValueError, "rows must be between 0", layout, {"rows": -1}),
        (ValueError, "block must divide cols, got 96 and 128", layout, {"block": 96}),
        (ValueError, "head_dim must be even and divide rows, got 6 and 4", layout, {"head_dim": 6}),
        (ValueError, "min_sign must be 1 or -1, got 0", layout, {"min_sign": 0}),
        (ValueError, "zero_point must be between", layout, {"zero_point": 10**6}),
        (TypeError, "scale must be a Field, got NoneType", layout, {"scale": None}),
        (ValueError, "codes cannot be of kind .*FLOAT16", layout, codes(kind=Kind.FLOAT16)),
        (ValueError, "zero cannot be of kind .*FLOAT16", layout, {"zero": layout.scale}),
        (ValueError, "codes of NIBBLES_64 need a block of a multiple of 64",
         layout, codes(kind=Kind.NIBBLES_64) | {"block": 32}),
        (ValueError, "codes of Q6_K need a block of 256 weights, got 128", layout, codes(kind=Kind.Q6_K)),
        (ValueError, "codes are not shared", layout, codes(cols=2)),
        (ValueError, "codes.offset must be between 0", layout, codes(offset=-1)),
        (ValueError, "of K_SCALE needs stride 0", k_layout, {"scale": dataclasses.replace(k_layout.scale, stride=1)}),
        (ValueError, "levels must be 16 numbers", layout, {"levels": (1.0,)}),
        (ValueError, "have neither zeros nor minima", levels, {"zero_point": 8}),
        (ValueError, "an outer scale of nothing", layout, {"outer_divides": True}),
        (ValueError, "gain cannot be of kind .*FLOAT16", layout, {"gain": layout.scale}),
        (ValueError, "gain.stride must be between 0", layout, {"gain": Field(Kind.FLOAT32, 0, stride=-4)}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"segment 1: .*{message}"):
            good = PackedSegment(layout, 0, torch.float32)
            PackedTable([good, PackedSegment(dataclasses.replace(base, **changes), 4096, torch.float32)])
    for message, out_offset, dtype in (
        ("segment 1: out_offset must be a multiple of 4, got 2050", 2050, torch.float32),
        ("segment 1 overlaps another where it is decoded to, at byte 2046 of out", 2046, torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=message):
            PackedTable([PackedSegment(layout, 0, torch.float32), PackedSegment(layout, out_offset, dtype)])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make_golden(), indent=1) + "\n")
