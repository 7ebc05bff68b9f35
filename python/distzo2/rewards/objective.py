"""What a model writes behind prompts, and how good it is: the objective of a run, and figures of an evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from distzo2.errors import RewardError
from distzo2.generation.generate import generate_batch
from distzo2.optim.state import NoLoss
from distzo2.parallel.group import Mesh
from distzo2.parallel.mesh import deal_evenly
from distzo2.rewards.functions import Reward, Row
from distzo2.streaming.lanes import current_lane

logger = logging.getLogger("distzo2")


@dataclass(frozen=True)
class Question:
    """What a model is to continue, and the row of data that it is from."""

    tokens: Sequence[int]
    prompt: str = ""
    row: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Writing:
    """How a model answers questions: the options of `distzo2.generate_batch`."""

    tokenizer: Any
    pad_id: int | None = None
    max_new_tokens: int = 50
    stop: Sequence[str] = ()
    temperature: float = 0.0  # 0: greedily
    top_k: int = 50

    def completions(self, model: nn.Module, questions: Sequence[Question], batch_size: int) -> list[str]:
        """What the model writes behind each question."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k} if self.temperature else {}
        made = generate_batch(
            model, [question.tokens for question in questions], tokenizer=self.tokenizer, stop=self.stop,
            max_new_tokens=self.max_new_tokens, batch_size=batch_size, pad_id=self.pad_id, **sampling,
        )  # fmt: skip
        return [each.text for each in made]


@dataclass(frozen=True)
class Asked:
    """A micro-batch of questions."""

    questions: Sequence[Question]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts."""
        return sum(len(question.tokens) for question in self.questions)


class RewardObjective:
    """Makes closures of micro-batches for `ZOSGD.step`: the loss is minus the mean reward of what the model writes."""

    name = "reward"

    def __init__(self, model: nn.Module, reward: Reward, writing: Writing) -> None:
        self.model, self.reward, self.writing = model, reward, writing
        self._step: int | None = None  # the last one, why it is lost, and the losses that it has by (evaluation, batch)
        self._lost: str | None = None
        self._losses: dict[tuple[int, int], Any] = {}
        self.rule: Literal["mean", "sum"] = "mean"  # of what closures return, as in `Objective`

    def batch(self, questions: Sequence[Question]) -> Asked:
        return Asked(questions)

    def closure(self, batch: Asked) -> Callable[[], Any]:
        """A closure for a step.

        Returns:
            Minus the mean reward; under the rule "sum" (minus the sum of rewards, their number). NoLoss where the
            reward fails, which skips the step: the step's other lanes then do not ask for rewards.
        """

        def loss() -> float | tuple[float, int]:
            texts = self.writing.completions(self.model, batch.questions, len(batch.questions))
            lane = current_lane()
            if lane is None or lane.step != self._step:
                self._step, self._lost, self._losses = lane and lane.step, None, {}
            if self._lost is not None:  # a lane that is run again, to be compared, has the loss that it had
                return self._losses.get((lane.index, lane.batch), NoLoss(self._lost))
            try:
                total = -math.fsum(rewards_of(self.reward, batch.questions, texts))
            except RewardError as error:
                logger.warning("%s", error)
                self._lost = error.reason if lane else None
                return NoLoss(error.reason)
            value = total / len(texts) if self.rule == "mean" else (total, len(texts))
            if lane is not None:
                self._losses[lane.index, lane.batch] = value
            return value

        return loss


def rewards_of(reward: Reward, questions: Sequence[Question], texts: Sequence[str]) -> Sequence[float]:
    """The reward of each text that was written behind a question."""
    return reward([q.prompt for q in questions], texts, [q.row for q in questions])


def questions_digest(questions: Sequence[Question]) -> str:
    """SHA-256 of all that a step can see of questions, in order."""
    sha256 = hashlib.sha256()
    for question in questions:
        sha256.update(json.dumps([[int(token) for token in question.tokens], question.prompt, question.row]).encode())
    return sha256.hexdigest()


def written_scores(
    model: nn.Module,
    questions: Sequence[Question],
    rewards: Mapping[str, Reward],
    writing: Writing,
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """The means of some rewards of what a model writes; NaN where a reward fails, which is logged.

    Args:
        rewards: by the name of the figure.
        batch_size: questions that share a pass.
        mesh: ranks that share the questions; all of them call this with the same ones.
    """
    dealt = [range(len(questions))] if mesh is None else deal_evenly(len(questions), mesh.world_size)
    own = [questions[i] for i in dealt[0 if mesh is None else mesh.rank]]
    rows = torch.zeros(len(dealt[0]), len(rewards), dtype=torch.float64)
    with mesh.together("an evaluation") if mesh is not None else nullcontext():
        texts = writing.completions(model, own, batch_size)
        for first in range(0, len(own), batch_size):
            part = slice(first, min(first + batch_size, len(own)))
            for column, reward in enumerate(rewards.values()):
                try:
                    rows[part, column] = torch.tensor(rewards_of(reward, own[part], texts[part]), dtype=torch.float64)
                except RewardError as error:
                    logger.warning("%s", error)
                    rows[part, column] = math.nan
    gathered = rows[None] if mesh is None else mesh.exchange.gather(rows)
    scores = torch.cat([values[: len(part)] for part, values in zip(dealt, gathered, strict=True)])
    return dict(zip(rewards, scores.mean(0).tolist(), strict=True))
