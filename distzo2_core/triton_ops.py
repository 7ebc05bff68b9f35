"""The torch ops `distzo2::*` by the kernels of `triton_kernels`: their tables, and their launches on torch's current
stream of the tensors' device. The caller checked the arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .triton_kernels import HEADER, embedding_kernel, materialize_kernel, noise_kernel
from .types import CODE_DTYPES, DTYPE_CODES, NORMAL, RADEMACHER

_TILE = 1024  # elements
_tensor = functools.partial(torch.tensor, device="cpu")  # whatever the default device is

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
            (code, len(table), tiles[code], _tensor(table, dtype=torch.int64).to(device))
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
            ints = _tensor(header + [0] * (HEADER - len(header)), dtype=torch.int64)
            ints = torch.cat([ints, updates.reshape(-1), emits[launch].reshape(-1), terms.reshape(-1)])
            floats = torch.cat([update_groups.reshape(-1), emit_scales[launch].reshape(-1), coefs])
            stored = _typed(weights, code)
            written = [_typed(outs[emit], code) for emit in launch]
            with _on_device(weights.device):
                materialize_kernel[(num_tiles,)](
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
    segments = _tensor([[0, w.numel(), DTYPE_CODES[w.dtype], param, offset, 0, 1, w.numel()]], dtype=torch.int64)
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
        terms=_tensor([[family, step, probe, 0]]),
        coefs=_tensor([scale], dtype=torch.float32),
        updates=_tensor([], dtype=torch.int64).view(0, 3),
        update_groups=_tensor([]).view(0, 1, 4),
        emits=_tensor([[0, 1]]),
        emit_scales=_tensor([[1.0]]),
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
        terms=_tensor([[family, step, probe, 0]]),
        coefs=_tensor([coef], dtype=torch.float32),
        updates=_tensor([[step, 0, 1]]),
        update_groups=_tensor([[[lr, weight_decay, 1.0, 1.0]]], dtype=torch.float32),
        emits=_tensor([], dtype=torch.int64).view(0, 2),
        emit_scales=_tensor([]).view(0, 1),
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
    ints = _tensor([seed & 0xFFFFFFFF, seed >> 32, step, param, probe, offset, rows, cols], dtype=torch.int64)
    with _on_device(weight.device):
        embedding_kernel[(ids.numel(), (cols + 2 * (_TILE - 1)) // _TILE)](
            _typed(weight, code) if weight.numel() else _typed(out, code),
            ids.contiguous(),
            _typed(out, code),
            ints.to(weight.device, non_blocking=True),
            _tensor([scale], dtype=torch.float32).to(weight.device, non_blocking=True),
            FAMILY=family,
            CODE=code,
            TILE=_TILE,
            enable_fp_fusion=False,
        )
    return out


def noise_(out: torch.Tensor, seed: int, step: int, param: int, probe: int, offset: int, family: int) -> None:
    seed %= 2**64
    ints = _tensor([seed & 0xFFFFFFFF, seed >> 32, step, param, probe, offset, out.numel()], dtype=torch.int64)
    with _on_device(out.device):
        noise_kernel[(_num_tiles(offset, out.numel()),)](
            _typed(out, DTYPE_CODES[out.dtype]),
            ints.to(out.device, non_blocking=True),
            FAMILY=family,
            CODE=DTYPE_CODES[out.dtype],
            TILE=_TILE,
            enable_fp_fusion=False,
        )


def normal(
    numel: int, seed: int, step: int, param: int, probe: int, offset: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    out = torch.empty(numel, dtype=dtype, device=device)
    noise_(out, seed, step, param, probe, offset, NORMAL)
    return out


def rademacher(
    numel: int, seed: int, step: int, param: int, probe: int, offset: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    out = torch.empty(numel, dtype=dtype, device=device)
    noise_(out, seed, step, param, probe, offset, RADEMACHER)
    return out
