"""What an estimator is: from the losses of a step's perturbations to the coefficients c_k of its update, one a probe.

The update is w <- w - lr * (sum of c_k·z_k + weight_decay·w).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import repeat
from typing import Protocol, runtime_checkable

import numpy as np

from distzo2.errors import DistZO2Error
from distzo2.parallel.mesh import Evaluation

# float64 [micro-batches], each the mean over its examples; [1], the loss of all of them, where closures return counts.
Losses = Mapping[Evaluation, np.ndarray]


@runtime_checkable
class Estimator(Protocol):
    """Says which perturbations a step needs, and turns their losses into coefficients: `ZOSGD(estimator=...)`.

    An estimator may have a `name`, for the journal's header; without one it has its class's. With `by_batch = True` its
    losses are always the means of micro-batches, also where closures return counts; micro-batches of count 0 are left
    out.
    With `own_batches = True`, which says that it does not compare the losses of several probes, these may have batches
    of their own (`ZOSGD(probe_batches="own")`).
    """

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        """The perturbations to evaluate, in the order in which they run; both signs of a probe side by side."""
        ...

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        """float64 [num_probes] from finite losses; `eps` is the float32 value that was used."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """An estimator whose coefficients depend on earlier steps too, by a few numbers. The optimizer keeps these in its
    state and in the journal, so that a run that is resumed or branched has the same bits; skipped steps leave them."""

    memory: tuple[float, ...]  # before the first step

    def coefficients_after(
        self, memory: tuple[float, ...], losses: Losses, num_probes: int, eps: float
    ) -> tuple[np.ndarray, tuple[float, ...]]:
        """As `coefficients`, and what is remembered from this step on."""
        ...


def mean_loss(losses: Iterable[float], counts: Iterable[float] | None = None) -> float:
    """The mean over micro-batches, added up in ascending order in float64. With `counts`, each loss is the sum of that
    many losses; the counts must not all be 0."""
    total = num = 0.0
    for value, count in zip(losses, repeat(1.0) if counts is None else counts, strict=False):
        total += float(value)
        num += float(count)
    return total / num


def both_signs(num_probes: int) -> list[Evaluation]:
    """The evaluations of two-sided probes."""
    return [(k, sign) for k in range(num_probes) for sign in (+1, -1)]


def differences(losses: Losses, num_probes: int) -> list[float]:
    """L+ - L- of each probe."""
    return [mean_loss(losses[k, +1]) - mean_loss(losses[k, -1]) for k in range(num_probes)]


def at_least(least: int, num_probes: int, name: str, why: str) -> None:
    """Raises DistZO2Error if an estimator has too few probes."""
    if num_probes < least:
        raise DistZO2Error(f"estimator {name} needs at least {least} probes {why}, got {num_probes}")
