"""Two-sided estimators: a step's coefficients are made of the differences L+ - L- of its probes."""

from __future__ import annotations

import numpy as np

from distzo2.errors import DistZO2Error
from distzo2.estimators.protocol import Losses, both_signs, differences, mean_loss
from distzo2.parallel.mesh import Evaluation


class SPSA:
    """Two-sided (Spall 1992; MeZO, arXiv 2305.17333): c_k = (mean L+ - mean L-) / (2·eps·K)."""

    own_batches = True

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        return both_signs(num_probes)

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        return np.array([difference / (2.0 * eps * num_probes) for difference in differences(losses, num_probes)])


class SPSASign(SPSA):
    """The signs of SPSA's differences (ZO-signSGD, Liu et al., ICLR 2019, a sign a probe): c_k = sign(L+ - L-) / K.

    One batch with outliers moves weights no further than another, and eps does not scale the step.
    """

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        return np.sign(differences(losses, num_probes)) / num_probes


class CurvatureSPSA:
    """1.5-SPSA (arXiv 2609.38095): SPSA whose probes count less the more the loss bends along them.

    c_k = (L+ - L-) / (2·eps·K) / max(damping, |h|^0.1), with h = (L+ - 2·L0 + L-) / eps². At the paper's lr = eps a
    step is -(1/2K)·sum of (L+ - L-)·z_k / max(damping, |h|^0.1).
    """

    def __init__(self, damping: float = 1.0) -> None:
        """
        Raises:
            DistZO2Error: `damping` is no positive number.
        """
        if not 0 < damping < float("inf"):
            raise DistZO2Error(f"damping={damping!r} of estimator 1.5spsa: expected a positive number")
        self.damping = damping
        self.name = "1.5SPSA" if damping == 1.0 else f"1.5SPSA(damping={damping:g})"

    def evaluations(self, num_probes: int) -> list[Evaluation]:
        return [(0, 0), *both_signs(num_probes)]

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        clean = mean_loss(losses[0, 0])
        sums = [mean_loss(losses[k, +1]) + mean_loss(losses[k, -1]) for k in range(num_probes)]
        bend = np.abs(np.array(sums) - 2.0 * clean) / eps**2
        return (
            np.array(differences(losses, num_probes)) / (2.0 * eps * num_probes) / np.maximum(self.damping, bend**0.1)
        )


class MeAZO(SPSA):
    """SPSA whose rate is divided by one second moment (MeAZO, arXiv 2605.03869).

    c_k = g_k / (K·(sqrt(v / (1 - beta^t)) + 1e-12)), with g_k = (L+ - L-) / (2·eps) and v <- beta·v + (1 - beta)·(mean
    of g_k² over the probes). The paper squares the mean of g_k, which is the same for one probe; for more, the mean of
    squares is steadier, and a step's size depends on K as those of `fzoo` and `es` do.
    """

    memory = (0.0, 1.0)  # v, and beta^t

    def __init__(self, beta: float = 0.99) -> None:
        self.beta = beta
        self.name = "MeAZO" if beta == 0.99 else f"MeAZO(beta={beta:g})"

    def coefficients(self, losses: Losses, num_probes: int, eps: float) -> np.ndarray:
        return self.coefficients_after(self.memory, losses, num_probes, eps)[0]

    def coefficients_after(
        self, memory: tuple[float, ...], losses: Losses, num_probes: int, eps: float
    ) -> tuple[np.ndarray, tuple[float, ...]]:
        projected = np.array(differences(losses, num_probes)) / (2.0 * eps)
        moment = self.beta * memory[0] + (1.0 - self.beta) * float(np.mean(projected**2))
        power = memory[1] * self.beta
        return projected / (num_probes * ((moment / (1.0 - power)) ** 0.5 + 1e-12)), (moment, power)
