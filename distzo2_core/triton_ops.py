"""The torch ops `distzo2::*` by the kernels of `triton_kernels`: their tables, and their launches on torch's current
stream of the tensors' device. The caller checked the arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from .packed import KINDS_OF
from .triton_kernels import HEADER, embedding_kernel, materialize_kernel, noise_kernel
from .triton_packed import decode_kernel
from .types import CODE8, CODE_DTYPES, DTYPE_CODES, FROZEN, in_place_ops

_TILE = 1024  # elements
_tensor = functools.partial(torch.tensor, device="cpu")  # whatever the default device is

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by their bytes
_segment_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _num_tiles(element_offset: int, numel: int) -> int:
    return (element_offset + numel - 1) // _TILE - element_offset // _TILE + 1


def _typed(buffer: torch.Tensor, code: int) -> torch.Tensor:
    """A view of bytes, or of weights, as integers of the width of a dtype code."""
    flat, itemsize = buffer.view(-1), CODE_DTYPES[code].itemsize
    if flat.dtype == torch.uint8:
        flat = flat[: flat.numel() - flat.numel() % itemsize]
    return flat.view(_INTEGERS[itemsize])


class _Kind(NamedTuple):
    """What a kernel is compiled for: a segment's dtypes, and whether its place in the outs is another one."""

    code: int
    out_code: int
    moved: bool


def _group_segments(segments: torch.Tensor, device: torch.device) -> list[tuple[_Kind, int, int, torch.Tensor]]:
    """(kind, number of segments, number of tiles, device table) of each kind, kept while `segments` is."""
    cached = _segment_tables.setdefault(segments, {})
    key = (device, segments._version)
    if key not in cached:
        rows: dict[_Kind, list[list[int]]] = {}
        tiles: dict[_Kind, int] = {}
        for segment in segments.tolist():
            byte_offset, numel, code, param, element_offset, group, *matrix = segment[:8]
            out_offset, out_code, *scaling = segment[8:]
            if numel:
                kind = _Kind(code, out_code, (byte_offset, code) != (out_offset, out_code))
                begin = tiles.get(kind, 0)
                place, out_place = (
                    offset // CODE_DTYPES[each].itemsize
                    for offset, each in ((byte_offset, code), (out_offset, out_code))
                )
                each = 4 if scaling[1] else CODE_DTYPES[code].itemsize  # without scales it is where w0 begins
                scales = (scaling[0] // each, max(1, scaling[1]).bit_length() - 1)
                row = [begin, place, numel, param, element_offset, group - FROZEN, out_place, *scales, *matrix]
                rows.setdefault(kind, []).append(row)
                tiles[kind] = begin + _num_tiles(element_offset, numel)
        cached[key] = [
            (kind, len(table), tiles[kind], _tensor(table, dtype=torch.int64).to(device))
            for kind, table in rows.items()
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
    # The kernel's first group is that of what is frozen: its rate and its scales are 0.
    update_groups, emit_scales = pad(update_groups, (0, 0, 1, 0)), pad(emit_scales, (1, 0))
    num_groups = update_groups.shape[1] if len(updates) else emit_scales.shape[1]
    anchored = bool(update_groups[:, :, 2].any())
    for launch in _split_emits(emits.tolist(), terms.tolist()) or [[]]:
        for kind, num_segments, num_tiles, table in _group_segments(segments, weights.device):
            if not launch:
                kind = _Kind(kind.code, kind.code, False)
            header = [seed & 0xFFFFFFFF, seed >> 32, num_segments, len(updates), num_groups]
            ints = _tensor(header + [0] * (HEADER - len(header)), dtype=torch.int64)
            ints = torch.cat([ints, updates.reshape(-1), emits[launch].reshape(-1), terms.reshape(-1)])
            floats = torch.cat([update_groups.reshape(-1), emit_scales[launch].reshape(-1), coefs])
            stored = _typed(weights, kind.code)
            written = [*(_typed(outs[emit], kind.out_code) for emit in launch), stored, stored]
            with _on_device(weights.device):
                materialize_kernel[(num_tiles,)](
                    stored,
                    *written[:2],
                    table,
                    ints.to(weights.device, non_blocking=True),
                    floats.to(weights.device, non_blocking=True),
                    CODE=kind.code,
                    OUT_CODE=kind.out_code,
                    MOVED=kind.moved,
                    WRITE_BACK=write_back and len(updates) > 0,
                    NUM_EMITS=len(launch),
                    LOW_RANK=bool((terms[:, 0] >= 16).any()),
                    ANCHORED=anchored and kind.code < CODE8,
                    TILE=_TILE,
                    enable_fp_fusion=False,
                )
        if write_back:  # the first launch made the updates
            updates, update_groups = updates[:0], update_groups[:0]


perturb_, update_ = in_place_ops(materialize)


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
    rows, cols = weight.shape
    if weight.device.type == "cpu":
        for i, row in enumerate(ids.reshape(-1).tolist()):
            if not 0 <= row < rows:
                raise IndexError(f"ids[{i}] is {row}, and the table has {rows} rows")
    out = torch.empty(*ids.shape, cols, dtype=out_dtype or weight.dtype, device=weight.device)
    if not out.numel():
        return out
    seed %= 2**64
    code, out_code = DTYPE_CODES[weight.dtype], DTYPE_CODES[out.dtype]
    ints = _tensor([seed & 0xFFFFFFFF, seed >> 32, step, param, probe, offset, rows, cols], dtype=torch.int64)
    with _on_device(weight.device):
        embedding_kernel[(ids.numel(), (cols + 2 * (_TILE - 1)) // _TILE)](
            _typed(weight if weight.numel() else weight.new_empty(1), code),
            ids.contiguous(),
            _typed(out, out_code),
            ints.to(weight.device, non_blocking=True),
            _tensor([scale], dtype=torch.float32).to(weight.device, non_blocking=True),
            FAMILY=family,
            CODE=code,
            OUT_CODE=out_code,
            TILE=_TILE,
            enable_fp_fusion=False,
        )
    return out


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
    seed %= 2**64
    place = [seed & 0xFFFFFFFF, seed >> 32, step, param, probe, offset, out.numel(), rows, cols]
    ints = _tensor(place, dtype=torch.int64)
    with _on_device(out.device):
        noise_kernel[(_num_tiles(offset, out.numel()),)](
            _typed(out, DTYPE_CODES[out.dtype]),
            ints.to(out.device, non_blocking=True),
            FAMILY=family if cols else family & 15,
            CODE=DTYPE_CODES[out.dtype],
            TILE=_TILE,
            enable_fp_fusion=False,
        )


def decode(stored: Tensor, matrices: Tensor, levels: Tensor, out: Tensor, gains: Tensor | None = None) -> None:
    device = stored.device
    on_device, levels = matrices.to(device, non_blocking=True), levels.to(device, non_blocking=True)
    for index, row in enumerate(matrices.tolist()):
        rows, cols, _, _, _, divides, _, has_levels, out_offset, code = row[:10]
        kinds = dict(zip((name.upper() for name in KINDS_OF), row[10::7], strict=True))
        if not rows * cols:
            continue
        num_bytes = rows * cols * CODE_DTYPES[code].itemsize
        with _on_device(device):
            decode_kernel[(rows, -(-cols // _TILE))](
                stored,
                _typed(out[out_offset : out_offset + num_bytes], code),
                on_device[index],
                levels[index],
                stored if gains is None else gains,
                **kinds,
                DIVIDES=divides,
                LEVELS=has_levels,
                OUT_CODE=code,
                TILE=_TILE,
                enable_fp_fusion=False,
            )
