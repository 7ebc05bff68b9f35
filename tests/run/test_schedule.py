"""Learning-rate schedules, and that one which is taken up in the middle gives the rates that it would have given."""

from __future__ import annotations

import pytest
import torch

from distzo2.errors import UsageError
from distzo2.run.rate import SCHEDULES, factor_of, make_scheduler


def rates(schedule: str, num_steps: int, warmup: int, first: int = 0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make_scheduler(optimizer, factor_of(schedule, num_steps, warmup), first)
    result = []
    for _ in range(first, num_steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


def test_values() -> None:
    assert rates("constant", 4, 0) == [0.5] * 4
    assert rates("linear", 4, 0) == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert rates("cosine", 4, 0) == pytest.approx([0.5, 0.4267767, 0.25, 0.0732233])
    assert rates("linear", 5, 3) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.25])
    assert factor_of("linear", 4)(9) == 0.0
    with pytest.raises(UsageError, match="expected one of constant, linear, cosine"):
        factor_of("sawtooth", 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_taken_up_in_the_middle(schedule: str) -> None:
    whole = rates(schedule, 9, 2)
    for first in (1, 2, 5, 8):
        assert rates(schedule, 9, 2, first) == whole[first:]
