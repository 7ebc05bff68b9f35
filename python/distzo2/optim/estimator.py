"""Estimators: from the losses of a step's perturbations to the coefficients c_k of its update, one a probe.

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

    One whose coefficient c_k is made of the losses of probe k alone may have the attribute `own_batches = True`: then
    probes may have batches of their own (`ZOSGD(probe_batches="own")`).
    """

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        """The perturbations to evaluate, in the order in which they run; both signs of a probe side by side."""
        ...

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        """float64 [num_probes] from finite losses; `eps` is the float32 value that was used."""
        ...


def mean_loss(losses: Iterable[float], counts: Iterable[float] | None = None) -> float:
    """The mean over micro-batches, added up in ascending order in float64. With `counts`, each loss is the sum of that
    many losses; the counts must not all be 0."""
    total = num = 0.0
    for value, count in zip(losses, repeat(1.0) if counts is None else counts, strict=False):
        total += float(value)
        num += float(count)
    return total / num


class SPSA:
    """Two-sided (Spall 1992; MeZO, arXiv 2305.17333): c_k = (mean L+ - mean L-) / (2·eps·K)."""

    own_batches = True

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        return [(k, sign) for k in range(num_probes) for sign in (+1, -1)]

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        differences = [mean_loss(losses[k, +1]) - mean_loss(losses[k, -1]) for k in range(num_probes)]
        return np.array([difference / (2.0 * eps * num_probes) for difference in differences])


class FZOO:
    """One-sided, divided by the spread of the losses: c_k = (l_k - l_0) / (K·s).

    s is the sample standard deviation of the K perturbed losses, at least `floor` times max(1, |l_0|): below that the
    losses differ by no more than their own rounding.
    """

    def __init__(self, floor: float = 1e-7) -> None:
        self.floor = floor

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        if num_probes < 2:
            raise DistZO2Error(f"estimator fzoo needs at least 2 probes to see a spread of losses, got {num_probes}")
        return [(0, 0), *((k, +1) for k in range(num_probes))]

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        clean = mean_loss(losses[0, 0])
        perturbed = np.array([mean_loss(losses[k, +1]) for k in range(num_probes)])
        spread = max(float(perturbed.std(ddof=1)), self.floor * max(1.0, abs(clean)))
        return (perturbed - clean) / (num_probes * spread)


ESTIMATORS = {"spsa": SPSA, "fzoo": FZOO}


def make_estimator(estimator: str | Estimator) -> Estimator:
    """The estimator of that name, or the object itself.

    Raises:
        DistZO2Error: an unknown name, or an object without `evaluations` and `coefficients`.
    """
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise DistZO2Error(f"estimator={estimator!r}: expected one of {', '.join(ESTIMATORS)}, or an Estimator")
        return ESTIMATORS[estimator]()
    if not isinstance(estimator, Estimator):
        raise DistZO2Error(f"estimator={estimator!r} has no evaluations() and coefficients()")
    return estimator
