"""Triton kernels under the same bit contract as the compiled ones, for CUDA tensors and for Triton's interpreter.

One kernel serves perturb_, restore_, update_ and materialize, a second one looks up perturbed rows, a third one writes
bare noise. A program handles one
tile: _TILE consecutive elements of a parameter, aligned to _TILE. Launches run on torch's current stream of the
tensors' device. The functions at the end have the signatures of the torch ops `distzo2::*`; the caller checked their
arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from .triton_noise import (
    decode,
    noise_tile,
    normal_tile,
    rademacher_tile,
    round_nearest,
    round_stochastic,
    rounding_tile,
)
from .types import CODE_DTYPES, DTYPE_CODES, NORMAL, RADEMACHER

_TILE = 1024  # elements; a multiple of 128, the elements of a Rademacher group
_HEADER = 8  # entries of the integer table before the updates

_HEADER_LENGTH = tl.constexpr(_HEADER)


@triton.jit
def _load_bits(pointers, mask, CODE: tl.constexpr):
    """Stored bits as uint32, through int32 or int16 pointers."""
    loaded = tl.load(pointers, mask=mask, other=0)
    if CODE == 0:
        return loaded.to(tl.uint32, bitcast=True)
    else:
        return loaded.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _store_bits(pointers, bits, mask, CODE: tl.constexpr):
    if CODE == 0:
        tl.store(pointers, bits.to(tl.int32, bitcast=True), mask=mask)
    else:
        tl.store(pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)


@triton.jit
def _uint32(pointer):
    return tl.load(pointer).to(tl.uint32)


@triton.jit
def _noise_kernel(out, ints, FAMILY: tl.constexpr, CODE: tl.constexpr, TILE: tl.constexpr):
    """ints: int64 [7], low and high half of the seed, step, param, probe, offset, numel."""
    offset = tl.load(ints + 5)
    numel = tl.load(ints + 6)
    first = (offset // TILE + tl.program_id(0)) * TILE
    index = first - offset + tl.arange(0, TILE)
    k0, k1, step, param, probe = (
        _uint32(ints),
        _uint32(ints + 1),
        _uint32(ints + 2),
        _uint32(ints + 3),
        _uint32(ints + 4),
    )
    if FAMILY == 0:
        z = normal_tile(first, step, param, probe, k0, k1, TILE)
    else:
        z = rademacher_tile(first, step, param, probe, k0, k1, TILE)
    _store_bits(out + index, round_nearest(z, CODE), (index >= 0) & (index < numel), CODE)


@triton.jit
def _embedding_kernel(table, ids, out, ints, floats, FAMILY: tl.constexpr, CODE: tl.constexpr, TILE: tl.constexpr):
    """One tile of one row of the result; a row of NaN for an id that is out of range.

    table, out: int32 or int16 pointers by CODE, [rows, cols] and [ids, cols]. ids: int64.
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
        k0, k1, step, param, probe = (
            _uint32(ints),
            _uint32(ints + 1),
            _uint32(ints + 2),
            _uint32(ints + 3),
            _uint32(ints + 4),
        )
        if FAMILY == 0:
            z = normal_tile(first, step, param, probe, k0, k1, TILE)
        else:
            z = rademacher_tile(first, step, param, probe, k0, k1, TILE)
        value = tl.fma(z, scale, value)
    value = tl.where(known, value, float("nan"))
    _store_bits(out + row * cols + index, round_nearest(value, CODE), mask, CODE)


