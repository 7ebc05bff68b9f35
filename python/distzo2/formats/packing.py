"""Packs the matrices of a 16-bit or float32 checkpoint while it is loaded, round to nearest, a group of 64 at a time.

Groups run along a row. The stores, with b bits and top = 2^(b-1) - 1; every step in float32, rounded once:

    affine8, affine16   s = max|w| / top * headroom,  q = rne(w / s) in [-top, top],  v = q * s
    affine4             m = min(w),  s = (max(w) - m) / 15,  q = rne((w - m) / s) in [0, 15],  v = fma(s, q, m)
    table4              s = max|w|,  q the level of nf4 nearest to w / s,  v = level * s

m and s of the 4-bit stores are rounded to bfloat16, each before it is used, so that a weight takes 0.56 or 0.53 bytes.
A group of zeros has s = 0 and q = 0. A parameter's bytes are all its codes in row-major order, then, from the next
multiple of 64 bytes, all scales, then minima likewise. They depend on the weights alone, and are made anew, a few MiB
at a time, whenever they are read.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.packed_param import PIECE_ALIGNMENT, VALUE_DTYPES, PackedParam, Piece
from distzo2.checkpoint.reading import read_ranges
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.formats.matrices import NF4
from distzo2.formats.packed_checkpoint import PackingError
from distzo2.weights.units import TRAINABLE_DTYPES, ParamInfo, StoredAs, collect_params, find_units
from distzo2_core.packed import Field, Kind, PackedLayout

GROUP = 64
_CHUNK_GROUPS = (1 << 18) // GROUP  # packed at once: buffers of 1 MiB
_SERIAL_GROUPS = (1 << 15) // GROUP - 1  # converted at once, since torch shares out more among threads


class Store(NamedTuple):
    """How weights are packed.

    Attributes:
        codes: the kind of the codes.
        scale: the kind of scales and minima.
        bits: of a code.
        headroom: by how much scales exceed what a group needs, so that training moves its largest weight without
            clamping it; 1 for what is never trained.
        has_min: whether a group has a minimum.
        levels: what codes stand for; none where they are numbers.
    """

    codes: Kind
    scale: Kind
    bits: int
    headroom: float = 1.0
    has_min: bool = False
    levels: tuple[float, ...] = ()


STORES = {
    "affine4": Store(Kind.NIBBLES_32, Kind.BFLOAT16, 4, has_min=True),
    "table4": Store(Kind.NIBBLES_32, Kind.BFLOAT16, 4, levels=NF4),
    "affine8": Store(Kind.INT8, Kind.FLOAT32, 8, headroom=1.125),
    "affine16": Store(Kind.INT16, Kind.FLOAT32, 16, headroom=1.5),
}
_PLANES = ("codes", "scale", "min")  # in this order
_CODES = {Kind.INT8: np.int8, Kind.INT16: np.int16}


def packed_as(shape: Sequence[int], store: str) -> StoredAs:
    """How a parameter of this shape is stored, packed: its bytes and their layout. They are in no file."""
    kind, cols, at, places = STORES[store], shape[-1], 0, []
    rows, scale_bytes = math.prod(shape) // cols, VALUE_DTYPES[kind.scale].itemsize
    for size in (GROUP * kind.bits // 8, scale_bytes, *([scale_bytes] if kind.has_min else [])):  # of a group
        offset, line = -(-at // PIECE_ALIGNMENT) * PIECE_ALIGNMENT, cols // GROUP * size
        stride = {"stride": size, "cols": GROUP} if places else {}
        places.append(Field(kind.scale if places else kind.codes, offset, row_stride=line, **stride))
        at = offset + rows * line
    layout = PackedLayout(rows, cols, cols, **dict(zip(_PLANES, places, strict=False)), levels=kind.levels)
    return StoredAs(at, None, None, layout, format=f"{store} g{GROUP}")


def packable(model: nn.Module, units: list[str] | None = None) -> set[str]:
    """Names of the parameters of a model that a store packs: the matrices of its blocks, see `pack_map`."""
    blocks = [unit for unit in find_units(model, collect_params(model), units) if not unit.resident]
    return {param.name for unit in blocks for param in unit.params if _is_packable(param)}


def pack_map(
    model: nn.Module,
    checkpoint_map: CheckpointMap,
    store: str,
    units: list[str] | None = None,
    names: Container[str] | None = None,
) -> tuple[CheckpointMap, PackingError]:
    """Has the matrices of a model's blocks packed when they are read.

    These are the parameters of two dimensions, or of three as stacked experts have, whose last is a multiple of 64.
    Embeddings, heads, routers of experts, norms, biases and whatever blocks share stay as they are. No weight is read.

    Args:
        model: with its parameters on meta, before adapters are put around it.
        checkpoint_map: what fills them. It is left as it is, and its files must stay open.
        store: "affine4", "table4", "affine8" or "affine16".
        units: as for `distzo2.offload`.
        names: of the parameters, if they are known; None: those above.

    Returns:
        the map that fills it, packed; and the error, which is complete when all parameters have been read.

    Raises:
        CheckpointError: there is no such store, or nothing to pack. Reading a parameter raises it for weights that are
            not finite, or larger than the scales' type can hold.
    """
    if store not in STORES:
        raise CheckpointError(f"expected a store among {', '.join(STORES)}, got {store!r}")
    if checkpoint_map.is_packed:
        where = f"{checkpoint_map.directory}: its weights are packed already ({checkpoint_map.formats})"
        raise CheckpointError(
            f"{where}: leave --store, or store=, out, or name the checkpoint that they were packed from"
        )
    chosen = packable(model, units) if names is None else names
    error, packed = PackingError(), dict(checkpoint_map.mapped)
    for name, mapped in packed.items():
        if name in chosen and mapped.packed is None:
            packed[name] = replace(mapped, packed=_Packer(mapped, checkpoint_map, store, error).param())
    if packed == checkpoint_map.mapped:
        where = checkpoint_map.directory
        raise CheckpointError(f"{where}: expected matrices of a multiple of {GROUP} columns in blocks, found none")
    return replace(checkpoint_map, mapped=packed), error


def _is_packable(param: ParamInfo) -> bool:
    shape = param.shape
    is_small = any(isinstance(owner, nn.Embedding) or "Router" in type(owner).__name__ for owner in param.owners)
    is_matrix = len(shape) in (2, 3) and shape.numel() > 0 and shape[-1] % GROUP == 0
    return is_matrix and not is_small and param.dtype in TRAINABLE_DTYPES


class _Packer:
    """Makes the bytes of one parameter."""

    def __init__(self, mapped: MappedTensor, checkpoint_map: CheckpointMap, store: str, error: PackingError):
        self.mapped, self.files, self.store, self.error = mapped, checkpoint_map.files, STORES[store], error
        self.num_groups, self.stored = mapped.numel // GROUP, packed_as(mapped.shape, store)
        places = [place for name in _PLANES if (place := getattr(self.stored.layout, name)) is not None]
        self.offsets = [place.offset for place in places]
        self.sizes = [place.row_stride * GROUP // mapped.shape[-1] for place in places]  # of a group

    def param(self) -> PackedParam:
        piece = Piece(None, 0, self.stored.num_bytes, self.fill, is_checked=True)
        return PackedParam(self.mapped.name, self.mapped.shape, self.stored.format, (piece,), self.stored.layout)

    def fill(self, out: torch.Tensor, begin: int) -> None:
        """Fills `out` with the bytes from `begin` on. All of them take one pass over the weights."""
        data, end = out.numpy(), begin + out.numel()
        ends = (stop for _, stop in self.spans(0, self.num_groups))
        for stop, start in zip(ends, self.offsets[1:], strict=False):
            out[max(0, stop - begin) : max(0, start - begin)] = 0

        for first in range(0, self.num_groups, _CHUNK_GROUPS):
            count = min(_CHUNK_GROUPS, self.num_groups - first)
            spans = self.spans(first, count)
            if all(stop <= begin or end <= start for start, stop in spans):
                continue
            for plane, (start, stop) in zip(self.pack(first, count), spans, strict=True):
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    made = plane.reshape(-1).view(np.uint8)
                    data[low - begin : high - begin] = made[low - start : high - start]

    def spans(self, first: int, count: int) -> list[tuple[int, int]]:
        """Where the codes, scales and minima of some groups begin and end."""
        return [(at + first * n, at + (first + count) * n) for at, n in zip(self.offsets, self.sizes, strict=True)]

    def weights(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Groups as the files have them, float32 [count, GROUP], and their smallest and largest weights: what the model
        computes in does not round them."""
        pieces = Layout(self.mapped.shape, self.mapped.pieces).flat(first * GROUP, count * GROUP).pieces
        dtypes = {self.files.entries[piece.source].dtype for piece in pieces}
        stored = torch.empty(count, GROUP, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
        read_ranges(part for piece in pieces for part in self.files.ranges_of(piece, stored.view(-1)))
        out = torch.empty(count, GROUP)
        parts = out.split(_SERIAL_GROUPS)
        for part, source in zip(parts, stored.split(_SERIAL_GROUPS), strict=True):
            part.copy_(source)
        low, high = (torch.cat([order(part, 1, keepdim=True) for part in parts]) for order in (torch.amin, torch.amax))
        return out, low, high

    def pack(self, first: int, count: int) -> list[np.ndarray]:
        """Codes, scales and minima of some groups; notes their error.

        NumPy computes in the calling thread, of which there are several while a checkpoint is loaded; torch would start
        more in each of them.
        """
        store, (weights, low, high) = self.store, self.weights(first, count)
        dtype = VALUE_DTYPES[store.scale]
        top = 15 if store.has_min else 1 if store.levels else 2 ** (store.bits - 1) - 1
        kept = [low.to(dtype)] if store.has_min else []
        reach = high - kept[0].float() if store.has_min else torch.maximum(high, -low)
        kept.insert(0, (reach / top * store.headroom).to(dtype))
        if not all(each.isfinite().all() for each in (low, high, kept[0])):
            self._refuse(weights, first)
        w = weights.numpy()
        scale, minimum = (each.float().numpy() for each in (kept[0], kept[-1]))
        value = w - minimum if store.has_min else w.copy()
        value /= scale + (scale == 0)
        if store.levels:
            levels, codes = np.float32(store.levels), np.zeros(w.shape, np.uint8)
            for between in (levels[1:] + levels[:-1]) / 2:
                codes += value > between
            value = levels.take(codes)
        else:
            np.clip(value, 0 if store.has_min else -top, top, out=value)
            codes = np.rint(value, out=value).astype(_CODES.get(store.codes, np.uint8))
        value *= scale
        value += minimum if store.has_min else np.float32(0)
        with np.errstate(over="ignore"):  # of weights beyond 1e19
            noted = tuple(float(np.square(each).sum()) for each in (value - w, w))
        self.error.sums.setdefault(self.mapped.name, {})[first] = noted
        if store.codes == Kind.NIBBLES_32:
            halves = codes.reshape(-1, 2, 16)
            codes = halves[:, 0] | halves[:, 1] << 4
        return [codes, *(each.view(torch.uint8).numpy() for each in kept)]

    def _refuse(self, weights: torch.Tensor, first: int) -> None:
        flat = weights.view(-1)
        at = int(torch.where(flat.isfinite(), flat.abs(), torch.inf).argmax())
        row = (first * GROUP + at) // self.mapped.shape[-1]
        where = f"{self.files.directory}: {self.mapped.name!r}, row {row}"
        raise CheckpointError(f"{where}: expected finite weights with finite scales, got {flat[at].item()}")
