"""The forwards of an optimizer's steps: a lane for each evaluation of each micro-batch, run in waves, to losses."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distzo2.errors import DistZO2Error
from distzo2.interrupts import DeferredInterrupt
from distzo2.optim.settings import Settings
from distzo2.optim.state import SKIPPED, NoLoss
from distzo2.parallel.mesh import Evaluation
from distzo2.streaming.isolation import RandomStream
from distzo2.streaming.lanes import Lane, LanePlace, Route
from distzo2.streaming.runtime import StreamingRuntime
from distzo2.text import dtype_name
from distzo2.weights.units import HALVES
from distzo2.weights.updates import CLEAN, Emission
from distzo2_core import FAMILIES, Term


class StepLanes:
    """Runs the lanes of one optimizer that are this rank's. Each wave of lanes is one pass over the weights."""

    def __init__(self, runtime: StreamingRuntime, settings: Settings, interrupt: DeferredInterrupt) -> None:
        self.settings = settings
        self.runtime, self._interrupt = runtime, interrupt
        self._warned = False  # of a loss in 16 bits

    def run(
        self,
        step: int,
        places: Sequence[tuple[int, int]],
        closures: Sequence[Callable[[], Any]],
        first_batch: int,
        as_sums: bool = False,
    ) -> tuple[np.ndarray, Route, int]:
        """Runs a step's lanes, given as (evaluation, micro-batch). `closures` begin with micro-batch `first_batch`.
        With `as_sums`, tensors that they return are added up, where otherwise their mean is taken.

        Returns:
            float64 [lanes, 2], the sum of each lane's losses and their count; the longest of the lanes' routes; and the
            number in `SKIPPED` of why a lane has no loss, or 0.
        """
        lanes = []
        # Which evaluation of a micro-batch is its first: 0, or that of its own probe, all of which run here.
        first_of = {batch: index for index, batch in reversed(places)} if self.settings.own_batches else {}
        for index, batch in places:
            is_first = index == first_of.get(batch, 0)
            place = LanePlace(step, index, batch, *self.settings.evaluations[index], first=is_first)
            lanes.append(self._lane(place, closures[batch - first_batch]))
        route = self._run(lanes)
        reasons = [SKIPPED.index(lane.result.reason) for lane in lanes if isinstance(lane.result, NoLoss)]
        return self._losses(lanes, as_sums), route, max(reasons, default=0)

    def losses_of(
        self, step: int, evaluations: Sequence[Evaluation], closures: Sequence[Callable[[], Any]]
    ) -> np.ndarray:
        """float64 [evaluations]: mean losses, all on this rank."""
        lanes = self._lanes_beside(step, evaluations, closures)
        with self._interrupt:
            self._run(lanes)
        sums = self._losses(lanes).reshape(len(evaluations), len(closures), 2).sum(1)
        return sums[:, 0] / sums[:, 1]

    def _run(self, lanes: Sequence[Lane], check: bool = False) -> Route:
        wave = self.settings.max_lanes or len(lanes) or 1
        route = None
        for first in range(0, len(lanes), wave):
            self._interrupt.check()
            some = lanes[first : first + wave]
            found = self.runtime.run(some, expected=route, interrupt=self._interrupt, check=check)
            route = found if route is None or len(found.units) > len(route.units) else route
        return route or Route()

    def _lanes_beside(
        self, step: int, evaluations: Sequence[Evaluation], closures: Sequence[Callable[[], Any]]
    ) -> list[Lane]:
        """Lanes that are no part of the step: none of them is a micro-batch's first."""
        return [
            self._lane(LanePlace(step, index, batch, *evaluation, first=False), closure)
            for index, evaluation in enumerate(evaluations)
            for batch, closure in enumerate(closures)
        ]

    def _lane(self, place: LanePlace, closure: Callable[[], Any]) -> Lane:
        s, sign = self.settings, place.sign
        emission = Emission((Term(FAMILIES[s.noise], place.step, place.probe, 0, sign * s.eps),)) if sign else CLEAN
        stream = RandomStream.seeded(self.runtime.device, s.seed, place.step, place.batch)
        return Lane(emission, place.batch, closure, stream, place)

    def check(self, step: int, closure: Callable[[], Any]) -> float:
        """Runs two clean lanes of `closure` and two perturbed ones; returns the clean loss.

        Raises:
            DistZO2Error: the clean ones differ, or a perturbed one differs when it runs alone.
        """
        lanes = self._lanes_beside(step, [(0, sign) for sign in (0, 0, +1, -1)], [closure])
        with self._interrupt:
            self._run(lanes, check=True)
        losses = self._losses(lanes)
        (first, second), counts = (losses[:2, i].tolist() for i in (0, 1))
        if losses[0].tobytes() != losses[1].tobytes():
            raise DistZO2Error(
                f"the same weights, batch and random stream gave {first!r} and {second!r}: the forward is not "
                "deterministic, and a difference of two losses would be made of that"
            )
        return first / (counts[0] or 1.0)

    def _losses(self, lanes: Sequence[Lane], as_sums: bool = False) -> np.ndarray:
        """float64 [lanes, 2]: sum and count of what each closure returned."""
        if not lanes:
            return np.zeros((0, 2))
        pairs = [self._pair(lane.result, lane.closure, as_sums) for lane in lanes]
        tensors = [value for pair in pairs for value in pair if isinstance(value, torch.Tensor)]
        values = iter(_read([t.to(tensors[0].device) for t in tensors]))
        losses = np.array([[next(values) if isinstance(v, torch.Tensor) else v for v in pair] for pair in pairs])
        counts, least = losses[:, 1], np.nextafter(0.0, 1.0) if self.settings.older_rules else 0.0
        for lane, count in zip(lanes, counts.tolist(), strict=True):
            if not least <= count < np.inf:
                raise DistZO2Error(
                    f"the closure of batch {lane.batch} returned a sum of losses and {count!r} as their number, "
                    f"which must be finite and {'above' if self.settings.older_rules else 'at least'} 0"
                )
        if self.settings.older_rules:  # means of micro-batches, whatever their counts
            losses = np.stack([losses[:, 0] / counts, np.ones(len(lanes))], 1)
        return losses

    def _pair(self, result: Any, closure: Callable[[], Any], as_sum: bool) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Float64 scalars: (sum, count) as the closure returned it; a mean counts as one loss."""
        if not isinstance(result, tuple):
            return self._value(result, closure, as_sum), 1.0
        if len(result) != 2 or any(isinstance(value, torch.Tensor) and value.numel() != 1 for value in result):
            shapes = ", ".join(str(list(v.shape)) if isinstance(v, torch.Tensor) else type(v).__name__ for v in result)
            raise DistZO2Error(
                f"the closure returned a tuple of {shapes or 'nothing'}; a loss was expected, or the pair (sum of "
                "losses, number of losses)"
            )
        total, count = result
        count = self._value(count) if isinstance(count, torch.Tensor) else self._value(count).item()
        return self._value(total, closure), count

    def _value(self, result: Any, closure: Callable[[], Any] | None = None, as_sum: bool = False) -> torch.Tensor:
        if not isinstance(result, torch.Tensor):
            try:
                return torch.tensor(float(result), dtype=torch.float64)
            except (TypeError, ValueError):
                raise DistZO2Error(
                    f"the closure returned {type(result).__name__}; a loss was expected (a tensor or a number)"
                ) from None
        if result.numel() == 0:
            raise DistZO2Error("the closure returned an empty tensor; a loss was expected")
        value = result.detach().double()
        value = value.sum() if as_sum else value.mean()
        if closure is not None and result.dtype in HALVES and not self._warned:
            self._warned = True
            name = dtype_name(result.dtype)
            spacing = torch.finfo(result.dtype).eps * 2.0 ** (math.frexp(value.item())[1] - 1)
            warnings.warn(
                f"the closure at {_place_of(closure)} returned a loss in {name}: near {value:.3g} it is "
                f"quantised to {spacing:.1g}, and a step is made of differences of losses. Compute it in float32 "
                "there: from logits.float(), for example",
                stacklevel=4,
            )
        return value


def _place_of(closure: Callable[[], Any]) -> str:
    """File and line where a closure is defined."""
    while isinstance(closure, functools.partial):
        closure = closure.func
    code = getattr(closure, "__code__", None) or getattr(type(closure).__call__, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else type(closure).__name__


class _Mapped:
    """Pinned host memory, which kernels can write, as CUDA's array interface shows it."""

    def __init__(self, host: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape), "typestr": "<f8", "data": (host.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _read(values: Sequence[torch.Tensor]) -> list[float]:
    """Reads float64 scalars of one device. A GPU's are written to host memory by a kernel: a copy, however small, would
    wait for the blocks that are on their way back."""
    device = values[0].device
    if device.type != "cuda":
        return torch.stack(list(values)).tolist()
    host = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
    with torch.cuda.device(device):
        torch.stack(list(values), out=torch.as_tensor(_Mapped(host), device=device))
        done = torch.cuda.Event(blocking=True)
        done.record()
    done.synchronize()
    return host.tolist()
