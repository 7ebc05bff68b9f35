"""Seconds of operations, visits and hand-overs on one device, from the rows of `distzo2 measure` or a few rates."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from distzo2.errors import DistZO2Error
from distzo2.planning.measure_forward import VISITS
from distzo2.planning.plan_model import Op, Part, plan_module
from distzo2_core import FAMILIES

# Which measured dtype stands for another.
_STANDS_FOR = {torch.float16: "bfloat16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def measured_name(dtype: torch.dtype) -> str:
    """The dtype that was measured and stands for `dtype`; anything that is no float (ids, masks) moves as float32."""
    return _STANDS_FOR.get(dtype, "float32")


@dataclass(frozen=True)
class Curve:
    """Seconds of a size, between and beyond measured points: straight lines in the logarithms of both; beyond the ends
    at the end's rate."""

    points: tuple[tuple[float, float], ...]  # size, seconds; ascending

    def __call__(self, size: float) -> float:
        sizes = [p[0] for p in self.points]
        if size <= sizes[0] or len(sizes) == 1:
            return self.points[0][1] * size / sizes[0]
        if size >= sizes[-1]:
            return self.points[-1][1] * size / sizes[-1]
        i = bisect_left(sizes, size)
        (a, x), (b, y) = self.points[i - 1], self.points[i]
        share = math.log(size / a) / math.log(b / a)
        return math.exp(math.log(x) + share * math.log(y / x))


@dataclass(frozen=True)
class Products:
    """Seconds of a product x·Wᵀ: so much a flop, so much a byte read, and the writing of the result; corrected by what
    the nearest measured shapes took beside that."""

    s_per_flop: float
    s_per_byte: float
    result: Curve  # seconds to write so many bytes
    residuals: tuple[tuple[tuple[float, ...], float], ...] = ()  # log of a shape, log of measured / fitted

    @classmethod
    def fit(cls, shapes: Sequence[tuple[int, int, int]], seconds: Sequence[float], itemsize: int, result: Curve):
        flop = np.array([2.0 * math.prod(s) for s in shapes])
        read = np.array([(s[0] * s[1] + s[1] * s[2]) * itemsize for s in shapes], dtype=float)
        target = np.maximum(np.array(seconds) - [result(s[0] * s[2] * itemsize) for s in shapes], 1e-9)
        weights = 1.0 / target  # relative errors count, not those of the largest product alone
        best: tuple[float, float, float] | None = None
        for columns in ((flop, read), (flop,), (read,)):  # the best with no negative part
            matrix = np.stack([c * weights for c in columns], axis=1)
            solution = np.linalg.lstsq(matrix, np.ones(len(target)), rcond=None)[0]
            error = float(np.sum((matrix @ solution - 1.0) ** 2))
            if (solution >= 0).all() and (best is None or error < best[0]):
                parts = {id(c): float(v) for c, v in zip(columns, solution, strict=True)}
                best = error, parts.get(id(flop), 0.0), parts.get(id(read), 0.0)
        fitted = cls(best[1], best[2], result)
        rows = zip(shapes, seconds, strict=True)
        residuals = tuple((_logs(s), math.log(t / fitted(s, itemsize))) for s, t in rows)
        return replace(fitted, residuals=residuals)

    def __call__(self, shape: tuple[int, ...], itemsize: int, batch: int = 1) -> float:
        rows, inner, columns = shape
        seconds = batch * (
            2.0 * rows * inner * columns * self.s_per_flop
            + (rows * inner + inner * columns) * itemsize * self.s_per_byte
        ) + self.result(batch * rows * columns * itemsize)
        if not self.residuals:
            return seconds
        here = _logs(shape)
        weights = [1.0 / (1e-9 + sum((a - b) ** 2 for a, b in zip(here, at, strict=True))) for at, _ in self.residuals]
        total = sum(w * r for w, (_, r) in zip(weights, self.residuals, strict=True))
        return seconds * math.exp(total / sum(weights))

    @property
    def largest_residual(self) -> float:
        """How far the fit is from the measured shape that it fits worst, before the correction."""
        return max((abs(math.expm1(r)) for _, r in self.residuals), default=0.0)


