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

    The window holds the coefficients as they were used, so that it can be filled from a journal.
    """

    def __init__(self, max_coef: float | None, max_clipped: int) -> None:
        """`max_coef` None: nothing is clipped. `max_clipped` 0: clipping never ends the run."""
        self._max_coef, self._max_clipped = max_coef, max_clipped
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._num_clipped = 0  # in a row

    def __call__(self, coefs: np.ndarray) -> tuple[np.ndarray, bool]:
        """float32 [probes] -> the coefficients to use, and whether they were clipped."""
        largest = float(np.abs(coefs).max(initial=0.0))
        limit = self._limit()
        if limit is None or not np.isfinite(largest) or largest <= limit:
            return coefs, False
        return (coefs.astype(np.float64) * (limit / largest)).astype(np.float32), True

    def _limit(self) -> float | None:
        if self._max_coef is None or len(self._window) < WARM_UP:
            return None
        median = float(np.median(self._window))
        return self._max_coef * median if median > 0 else None

    def count(self, step: int, coefs: Sequence[float], clipped: bool) -> None:
        """Remembers the coefficients that a step has used; an empty list where it was skipped.

        Raises:
            DivergenceError: `max_clipped` steps in a row were clipped. The count begins again after it.
        """
        if len(coefs):
            self._window.append(float(np.abs(np.asarray(coefs, np.float64)).max()))
        self._num_clipped = self._num_clipped + 1 if clipped else 0
        if self._max_clipped and self._num_clipped >= self._max_clipped:
            self._num_clipped = 0
            raise DivergenceError(
                f"step {step}: coefficients above {self._max_coef:g} times their running median for "
                f"{self._max_clipped} steps in a row: the run diverges. A smaller lr or a larger eps may help; the "
                "journal holds every step."
            )

    def state(self) -> list[float]:
        """The window, for `load`."""
        return list(self._window)

    def load(self, state: Sequence[float]) -> None:
        """Takes over what `state` returned."""
        self._window.clear()
        self._window.extend(state)
