"""Random and adversarial tensors of quantized checkpoints, and what each format's own decoder makes of them.

A form is a function of a weight's shape and a generator. It returns tensors by what follows the name of the layer (or
of the weight), and the decoded weight in the dtype that the format's decoder computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

Tensors = dict[str, torch.Tensor]
Form = Callable[[tuple[int, ...], torch.Generator], tuple[Tensors, torch.Tensor]]


def random_bytes(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Every bit pattern of `dtype` alike."""
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=g, dtype=torch.uint8)
    return data.view(dtype)


def any_scales(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Finite numbers of all sizes and both signs; among the first are 0, -0, 1, the smallest and the largest."""
    scales = random_bytes(shape, g, dtype)
    scales = torch.where(scales.float().isfinite(), scales.float(), torch.tensor(0.01)).to(dtype)
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, 1.0, info.tiny, -info.smallest_normal / 2, info.max, -info.max]).to(dtype)
    scales.view(-1)[: len(special)] = special[: scales.numel()]
    return scales


def _nibbles(words: np.ndarray, axis: int, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """The codes of int32 words along an axis."""
    places = order or range(32 // bits)
    parts = [words.view(np.uint32) >> np.uint32(bits * place) & np.uint32(2**bits - 1) for place in places]
    stacked = np.stack(parts, axis + 1)
    return stacked.reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :]).astype(np.int64)


def gptq(bits: int, group: int, dtype: torch.dtype = torch.float16, plus: int = 1) -> Form:
    def form(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, cols = shape
        groups = cols // group
        tensors = {
            ".qweight": random_bytes((cols * bits // 32, rows), g, torch.int32),
            ".qzeros": random_bytes((groups, rows * bits // 32), g, torch.int32),
            ".scales": any_scales((groups, rows), g, dtype),
            ".g_idx": (torch.arange(cols) // group).int(),
        }
        q, z = _nibbles(tensors[".qweight"].numpy(), 0, bits), _nibbles(tensors[".qzeros"].numpy(), 1, bits)
        z = (z + plus) % 2**bits
        with np.errstate(over="ignore"):
            weight = tensors[".scales"].float().numpy().repeat(group, 0) * (q - z.repeat(group, 0)).astype(np.float32)
        return tensors, torch.from_numpy(weight.T.copy())

    return form


def awq(group: int) -> Form:
    order = (0, 4, 1, 5, 2, 6, 3, 7)

    def form(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, cols = shape
        tensors = {
            ".qweight": random_bytes((cols, rows // 8), g, torch.int32),
            ".qzeros": random_bytes((cols // group, rows // 8), g, torch.int32),
            ".scales": any_scales((cols // group, rows), g, torch.float16),
        }
        q, z = (_nibbles(tensors[name].numpy(), 1, 4, order).astype(np.float32) for name in (".qweight", ".qzeros"))
        weight = (q - z.repeat(group, 0)) * tensors[".scales"].float().numpy().repeat(group, 0)
        return tensors, torch.from_numpy(weight.T.copy())

    return form


def compressed(kind: str, dtype: torch.dtype, group: int | None = None, symmetric: bool = True, bits: int = 8) -> Form:
    """Of compressed-tensors, whose own compressor decodes. `group`: columns; None for a channel, 0 for the tensor."""

    def form(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        pytest.importorskip("compressed_tensors", exc_type=ImportError)
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        *lead, rows, cols = shape
        groups = cols // group if group else 1
        block = [128, 128] if group == -128 else None
        scale_shape = (*lead, rows, groups) if group != 0 else (1,)
        if block:
            scale_shape = (-(-rows // 128), cols // 128)
        strategy = {None: "channel", 0: "tensor", -128: "block"}.get(group, "group")
        is_float = "float" in kind or "fp4" in kind
        if kind.startswith("nvfp4"):
            strategy = "tensor_group"
        args = QuantizationArgs(
            num_bits=bits, type="float" if is_float else "int", symmetric=symmetric, strategy=strategy,
            group_size=group if strategy in ("group", "tensor_group") else None, block_structure=block,
        )  # fmt: skip
        tensors: Tensors = {}
        if "pack" in kind:
            dtype_of_words = torch.uint8 if is_float else torch.int32
            num_words = cols * bits // 8 // dtype_of_words.itemsize
            tensors[".weight_packed"] = random_bytes((*lead, rows, num_words), g, dtype_of_words)
        else:
            tensors[".weight"] = random_bytes(shape, g, torch.float8_e4m3fn if is_float else torch.int8)
        if kind.startswith("mxfp4"):
            tensors[".weight_scale"] = torch.randint(0, 255, scale_shape, generator=g, dtype=torch.uint8)
        else:
            tensors[".weight_scale"] = any_scales(scale_shape, g, dtype)
        if kind.startswith("nvfp4"):
            tensors[".weight_global_scale"] = torch.tensor([1234.567])
        if kind == "pack-quantized":
            tensors[".weight_shape"] = torch.tensor(shape)
        if not symmetric:
            zeros = (-(-rows * bits // 32), groups)
            tensors[".weight_zero_point"] = random_bytes(zeros, g, torch.int32)
            if kind != "pack-quantized":
                tensors[".weight_zero_point"] = random_bytes((rows, groups), g, torch.int8)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        named = {name.removeprefix("."): t for name, t in tensors.items()}
        decoded = BaseCompressor.get_value_from_registry(kind).decompress(named, scheme)
        return tensors, decoded["weight"].detach()

    return form


def bitsandbytes(kind: str, block: int, nested: bool) -> Form:
    def form(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        bnb = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
        blocks = math.prod(shape) // block
        packed = random_bytes((math.prod(shape) // 2, 1), g)
        absmax, offset, inner = any_scales((blocks,), g, torch.float32), None, None
        if nested:
            code = torch.sort(torch.randn(256, generator=g)).values
            outer = any_scales((-(-blocks // 256),), g, torch.float32)
            inner = bnb.QuantState(absmax=outer, blocksize=256, code=code, dtype=torch.float32)
            absmax, offset = random_bytes((blocks,), g), torch.tensor(0.0371)
        state = bnb.QuantState(
            absmax=absmax, shape=torch.Size(shape), code=bnb.get_4bit_type(kind, device="cpu"), blocksize=block,
            quant_type=kind, dtype=torch.float32, offset=offset, state2=inner,
        )  # fmt: skip
        tensors = {".weight": packed} | {f".weight.{name}": t for name, t in state.as_dict(packed=True).items()}
        return tensors, bnb.dequantize_4bit(packed, state)

    return form


def fp8_blocks(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek's: 128 x 128, the last rows cut short."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    *lead, rows, cols = shape
    weight = random_bytes(shape, g, torch.float8_e4m3fn)
    scale = any_scales((*lead, -(-rows // 128), cols // 128), g, torch.float32)
    return {".weight": weight, ".weight_scale_inv": scale}, _dequantize_fp8_weight(
        weight, scale, [128, 128], torch.float32
    )


def modelopt_nvfp4(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """level * (weight_scale * weight_scale_2), in NumPy."""
    rows, cols = shape
    tensors = {
        ".weight": random_bytes((rows, cols // 2), g),
        ".weight_scale": any_scales((rows, cols // 16), g, torch.float8_e4m3fn),
        ".weight_scale_2": torch.tensor(0.00123),
        ".input_scale": torch.tensor(0.5),
    }
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    levels = np.concatenate([levels, -levels])
    packed = tensors[".weight"].numpy()
    level = levels[np.stack([packed & 15, packed >> 4], -1).reshape(rows, cols)]
    scale = tensors[".weight_scale"].float().numpy() * tensors[".weight_scale_2"].numpy()
    return tensors, torch.from_numpy(level * scale.repeat(16, 1))


def gpt_oss(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """mxfp4 for a parameter [experts, cols, rows], whose scales are 0 to 254."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, cols, rows = shape
    blocks = random_bytes((experts, rows, cols // 32, 16), g)
    scales = torch.randint(0, 255, (experts, rows, cols // 32), generator=g, dtype=torch.uint8)
    return {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


FORMS: dict[str, Form] = {
    "gptq int4 g128": gptq(4, 128),
    "gptq int4 g32 bfloat16": gptq(4, 32, torch.bfloat16),
    "gptq int8 g64": gptq(8, 64),
    "gptq_v2 int4 g64": gptq(4, 64, plus=0),
    "awq int4 g64": awq(64),
    "pack-quantized int4 g128": compressed("pack-quantized", torch.bfloat16, 128, bits=4),
    "pack-quantized int4 g32 float16": compressed("pack-quantized", torch.float16, 32, bits=4),
    "pack-quantized int4 g64 float32": compressed("pack-quantized", torch.float32, 64, bits=4),
    "pack-quantized int4 g64 asymmetric": compressed("pack-quantized", torch.float32, 64, False, bits=4),
    "pack-quantized int4 channel": compressed("pack-quantized", torch.bfloat16, bits=4),
    "pack-quantized int8 channel asymmetric": compressed("pack-quantized", torch.float32, None, False),
    "pack-quantized int8 g128": compressed("pack-quantized", torch.float16, 128),
    "float-quantized channel": compressed("float-quantized", torch.bfloat16),
    "float-quantized tensor": compressed("float-quantized", torch.float32, 0),
    "float-quantized block": compressed("float-quantized", torch.float32, -128),
    "int-quantized channel": compressed("int-quantized", torch.float32),
    "int-quantized channel asymmetric": compressed("int-quantized", torch.float32, None, False),
    "nvfp4-pack-quantized": compressed("nvfp4-pack-quantized", torch.float8_e4m3fn, 16, bits=4),
    "mxfp4-pack-quantized": compressed("mxfp4-pack-quantized", torch.uint8, 32, bits=4),
    "nf4 g64": bitsandbytes("nf4", 64, False),
    "nf4 g64 nested": bitsandbytes("nf4", 64, True),
    "fp4 g128": bitsandbytes("fp4", 128, False),
    "fp4 g64 nested": bitsandbytes("fp4", 64, True),
    "fp8 128x128": fp8_blocks,
    "nvfp4 of ModelOpt": modelopt_nvfp4,
}
