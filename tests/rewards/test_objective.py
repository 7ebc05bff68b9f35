"""The objective of rewards, in an optimizer's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

import distzo2
from distzo2.errors import RewardError
from distzo2.rewards.objective import Question, RewardObjective


@dataclass(frozen=True)
class Fixed:
    """In place of `Writing`: enters the model and writes the same text."""

    def completions(self, model: torch.nn.Module, questions: Sequence[Question], batch_size: int) -> list[str]:
        model(torch.ones(1, 2))
        return ["text"] * batch_size


@pytest.mark.parametrize("fails_at", [1, 3, 100])
def test_a_lost_step_asks_no_further(fails_at: int, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def reward(prompts, completions, rows) -> list[float]:
        asked.append(rows)
        if len(asked) == fails_at:
            raise RewardError(RewardError.SLOW, "it took long")
        return [float(len(rows[0]))] * len(completions)

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    opt = distzo2.ZOSGD(distzo2.offload(model, units=["0", "1"], device="cpu"), lr=0.1, num_probes=2)
    objective = RewardObjective(model, reward, Fixed())
    closures = [objective.closure(objective.batch([Question([1], row={"n": i})])) for i in range(2)]
    for step in range(2):  # the second one asks again
        opt.step(closures)
        lost = step == 0 and fails_at < 100
        assert opt.last.skipped == (RewardError.SLOW if lost else None)
        if lost:
            assert len(asked) == fails_at
    assert caplog.text.count("it took long") == (fails_at < 100)
    assert len(asked) >= 8 + min(fails_at, 8)
