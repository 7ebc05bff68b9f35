"""Schedules of a run's learning rate and of its eps: factors on them, functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from distzo2.errors import DistZO2Error

SCHEDULES = ("constant", "linear", "cosine", "wsd")
DECAY = 0.2  # of the steps of "wsd"


def factor_of(
    schedule: str, num_steps: int, warmup: int = 0, *, final: float = 0.0, rises: bool = True, decay: float = DECAY
) -> Callable[[int], float]:
    """The factor on a rate at a step, counted from 0.

    Args:
        schedule: "constant" stays at 1; "linear" and "cosine" fall to `final` at `num_steps`; "wsd" (warm-up, stable,
            decay; MiniCPM, arXiv 2404.06395) stays at 1 and falls in the last `decay` of the steps, linearly.
        warmup: steps in which it rises from 0 to 1.
        rises: False keeps the factor at 1 during the warm-up. eps needs this: differences of losses near eps = 0 are
            rounding.

    Raises:
        DistZO2Error: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise DistZO2Error(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}")
    begin = max(warmup, num_steps - round(decay * num_steps)) if schedule == "wsd" else warmup

    def factor(step: int) -> float:
        if rises and step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant" or step < begin:
            return 1.0
        done = min(1.0, (step - begin) / max(1, num_steps - begin))
        left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
        return left if final == 0 else final + (1.0 - final) * left

    return factor