def _logs(shape: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.log(v) for v in shape)


@dataclass(frozen=True)
class Noise:
    """Seconds an element, of one family and dtype: to make it once, to read or write it, to round an update."""

    made_s: float
    moved_s: float
    rounded_s: float = 0.0

    def __call__(self, terms: int, emissions: int, outs: int, write: bool) -> float:
        """One element of a call that applies updates of `terms` noise tensors in all, makes `emissions` other noise
        tensors and `outs` perturbed copies, and writes back or does not."""
        passes = 1 + outs + int(write)
        return (terms + emissions) * self.made_s + passes * self.moved_s + bool(terms) * self.rounded_s

    @classmethod
    def fit(cls, seconds: Mapping[tuple[int, int, int, bool], float]) -> Noise:
        """To measured calls, by their arguments; no part is negative."""
        calls = list(seconds)
        target = np.array([seconds[c] for c in calls])
        matrix = np.array([[t + e, 1 + o + int(w), float(t > 0)] for t, e, o, w in calls]) / target[:, None]
        best, least = np.zeros(3), math.inf
        for chosen in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1]):
            parts = np.zeros(3)
            parts[chosen] = np.linalg.lstsq(matrix[:, chosen], np.ones(len(target)), rcond=None)[0]
            error = float(np.sum((matrix @ parts - 1.0) ** 2))
            if (parts >= 0).all() and error < least:
                best, least = parts, error
        return cls(*(float(p) for p in best))


@dataclass(frozen=True)
class Host:
    """Seconds of the host that issues the work: a unit of a pass, a lane on it, a call that perturbs, an operation, a
    step."""

    visit_s: float
    lane_s: float
    materialize_s: float
    op_s: float
    step_s: float


@dataclass(frozen=True)
class Rates:
    """What one device does. `slowdown` multiplies all that it computes: ranks that share it divide it evenly."""

    products: Mapping[str, Products]
    attention: Mapping[str, Curve]  # seconds a flop, times 1e12, by tokens
    stream: Mapping[str, Curve]  # seconds by bytes of the result, of an operation that reads as many
    softmax_s: float  # an element
    noise: Mapping[tuple[str, str], Noise]  # by family and dtype
    host: Host
    compute_factor: Mapping[str, float] = field(default_factory=dict)  # in a step, over operations alone; by dtype
    noise_factor: Mapping[str, float] = field(default_factory=dict)
    slowdown: float = 1.0
    notes: tuple[str, ...] = field(default=())

    def op_s(self, op: Op) -> float:
        """Seconds of an operation on the device."""
        name = measured_name(op.dtype)
        if op.kind == "product":
            seconds = self.products[name](op.size, op.dtype.itemsize, op.batch)
        elif op.kind == "attention":
            seconds = self._attention_s(op, self.attention[name])
        elif op.kind == "softmax":
            seconds = op.size[0] * self.softmax_s
        else:
            seconds = self.stream[name](op.num_bytes / 2)
        return seconds * self.slowdown

    @staticmethod
    def _attention_s(op: Op, curve: Curve) -> float:
        tokens = min(max(op.size[1], curve.points[0][0]), curve.points[-1][0])
        return op.flop * curve(tokens) * 1e-12

    def part_s(self, part: Part) -> float:
        """Seconds of a lane's part on the device, in a step."""
        factor = self.compute_factor.get
        return sum(self.op_s(op) * count * factor(measured_name(op.dtype), 1.0) for op, count in part.ops)

    def noise_s(self, numel: int, dtype: torch.dtype, family: str, **call: Any) -> float:
        factor = self.noise_factor.get(measured_name(dtype), 1.0)
        return factor * self.slowdown * numel * self.noise[family, measured_name(dtype)](**call)

    def shared_by(self, num_ranks: int) -> Rates:
        """The rates of one of `num_ranks` ranks that share the device evenly."""
        return replace(self, slowdown=self.slowdown * num_ranks)


