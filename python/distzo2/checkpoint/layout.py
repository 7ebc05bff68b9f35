"""Which element of a checkpoint goes where: strided pieces and the few tensor operations that rearrange them.

A `Piece` is a box of elements that a strided walk visits in the source (a checkpoint tensor, row-major on file) and
in the destination (a parameter, row-major) at once. A `Layout` is a tensor described by the pieces that fill it.
Reshapes, transposes, slices, splits and concatenations map pieces to pieces exactly, so whatever a library does with
them while it loads a checkpoint can be replayed range by range, in both directions, without ever holding the tensors.

All offsets and strides count elements. Destination coordinates are flat row-major indices into the layout's shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

_MAX_OBLIQUE_STEPS = 4096


class LayoutError(ValueError):
    """An operation or a region that strided pieces cannot express."""


class Piece(NamedTuple):
    """`sizes[k]` steps of `src_strides[k]` in tensor `source` and of `dst_strides[k]` in the destination."""

    source: int
    sizes: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def src_span(self) -> int:
        """Elements from the first to the last one touched in the source."""
        return 1 + sum(stride * (size - 1) for stride, size in zip(self.src_strides, self.sizes, strict=True))

    def to_json(self) -> list[int | list[int]]:
        return [list(field) if isinstance(field, tuple) else field for field in self]

    def cut(self, dim: int, at: int) -> tuple[Piece, Piece]:
        """The first `at` steps along `dim`, and the rest."""
        head, tail = list(self.sizes), list(self.sizes)
        head[dim], tail[dim] = at, self.sizes[dim] - at
        rest = self._replace(
            sizes=tuple(tail),
            src_offset=self.src_offset + at * self.src_strides[dim],
            dst_offset=self.dst_offset + at * self.dst_strides[dim],
        )
        return self._replace(sizes=tuple(head)), rest

    def split_dim(self, dim: int, inner: int) -> Piece:
        """The same walk with dimension `dim` written as (size / inner, inner)."""
        sizes, src, dst = list(self.sizes), list(self.src_strides), list(self.dst_strides)
        sizes[dim : dim + 1] = [sizes[dim] // inner, inner]
        src[dim : dim + 1] = [src[dim] * inner, src[dim]]
        dst[dim : dim + 1] = [dst[dim] * inner, dst[dim]]
        return self._replace(sizes=tuple(sizes), src_strides=tuple(src), dst_strides=tuple(dst))

    def coalesced(self) -> Piece:
        """The same walk in the fewest dimensions, ordered by falling source stride."""
        dims = [d for d in zip(self.src_strides, self.dst_strides, self.sizes, strict=True) if d[2] != 1]
        merged: list[tuple[int, int, int]] = []
        for src, dst, size in sorted(dims, reverse=True):
            if merged and merged[-1][0] == src * size and merged[-1][1] == dst * size:
                merged[-1] = (src, dst, merged[-1][2] * size)
            else:
                merged.append((src, dst, size))
        return self._replace(
            sizes=tuple(size for _, _, size in merged),
            src_strides=tuple(src for src, _, _ in merged),
            dst_strides=tuple(dst for _, dst, _ in merged),
        )

    @property
    def is_run(self) -> bool:
        """One contiguous run on both sides (of a coalesced piece)."""
        return self.src_strides == self.dst_strides and self.src_strides in ((), (1,))

    @property
    def src_is_dense(self) -> bool:
        """The walk visits every element of its source span."""
        return self.numel == self.src_span

    def blocks(self, max_span: int, min_density: float = 0.25, min_run: int = 1024) -> Iterator[Piece]:
        """Parts of a coalesced piece whose source span is at most `max_span` elements and mostly used.

        A part whose span is under `min_density` used is cut further, into parts of at least `min_run` elements.
        """
        size = self.sizes[0] if self.sizes else 1
        wasteful = self.numel < min_density * self.src_span and self.numel >= min_run * size
        if not self.sizes or (self.src_span <= max_span and not wasteful):
            yield self
            return
        row = self._replace(sizes=(1, *self.sizes[1:]))
        fitting = (max_span - row.src_span) // self.src_strides[0] + 1
        steps = max(1, min(size - 1, fitting)) if self.src_span > max_span else 1
        rest = self
        while rest.sizes[0] > steps:
            head, rest = rest.cut(0, steps)
            yield from head.coalesced().blocks(max_span, min_density, min_run)
        yield from rest.coalesced().blocks(max_span, min_density, min_run)


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(1, shape[dim + 1])
    return tuple(strides)


class _Placed(NamedTuple):
    """A piece whose every dimension moves along one dimension of its layout: (dim, step) each, from `start`."""

    piece: Piece
    start: tuple[int, ...]
    dims: tuple[int, ...]
    steps: tuple[int, ...]


def _place(piece: Piece, shape: tuple[int, ...]) -> Iterator[_Placed]:
    """`piece` cut and split until each of its dimensions lies within one dimension of `shape`."""
    strides = row_major_strides(shape)
    todo = [piece]
    while todo:
        piece = todo.pop()
        start = tuple(piece.dst_offset // stride % size for stride, size in zip(strides, shape, strict=True))
        dims, steps = [], []
        oblique = None
        for k, (stride, size) in enumerate(zip(piece.dst_strides, piece.sizes, strict=True)):
            dim = next((d for d in range(len(shape)) if shape[d] > 1 and strides[d] <= stride), 0)
            dims.append(dim)
            steps.append(stride // strides[dim] if size > 1 else 0)
            if size > 1 and stride % strides[dim]:
                oblique = k
        if oblique is not None:  # a step that moves along two dimensions: only single steps stay within them
            if piece.sizes[oblique] > _MAX_OBLIQUE_STEPS:
                raise LayoutError(f"a walk over {piece.sizes} does not follow the dimensions of shape {list(shape)}")
            todo.extend(reversed(piece.cut(oblique, piece.sizes[oblique] // 2)))
            continue
        cut = _overflow(piece, shape, start, dims, steps)
        if cut is None:
            yield _Placed(piece, start, tuple(dims), tuple(steps))
        else:
            todo.extend(reversed(cut))


def _overflow(
    piece: Piece, shape: tuple[int, ...], start: tuple[int, ...], dims: list[int], steps: list[int]
) -> list[Piece] | None:
    """None if no dimension of `piece` runs past its dimension of `shape`, else the pieces to use instead."""
    for dim in set(dims):
        mine = [k for k, d in enumerate(dims) if d == dim and piece.sizes[k] > 1]
        reach = {k: steps[k] * (piece.sizes[k] - 1) for k in mine}
        if not mine or start[dim] + sum(reach.values()) < shape[dim]:
            continue
        k = max(mine, key=lambda k: steps[k])
        others = sum(reach.values()) - reach[k]
        whole = shape[dim] // steps[k]  # steps of k that fill the dimension exactly
        if shape[dim] % steps[k] == 0 and start[dim] + others < steps[k] and 1 < whole < piece.sizes[k]:
            if piece.sizes[k] % whole == 0:
                return [piece.split_dim(k, whole)]
            return list(piece.cut(k, piece.sizes[k] // whole * whole))
        fits = (shape[dim] - 1 - start[dim] - others) // steps[k] + 1
        return list(piece.cut(k, min(max(fits, 1), piece.sizes[k] - 1)))
    return None


class Layout(NamedTuple):
    """A tensor of `shape` as the pieces that fill it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @staticmethod
    def leaf(source: int, shape: Sequence[int]) -> Layout:
        """The whole tensor number `source`."""
        shape = tuple(shape)
        numel = math.prod(shape)
        pieces = (Piece(source, (numel,), 0, (1,), 0, (1,)).coalesced(),) if numel else ()
        return Layout(shape, pieces)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def reshape(self, shape: Sequence[int]) -> Layout:
        """Another row-major shape of as many elements; flat indices stay."""
        if math.prod(shape) != self.numel:
            raise LayoutError(f"shape {list(self.shape)} cannot become {list(shape)}")
        return Layout(tuple(shape), self.pieces)

    def _rebuild(
        self, shape: tuple[int, ...], placed: Iterable[_Placed], order: Sequence[int], shift: Sequence[int]
    ) -> Layout:
        """Dimension d of every placed piece becomes dimension `order[d]` of `shape`, `shift[d]` further on."""
        strides = row_major_strides(shape)
        pieces = []
        for part in placed:
            offset = sum((s + shift[d]) * strides[order[d]] for d, s in enumerate(part.start))
            dst = tuple(step * strides[order[d]] for d, step in zip(part.dims, part.steps, strict=True))
            pieces.append(part.piece._replace(dst_offset=offset, dst_strides=dst).coalesced())
        return Layout(shape, tuple(pieces))

    def permute(self, order: Sequence[int]) -> Layout:
        """Dimension i of the result is dimension `order[i]`."""
        shape = tuple(self.shape[d] for d in order)
        goes_to = [list(order).index(d) for d in range(len(order))]
        placed = (part for piece in self.pieces for part in _place(piece, self.shape))
        return self._rebuild(shape, placed, goes_to, [0] * len(shape))

    def narrow(self, dim: int, start: int, length: int) -> Layout:
        """Indices `start` to `start + length` of dimension `dim`."""
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise LayoutError(f"rows {start} to {start + length} are outside dimension {dim} of {list(self.shape)}")
        if start == 0 and length == self.shape[dim]:
            return self
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        kept: list[_Placed] = []
        todo = [part for piece in self.pieces for part in _place(piece, self.shape)]
        while todo:
            part = todo.pop()
            mine = [k for k, d in enumerate(part.dims) if d == dim and part.piece.sizes[k] > 1]
            first = part.start[dim]
            last = first + sum(part.steps[k] * (part.piece.sizes[k] - 1) for k in mine)
            if last < start or first >= start + length:
                continue
            if first >= start and last < start + length:
                kept.append(part)
                continue
            k = max(mine, key=lambda k: part.steps[k])
            border = start if first < start else start + length
            at = min(max(-(-(border - first) // part.steps[k]), 1), part.piece.sizes[k] - 1)
            head, tail = part.piece.cut(k, at)
            moved = list(part.start)
            moved[dim] += at * part.steps[k]
            todo += [part._replace(piece=head), part._replace(piece=tail, start=tuple(moved))]
        shift = [0] * len(shape)
        shift[dim] = -start
        return self._rebuild(shape, kept, list(range(len(shape))), shift)

    def strided(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> Layout:
        """What `torch.as_strided` would view of the row-major tensor: dimension i of the result takes `shape[i]` steps
        of `strides[i]` elements, from element `offset` on."""
        if 0 in shape:
            return Layout(tuple(shape), ())
        dims = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -strides[d])
        # Reshaped to dimensions that have just these strides, the tensor only needs to be narrowed and permuted.
        extents = [*pairwise([self.numel, *(strides[d] for d in dims), 1])]
        if any(step == 0 or extent % step for extent, step in extents):
            raise LayoutError(f"steps of {list(strides)} do not follow the dimensions of {list(self.shape)}")
        view = self.reshape([extent // step for extent, step in extents])
        for k, (extent, step) in enumerate(extents):
            view = view.narrow(k, offset % extent // step, shape[dims[k]] if k < len(dims) else 1)
        if dims != sorted(dims):
            view = view.permute([*sorted(range(len(dims)), key=lambda k: dims[k]), len(dims)])
        return view.reshape(shape)

    @staticmethod
    def cat(parts: Sequence[Layout], dim: int) -> Layout:
        """`parts` side by side along `dim`."""
        first = parts[0].shape
        if len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
            raise LayoutError(f"shapes {[list(part.shape) for part in parts[:4]]} do not join along dimension {dim}")
        shape = (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])
        pieces: list[Piece] = []
        at = 0
        for part in parts:
            if all(size == 1 for size in first[:dim]):  # outermost: flat indices only shift
                offset = at * row_major_strides(shape)[dim]
                pieces += [p._replace(dst_offset=p.dst_offset + offset) for p in part.pieces]
            else:
                shift = [0] * len(shape)
                shift[dim] = at
                placed = (q for piece in part.pieces for q in _place(piece, part.shape))
                pieces += part._rebuild(shape, placed, list(range(len(shape))), shift).pieces
            at += part.shape[dim]
        return Layout(shape, tuple(pieces))
