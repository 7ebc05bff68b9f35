"""Learning-rate schedules, as factors on the base rate that torch's LambdaLR takes."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distzo2.errors import UsageError

SCHEDULES = ("constant", "linear", "cosine")


def factor_of(schedule: str, num_steps: int, warmup: int = 0) -> Callable[[int], float]:
    """The factor at step t: rises to 1 over `warmup` steps, then is 1, or falls to 0 at `num_steps`."""
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def make_scheduler(optimizer: Optimizer, factor: Callable[[int], float], first_step: int) -> LambdaLR:
    """A scheduler that stands at `first_step`, whose rate the optimizer has from now on."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, factor, last_epoch=first_step - 1)
