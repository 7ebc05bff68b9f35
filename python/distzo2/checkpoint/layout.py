"""Which element of a checkpoint goes where: strided pieces and the few tensor operations that rearrange them.

A `Piece` is a box of elements that a strided walk visits in the source (a checkpoint tensor, row-major on file) and
in the destination (a parameter, row-major) at once. A `Layout` is a tensor described by the pieces that fill it.
Reshapes, transposes, slices, splits and concatenations map pieces to pieces exactly, so whatever a library does with
them while it loads a checkpoint can be replayed range by range, in both directions, without ever holding the tensors.

All offsets and strides count elements. Destination coordinates are flat row-major indices into the layout's shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

_MIN_DENSITY = 0.25  # of a span that is read at once, unless its parts have less than _MIN_RUN elements
_MIN_RUN = 1024


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

    @property
    def dst_span(self) -> int:
        """Elements from the first to the last one touched in the destination."""
        return 1 + sum(stride * (size - 1) for stride, size in zip(self.dst_strides, self.sizes, strict=True))

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

    def blocks(self, max_span: int) -> Iterator[Piece]:
        """Parts of a coalesced piece whose source span is at most `max_span` elements and mostly used: of a sparse span
        only parts of few elements are kept whole."""
        size = self.sizes[0] if self.sizes else 1
        wasteful = self.numel < _MIN_DENSITY * self.src_span and self.numel >= _MIN_RUN * size
        if not self.sizes or (self.src_span <= max_span and not wasteful):
            yield self
            return
        row = self._replace(sizes=(1, *self.sizes[1:]))
        fitting = (max_span - row.src_span) // self.src_strides[0] + 1
        steps = max(1, min(size - 1, fitting)) if self.src_span > max_span else 1
        rest = self
        while rest.sizes[0] > steps:
            head, rest = rest.cut(0, steps)
            yield from head.coalesced().blocks(max_span)
        yield from rest.coalesced().blocks(max_span)


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(1, shape[dim + 1])
    return tuple(strides)


class Layout(NamedTuple):
    """A tensor of `shape` as the pieces that fill it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @staticmethod
    def leaf(source: int, shape: Sequence[int]) -> Layout:
        """The whole tensor number `source`."""
        numel = math.prod(shape)
        pieces = (Piece(source, (numel,), 0, (1,), 0, (1,)).coalesced(),) if numel else ()
        return Layout(tuple(shape), pieces)

    def flat(self, begin: int, length: int) -> Layout:
        """The `length` elements from `begin` on, counted through all dimensions."""
        near = (p for p in self.pieces if p.dst_offset < begin + length and begin < p.dst_offset + p.dst_span)
        moved = Layout(self.shape, tuple(near))._moved((math.prod(self.shape),), (begin,), (length,), (1,))
        return Layout((length,), moved)

    def strided(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> Layout:
        """What `torch.as_strided` would view of the row-major tensor: dimension i of the result takes `shape[i]` steps
        of `strides[i]` elements, from element `offset` on."""
        pieces = () if 0 in shape else self._walked(shape, strides, offset, row_major_strides(shape))
        return Layout(tuple(shape), pieces)

    def through(self, piece: Piece) -> tuple[Piece, ...]:
        """What `piece` takes from this tensor, as pieces that take it from this tensor's own sources."""
        return self._walked(piece.sizes, piece.src_strides, piece.src_offset, piece.dst_strides, piece.dst_offset)

    def _walked(
        self, shape: Sequence[int], strides: Sequence[int], offset: int, steps: Sequence[int], to: int = 0
    ) -> tuple[Piece, ...]:
        """The pieces of a walk of `strides` from element `offset` on, laid out with `steps` from `to` on."""
        dims = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -strides[d])
        # A window into the tensor reshaped to dimensions that have just these strides.
        extents = [*pairwise([math.prod(self.shape), *(strides[d] for d in dims), 1])]
        begin = [offset % max(1, extent) // max(1, step) for extent, step in extents]
        length = [*(shape[d] for d in dims), 1]
        if any(
            step == 0 or extent % step or b + n > extent // step
            for (extent, step), b, n in zip(extents, begin, length, strict=True)
        ):
            raise LayoutError(f"steps of {list(strides)} do not follow the dimensions of {list(self.shape)}")
        view = [extent // step for extent, step in extents]
        return self._moved(view, begin, length, [*(steps[d] for d in dims), 0], to)

    @staticmethod
    def cat(parts: Sequence[Layout], dim: int) -> Layout:
        """`parts` side by side along `dim`."""
        first = parts[0].shape
        if len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
            raise LayoutError(f"shapes {[list(part.shape) for part in parts[:4]]} do not join along dimension {dim}")
        shape = (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])
        rows, row = math.prod(shape[:dim]), math.prod(shape[dim:])
        pieces: list[Piece] = []
        at = 0
        for part in parts:
            view = rows, math.prod(part.shape[dim:])
            pieces += part._moved(view, (0, 0), view, (row, 1), at)
            at += view[1]
        return Layout(shape, tuple(pieces))

    def _moved(
        self, shape: Sequence[int], begin: Sequence[int], length: Sequence[int], steps: Sequence[int], offset: int = 0
    ) -> tuple[Piece, ...]:
        """The pieces of a window into the tensor reshaped to `shape`: `length[d]` indices from `begin[d]` on. Each
        index in the window moves an element by `steps[d]`, from `offset` on."""
        strides = row_major_strides(shape)
        pieces = []
        for piece, start, dims in (part for p in self.pieces for part in _parts(p, shape, strides, begin, length)):
            to = offset + sum(step * (s - b) for step, s, b in zip(steps, start, begin, strict=True))
            walk = (stride // strides[d] * steps[d] for stride, d in zip(piece.dst_strides, dims, strict=True))
            pieces.append(piece._replace(dst_offset=to, dst_strides=tuple(walk)).coalesced())
        return tuple(pieces)


def _parts(
    piece: Piece, shape: Sequence[int], strides: Sequence[int], begin: Sequence[int], length: Sequence[int]
) -> Iterator[tuple[Piece, list[int], list[int]]]:
    """The parts of `piece` in a window of `shape`, cut and split until each of their dimensions lies within one of
    `shape`; with the indices at which each starts, and the dimension of `shape` in which each of its dimensions lies.
    """
    todo = [piece]
    while todo:
        piece = todo.pop()
        start = [piece.dst_offset // stride % size for stride, size in zip(strides, shape, strict=True)]
        dims = [
            next((d for d, size in enumerate(shape) if size > 1 and strides[d] <= stride), 0)
            for stride in piece.dst_strides
        ]
        walks = [k for k, size in enumerate(piece.sizes) if size > 1]
        if any(piece.dst_strides[k] % strides[dims[k]] for k in walks):  # a step moves along two dimensions
            raise LayoutError(f"a walk over {piece.sizes} does not follow the dimensions of shape {list(shape)}")
        last = list(start)
        for k in walks:
            last[dims[k]] += piece.dst_strides[k] // strides[dims[k]] * (piece.sizes[k] - 1)
        spans = list(enumerate(zip(start, last, shape, begin, length, strict=True)))
        over = [(dim, size) for dim, (_, end, size, _, _) in spans if end >= size]
        if not over and any(end < b or first >= b + n for _, (first, end, _, b, n) in spans):
            continue
        cuts = over or [
            (dim, b if first < b else b + n) for dim, (first, end, _, b, n) in spans if first < b or end >= b + n
        ]
        if not cuts:
            yield piece, start, dims
            continue
        dim, border = cuts[0]
        k = max((k for k in walks if dims[k] == dim), key=lambda k: piece.dst_strides[k])
        step, size = piece.dst_strides[k] // strides[dim], piece.sizes[k]
        first = last[dim] - step * (size - 1) if over else start[dim]  # with the reach of the shorter steps
        whole = border // step  # steps of k that fill the dimension exactly
        if over and border % step == 0 and first < step and 1 < whole < size:
            even = size // whole * whole
            todo += [piece.split_dim(k, whole)] if even == size else reversed(piece.cut(k, even))
        else:
            todo += reversed(piece.cut(k, min(max((border - 1 - first) // step + 1, 1), size - 1)))
