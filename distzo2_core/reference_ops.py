"""The torch ops `distzo2::*` in NumPy: `reference` on CPU tensors. The caller checked the arguments.

`checksum` alone is in torch operations, and runs on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from .reference import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NoiseTerm,
    direction,
    is_identity,
    mul,
    noise_values,
    perturbed,
    round_nearest,
    round_stochastic,
    rounding_bits,
    step_codes,
    updated,
)
from .reference import decode as values_of
from .reference_packed import decode  # noqa: F401 -- the op
from .types import CODE8, CODE16, CODE_DTYPES, DTYPE_CODES, FROZEN, MAX_ELEMENTS, NONNEGATIVE, in_place_ops

_CHUNK = 1 << 18  # elements handled at a time, a multiple of 128: bounds the memory of temporaries
_STORED = {FLOAT32: np.uint32, BFLOAT16: np.uint16, FLOAT16: np.uint16, CODE8: np.int8, CODE16: np.int16}
_STORED[NONNEGATIVE] = np.uint32


def _bits_of(tensor: torch.Tensor) -> np.ndarray:
    """A flat view of a contiguous CPU tensor's stored bits."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().view(_STORED[DTYPE_CODES[tensor.dtype]])


def noise_(
    out: torch.Tensor,
    seed: int,
    step: int,
    param: int,
    probe: int,
    offset: int,
    family: int,
    rows: int = 0,
    cols: int = 0,
) -> None:
    bits, code = _bits_of(out), DTYPE_CODES[out.dtype]
    for at in range(0, bits.size, _CHUNK):
        part = bits[at : at + _CHUNK]
        z = noise_values(family, seed, step, param, probe, offset + at, part.size, rows, cols)
        part[:] = round_nearest(z, code)


def embedding(
    weight: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    seed: int,
    step: int,
    param: int,
    probe: int,
    offset: int,
    family: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    rows, inverse = ids.reshape(-1).unique(return_inverse=True)
    for i, row in enumerate(ids.reshape(-1).tolist()):
        if not 0 <= row < weight.shape[0]:
            raise IndexError(f"ids[{i}] is {row}, and the table has {weight.shape[0]} rows")
    cols = weight.shape[1]
    out = weight.new_empty(len(rows), cols, dtype=out_dtype)
    for i, row in enumerate(rows.tolist()):
        noise = partial(noise_values, family, seed, step, param, probe, offset + row * cols, cols, MAX_ELEMENTS, cols)
        values = perturbed(values_of(_bits_of(weight[row]), DTYPE_CODES[weight.dtype]), [(np.float32(scale), noise)])
        _bits_of(out[i])[:] = round_nearest(values, DTYPE_CODES[out.dtype])
    return out[inverse].view(*ids.shape, cols)


def materialize(
    weights: torch.Tensor,
    segments: torch.Tensor,
    seed: int,
    terms: torch.Tensor,
    coefs: torch.Tensor,
    updates: torch.Tensor,
    update_groups: torch.Tensor,
    emits: torch.Tensor,
    emit_scales: torch.Tensor,
    outs: Sequence[torch.Tensor],
    write_back: bool,
) -> None:
    stored, written = weights.numpy(), [out.numpy() for out in outs]
    term_rows, coef_values = terms.tolist(), coefs.numpy()
    for row in segments.tolist():
        (
            byte_offset,
            numel,
            code,
            param,
            element_offset,
            group,
            *matrix,
            out_offset,
            out_code,
            scale_offset,
            scale_group,
        ) = row
        itemsize, out_itemsize = CODE_DTYPES[code].itemsize, CODE_DTYPES[out_code].itemsize
        frozen = group == FROZEN
        for at in range(0, numel, _CHUNK):
            count, offset = min(_CHUNK, numel - at), element_offset + at
            place = slice(byte_offset + at * itemsize, byte_offset + (at + count) * itemsize)
            scaled = partial(_scaled_terms, term_rows, coef_values, seed, param, offset, count, matrix)
            bits = stored[place].view(_STORED[code])
            units = None  # of codes, the scale of each
            if scale_group:
                first, last = at // scale_group, (at + count - 1) // scale_group + 1
                units = stored[scale_offset + 4 * first : scale_offset + 4 * last].view(np.float32)
                units = np.repeat(units, scale_group)[:count]
            starts = None
            if scale_offset and not scale_group:
                start = scale_offset - byte_offset
                starts = values_of(stored[place.start + start : place.stop + start].view(_STORED[code]), code)
            changed = False
            for (step, first, num), scalars in zip(updates.tolist(), update_groups.numpy(), strict=True):
                if frozen:
                    break
                lr, weight_decay, anchor, update_scale = scalars[group]
                update_terms = scaled(first, num, update_scale)
                if is_identity(lr, weight_decay, update_terms, anchor):
                    continue
                values, random16 = values_of(bits, code, units), rounding_bits(seed, step, param, offset, count)
                if units is None:
                    values = updated(values, lr, weight_decay, update_terms, anchor, starts)
                    bits = round_stochastic(values, random16, code)
                else:
                    changes = mul(-lr, direction(values, weight_decay, update_terms))
                    bits = step_codes(bits, changes, units, random16, code)
                changed = True
            for (first, num), scales, out in zip(emits.tolist(), emit_scales.numpy(), written, strict=True):
                values = perturbed(values_of(bits, code, units), [] if frozen else scaled(first, num, scales[group]))
                begin = out_offset + at * out_itemsize
                out[begin : begin + count * out_itemsize] = round_nearest(values, out_code).view(np.uint8)
            if write_back and changed:
                stored[place] = bits.view(np.uint8)


perturb_, update_ = in_place_ops(materialize)


def _scaled_terms(
    term_rows: list[list[int]],
    coefs: np.ndarray,
    seed: int,
    param: int,
    offset: int,
    count: int,
    matrix: list[int],
    first: int,
    num: int,
    scale: np.float32,
) -> list[NoiseTerm]:
    """Terms [first, first + num), coefficients times a group's scale in float32, for elements of one parameter."""
    return [
        (mul(coefs[index], scale), partial(noise_values, family, seed, step, param, probe, offset, count, *matrix))
        for index, (family, step, probe, _) in enumerate(term_rows[first : first + num], start=first)
    ]


_CHECKSUM_ODD = 0x9E3779B97F4A7C15 - 2**64  # of the golden ratio, as a signed number
_CHECKSUM_WORDS = 1 << 20  # summed at a time: bounds the memory of temporaries


def checksum(data: torch.Tensor, before: int) -> int:
    num_words = data.numel() // 8
    total = int.from_bytes(bytes(data[8 * num_words :].tolist()), "little") * 3 + data.numel()
    words = data[: 8 * num_words]
    if words.storage_offset() % 8:  # torch gives no view of 8-byte words there
        words = words.clone()
    words = words.view(torch.int64)
    for first in range(0, num_words, _CHECKSUM_WORDS):
        part = words[first : first + _CHECKSUM_WORDS]
        places = torch.arange(first, first + part.numel(), device=part.device)
        total += int((part * places.mul_(_CHECKSUM_ODD).bitwise_or_(1)).sum())
    result = (before * _CHECKSUM_ODD + total) % 2**64
    return result - 2**64 if result >= 2**63 else result
