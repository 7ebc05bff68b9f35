"""Calls of every op with random arguments, by interpreted kernels and by the native CPU kernels: equal bits."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from kernel_cases import (
    CODES,
    DTYPES,
    Visit,
    append_scales,
    assert_same_bits,
    random_codes,
    random_coef,
    random_place,
    random_weights,
)

import distzo2_core
import distzo2_core.ops
from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update
from distzo2_core.types import CODE8, CODE16, CODE_DTYPES

from .cuda_kernels import CudaKernels
from .triton_kernels import ARGUMENTS, PAIRS, STORED_PAIRS, TritonKernels

FAMILIES = ("normal", "rademacher")
# Updates and emits that the CUDA kernels have programs for, and one that they have none for.
SHAPES = ((0, 1), (0, 2), (1, 0), (1, 2), (1, 1))


@contextmanager
def backend_of(kernels: CudaKernels | TritonKernels) -> Iterator[str]:
    """The name of a backend of `distzo2_core` that is these kernels."""
    original, functions = distzo2_core.ops.implementation, kernels
    with ExitStack() as stack:
        if isinstance(kernels, TritonKernels):
            functions = importlib.import_module("distzo2_core.triton_ops")
            for name in ARGUMENTS:
                stack.enter_context(mock.patch.object(functions, name, kernels.kernel(name)))

        def implementation(backend: str | None, device: torch.device) -> object:
            return functions if backend == "ptx" else original(backend, device)

        stack.enter_context(mock.patch.object(distzo2_core.ops, "implementation", implementation))
        yield "ptx"


def pairs_of(kernels: CudaKernels | TritonKernels) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """What is emitted in another dtype than it is stored in: everything, or what was compiled for these tests."""
    if isinstance(kernels, TritonKernels):
        codes = [*PAIRS, *(pair for pair in STORED_PAIRS if CODE_DTYPES[pair[0]] in CODES)]
    else:
        codes = [*itertools.permutations(range(3), 2), *itertools.product((CODE8, CODE16), range(3))]
    return tuple((CODE_DTYPES[code], DTYPES[out_code]) for code, out_code in codes)


def simple_visit(
    rng: np.random.Generator,
    shape: tuple[int, int],
    family: int,
    dtypes: tuple[torch.dtype, ...],
    numels: list[int],
    whole: bool = False,
    plain: bool = False,
    pairs: tuple[tuple[torch.dtype, torch.dtype], ...] = (),
    nonnegative: bool = False,
    special: float = 0.05,
) -> Visit:
    """A visit of one-term updates and emits, all emits of one noise, to segments of the dtypes in turn.

    Args:
        whole: octets are whole and aligned.
        plain: weights are finite and of a model's size, and no scalar is 0.
        pairs: what segments are emitted as, in turn, if there are any; at other places, of multiples of 16 if `whole`.
        nonnegative: every segment of float32 is.
        special: the share of special values among weights that are no codes.
    """
    parts, segments, num_bytes = [], [], 0
    for index, numel in enumerate(numels):
        dtype = dtypes[index % len(dtypes)]
        gap = 0 if whole else int(rng.integers(0, 5)) * 4 + -num_bytes % 4
        offset = 0 if whole else int(rng.choice([0, 3, 8, 2**34 - 50, 2**37 + 5]))
        more = {"nonnegative": True} if nonnegative and dtype == torch.float32 else {}
        if dtype in CODES:
            more, offset = {"scale_group": 32}, offset - offset % 32
        where = (num_bytes + gap, numel, dtype, int(rng.integers(0, 2**32)), offset)
        segments.append(Segment(*where, int(rng.integers(2)), offset + numel, 0, **more))
        usual = torch.from_numpy(rng.standard_normal(numel) * 0.02).to(dtype)
        if plain:
            weights = usual
        else:
            weights = random_codes(rng, numel, dtype) if dtype in CODES else random_weights(rng, numel, dtype, special)
        parts += [torch.full((gap,), 0x5A, dtype=torch.uint8), weights.view(torch.uint8)]
        num_bytes += gap + numel * dtype.itemsize
        if dtype in CODES:
            num_bytes = append_scales(rng, segments, parts, num_bytes)
            parts.append(torch.zeros(-num_bytes % 16 if whole else 0, dtype=torch.uint8))
            num_bytes += parts[-1].numel()
    noises = [(family, int(rng.integers(0, 2**32)), int(rng.integers(0, 2**20)), 0) for _ in range(2)]

    def scalar(*values: float) -> float:
        return values[0] if plain else float(rng.choice(values))

    updates = tuple(
        Update(
            int(rng.integers(0, 2**32)),
            tuple(GroupScalars(scalar(1e-2, 0.0, -1e-3), scalar(0.1, 0.0), 1.0, scalar(1.0, 0.5)) for _ in range(2)),
            (Term(*noises[0], 0.7 if plain else random_coef(rng)),),
        )
        for _ in range(shape[0])
    )
    coef = 1e-3 if plain else random_coef(rng)
    emits = tuple(
        Emit((Term(*noises[1], sign * coef),), (scalar(1.0, 0.5), scalar(1.0, 0.0, 1.7)))
        for sign in (1, -1)[: shape[1]]
    )
    at = 0
    for index, segment in enumerate(segments if pairs else ()):
        outs = [dtype for dtype in (segment.dtype,) if dtype in DTYPES]
        outs += [out for dtype, out in pairs if dtype == segment.dtype]
        out_dtype = outs[-1] if plain else outs[(index // len(dtypes) + 1) % len(outs)]
        at += 16 - at % 16 if whole else int(rng.integers(0, 5)) * 4 + -at % 4
        segments[index] = segment._replace(out_offset=at, out_dtype=out_dtype)
        at += segment.numel * out_dtype.itemsize
    parts.append(torch.zeros(-num_bytes % 4 if set(CODES) & set(dtypes) else 0, dtype=torch.uint8))
    table = SegmentTable(segments, num_bytes=num_bytes)
    return Visit(torch.cat(parts), table, int(rng.integers(0, 2**64, dtype=np.uint64)), updates, emits)


def in_workspace(visit: Visit) -> Visit:
    """The same visit with scalars for so many more groups that its tables are too long for a launch's parameters."""
    more = 1200
    updates = tuple(each._replace(groups=each.groups + each.groups[-1:] * more) for each in visit.updates)
    emits = tuple(each._replace(perturb_scales=each.perturb_scales + (1.0,) * more) for each in visit.emits)
    return visit._replace(updates=updates, emits=emits)


