"""Where a run stands between two steps: what the next step depends on besides the weights and the settings.

It keeps a run finite: coefficients far above their running median (or above a running percentile) are clipped, and too
many in a row end the run.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from distzo2.errors import DistZO2Error, RewardError
from distzo2.optim.settings import Settings
from distzo2.text import brief

WINDOW = 101  # steps that the running median looks back on
WARM_UP = 16  # steps before anything is clipped
STILL = 8  # steps in a row whose coefficients are all 0, before that is told
NON_FINITE_LOSS, NON_FINITE_COEFFICIENT = "non-finite loss", "non-finite coefficient"  # why a step was skipped
SKIPPED = (  # all reasons, by the numbers that ranks exchange
    None, NON_FINITE_LOSS, NON_FINITE_COEFFICIENT, RewardError.RAISED, RewardError.SLOW, RewardError.NO_NUMBERS,
)  # fmt: skip

logger = logging.getLogger("distzo2")


class NoLoss(float):
    """What a closure returns where it has no loss: NaN, and the `reason`, one of `SKIPPED`, why the step is skipped."""

    def __new__(cls, reason: str) -> NoLoss:
        if reason not in SKIPPED[1:]:
            raise DistZO2Error(f"NoLoss({reason!r}): expected one of {', '.join(map(repr, SKIPPED[1:]))}")
        self = super().__new__(cls, math.nan)
        self.reason = reason
        return self


class NonFiniteLossError(DistZO2Error):
    """Too many steps in a row had a loss that is not finite."""


class DivergenceError(DistZO2Error):
    """The coefficients stay far above their running median."""


class Progress:
    """The number of the next step, and what earlier steps mean for it, whether they were made here or are a journal's.

    Attributes:
        step: number of the next step; skipped steps count.
        memory: what the estimator remembers of earlier steps.
        window: max |c_k| of the latest steps, so that a journal can fill it: as the coefficients were used, but with
            `clip_percentile` before they were clipped. A percentile of what it has clipped itself could only fall.
    """

    def __init__(self, settings: Settings) -> None:
        self.step = 0
        self.memory = settings.memory
        self.window: deque[float] = deque(maxlen=WINDOW)
        self._settings = settings
        self._num_skipped = self._num_clipped = self._num_still = 0  # in a row

    def recalled(self, memory: Any) -> tuple[float, ...]:
        """Returns what the estimator remembered, of what a journal or a state holds.

        Raises:
            DistZO2Error: it is not as many numbers as the estimator remembers.
        """
        size = len(self._settings.memory)
        if not isinstance(memory, list | tuple) or [type(value) for value in memory] != [float] * size:
            raise DistZO2Error(f"memory of the estimator: {size} numbers were expected, found {brief(memory)}")
        return tuple(memory)

    def clip(self, coefs: np.ndarray) -> tuple[np.ndarray, bool]:
        """Scales float32 [probes] down to `max_coef` times the median of the window, or to its `clip_percentile`;
        returns whether it had to."""
        max_coef, percentile = self._settings.max_coef, self._settings.clip_percentile
        if (max_coef is None and percentile is None) or len(self.window) < WARM_UP:
            return coefs, False
        largest, limit = float(np.abs(coefs).max(initial=0.0)), self._limit()
        if not limit > 0 or not np.isfinite(largest) or largest <= limit:
            return coefs, False
        return (coefs.astype(np.float64) * (limit / largest)).astype(np.float32), True

    def _limit(self) -> float:
        """The largest |c_k| that is not clipped."""
        if (percentile := self._settings.clip_percentile) is not None:
            return float(np.percentile(self.window, percentile))
        return self._settings.max_coef * float(np.median(self.window))

    def warn_if_still(self, coefs: Sequence[float]) -> None:
        """Warns, once, when the step with these coefficients is the `STILL`-th in a row that changes nothing."""
        if _is_still(coefs) and self._num_still + 1 == STILL:
            logger.warning(
                "step %d: for %d steps in a row no perturbation has changed a loss, and nothing is learned: eps may be "
                "too small, rewards equal for all members, or the weights ruined by an lr that is too large",
                self.step, STILL,
            )  # fmt: skip

    def count(self, coefs: Sequence[float], skipped: str | None, clipped: bool, largest: float | None = None) -> None:
        """Counts a step that was made. After an error, counts begin at 0 again.

        Args:
            coefs: as they were used; empty if the step was skipped.
            largest: max |c_k| before clipping; None: `coefs` were not clipped, or are clipped by the median.

        Raises:
            NonFiniteLossError: `max_skipped` steps in a row were skipped.
            DivergenceError: `max_clipped` steps in a row were clipped; by a percentile, which clips healthy steps too,
                only those count whose coefficients were `max_coef` times as large.
        """
        s, step, self.step = self._settings, self.step, self.step + 1
        self._num_skipped = self._num_skipped + 1 if skipped else 0
        if skipped in (None, NON_FINITE_COEFFICIENT):
            if clipped and s.clip_percentile is not None:
                clipped = s.max_coef is not None and (largest or 0.0) > s.max_coef * self._limit()
            if len(coefs):
                used = float(np.abs(np.asarray(coefs, np.float64)).max())
                self.window.append(used if largest is None or s.clip_percentile is None else largest)
            self._num_clipped = self._num_clipped + 1 if clipped else 0
            self._num_still = self._num_still + 1 if _is_still(coefs) else 0
            if s.max_clipped and self._num_clipped >= s.max_clipped:
                self._num_clipped = 0
                limit = f"{s.max_coef:g} times their running median"
                if s.clip_percentile is not None:
                    limit = f"{s.max_coef:g} times percentile {s.clip_percentile:g} of the last {WINDOW} steps"
                raise DivergenceError(
                    f"step {step}: coefficients above {limit} for {s.max_clipped} "
                    "steps in a row: the run diverges. A smaller lr or a larger eps may help; the journal holds every "
                    "step."
                )
        if skipped and self._num_skipped >= s.max_skipped:
            self._num_skipped = 0
            raise NonFiniteLossError(
                f"step {step}: {skipped}, for {s.max_skipped} steps in a row; none of them was applied"
            )


def _is_still(coefs: Sequence[float]) -> bool:
    return len(coefs) > 0 and not np.any(coefs)
