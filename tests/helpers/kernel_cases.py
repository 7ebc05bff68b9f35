"""Random weights, segment tables, updates and emits that the tests of every backend share."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch

import distzo2_core
from distzo2_core import FAMILIES, FROZEN, Emit, GroupScalars, Segment, SegmentTable, Term, Update
from distzo2_core.types import MAX_ELEMENTS, SCALE_GROUPS

needs_native = pytest.mark.skipif(
    not distzo2_core.build_info()["native"], reason="the extension distzo2_core._C is not built"
)
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels: conftest.py sets it where there is no GPU
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="no triton for this platform, or no NVIDIA GPU and TRITON_INTERPRET=0",
)
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton's kernels are not interpreted")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.int16)
LOW_RANK = tuple(name for name, code in FAMILIES.items() if code >= 16)
LARGEST_FLOAT32 = Fraction(2) ** 128 - Fraction(2) ** 104
SPECIALS = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 6e-8, -6e-8, 6.1e-5, 3.3e38, 1e-39, -1e-45]


def spacing_at(magnitude: Fraction, fraction_bits: int = 23, least: int = -149) -> Fraction:
    """Distance between neighbours of float32, or of a dtype of so many bits of fraction, its least number 2^least."""
    if magnitude == 0:
        return Fraction(2) ** least
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    return Fraction(2) ** max(exponent - fraction_bits, least)


def rounded(exact: Fraction, fraction_bits: int = 23, least: int = -149, most: Fraction = LARGEST_FLOAT32) -> float:
    """To nearest even, infinite beyond `most`, by integer arithmetic."""
    spacing = spacing_at(abs(exact), fraction_bits, least)
    near = round(exact / spacing) * spacing  # Python rounds halves to even
    return float(near) if abs(near) <= most else float("inf") * (1 if near > 0 else -1)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """Fails naming the first element whose bits differ, NaN included."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.dtype.itemsize == 1:
        integer = torch.uint8
    else:
        integer = {2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    different = (got.cpu().view(integer) != expected.cpu().view(integer)).reshape(-1).nonzero().reshape(-1).tolist()
    if different:
        first = different[0]
        values = got.reshape(-1)[first].item(), expected.reshape(-1)[first].item()
        raise AssertionError(f"{len(different)} of {got.numel()} differ, first at {first}: {values} {what}")


def random_weights(rng: np.random.Generator, numel: int, dtype: torch.dtype, special: float = 0.05) -> torch.Tensor:
    """Weights of a model's size, of all magnitudes, and this share of special values, mixed."""
    values = rng.standard_normal(numel) * 0.02
    wild = np.ldexp(rng.standard_normal(numel), rng.integers(-150, 127, numel))
    values = np.where(rng.random(numel) < 0.2, wild, values)
    values = np.where(rng.random(numel) < special, rng.choice(SPECIALS, numel), values)
    with np.errstate(all="ignore"):
        return torch.from_numpy(values.astype(np.float32)).to(dtype)


def random_codes(rng: np.random.Generator, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes of all sizes, the largest among them."""
    largest = torch.iinfo(dtype).max
    usual, special = rng.integers(-largest, largest + 1, numel), rng.choice([-largest, largest, 0], numel)
    return torch.from_numpy(np.where(rng.random(numel) < 0.2, special, usual)).to(dtype)


def random_scales(rng: np.random.Generator, num: int) -> torch.Tensor:
    """Scales of a model's size, and zeros, subnormal and huge ones."""
    wild = rng.choice([0.0, 1e-45, 3e-39, 1.2e-38, 1.0, 3e38], num)
    return torch.from_numpy(np.where(rng.random(num) < 0.3, wild, np.exp2(rng.uniform(-20, -6, num)))).float()


def append_scales(rng: np.random.Generator, segments: list[Segment], parts: list[torch.Tensor], at: int) -> int:
    """Places scales for the last segment's codes behind `at` bytes; returns where they end."""
    gap, num = int(rng.integers(0, 3)) * 4 + -at % 4, -(-segments[-1].numel // segments[-1].scale_group)
    parts += [torch.full((gap,), 0x5A, dtype=torch.uint8), random_scales(rng, num).view(torch.uint8)]
    segments[-1] = segments[-1]._replace(scale_offset=at + gap)
    return at + gap + 4 * num


class Visit(NamedTuple):
    """A packed buffer and one call of materialize on it."""

    weights: torch.Tensor
    segments: SegmentTable
    seed: int
    updates: tuple[Update, ...]
    emits: tuple[Emit, ...]

    def run(self, backend: str, write_back: bool, device: str = "cpu") -> list[torch.Tensor]:
        """The weights and the buffers of the emits afterwards; bytes between segments begin as 0xA5."""
        weights = self.weights.to(device, copy=True)
        outs = [torch.full((self.segments.out_bytes,), 0xA5, dtype=torch.uint8, device=device) for _ in self.emits]
        program = {"seed": self.seed, "updates": self.updates, "emits": self.emits}
        distzo2_core.materialize(weights, self.segments, **program, outs=outs, write_back=write_back, backend=backend)
        return [weights, *outs]


def random_coef(rng: np.random.Generator) -> float:
    return float(rng.choice([0.0, -0.0, 1.0, rng.standard_normal(), rng.standard_normal() * 1e3, 1e-40]))


def emitted_as(
    rng: np.random.Generator, segments: list[Segment], pairs: tuple[tuple[torch.dtype, torch.dtype], ...]
) -> list[Segment]:
    """The segments, emitted at other places, in a dtype that makes a pair with their own, or in their own."""
    moved, at = [], 0
    for segment in segments:
        choices = [each for each in (segment.dtype,) if each in DTYPES]
        choices += [out for dtype, out in pairs if dtype == segment.dtype]
        out_dtype = choices[rng.integers(len(choices))]
        at += int(rng.integers(0, 3)) * 4 + -at % 4
        moved.append(segment._replace(out_offset=at, out_dtype=out_dtype))
        at += segment.numel * out_dtype.itemsize
    return moved


def random_visit(
    rng: np.random.Generator,
    dtypes: tuple[torch.dtype, ...],
    max_numel: int,
    pairs: tuple[tuple[torch.dtype, torch.dtype], ...] = tuple(itertools.product((*DTYPES, *CODES), DTYPES)),
    nonnegative: bool = False,
) -> Visit:
    """A few segments of random sizes, gaps, parameters and offsets, some of them frozen, half of the time, and where
    they are codes, emitted as one of `pairs`; up to three updates and four emits. `nonnegative`: half of the float32
    segments are."""
    num_groups = int(rng.integers(1, 4))
    parts: list[torch.Tensor] = []
    segments: list[Segment] = []
    num_bytes = 0
    for _ in range(int(rng.integers(1, 5))):
        dtype = dtypes[rng.integers(len(dtypes))]
        numel = int(rng.integers(0, max_numel))
        gap = int(rng.integers(0, 3)) * 4 + -num_bytes % 4
        offset = int(rng.choice([0, 1, 127, 128, 2**34 - 50, 2**35 + 5, rng.integers(0, 5000)]))
        param, group = int(rng.integers(0, 2**32)), FROZEN if rng.random() < 0.1 else int(rng.integers(num_groups))
        parts.append(torch.full((gap,), 0x5A, dtype=torch.uint8))
        more: dict[str, int] = {}
        if dtype in CODES:
            more["scale_group"] = int(rng.choice(SCALE_GROUPS))
            offset -= offset % more["scale_group"]
        elif nonnegative and dtype == torch.float32:
            more["nonnegative"] = rng.random() < 0.5
        segments.append(Segment(num_bytes + gap, numel, dtype, param, offset, group, 1, offset + numel, **more))
        if numel:
            make = random_codes if dtype in CODES else random_weights
            parts.append(make(rng, numel, dtype).view(torch.uint8))
        num_bytes += gap + numel * dtype.itemsize
        if dtype in CODES:
            num_bytes = append_scales(rng, segments, parts, num_bytes)
    pool = [
        (int(rng.integers(0, 2)), int(rng.integers(0, 2**32)), int(rng.integers(0, 2**20)), 0)
        for _ in range(int(rng.integers(1, 4)))
    ]

    def random_terms(maximum: int) -> tuple[Term, ...]:
        return tuple(
            Term(*pool[rng.integers(len(pool))], random_coef(rng)) for _ in range(rng.integers(0, maximum + 1))
        )

    def random_scale() -> float:
        return float(rng.choice([1.0, 0.0, 0.5, 1.7]))

    updates = tuple(
        Update(
            int(rng.integers(0, 2**32)),
            tuple(
                GroupScalars(
                    float(rng.choice([0.0, 1e-2, 1e-6, -1e-3])), float(rng.choice([0.0, 0.1])), 1.0, random_scale()
                )
                for _ in range(num_groups)
            ),
            random_terms(3),
        )
        for _ in range(rng.integers(0, 4))
    )
    emits: list[Emit] = []
    for _ in range(rng.integers(0, 3)):
        terms, scales = random_terms(2), tuple(random_scale() for _ in range(num_groups))
        emits.append(Emit(terms, scales))
        if rng.random() < 0.7:  # the other sign of the same perturbation
            emits.append(Emit(tuple(term._replace(c=-term.c) for term in terms), scales))
    if any(dtype in CODES for dtype in dtypes):
        parts.append(torch.zeros(-num_bytes % 4, dtype=torch.uint8))
    weights = torch.cat(parts)
    if rng.random() < 0.5 or any(segment.dtype in CODES for segment in segments):
        segments = emitted_as(rng, segments, pairs)
    table = SegmentTable(segments, num_bytes=weights.numel())
    return Visit(weights, table, int(rng.integers(0, 2**64, dtype=np.uint64)), updates, tuple(emits))


def low_rank_visit(rng: np.random.Generator, visit: Visit, families: Sequence[str] = ()) -> Visit:
    """The visit with other families of noise, two of which are given or one of low rank at least, and segments of
    matrices of all shapes, some of experts, some without columns."""
    families = list(families) or rng.choice([*LOW_RANK], 1).tolist() + rng.choice([*FAMILIES], 1).tolist()
    codes = [FAMILIES[name] for name in rng.permutation(families)]

    def replaced(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(term._replace(family=codes[term.family]) for term in terms)

    segments = []
    for segment in visit.segments.segments:
        end, cols = segment.element_offset + segment.numel, int(rng.choice([0, 1, 3, 8, 64, 100, 129, 384, 520, 1024]))
        matrices, each = (int(rng.choice([1, 1, 5])), cols) if cols else (1, 1)
        segments.append(segment._replace(rows=-(-end // (matrices * each)), cols=cols, matrices=matrices))
    return visit._replace(
        segments=SegmentTable(segments, num_bytes=visit.weights.numel()),
        updates=tuple(update._replace(terms=replaced(update.terms)) for update in visit.updates),
        emits=tuple(emit._replace(terms=replaced(emit.terms)) for emit in visit.emits),
    )


def anchored_visit(rng: np.random.Generator, visit: Visit) -> Visit:
    """The visit with weights at the start behind the buffer, equal to the weights here and there, and with anchors in
    most groups that have no other segments."""
    parts, num_bytes, segments = [visit.weights], visit.weights.numel(), []
    for segment in visit.segments.segments:
        if segment.dtype not in CODES and not segment.nonnegative and segment.numel:
            size, gap = segment.dtype.itemsize, int(rng.choice([0, 4, 8, 16])) + -num_bytes % 4
            weights = visit.weights[segment.byte_offset :][: segment.numel * size].view(segment.dtype)
            moved = torch.from_numpy(rng.random(segment.numel) < 0.7)
            starts = torch.where(moved, random_weights(rng, segment.numel, segment.dtype), weights)
            parts += [torch.full((gap,), 0x5A, dtype=torch.uint8), starts.view(torch.uint8)]
            segment, num_bytes = segment._replace(start_offset=num_bytes + gap), num_bytes + gap + segment.numel * size
        segments.append(segment)
    parts.append(torch.zeros(-num_bytes % 4, dtype=torch.uint8))
    weights = torch.cat(parts)
    table = SegmentTable(segments, num_bytes=weights.numel())

    def pulled(group: int, scalars: GroupScalars) -> GroupScalars:
        can = group not in table.unanchored
        return scalars._replace(anchor=float(rng.choice([0.3, 1e-3, -2.0, 0.0])) if can else 0.0)

    updates = tuple(
        update._replace(groups=tuple(pulled(*each) for each in enumerate(update.groups))) for update in visit.updates
    )
    return visit._replace(weights=weights, segments=table, updates=updates)


def random_place(rng: np.random.Generator) -> dict[str, int]:
    return {
        "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
        "step": int(rng.integers(0, 2**32)),
        "param": int(rng.integers(0, 2**32)),
        "probe": int(rng.integers(0, 2**20)),
        "offset": int(rng.choice([0, 1, 130, 2**34 - 20, rng.integers(0, 2**37)])),
    }


def check_visit(visit: Visit, backend: str, device: str = "cpu") -> None:
    """A backend against the reference, with and without write-back."""
    for write_back in (False, True):
        got, expected = visit.run(backend, write_back, device), visit.run("reference", write_back)
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(one, other, f"buffer {index}, write_back={write_back}")


def check_noise(backend: str, device: str = "cpu", numels: tuple[int, ...] = (1, 5, 1024, 1500)) -> None:
    """normal and rademacher against the reference, at odd sizes and offsets."""
    offsets = (3, 2**34 - 700, 2**38 - max(numels))
    place = {"seed": 2**64 - 3, "step": 2**32 - 1, "param": 9, "probe": 2**20 - 1}
    for dtype, numel, offset in itertools.product(DTYPES, numels, offsets):
        for function in (distzo2_core.normal, distzo2_core.rademacher):
            got = function(numel, **place, offset=offset, dtype=dtype, device=device, backend=backend)
            assert got.device.type == device
            expected = function(numel, **place, offset=offset, dtype=dtype, backend="reference")
            assert_same_bits(got, expected)
            out = torch.full((numel, 1), float("nan"), dtype=dtype, device=device)
            assert function(numel, **place, offset=offset, out=out, backend=backend) is out
            assert_same_bits(out.view(-1), expected)


def check_low_rank(backend: str, device: str = "cpu", numels: tuple[int, ...] = (1, 700, 2000)) -> None:
    """low_rank and the ops in place against the reference: slices from the middle of a row on, experts, odd columns."""
    place = {"seed": 2**64 - 3, "step": 2**32 - 1, "param": 9, "probe": 2**20 - 1}
    shapes = ((70, 33), (5, 6, 77), (40, 512), (3, 1500), (2, 9, 128), (2100, 1))
    for (index, shape), family, numel in itertools.product(enumerate(shapes), LOW_RANK, numels):
        at = {"offset": int(17 * index % (torch.Size(shape).numel() - numel)), "family": family}
        got = distzo2_core.low_rank(shape, numel=numel, **place, **at, device=device, backend=backend)
        z = distzo2_core.low_rank(shape, **place, family=family, backend="reference")
        assert_same_bits(got, z.view(-1)[at["offset"] :][:numel], (shape, family, numel))
        at["matrix"] = shape[-2:]
        for dtype in DTYPES[index % 3 :][:1]:
            w = random_weights(np.random.default_rng(index), numel, dtype)
            for function, scalars in ((distzo2_core.restore_, (0.3,)), (distzo2_core.update_, (0.1, 0.7))):
                changed = function(w.to(device, copy=True), *scalars, **place, **at, backend=backend)
                expected = function(w.clone(), *scalars, **place, **at, backend="reference")
                assert_same_bits(changed, expected, (function.__name__, shape, family, numel))


def check_embedding(rng: np.random.Generator, backend: str, dtype: torch.dtype, cols: int, device: str = "cpu") -> None:
    """embedding against rows of the table that the reference has perturbed as a whole, for one random table; in another
    dtype, the rows that the reference makes of each."""
    rows = 11
    table = random_weights(rng, rows * cols, dtype).view(rows, cols)
    place = random_place(rng)
    ids = torch.tensor([[10, 0, 3], [3, 7, 10]])
    for family, scale in itertools.product(("normal", "rademacher", rng.choice(LOW_RANK)), (0.0, random_coef(rng))):
        more = {"family": str(family)}
        before = table.to(device, copy=True)
        got = distzo2_core.embedding(before, ids.to(device), scale, **place, **more, backend=backend)
        if more["family"] in LOW_RANK:
            more["matrix"] = (2**31, cols)
            place["offset"] %= 2**30
            got = distzo2_core.embedding(before, ids.to(device), scale, **place, family=str(family), backend=backend)
        whole = distzo2_core.perturb_(table.clone(), scale, **place, **more, backend="reference")
        more.pop("matrix", None)
        assert_same_bits(got, torch.nn.functional.embedding(ids, whole), (scale, family, place))
        out_dtype = DTYPES[rng.integers(3)]
        more |= {**place, "out_dtype": out_dtype}
        got = distzo2_core.embedding(before, ids.to(device), scale, **more, backend=backend)
        expected = distzo2_core.embedding(table, ids, scale, **more, backend="reference")
        assert_same_bits(got, expected, (scale, family, place, out_dtype))
        assert_same_bits(before, table)


def check_in_place(rng: np.random.Generator, backend: str, dtype: torch.dtype, numel: int, device: str = "cpu") -> None:
    """perturb_, restore_ and update_ against the reference, for one random tensor and place."""
    weights = random_weights(rng, numel, dtype)
    place = random_place(rng)
    lr = float(rng.choice([0.0, 1e-2, 1e-6]))
    calls = [
        (distzo2_core.perturb_, (random_coef(rng),), {}),
        (distzo2_core.restore_, (random_coef(rng),), {}),
        (distzo2_core.update_, (lr, random_coef(rng)), {"weight_decay": float(rng.choice([0.0, 0.1]))}),
    ]
    for family, (function, arguments, extra) in itertools.product(("normal", "rademacher"), calls):
        got, expected = weights.to(device, copy=True), weights.clone()
        assert function(got, *arguments, **place, **extra, family=family, backend=backend) is got
        function(expected, *arguments, **place, **extra, family=family, backend="reference")
        assert_same_bits(got, expected, (function.__name__, arguments, extra, family, place))


def check_splits(rng: np.random.Generator, dtype: torch.dtype, edges: list[int]) -> None:
    """Noise and in-place ops on the slices between `edges`, in place in one tensor, against the whole at once."""
    numel = edges[-1]
    weights = random_weights(rng, numel, dtype)
    offset = int(rng.choice([0, 3, 2**34 - 1000, 2**35 - 999, MAX_ELEMENTS - numel, rng.integers(0, 2**37)]))
    place = {"seed": int(rng.integers(0, 2**64, dtype=np.uint64)), "step": 4, "param": 2**32 - 1, "probe": 2**20 - 1}
    place["backend"] = "native"
    for function in (distzo2_core.normal, distzo2_core.rademacher):
        whole = function(numel, **place, offset=offset, dtype=dtype)
        parts = [function(b - a, **place, offset=offset + a, dtype=dtype) for a, b in itertools.pairwise(edges)]
        assert_same_bits(torch.cat(parts), whole, (function.__name__, offset, edges))
    ops = [(distzo2_core.perturb_, (0.5,)), (distzo2_core.restore_, (1e-3,)), (distzo2_core.update_, (1e-2, 0.7))]
    for (function, scalars), family in itertools.product(ops, ("normal", "rademacher")):
        whole, parts = weights.clone(), weights.clone()
        function(whole, *scalars, **place, offset=offset, family=family)
        for a, b in itertools.pairwise(edges):
            function(parts[a:b], *scalars, **place, offset=offset + a, family=family)
        assert_same_bits(parts, whole, (function.__name__, family, offset, edges))
