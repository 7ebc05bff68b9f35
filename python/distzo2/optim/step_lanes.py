"""The forwards of an optimizer's steps: a lane for each evaluation of each micro-batch, run in waves, to losses."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distzo2.errors import DistZO2Error
from distzo2.interrupts import DeferredInterrupt
from distzo2.optim.loss_reader import LossReader
from distzo2.streaming.isolation import RandomStream
from distzo2.streaming.lanes import Lane
from distzo2.streaming.offload import no_kv_cache
from distzo2.weights.units import Unit
from distzo2.weights.updates import CLEAN, Emission
from distzo2_core import FAMILIES, Term

if TYPE_CHECKING:
    from distzo2.optim.zosgd import ZOSGD


class StepLanes:
    """Those of one optimizer, on this rank. Each wave is one pass over the weights."""

    def __init__(self, optimizer: ZOSGD, interrupt: DeferredInterrupt) -> None:
        self._optimizer = weakref.proxy(optimizer)  # its seed, eps, noise and max_lanes may change between steps
        self._model, self._runtime, self._interrupt = optimizer._model, optimizer._runtime, interrupt
        self._mean_losses = LossReader()

    def run(
        self,
        step: int,
        places: Sequence[tuple[int, int]],
        closures: Sequence[Callable[[], Any]],
        first_batch: int,
    ) -> tuple[np.ndarray, Sequence[Unit]]:
        """float64 [lanes], and the units entered. `places` are lanes as (evaluation, micro-batch), of which
        `closures[0]` is number `first_batch`."""
        optimizer, runtime = self._optimizer, self._runtime
        family = FAMILIES[optimizer.noise]
        lanes = []
        for index, batch in places:
            probe, sign = optimizer._evaluations[index]
            emission = Emission((Term(family, step, probe, 0, sign * optimizer.eps),)) if sign else CLEAN
            lanes.append(Lane(emission, batch, closures[batch - first_batch], self._stream(step, batch)))
        wave = optimizer.max_lanes or len(lanes)
        expected = None
        with no_kv_cache(self._model):
            for first in range(0, len(lanes), wave or 1):
                self._interrupt.check()
                expected = runtime.run(lanes[first : first + wave], expected=expected, interrupt=self._interrupt)
        return self._mean_losses([lane.result for lane in lanes]), expected or ()

    def _stream(self, step: int, batch: int) -> RandomStream:
        """The same for every perturbation of a micro-batch."""
        return RandomStream.seeded(self._runtime.device, self._optimizer.seed, step, batch)

    def run_guarded(self, step: int, closure: Callable[[], Any]) -> None:
        """Runs one clean lane in which every use of a parameter is watched.

        Raises:
            DistZO2Error: one is used where it is not present; names it.
        """
        with no_kv_cache(self._model):
            self._runtime.run([Lane(CLEAN, 0, self._runtime.guarded(closure), self._stream(step, 0))])

    def check(self, step: int, closure: Callable[[], Any]) -> float:
        """Runs two clean lanes of `closure` and returns their loss.

        Raises:
            DistZO2Error: they differ.
        """
        lanes = [Lane(CLEAN, 0, closure, self._stream(step, 0)) for _ in range(2)]
        with self._interrupt, no_kv_cache(self._model):
            self._runtime.run(lanes, interrupt=self._interrupt)
        first, second = (float(v) for v in self._mean_losses([lane.result for lane in lanes]))
        if np.float64(first).tobytes() != np.float64(second).tobytes():
            raise DistZO2Error(
                f"the same weights, batch and random stream gave {first!r} and {second!r}: the forward is not "
                "deterministic, and a difference of two losses would be made of that"
            )
        return first
