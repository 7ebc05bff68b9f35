"""Keeps a run finite: coefficients far above their running median are clipped, and too many in a row end the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from distzo2.errors import DistZO2Error

WINDOW = 101  # steps that the running median looks back on
WARM_UP = 16  # steps before anything is clipped


class DivergenceError(DistZO2Error):
    """The coefficients stay far above their running median."""


class CoefficientClip:
    """Scales a step's coefficients down to `max_coef` times the running median of max |c_k|.

    The window holds the coefficients as they were used, so that a journal is enough to go on with the same bits.
    """

    def __init__(self, max_coef: float | None, max_clipped: int) -> None:
        if max_coef is not None and not max_coef > 1:
            raise DistZO2Error(f"max_coef={max_coef!r}: a number above 1 was expected, or None")
        self._max_coef, self._max_clipped = max_coef, max_clipped
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._in_row = 0

    def __call__(self, coefs: np.ndarray) -> tuple[np.ndarray, bool]:
        """float32 [probes] -> the coefficients to use, and whether they were clipped."""
        largest = float(np.abs(coefs).max(initial=0.0))
        limit = self._limit()
        clipped = limit is not None and np.isfinite(largest) and largest > limit
        if clipped:
            coefs = (coefs.astype(np.float64) * (limit / largest)).astype(np.float32)
        self._in_row = self._in_row + 1 if clipped else 0
        if np.isfinite(largest):
            self.remember(coefs)
        return coefs, clipped

    def take(self, coefs: Sequence[float], clipped: bool) -> None:
        """Takes over what another rank's clip has made of the same step."""
        self._in_row = self._in_row + 1 if clipped else 0
        self.remember(coefs)

    def count(self, clipped: bool) -> None:
        """Takes over from a journal that a step was clipped, or was not. A run that so many ended, and that goes on all
        the same, has none behind it."""
        self._in_row = self._in_row + 1 if clipped else 0
        if self._max_clipped and self._in_row >= self._max_clipped:
            self._in_row = 0

    def _limit(self) -> float | None:
        if self._max_coef is None or len(self._window) < WARM_UP:
            return None
        median = float(np.median(self._window))
        return self._max_coef * median if median > 0 else None

    def remember(self, coefs: Sequence[float]) -> None:
        """Puts a step's coefficients into the window; a step without any changes nothing."""
        if len(coefs):
            self._window.append(float(np.abs(np.asarray(coefs, np.float64)).max()))

    def check(self, step: int) -> None:
        """Raises DivergenceError when too many steps in a row were clipped."""
        if self._max_clipped and self._in_row >= self._max_clipped:
            raise DivergenceError(
                f"step {step}: coefficients above {self._max_coef:g} times their running median for {self._in_row} "
                "steps in a row: the run diverges. A smaller lr or a larger eps may help; the journal holds every step."
            )

    def state(self) -> list[float]:
        return list(self._window)

    def load(self, state: Sequence[float]) -> None:
        self._window.clear()
        self._window.extend(state)