@triton.jit
def _materialize_kernel(
    weights,
    out0,
    out1,
    segments,
    ints,
    floats,
    CODE: tl.constexpr,
    WRITE_BACK: tl.constexpr,
    NUM_EMITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one segment.

    weights, out0, out1: int32 or int16 pointers by CODE; emit i of NUM_EMITS goes to out i. Two emits have the same
        terms but for the coefficients, so that each noise is made once.
    segments: int64 [S, 6]: first tile, first element in the buffer, numel, param, element_offset, group.
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
        before = tl.load(segments + 6 * middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    segment = segments + 6 * low
    numel = tl.load(segment + 2)
    param = _uint32(segment + 3)
    element_offset = tl.load(segment + 4)
    group = tl.load(segment + 5).to(tl.int32)

    first = (element_offset // TILE + tile - tl.load(segment)) * TILE
    index = first - element_offset + tl.arange(0, TILE)
    mask = (index >= 0) & (index < numel)
    place = tl.load(segment + 1) + index
    bits = _load_bits(weights + place, mask, CODE)
    changed = tile * 0

    for u in range(num_updates):
        step = _uint32(updates + 3 * u)
        begin = tl.load(updates + 3 * u + 1).to(tl.int32)
        end = begin + tl.load(updates + 3 * u + 2).to(tl.int32)
        scalars = floats + 4 * (u * num_groups + group)
        lr = tl.load(scalars)
        weight_decay = tl.load(scalars + 1)
        update_scale = tl.load(scalars + 3)
        active = weight_decay != 0.0
        for t in range(begin, end):
            active = active | (tl.load(coefs + t) * update_scale != 0.0)
        active = active & (lr != 0.0)
        if active:
            value = decode(bits, CODE)
            total = tl.where(weight_decay == 0.0, 0.0, weight_decay * value)
            for t in range(begin, end):
                coef = tl.load(coefs + t) * update_scale
                if coef != 0.0:
                    term = terms + 4 * t
                    z = noise_tile(tl.load(term), first, _uint32(term + 1), param, _uint32(term + 2), k0, k1, TILE)
                    total = tl.fma(z, coef, total)
            value = tl.fma(total, -lr, value)
            if CODE == 0:
                bits = round_nearest(value, CODE)
            else:
                bits = round_stochastic(value, rounding_tile(first, step, param, k0, k1, TILE), CODE)
            changed = tile * 0 + 1

    if WRITE_BACK:  # noqa: SIM102 -- one is known when compiling, the other is not
        if changed != 0:
            _store_bits(weights + place, bits, mask, CODE)

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
        total1 = total0
        for t in range(begin0, end0):
            term = terms + 4 * t
            z = noise_tile(tl.load(term), first, _uint32(term + 1), param, _uint32(term + 2), k0, k1, TILE)
            coef0 = tl.load(coefs + t) * scale0
            total0 = tl.where(coef0 != 0.0, tl.fma(z, coef0, total0), total0)
            if NUM_EMITS == 2:
                coef1 = tl.load(coefs + t + shift) * scale1
                total1 = tl.where(coef1 != 0.0, tl.fma(z, coef1, total1), total1)
        _store_bits(out0 + place, round_nearest(total0, CODE), mask, CODE)
        if NUM_EMITS == 2:
            _store_bits(out1 + place, round_nearest(total1, CODE), mask, CODE)


INTERPRETED = not isinstance(_materialize_kernel, triton.JITFunction)


# Launches.

_BITS_TYPE = {0: torch.int32, 1: torch.int16, 2: torch.int16}
_segment_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _num_tiles(element_offset: int, numel: int) -> int:
    return (element_offset + numel - 1) // _TILE - element_offset // _TILE + 1


def _typed(buffer: torch.Tensor, code: int) -> torch.Tensor:
    """A view of bytes, or of weights, as integers of the width of a dtype code."""
    flat = buffer.view(-1)
    if flat.dtype == torch.uint8:
        flat = flat[: flat.numel() - flat.numel() % CODE_DTYPES[code].itemsize]
    return flat.view(_BITS_TYPE[code])


def _group_segments(segments: torch.Tensor, device: torch.device) -> list[tuple[int, int, int, torch.Tensor]]:
    """(dtype code, number of segments, number of tiles, device table) of each dtype, kept while `segments` is."""
    cached = _segment_tables.setdefault(segments, {})
    key = (device, segments._version)
    if key not in cached:
        rows: dict[int, list[list[int]]] = {}
        tiles: dict[int, int] = {}
        for byte_offset, numel, code, param, element_offset, group, _, _ in segments.tolist():
            if numel:
                begin = tiles.get(code, 0)
                row = [begin, byte_offset // CODE_DTYPES[code].itemsize, numel, param, element_offset, group]
                rows.setdefault(code, []).append(row)
                tiles[code] = begin + _num_tiles(element_offset, numel)
        cached[key] = [
            (code, len(table), tiles[code], torch.tensor(table, dtype=torch.int64).to(device))
            for code, table in rows.items()
        ]
    return cached[key]


def _split_emits(emits: list[list[int]], term_rows: list[list[int]]) -> list[list[int]]:
    """Indices of the emits of each launch: two neighbours with the same terms share one, as +eps and -eps do."""

    def keys(emit: int) -> list[list[int]]:
        first, num = emits[emit]
        return term_rows[first : first + num]

    launches: list[list[int]] = []
    for emit in range(len(emits)):
        if launches and len(launches[-1]) == 1 and keys(launches[-1][0]) == keys(emit):
            launches[-1].append(emit)
        else:
            launches.append([emit])
    return launches


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
    seed %= 2**64
    num_groups = update_groups.shape[1] if len(updates) else emit_scales.shape[1]
    for launch in _split_emits(emits.tolist(), terms.tolist()) or [[]]:
        for code, num_segments, num_tiles, table in _group_segments(segments, weights.device):
            header = [seed & 0xFFFFFFFF, seed >> 32, num_segments, len(updates), num_groups]
            ints = torch.tensor(header + [0] * (_HEADER - len(header)), dtype=torch.int64)
            ints = torch.cat([ints, updates.reshape(-1), emits[launch].reshape(-1), terms.reshape(-1)])
            floats = torch.cat([update_groups.reshape(-1), emit_scales[launch].reshape(-1), coefs])
            stored = _typed(weights, code)
            written = [_typed(outs[emit], code) for emit in launch]
            with _on_device(weights.device):
                _materialize_kernel[(num_tiles,)](
                    stored,
                    written[0] if written else stored,
                    written[1] if len(written) > 1 else stored,
                    table,
                    ints.to(weights.device, non_blocking=True),
                    floats.to(weights.device, non_blocking=True),
                    CODE=code,
                    WRITE_BACK=write_back and len(updates) > 0,
                    NUM_EMITS=len(launch),
                    TILE=_TILE,
                    enable_fp_fusion=False,
                )
        if write_back:  # the first launch made the updates
            updates, update_groups = updates[:0], update_groups[:0]


def _in_place(w: torch.Tensor, seed: int, param: int, offset: int, **program: torch.Tensor) -> None:
    """materialize on one tensor, the emit, if there is one, going to the tensor itself."""
    segments = torch.tensor([[0, w.numel(), DTYPE_CODES[w.dtype], param, offset, 0, 1, w.numel()]], dtype=torch.int64)
    outs = [w] * len(program["emits"])
    materialize(w, segments, seed, **program, outs=outs, write_back=len(program["updates"]) > 0)


def perturb_(
    w: torch.Tensor, scale: float, seed: int, step: int, param: int, probe: int, offset: int, family: int
) -> None:
    _in_place(
        w,
        seed,
        param,
        offset,
        terms=torch.tensor([[family, step, probe, 0]]),
        coefs=torch.tensor([scale], dtype=torch.float32),
        updates=torch.empty(0, 3, dtype=torch.int64),
        update_groups=torch.empty(0, 1, 4),
        emits=torch.tensor([[0, 1]]),
        emit_scales=torch.ones(1, 1),
    )


def restore_(
    w: torch.Tensor, scale: float, seed: int, step: int, param: int, probe: int, offset: int, family: int
) -> None:
    perturb_(w, -scale, seed, step, param, probe, offset, family)


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
) -> None:
    _in_place(
        w,
        seed,
        param,
        offset,
        terms=torch.tensor([[family, step, probe, 0]]),
        coefs=torch.tensor([coef], dtype=torch.float32),
        updates=torch.tensor([[step, 0, 1]]),
        update_groups=torch.tensor([[[lr, weight_decay, 1.0, 1.0]]], dtype=torch.float32),
        emits=torch.empty(0, 2, dtype=torch.int64),
        emit_scales=torch.empty(0, 1),
    )


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
) -> torch.Tensor:
    rows, cols = weight.shape
    if weight.device.type == "cpu":
        for i, row in enumerate(ids.reshape(-1).tolist()):
            if not 0 <= row < rows:
                raise IndexError(f"ids[{i}] is {row}, and the table has {rows} rows")
    out = torch.empty(*ids.shape, cols, dtype=weight.dtype, device=weight.device)
    if not out.numel():
        return out
    seed %= 2**64
    code = DTYPE_CODES[weight.dtype]
    ints = torch.tensor([seed & 0xFFFFFFFF, seed >> 32, step, param, probe, offset, rows, cols], dtype=torch.int64)
    with _on_device(weight.device):
        _embedding_kernel[(ids.numel(), (cols + 2 * (_TILE - 1)) // _TILE)](
            _typed(weight, code) if weight.numel() else _typed(out, code),
            ids.contiguous(),
            _typed(out, code),
            ints.to(weight.device, non_blocking=True),
            torch.tensor([scale], dtype=torch.float32).to(weight.device, non_blocking=True),
            FAMILY=family,
            CODE=code,
            TILE=_TILE,
            enable_fp_fusion=False,
        )
    return out


def _generate(
    family: int,
    numel: int,
    seed: int,
    step: int,
    param: int,
    probe: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    out = torch.empty(numel, dtype=dtype, device=device)
    seed %= 2**64
    ints = torch.tensor([seed & 0xFFFFFFFF, seed >> 32, step, param, probe, offset, numel], dtype=torch.int64)
    with _on_device(out.device):
        _noise_kernel[(_num_tiles(offset, numel),)](
            _typed(out, DTYPE_CODES[dtype]),
            ints.to(out.device, non_blocking=True),
            FAMILY=family,
            CODE=DTYPE_CODES[dtype],
            TILE=_TILE,
            enable_fp_fusion=False,
        )
    return out


def normal(
    numel: int, seed: int, step: int, param: int, probe: int, offset: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return _generate(NORMAL, numel, seed, step, param, probe, offset, dtype, device)


def rademacher(
    numel: int, seed: int, step: int, param: int, probe: int, offset: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return _generate(RADEMACHER, numel, seed, step, param, probe, offset, dtype, device)
