"""The packed matrices of a safetensors checkpoint, told by the names, dtypes and shapes of its tensors.

Each form below says how its tensors lie and what a weight is; q is a code, z a zero point. Sources:

    gptq     https://github.com/AutoGPTQ/AutoGPTQ/blob/main/auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py
    awq      https://github.com/casper-hansen/AutoAWQ/blob/main/awq/modules/linear/gemm.py
    pack-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, float-quantized, int-quantized
             https://github.com/vllm-project/compressed-tensors/tree/main/src/compressed_tensors/compressors
    nf4, fp4 https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py
    nvfp4    https://github.com/NVIDIA/TensorRT-Model-Optimizer/blob/main/modelopt/torch/quantization/qtensor/nvfp4_tensor.py
    mxfp4    https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/mxfp4.py
    fp8      https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distzo2.checkpoint.packed_param import VALUE_DTYPES, Piece
from distzo2.checkpoint.tensor_files import CheckpointError, TensorEntry
from distzo2.formats.repacking import nested_scales, piece_of, read_rows, transposed_codes, zeros
from distzo2.text import dtype_name
from distzo2_core.packed import Field, Kind

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# The tables of bitsandbytes as its C++ and Python have them; it divides those of fp4 by 12 in float32.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = (
    *(0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25),
    *(0.0, -0.005208333333333333, -0.6666666666666666, -1.0, -0.3333333333333333, -0.5, -0.16666666666666666, -0.25),
)
_KINDS = {dtype: kind for kind, dtype in VALUE_DTYPES.items()} | {torch.int8: Kind.INT8}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MAX_STATE_BYTES = 1 << 16  # some 200 are usual
# What scales activations or a cache of keys and values has no part in a weight.
_ACTIVATIONS = re.compile(r"(^|[._])(input|output|activation|[kqv])_(global_)?(scale|zero_point)(_inv|_2)?$")


Plane = tuple[Piece, Field]
"""Values of one kind of a matrix, and where each is in their bytes: a line for each `rows` rows of the field."""


def _codes(kind: Kind, piece: Piece, line_bytes: int) -> Plane:
    """A line a row, in which codes lie as their kind says."""
    return piece, Field(kind, 0, line_bytes)


def _shared(kind: Kind, piece: Piece, num_cols: int, cols: int, rows: int = 1) -> Plane:
    """A value for each `rows` x `cols` weights of a matrix of `num_cols` columns, line by line."""
    item = VALUE_DTYPES.get(kind, torch.uint8).itemsize
    return piece, Field(kind, 0, num_cols // cols * item, stride=item, rows=rows, cols=cols)


@dataclass(frozen=True)
class Matrix:
    """A packed tensor, as a checkpoint would have it if it were not packed.

    Attributes:
        name, shape: of the tensor; leading dimensions are folded into rows.
        transposed: whether `shape` has the last two dimensions of what is packed swapped.
        planes: by their names in `PackedLayout`.
        constants: the other attributes of `PackedLayout`.
        used: names of the tensors that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    planes: dict[str, Plane]
    used: tuple[str, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False

    @property
    def pieces(self) -> list[Piece]:
        return [piece for piece, _ in self.planes.values()]

    @property
    def cols(self) -> int:
        return self.shape[-2 if self.transposed else -1]


def find_matrices(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> tuple[list[Matrix], set[str]]:
    """The packed matrices among `tensors`, and the names of all tensors that they account for: theirs, and scales of
    activations, which are not quantized here.

    Reads headers; of tensors only what decides between forms (g_idx, bitsandbytes' quant_state).

    Args:
        tensors: of the checkpoint, by name.
        settings: of the quantisation, as config.json has it: `checkpoint_format` of GPTQ, `weight_block_size` of fp8.

    Raises:
        CheckpointError: a matrix has act-order, lacks a tensor, or has one of an unexpected shape or dtype.
    """
    found = []
    for name, tensor in tensors.items():
        for pattern, form in _FORMS:
            if match := pattern.search(name):
                matrix = form(_Parts(tensors, name, match), tensor, settings)
                if matrix is not None:
                    found.append(matrix)
                    break
    used = {name for matrix in found for name in matrix.used}
    return found, used | {name for name in tensors if found and _ACTIVATIONS.search(name)}


class _Parts:
    """The tensors of one matrix by their suffixes, and the errors about them."""

    def __init__(self, tensors: Mapping[str, TensorEntry], name: str, match: re.Match):
        self.tensors, self.name, self.used = tensors, name, [name]
        self.front = name[: match.start()]

    def get(self, suffix: str) -> TensorEntry | None:
        """The tensor with this suffix, if there is one."""
        found = self.tensors.get(self.front + suffix)
        if found is not None:
            self.used.append(self.front + suffix)
        return found

    def require(self, suffix: str, shape: tuple[int, ...] | None = None, dtypes: tuple = ()) -> TensorEntry:
        """The tensor with this suffix, of this shape (None: any) and one of these dtypes (none: any)."""
        found = self.get(suffix)
        if found is None:
            raise self.error(f"expected a tensor {self.front + suffix!r} beside it, got none")
        expected = [str(list(shape))] if shape is not None else []
        expected += [" or ".join(map(dtype_name, dtypes))] if dtypes else []
        if (shape is not None and found.shape != shape) or (dtypes and found.dtype not in dtypes):
            got = f"{dtype_name(found.dtype)} {list(found.shape)}"
            raise self.error(f"expected {' of '.join(expected)} in {self.front + suffix!r}, got {got}")
        return found

    def error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.tensors[self.name].path}: tensor {self.name!r}: {why}")

    def refuse_act_order(self, suffix: str, cols: int, group: int) -> None:
        if self.get(suffix) is None:
            return
        g_idx = self.require(suffix, (cols,), (torch.int32, torch.int64))
        if not torch.equal(read_rows(g_idx).long(), torch.arange(cols) // group):
            why = f"{self.front + suffix!r} does not name groups in order; take a checkpoint without it"
            raise self.error(f"act-order (desc_act), which is not decoded: {why}")

    def group(self, cols: int, count: int) -> int:
        """Columns of a group where a row has `count` groups."""
        if not count or cols % count:
            raise self.error(f"expected groups that divide the {cols} columns, got {count} groups")
        return cols // count

    def scalar(self, suffix: str, shape: tuple[int, ...]) -> Plane:
        """One float32 for all of a matrix of `shape`."""
        scale = self.require(suffix, None, (torch.float32,))
        if scale.numel != 1:
            raise self.error(f"expected one number in {scale.name!r}, got {list(scale.shape)}")
        return _shared(Kind.FLOAT32, piece_of(scale), shape[-1], shape[-1], math.prod(shape[:-1]))

    def grid(self, suffix: str, shape: tuple[int, ...], dtypes: tuple, block: tuple[int, int] = (1, 1)) -> Plane:
        """The scales of a matrix of `shape`: one for all of it, for each `block` of rows and columns, or else for each
        row and groups of its columns. The last rows may be less than a block."""
        scale = self.require(suffix, None, dtypes)
        kind, (rows, cols) = _KINDS[scale.dtype], shape[-2:]
        if scale.numel == 1:
            return _shared(kind, piece_of(scale), cols, cols, math.prod(shape[:-1]))
        lead, (lines, values) = scale.shape[:-2], scale.shape[-2:] if len(scale.shape) > 1 else (0, 0)
        if scale.shape == shape[:-1]:
            lead, lines, values = shape[:-2], rows, 1
        if (lines, values) == (-(-rows // block[0]), -(-cols // block[1])):
            height, width = block
            if cols % width or (lead and rows % height):
                raise self.error(
                    f"expected blocks of {height} x {width} that divide the {cols} columns of {list(shape)}"
                )
        else:
            height, width = 1, self.group(cols, values) if lines == rows else 0
        if not width or lead != shape[:-2]:
            raise self.error(f"expected scales for rows or blocks of {list(shape)}, got {list(scale.shape)}")
        return _shared(kind, piece_of(scale), cols, width, height)

    def matrix(
        self, suffix: str, shape: tuple[int, ...], form: str, planes: dict[str, Plane], **constants: Any
    ) -> Matrix:
        return Matrix(self.front + suffix, shape, form, planes, tuple(self.used), constants)

    def fp4(
        self, suffix: str, shape: tuple[int, ...], codes: TensorEntry, scale: Plane, outer: str, **more: Any
    ) -> Matrix:
        """Two levels of e2m1 a byte, the first in the low bits, with scales; of nvfp4 also one for all, `outer`."""
        planes = {"codes": _codes(Kind.NIBBLES_LOW, piece_of(codes), shape[-1] // 2), "scale": scale}
        if outer:
            planes["outer"] = self.scalar(outer, shape)
        form = f"{'nvfp4' if outer else 'mxfp4'} g{scale[1].cols}"
        return self.matrix(suffix, shape, form, planes, levels=E2M1, **more)


def _gptq_or_awq(parts: _Parts, qweight: TensorEntry, settings: Mapping[str, Any]) -> Matrix | None:
    """GPTQ: weight[row, col] = scales[group, row] * (q - z). int32 words hold codes along columns: qweight
    [cols * bits / 32, rows], and zero points along rows: qzeros [groups, rows * bits / 32]; scales are [groups, rows].
    Format "gptq" stores z - 1, "gptq_v2" z. z stays within its bits, as in AutoGPTQ: stored 15 is 0. g_idx [cols] names
    each column's group; with act-order they are not in order.

    AWQ (gemm): the same, but 4 bits, all words along rows with the codes in another order: qweight [cols, rows / 8],
    qzeros [groups, rows / 8]; z as it is.
    """
    scales = parts.require(".scales", None, _FLOATS)
    qzeros = parts.require(".qzeros", None, (torch.int32,))
    if qweight.dtype != torch.int32 or {len(t.shape) for t in (qweight, qzeros, scales)} != {2}:
        raise parts.error(f"expected int32 words in two dimensions, got {dtype_name(qweight.dtype)}")
    groups, rows = scales.shape
    awq = qweight.shape[1] * 8 == rows and qzeros.shape == (groups, rows // 8)
    bits = 4 if awq else qzeros.shape[1] * 32 // max(1, rows)
    cols = qweight.shape[0] * (1 if awq else 32 // max(1, bits))
    if bits not in (4, 8) or not (awq or qweight.shape[1] == rows) or qzeros.shape != (groups, rows * bits // 32):
        shapes = ", ".join(f"{t.name.rpartition('.')[2]} {list(t.shape)}" for t in (qweight, qzeros, scales))
        raise parts.error(f"expected GPTQ of 4 or 8 bits or AWQ (gemm), got {shapes}")
    group = parts.group(cols, groups)
    if cols % 32:
        raise parts.error(f"expected a multiple of 32 columns, got {cols}")
    parts.refuse_act_order(".g_idx", cols, group)
    plus = int(not awq and (settings.get("checkpoint_format") or "gptq") == "gptq")
    kind, codes = Kind.NIBBLES_32 if bits == 4 else Kind.UINT8, transposed_codes(qweight, bits, awq)
    transposed = Piece.made(scales.num_bytes, lambda: read_rows(scales).t())
    planes = {
        "codes": _codes(kind, codes, cols * bits // 8),
        "scale": _shared(_KINDS[scales.dtype], transposed, cols, group),
        "zero": _shared(Kind.UINT8, zeros(qzeros, rows, bits, 1, awq, plus), cols, group),
    }
    return parts.matrix(".weight", (rows, cols), f"{'awq' if awq else 'gptq'} int{bits} g{group}", planes)


def _weight_packed(parts: _Parts, packed: TensorEntry, settings: Mapping[str, Any]) -> Matrix | None:
    """compressed-tensors. pack-quantized: weight[row, col] = scale * (q - z), stored as q + 8 (of 4 bits) or q + 128 in
    int32 words along columns, lowest bits first: weight_packed [rows, cols * bits / 32], weight_scale [rows, groups].
    Zero points, where there are any, are packed along rows: weight_zero_point [rows * bits / 32, groups].

    nvfp4-pack-quantized: weight = level * (weight_scale / weight_global_scale), two levels a byte, the first in the low
    bits: weight_packed uint8 [rows, cols / 2]; weight_scale e4m3 [rows, cols / 16]; one weight_global_scale, float32.
    mxfp4-pack-quantized: the same with weight_scale e8m0 [rows, cols / 32] alone.
    """
    *lead, words = packed.shape if len(packed.shape) >= 2 else (1, 1, 1)
    if packed.dtype == torch.uint8:
        shape = (*lead, 2 * words)
        scale = parts.grid(".weight_scale", shape, (torch.float8_e4m3fn, torch.uint8))
        outer = "" if scale[1].kind == Kind.E8M0 else ".weight_global_scale"
        return parts.fp4(".weight", shape, packed, scale, outer, outer_divides=bool(outer))

    told = read_rows(parts.require(".weight_shape", (len(packed.shape),), (torch.int64, torch.int32))).tolist()
    bits = next((b for b in (4, 8) if told[:-1] == lead and -(-told[-1] * b // 32) == words), None)
    if bits is None or packed.dtype != torch.int32:
        got = f"{dtype_name(packed.dtype)} {list(packed.shape)} for {told}"
        raise parts.error(f"expected codes of 4 or 8 bits in int32 words, got {got}")
    shape = (*lead, told[-1])
    scale = parts.grid(".weight_scale", shape, _FLOATS)
    group = scale[1].cols
    parts.refuse_act_order(".weight_g_idx", shape[-1], group)
    kind, half = (Kind.NIBBLES_LOW, 8) if bits == 4 else (Kind.UINT8, 128)
    planes = {"codes": _codes(kind, piece_of(packed), 4 * words), "scale": scale}
    label = f"pack-quantized int{bits} " + ("channel" if group == shape[-1] else f"g{group}")
    if parts.get(".weight_zero_point") is None:
        return parts.matrix(".weight", shape, label, planes, zero_point=half)
    rows = math.prod(lead)
    points = parts.require(".weight_zero_point", (-(-rows * bits // 32), shape[-1] // group), (torch.int32,))
    if scale[1].rows != 1:
        raise parts.error("expected zero points with scales for each row")
    planes["zero"] = _shared(Kind.UINT8, zeros(points, rows, bits, 0), shape[-1], group)
    return parts.matrix(".weight", shape, label + " asymmetric", planes)


def _bitsandbytes(parts: _Parts, state: TensorEntry, settings: Mapping[str, Any]) -> Matrix | None:
    """bitsandbytes, 4 bits: weight = level * absmax of its block of 64 or so, two levels a byte, the first in the high
    bits: weight uint8 [rows * cols / 2, 1], weight.absmax float32 [blocks]. Nested, absmax is uint8, and a scale is
    nested_quant_map[absmax] * nested_absmax of its block of 256 scales + nested_offset. The shape, the blocks and the
    offset are JSON in weight.quant_state.bitsandbytes__nf4 (or fp4).
    """
    if state.num_bytes > _MAX_STATE_BYTES:
        raise parts.error(f"expected JSON of at most {_MAX_STATE_BYTES} bytes, got {state.num_bytes}")
    try:
        told = json.loads(bytes(read_rows(state).view(torch.uint8).tolist()))
        shape, block = tuple(map(int, told["shape"])), int(told["blocksize"])
        offset, nested = float(told.get("nested_offset", 0)), int(told.get("nested_blocksize", 256))
    except (ValueError, TypeError, KeyError) as error:
        raise parts.error(f"expected JSON with the shape and blocksize of a weight, got {error!r}"[:300]) from None
    if len(shape) < 2 or min(*shape, block, nested) < 1 or shape[-1] % block or not math.isfinite(offset):
        raise parts.error(f"expected blocks that divide the columns of a matrix, got {block} of {list(shape)}")
    numel = math.prod(shape)
    codes = parts.require("", None, (torch.uint8,))
    if codes.numel * 2 != numel:
        raise parts.error(f"expected {numel // 2} bytes in {parts.front!r} of shape {list(shape)}")
    absmax = parts.require(".absmax", (numel // block,), (torch.uint8, torch.float32))
    parts.get(".quant_map")
    scales, kind = piece_of(absmax), state.name[-3:]
    if absmax.dtype == torch.uint8:
        levels = parts.require(".nested_quant_map", (256,), (torch.float32,))
        outer = parts.require(".nested_absmax", (-(-absmax.numel // nested),), (torch.float32,))
        scales = nested_scales(absmax, levels, outer, offset, nested)
    planes = {
        "codes": _codes(Kind.NIBBLES_HIGH, piece_of(codes), shape[-1] // 2),
        "scale": _shared(Kind.FLOAT32, scales, shape[-1], block),
    }
    label = f"{kind} g{block}" + (" nested" if absmax.dtype == torch.uint8 else "")
    return parts.matrix("", shape, label, planes, levels=NF4 if kind == "nf4" else FP4)


def _mxfp4_blocks(parts: _Parts, blocks: TensorEntry, settings: Mapping[str, Any]) -> Matrix | None:
    """gpt-oss: weight[e, col, row] = level * 2^(scale - 127), two levels a byte, the first in the low bits: X_blocks
    uint8 [experts, rows, groups, 16], X_scales e8m0 [experts, rows, groups]. transformers' GptOssExperts computes
    x @ weight[e] and so holds gate_up_proj as [experts, hidden, 2 * intermediate] and down_proj as [experts,
    intermediate, hidden]: what is packed, with the last two dimensions swapped. A view of what is decoded serves.
    """
    if len(blocks.shape) < 3 or blocks.shape[-1] != 16 or blocks.dtype != torch.uint8:
        return None
    *lead, rows, groups, _ = blocks.shape
    scales = parts.require("_scales", blocks.shape[:-1], (torch.uint8,))
    shape, scale = (*lead, rows, groups * 32), _shared(Kind.E8M0, piece_of(scales), groups * 32, 32)
    return replace(parts.fp4("", shape, blocks, scale, ""), shape=(*lead, shape[-1], rows), transposed=True)


def _scaled(parts: _Parts, scale: TensorEntry, settings: Mapping[str, Any]) -> Matrix | None:
    """One value a weight with scales beside it: weight = scale * q. DeepSeek's fp8: X e4m3 [rows, cols] and X_scale_inv
    float32 [rows / 128, cols / 128]; compressed-tensors' float-quantized and int-quantized, fbgemm's and ModelOpt's
    fp8: X_scale, one for the tensor, a row, or a block; mxfp8: e8m0 for each 32 columns.

    ModelOpt's nvfp4: weight = level * (weight_scale * weight_scale_2), with the codes as in nvfp4-pack-quantized, in
    weight uint8 [rows, cols / 2].
    """
    weight = parts.tensors.get(parts.front)
    if weight is None or len(weight.shape) < 2:
        return None
    parts.get("")
    suffix = scale.name.removeprefix(parts.front)
    if weight.dtype == torch.uint8:
        shape = (*weight.shape[:-1], 2 * weight.shape[-1])
        return parts.fp4("", shape, weight, parts.grid(suffix, shape, (torch.float8_e4m3fn,)), "_scale_2")
    if weight.dtype not in (*_FP8, torch.int8):
        return None
    block = settings.get("weight_block_size") or (128, 128)
    scales = parts.grid(suffix, weight.shape, (*_FLOATS, torch.uint8), tuple(block))
    planes = {"codes": _codes(_KINDS[weight.dtype], piece_of(weight), weight.shape[-1]), "scale": scales}
    points, place = parts.get("_zero_point"), scales[1]
    if points is not None and weight.dtype == torch.int8:
        planes["zero"] = parts.grid("_zero_point", weight.shape, (torch.int8,), tuple(block))
    elif points is not None and read_rows(points).float().any():
        raise parts.error(f"expected zero points of 0 beside {dtype_name(weight.dtype)}")  # some have such
    by = f"{place.rows}x{place.cols}"
    if place.cols == weight.shape[-1]:
        by = "channel" if place.rows == 1 else "tensor"
    return parts.matrix("", weight.shape, f"{dtype_name(weight.dtype)} {by}", planes)


# By the name of the tensor that tells a form; what is before the match is the front of the matrix's other tensors.
_FORMS = (
    (re.compile(r"\.qweight$"), _gptq_or_awq),
    (re.compile(r"\.weight_packed$"), _weight_packed),
    (re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$"), _bitsandbytes),
    (re.compile(r"_blocks$"), _mxfp4_blocks),
    (re.compile(r"_scale(_inv)?$"), _scaled),
)
