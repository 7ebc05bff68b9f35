"""Where a run stands between two steps: what the next step depends on besides the weights and the settings.

It keeps a run finite: coefficients far above their running median are clipped, and too many in a row end the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from distzo2.errors import DistZO2Error
from distzo2.optim.settings import Settings

WINDOW = 101  # steps that the running median looks back on
WARM_UP = 16  # steps before anything is clipped
NON_FINITE_LOSS, NON_FINITE_COEFFICIENT = "non-finite loss", "non-finite coefficient"  # why a step was skipped


class NonFiniteLossError(DistZO2Error):
    """Too many steps in a row had a loss that is not finite."""


class DivergenceError(DistZO2Error):
    """The coefficients stay far above their running median."""


class CoefficientClip:
    """Scales a step's coefficients down to `max_coef` times the running median of max |c_k|.

    The window holds coefficients as they were used, so that it can be filled from a journal.
    """

    def __init__(self, max_coef: float | None, max_clipped: int) -> None:
        """`max_coef` None: nothing is clipped. `max_clipped` 0: clipping never ends the run."""
        self._max_coef, self._max_clipped = max_coef, max_clipped
        self.window: deque[float] = deque(maxlen=WINDOW)  # max |c_k| of the steps that were not skipped
        self._num_clipped = 0  # in a row

    def __call__(self, coefs: np.ndarray) -> tuple[np.ndarray, bool]:
        """float32 [probes] -> the coefficients to use, and whether they were clipped."""
        if self._max_coef is None or len(self.window) < WARM_UP:
            return coefs, False
        largest = float(np.abs(coefs).max(initial=0.0))
        limit = self._max_coef * float(np.median(self.window))
        if not limit > 0 or not np.isfinite(largest) or largest <= limit:
            return coefs, False
        return (coefs.astype(np.float64) * (limit / largest)).astype(np.float32), True

    def count(self, step: int, coefs: Sequence[float], clipped: bool) -> None:
        """Remembers the coefficients that a step has used; an empty list where it was skipped.

        Raises:
            DivergenceError: `max_clipped` steps in a row were clipped. The count begins again after it.
        """
        if len(coefs):
            self.window.append(float(np.abs(np.asarray(coefs, np.float64)).max()))
        self._num_clipped = self._num_clipped + 1 if clipped else 0
        if self._max_clipped and self._num_clipped >= self._max_clipped:
            self._num_clipped = 0
            raise DivergenceError(
                f"step {step}: coefficients above {self._max_coef:g} times their running median for "
                f"{self._max_clipped} steps in a row: the run diverges. A smaller lr or a larger eps may help; the "
                "journal holds every step."
            )


class Progress:
    """The number of the next step, and what earlier steps mean for it, made here or read from a journal."""

    def __init__(self, settings: Settings) -> None:
        self.step = 0  # number of the next step; skipped steps count
        self.clip = CoefficientClip(settings.max_coef, settings.max_clipped)
        self._max_skipped = settings.max_skipped
        self._num_skipped = 0  # in a row

    def count(self, coefs: Sequence[float], skipped: str | None, clipped: bool) -> None:
        """Counts a step that was made.

        Raises:
            NonFiniteLossError: `max_skipped` steps in a row were skipped. The count begins again after it.
            DivergenceError: too many steps in a row were clipped.
        """
        step, self.step = self.step, self.step + 1
        self._num_skipped = self._num_skipped + 1 if skipped else 0
        if skipped != NON_FINITE_LOSS:
            self.clip.count(step, coefs, clipped)
        if skipped and self._num_skipped >= self._max_skipped:
            self._num_skipped = 0
            raise NonFiniteLossError(
                f"step {step}: {skipped}, for {self._max_skipped} steps in a row; none of them was applied"
            )
