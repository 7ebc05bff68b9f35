"""Triton kernels under the same bit contract as the compiled ones, for CUDA tensors and for Triton's interpreter.

One kernel serves perturb_, restore_, update_ and materialize, a second one looks up perturbed rows, a third one writes
bare noise. A program handles one tile: TILE consecutive elements of a parameter, aligned to TILE, a multiple of 128
(the elements of a Rademacher group). `triton_ops` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_noise import (
    any_tile,
    decode,
    low_rank_tile,
    noise_tile,
    normal_tile,
    rademacher_tile,
    round_nearest,
    round_stochastic,
    rounding_tile,
    step_codes,
)
from .types import CODE8, MAX_ELEMENTS, NONNEGATIVE

HEADER = 8  # entries of the integer table of materialize_kernel before the updates

_HEADER_LENGTH, _CODE8, _NONNEGATIVE = tl.constexpr(HEADER), tl.constexpr(CODE8), tl.constexpr(NONNEGATIVE)
_MAX_ELEMENTS = tl.constexpr(MAX_ELEMENTS)


@triton.jit
def _load_bits(pointers, mask, CODE: tl.constexpr):
    """Stored bits as uint32, through int32, int16 or int8 pointers."""
    loaded = tl.load(pointers, mask=mask, other=0)
    if CODE == 0 or CODE == _NONNEGATIVE:
        return loaded.to(tl.uint32, bitcast=True)
    elif CODE >= _CODE8:
        return loaded.to(tl.int32).to(tl.uint32, bitcast=True)
    else:
        return loaded.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def store_bits(pointers, bits, mask, CODE: tl.constexpr):
    if CODE == 0 or CODE == _NONNEGATIVE:
        tl.store(pointers, bits.to(tl.int32, bitcast=True), mask=mask)
    elif CODE == _CODE8:
        tl.store(pointers, bits.to(tl.uint8).to(tl.int8, bitcast=True), mask=mask)
    else:
        tl.store(pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)


@triton.jit
def _uint32(pointer):
    return tl.load(pointer).to(tl.uint32)


@triton.jit
def _stream_tile(ints, first, rows, cols, FAMILY: tl.constexpr, TILE: tl.constexpr):
    """The noise of a tile; ints: int64, low and high half of the seed, step, param, probe."""
    k0, k1, step, param, probe = (
        _uint32(ints),
        _uint32(ints + 1),
        _uint32(ints + 2),
        _uint32(ints + 3),
        _uint32(ints + 4),
    )
    if FAMILY >= 16:
        return low_rank_tile(step * 0 + FAMILY, first, step, param, probe, k0, k1, rows, cols, TILE)
    elif FAMILY == 0:
        return normal_tile(first, step, param, probe, k0, k1, TILE)
    else:
        return rademacher_tile(first, step, param, probe, k0, k1, TILE)


@triton.jit
def _term_tile(term, first, param, k0, k1, rows, cols, LOW_RANK: tl.constexpr, TILE: tl.constexpr):
    if LOW_RANK:
        return any_tile(tl.load(term), first, _uint32(term + 1), param, _uint32(term + 2), k0, k1, rows, cols, TILE)
    else:
        return noise_tile(tl.load(term), first, _uint32(term + 1), param, _uint32(term + 2), k0, k1, TILE)


@triton.jit
def noise_kernel(out, ints, FAMILY: tl.constexpr, CODE: tl.constexpr, TILE: tl.constexpr):
    """ints: int64 [9], low and high half of the seed, step, param, probe, offset, numel, rows, cols."""
    offset = tl.load(ints + 5)
    numel = tl.load(ints + 6)
    first = (offset // TILE + tl.program_id(0)) * TILE
    index = first - offset + tl.arange(0, TILE)
    z = _stream_tile(ints, first, tl.load(ints + 7), tl.load(ints + 8), FAMILY, TILE)
    store_bits(out + index, round_nearest(z, CODE), (index >= 0) & (index < numel), CODE)


@triton.jit
def embedding_kernel(
    table,
    ids,
    out,
    ints,
    floats,
    FAMILY: tl.constexpr,
    CODE: tl.constexpr,
    OUT_CODE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one row of the result; a row of NaN for an id that is out of range.

    table, out: int32 or int16 pointers by CODE and by OUT_CODE, [rows, cols] and [ids, cols]. ids: int64.
    ints: int64 [8], low and high half of the seed, step, param, probe, offset, rows, cols. floats: float32 [1], scale.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.load(ints + 7)
    wanted = tl.load(ids + row)
    known = (wanted >= 0) & (wanted < tl.load(ints + 6))
    begin = tl.where(known, wanted, 0) * cols
    element = tl.load(ints + 5) + begin
    first = (element // TILE + tl.program_id(1)) * TILE
    index = first - element + tl.arange(0, TILE)
    mask = (index >= 0) & (index < cols)
    value = decode(_load_bits(table + begin + index, mask, CODE), CODE)
    scale = tl.load(floats)
    if scale != 0.0:
        z = _stream_tile(ints, first, cols * 0 + _MAX_ELEMENTS, cols, FAMILY, TILE)
        value = tl.fma(z, scale, value)
    value = tl.where(known, value, float("nan"))
    store_bits(out + row * cols + index, round_nearest(value, OUT_CODE), mask, OUT_CODE)


@triton.jit
def materialize_kernel(
    weights,
    out0,
    out1,
    segments,
    ints,
    floats,
    CODE: tl.constexpr,
    OUT_CODE: tl.constexpr,
    MOVED: tl.constexpr,
    WRITE_BACK: tl.constexpr,
    NUM_EMITS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ANCHORED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one segment.

    weights, out0, out1: int32, int16 or int8 pointers, weights by CODE, outs by OUT_CODE; emit i of NUM_EMITS goes to
        out i. Two emits have the same terms but for the coefficients, so that each noise is made once.
    segments: int64 [S, 11]: first tile, first element in the buffer, numel, param, element_offset, group, first element
        in the outs, which is read where it is MOVED from that of the buffer; of codes the first scale, as float32s of
        the buffer, and the binary logarithm of how many elements share one; rows and cols, for LOW_RANK terms. Where it
        is ANCHORED, the first scale is the first element at the start.
    ints: int64: a header (low and high half of the seed, S, U, G); updates [U, 3]; emits [NUM_EMITS, 2]; terms [T, 4].
    floats: float32: update_groups [U, G, 4]; emit_scales [NUM_EMITS, G]; coefs [T].
    """
    tile = tl.program_id(0)
    k0, k1 = _uint32(ints), _uint32(ints + 1)
    num_updates = tl.load(ints + 3).to(tl.int32)
    num_groups = tl.load(ints + 4).to(tl.int32)
    updates = ints + _HEADER_LENGTH
    emits = updates + 3 * num_updates
    terms = emits + 2 * NUM_EMITS
    emit_scales = floats + 4 * num_updates * num_groups
    coefs = emit_scales + NUM_EMITS * num_groups

    # The last segment that begins at this tile or before it.
    low = tile * 0
    high = tl.load(ints + 2).to(tl.int32) - 1
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.load(segments + 11 * middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    segment = segments + 11 * low
    numel = tl.load(segment + 2)
    CODES: tl.constexpr = CODE >= _CODE8 and CODE != _NONNEGATIVE
    param = _uint32(segment + 3)
    element_offset = tl.load(segment + 4)
    group = tl.load(segment + 5).to(tl.int32)

    first = (element_offset // TILE + tile - tl.load(segment)) * TILE
    index = first - element_offset + tl.arange(0, TILE)
    mask = (index >= 0) & (index < numel)
    place = tl.load(segment + 1) + index
    bits = _load_bits(weights + place, mask, CODE)
    if CODES:
        scales = weights.to(tl.pointer_type(tl.float32), bitcast=True) + tl.load(segment + 7)
        scale = tl.load(scales + (index >> tl.load(segment + 8)), mask=mask, other=0.0)
    if ANCHORED:
        w0 = decode(_load_bits(weights + tl.load(segment + 7) + index, mask, CODE), CODE)
    changed = tile * 0
    rows, cols = tl.load(segment + 9), tl.load(segment + 10)

    for u in range(num_updates):
        step = _uint32(updates + 3 * u)
        begin = tl.load(updates + 3 * u + 1).to(tl.int32)
        end = begin + tl.load(updates + 3 * u + 2).to(tl.int32)
        scalars = floats + 4 * (u * num_groups + group)
        lr = tl.load(scalars)
        weight_decay = tl.load(scalars + 1)
        update_scale = tl.load(scalars + 3)
        active = weight_decay != 0.0
        if ANCHORED:
            anchor = tl.load(scalars + 2)
            active = active | (anchor != 0.0)
        for t in range(begin, end):
            active = active | (tl.load(coefs + t) * update_scale != 0.0)
        active = active & (lr != 0.0)
        if active:
            value = decode(bits, CODE)
            if CODES:
                value = value * scale
            total = tl.where(weight_decay == 0.0, 0.0, weight_decay * value)
            if ANCHORED:
                total = tl.where(anchor == 0.0, total, tl.fma(value - w0, anchor, total))
            for t in range(begin, end):
                coef = tl.load(coefs + t) * update_scale
                if coef != 0.0:
                    term = terms + 4 * t
                    z = _term_tile(term, first, param, k0, k1, rows, cols, LOW_RANK, TILE)
                    total = tl.fma(z, coef, total)
            if CODE == 0 or CODE == _NONNEGATIVE:
                bits = round_nearest(tl.fma(total, -lr, value), CODE)
            else:
                random16 = rounding_tile(first, step, param, k0, k1, TILE)
                if CODES:
                    bits = step_codes(decode(bits, CODE), total * -lr, scale, random16, CODE)
                else:
                    bits = round_stochastic(tl.fma(total, -lr, value), random16, CODE)
            changed = tile * 0 + 1

    if WRITE_BACK:  # noqa: SIM102 -- one is known when compiling, the other is not
        if changed != 0:
            store_bits(weights + place, bits, mask, CODE)

    if NUM_EMITS > 0:
        begin0 = tl.load(emits).to(tl.int32)
        end0 = begin0 + tl.load(emits + 1).to(tl.int32)
        scale0 = tl.load(emit_scales + group)
        shift = begin0 * 0  # from a term of the first emit to the same one of the second
        scale1 = scale0
        if NUM_EMITS == 2:
            shift = tl.load(emits + 2).to(tl.int32) - begin0
            scale1 = tl.load(emit_scales + num_groups + group)
        total0 = decode(bits, CODE)
        if CODES:
            total0 = total0 * scale
        total1 = total0
        for t in range(begin0, end0):
            term = terms + 4 * t
            z = _term_tile(term, first, param, k0, k1, rows, cols, LOW_RANK, TILE)
            coef0 = tl.load(coefs + t) * scale0
            total0 = tl.where(coef0 != 0.0, tl.fma(z, coef0, total0), total0)
            if NUM_EMITS == 2:
                coef1 = tl.load(coefs + t + shift) * scale1
                total1 = tl.where(coef1 != 0.0, tl.fma(z, coef1, total1), total1)
        if MOVED:
            place = tl.load(segment + 6) + index
        store_bits(out0 + place, round_nearest(total0, OUT_CODE), mask, OUT_CODE)
        if NUM_EMITS == 2:
            store_bits(out1 + place, round_nearest(total1, OUT_CODE), mask, OUT_CODE)


INTERPRETED = not isinstance(materialize_kernel, triton.JITFunction)