def rates_from_rows(result: Mapping[str, Any], device: str) -> Rates:
    """Of a device (cpu, cuda:0) that `distzo2 measure` measured.

    Raises:
        DistZO2Error: it did not.
    """

    def rows(key: str, **wanted: Any) -> list[dict[str, Any]]:
        found = [r for r in result[key] if r["device"] == device and all(r[k] == v for k, v in wanted.items())]
        if not found:
            raise DistZO2Error(f"the measurement holds no {key} of {device}, {wanted}: run distzo2 measure there")
        return found

    products, attention, stream = {}, {}, {}
    for name, itemsize in (("float32", 4), ("bfloat16", 2)):
        curve = sorted((float(r["size"][0]), r["seconds"]) for r in rows("forward", what="stream", dtype=name))
        stream[name] = Curve(tuple(curve))
        made = rows("forward", what="product", dtype=name)
        # Writing a result is half of what relu does, which reads as much.
        half = Curve(tuple((size, seconds / 2) for size, seconds in curve))
        shapes, seconds = [tuple(r["size"]) for r in made], [r["seconds"] for r in made]
        products[name] = Products.fit(shapes, seconds, itemsize, half)
        points = []
        for row in rows("forward", what="attention", dtype=name):
            queries, keys, width, batch = row["size"]
            flop = Op("attention", (queries, keys, width), torch.float32, batch, causal=True).flop
            points.append((float(keys), row["seconds"] / flop * 1e12))
        attention[name] = Curve(tuple(sorted(points)))
    softmax = rows("forward", what="softmax")[0]
    noise = {}
    for family in FAMILIES:
        for name in products:
            calls = {}
            for what, (updates, emits) in VISITS.items():
                row = rows("visits", what=what, family=family, dtype=name)[0]
                calls[updates, min(emits, 1), emits, updates > 0] = 1.0 / row["elements_per_s"]
            noise[family, name] = Noise.fit(calls)
    host = rows("host")[0]
    worst = max(p.largest_residual for p in products.values())
    notes = (
        f"products: so much a flop and a byte read, fitted to {len(products['float32'].residuals)} measured shapes a "
        f"dtype (within {worst:.0%}), times what the nearest of them took beside that",
        "float16 computes at bfloat16's rates",
    )
    rates = Rates(
        products,
        attention,
        stream,
        softmax["seconds"] / math.prod(softmax["size"]),
        noise,
        Host(**{k: host[k] for k in ("visit_s", "lane_s", "materialize_s", "op_s", "step_s")}),
        notes=notes,
    )
    return _held_against(rates, rows("steps"))


def _held_against(rates: Rates, steps: Sequence[Mapping[str, Any]]) -> Rates:
    """The rates, with what a measured step of a small model takes beside what they say of it."""
    from distzo2.planning.measure_step import ProbeModel

    compute, noise = {}, {}
    for row in steps:
        dtype = getattr(torch, row["dtype"])
        with torch.device("meta"):
            model = ProbeModel().to(dtype).eval()
        plan = plan_module(model, "probe", dtype, row["rows"], row["tokens"], forward=model)
        host, num_lanes = rates.host, 2
        lane_s = sum(rates.part_s(part) + host.lane_s + part.num_ops * host.op_s for part in plan.parts)
        visit = {"terms": 1, "emissions": 1, "outs": 2, "write": True}
        made_s = sum(rates.noise_s(p.numel, p.dtype, "normal", **visit) for u in plan.units for p in u.params)
        made_s += len(plan.units) * host.materialize_s
        expected = num_lanes * lane_s
        if row["noise_s"] is None:
            expected += made_s
        else:
            noise[row["dtype"]] = row["noise_s"] / made_s
        compute[row["dtype"]] = row["compute_s"] / expected
    name = "float32"
    text = f"in a step of a small model, computing took {compute[name]:.2f} x what its operations take alone"
    if noise:
        text += f", noise {noise[name]:.2f} x (fp32)"
    return replace(rates, compute_factor=compute, noise_factor=noise, notes=(*rates.notes, text + ": so it is here"))