def check_visit(visit: Visit, backend: str) -> int:
    """A visit with and without write-back. Returns the bits compared."""
    num_bits = 0
    for write_back in (False, True):
        got, expected = visit.run(backend, write_back), visit.run("native", write_back)
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(one, other, f"buffer {index}, write_back={write_back}")
            num_bits += 8 * one.numel()
    return num_bits


def check_ops(rng: np.random.Generator, backend: str, dtype: torch.dtype, numel: int) -> int:
    """Noise and the in-place ops, at a start that is aligned to an element only. Returns the bits compared."""
    start, place, num_bits = int(rng.integers(0, 9)), random_place(rng), 0
    weights = random_weights(rng, start + numel, dtype)
    lr, decay = float(rng.choice([0.0, 1e-2])), float(rng.choice([0.0, 0.1]))
    calls = [
        (distzo2_core.perturb_, (random_coef(rng),), {}),
        (distzo2_core.restore_, (random_coef(rng),), {}),
        (distzo2_core.update_, (lr, random_coef(rng)), {"weight_decay": decay}),
    ]
    for family in FAMILIES:
        results = []
        for each in (backend, "native"):
            out = weights.clone()
            getattr(distzo2_core, family)(numel, **place, out=out[start:], backend=each)
            results.append([out, getattr(distzo2_core, family)(numel, **place, dtype=dtype, backend=each)])
            for function, arguments, extra in calls:
                w = weights.clone()
                function(w[start:], *arguments, **place, **extra, family=family, backend=each)
                results[-1].append(w)
        for index, (got, expected) in enumerate(zip(*results, strict=True)):
            assert_same_bits(got, expected, (index, family, place))
            num_bits += 8 * got.nbytes
    return num_bits


def check_lookup(
    rng: np.random.Generator,
    backend: str,
    dtype: torch.dtype,
    cols: int,
    whole: bool = False,
    out_dtype: torch.dtype | None = None,
    families: tuple[str, ...] = FAMILIES,
) -> int:
    """Perturbed rows of a table that begins at any element, or at a whole octet. Returns the bits compared."""
    rows, place, num_bits = 7, random_place(rng), 0
    start = 0 if whole else int(rng.integers(0, 9))
    place["offset"] -= place["offset"] % 8 if whole else 0
    table = random_weights(rng, start + rows * cols, dtype)[start:].view(rows, cols)
    ids = torch.from_numpy(rng.integers(0, rows, (2, 3)))
    for family, scale in itertools.product(families, (0.0, random_coef(rng))):
        results = [
            distzo2_core.embedding(table, ids, scale, **place, family=family, out_dtype=out_dtype, backend=each)
            for each in (backend, "native")
        ]
        assert_same_bits(*results, (scale, family, place))
        num_bits += 8 * results[0].nbytes
    return num_bits
