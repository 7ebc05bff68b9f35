"""Where a run stands between two steps: what the next step depends on besides the weights and the settings."""

from __future__ import annotations

from collections.abc import Sequence

from distzo2.errors import DistZO2Error
from distzo2.optim.clipping import CoefficientClip
from distzo2.optim.settings import Settings

NON_FINITE_LOSS, NON_FINITE_COEFFICIENT = "non-finite loss", "non-finite coefficient"  # why a step was skipped


class NonFiniteLossError(DistZO2Error):
    """Too many steps in a row had a loss that is not finite."""


class Progress:
    """The number of the next step, and what earlier steps mean for it.

    It is a function of the steps made: whether their forwards were run here or they were read from a journal.
    """

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
