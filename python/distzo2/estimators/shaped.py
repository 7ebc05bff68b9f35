"""Estimators whose steps do not grow with the losses: these are divided by their spread, or ranked."""

from __future__ import annotations

import numpy as np

from distzo2.errors import DistZO2Error
from distzo2.estimators.protocol import Losses, at_least, both_signs, mean_loss
from distzo2.parallel.mesh import Evaluation

SHAPES = ("zscore", "ranks", "group")


class FZOO:
    """One-sided, divided by the spread of the losses (FZOO, arXiv 2506.09034): c_k = (l_k - l_0) / (K·s).

    s is the sample standard deviation of the K perturbed losses, at least `floor` times max(1, |l_0|): below that the
    losses differ by no more than their own rounding.
    """

    def __init__(self, floor: float = 1e-7) -> None:
        self.floor = floor

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        at_least(2, num_probes, "fzoo", "to see a spread of losses")
        return [(0, 0), *((k, +1) for k in range(num_probes))]

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        clean = mean_loss(losses[0, 0])
        perturbed = np.array([mean_loss(losses[k, +1]) for k in range(num_probes)])
        spread = max(float(perturbed.std(ddof=1)), self.floor * max(1.0, abs(clean)))
        return (perturbed - clean) / (num_probes * spread)


class ES:
    """Evolution strategies: each perturbed model is a member of a population, and its loss is shaped before it counts.

    c_k = (s(k, +) - s(k, -)) / 2K with `mirrored` members, s(k, +) / K without; s is by `shape`
    - "zscore": (l - mean) / standard deviation over the members (ES at Scale, arXiv 2509.24372);
    - "ranks": centred ranks, -1/2 for the least loss to 1/2 for the largest; equal losses share the mean of their ranks
      (Salimans et al., arXiv 1703.03864). Outliers count no more than others;
    - "group": z-scores in each micro-batch, then their mean (the group rule of EGGROLL, arXiv 2511.16652): with as many
      micro-batches as examples, hard examples weigh as much as easy ones. One on which all members agree adds nothing.
    """

    def __init__(self, shape: str = "zscore", mirrored: bool = True, floor: float = 1e-7) -> None:
        """
        Raises:
            DistZO2Error: an unknown shape.
        """
        if shape not in SHAPES:
            raise DistZO2Error(f"shape={shape!r} of estimator es: expected one of {', '.join(SHAPES)}")
        self.shape, self.mirrored, self.floor = shape, mirrored, floor
        self.by_batch = shape == "group"
        self.name = f"ES({shape}{'' if mirrored else ', one-sided'})"

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        at_least(2, num_probes, "es", "to compare members")
        return both_signs(num_probes) if self.mirrored else [(k, +1) for k in range(num_probes)]

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        members = self.evaluations(num_probes)
        if self.by_batch:
            batches = np.array([losses[member] for member in members]).T
            shaped = np.mean([self._zscores(batch) for batch in batches], axis=0)
        else:
            means = np.array([mean_loss(losses[member]) for member in members])
            shaped = _ranks(means) if self.shape == "ranks" else self._zscores(means)
        return (shaped[::2] - shaped[1::2]) / (2 * num_probes) if self.mirrored else shaped / num_probes

    def _zscores(self, losses: np.ndarray) -> np.ndarray:
        mean = float(losses.mean())
        return (losses - mean) / max(float(losses.std()), self.floor * max(1.0, abs(mean)))


def _ranks(losses: np.ndarray) -> np.ndarray:
    """Ranks from -1/2 to 1/2."""
    _, place, counts = np.unique(losses, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts + 1) / 2  # from 0, of equal losses their mean
    return ranks[place] / (len(losses) - 1) - 0.5
