"""Objectives: what a step minimizes, and what evaluation reports. All of it is computed in float32 from the logits.

lm         mean cross-entropy of the tokens that are learned (a completion, the assistant's turns, a text)
choices    cross-entropy over the choices, a choice's score being the mean log-likelihood of its tokens
error      1 - accuracy: of the choices, or of the tokens that are learned. No gradient exists, none is needed
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from distzo2.errors import UsageError
from distzo2.parallel.group import Mesh
from distzo2.parallel.mesh import deal_evenly
from distzo2.streaming.offload import evaluate
from distzo2.tasks.batches import Batch, collate
from distzo2.tasks.tokenize import Example


@dataclass(frozen=True)
class Score:
    """The result of an evaluation. `loss` is a mean over tokens (lm) or examples (choices)."""

    loss: float
    accuracy: float
    num_examples: int
    num_tokens: int  # that the model read


def resolve_objective(name: str | None, examples: Sequence[Example], source: str = "the data") -> str:
    """The objective called `name`, or the data's own where it is None; `source` is the data's file.

    Raises:
        UsageError: the data is not of the kind that the objective needs.
    """
    has_choices = bool(examples[0].options)
    if name is None:
        return "choices" if has_choices else "lm"
    if name == "choices" and not has_choices:
        raise UsageError(f"{source}: objective 'choices' needs lines with 'choices' and 'label'")
    return name


def right_choice(example: Example) -> Example:
    """An example with choices as a sequence whose right choice is learned, as `lm` reads it; others as they are."""
    if not example.options:
        return example
    tokens = np.concatenate([example.tokens, example.options[example.label]])
    return Example(tokens, np.arange(len(tokens)) >= len(example.tokens))


class Objective:
    """Makes closures of micro-batches, for `ZOSGD.step` and for evaluation."""

    def __init__(self, model: nn.Module, name: str, *, pad_id: int, device: torch.device | str = "cpu") -> None:
        self.model, self.name, self._pad_id, self._device = model, name, pad_id, device
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The tensors of a micro-batch."""
        examples = [right_choice(e) for e in examples] if self.name == "lm" else examples
        return collate(examples, pad_id=self._pad_id, device=self._device)

    def closure(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """A closure that returns the micro-batch's loss, float32 scalar."""

        def loss() -> torch.Tensor:
            logits, likelihoods = self._token_scores(batch)
            if self.name == "error":
                hits, count = _hits(batch, logits, likelihoods)
                return 1.0 - hits / count
            return _losses(batch, likelihoods).mean()

        return loss

    def evaluation(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """A closure that returns float64 [4]: sum of losses, number of them, right answers, number of them."""

        def figures() -> torch.Tensor:
            logits, likelihoods = self._token_scores(batch)
            losses = _losses(batch, likelihoods)
            hits, count = _hits(batch, logits, likelihoods)
            if self.name == "error":
                return torch.stack([count - hits, count, hits, count])
            return torch.stack([losses.double().sum(), torch.full_like(count, losses.numel()), hits, count])

        return figures

    def _token_scores(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, float32 [scored, vocabulary], and log-likelihoods, float32 [scores]."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        columns = batch.columns
        if batch.keep is not None:
            if self._takes_keep:
                inputs["logits_to_keep"] = batch.keep
            else:
                columns = batch.keep[columns]
        logits = self.model(**inputs).logits[batch.rows, columns].float()
        return logits, logits[batch.scored, batch.tokens] - logits.logsumexp(-1)[batch.scored]


def choice_scores(batch: Batch, likelihoods: torch.Tensor) -> torch.Tensor:
    """float32 [examples, most choices]: mean log-likelihood of each choice's tokens; -inf where there is no choice."""
    padded = torch.cat([likelihoods, likelihoods.new_zeros(1)])
    means = padded[batch.spans].sum(-1) / batch.span_lengths
    return torch.cat([means, means.new_full((1,), -torch.inf)])[batch.choices]


def _losses(batch: Batch, likelihoods: torch.Tensor) -> torch.Tensor:
    """float32: of each token, or with choices of each example."""
    if batch.choices is None:
        return -likelihoods
    scores = choice_scores(batch, likelihoods)
    return scores.logsumexp(-1) - scores.gather(-1, batch.labels[:, None])[:, 0]


def _hits(batch: Batch, logits: torch.Tensor, likelihoods: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 scalars: right answers, and answers."""
    if batch.choices is None:
        right = logits.argmax(-1)[batch.scored] == batch.tokens
    else:
        right = choice_scores(batch, likelihoods).argmax(-1) == batch.labels
    hits = right.double().sum()
    return hits, torch.full_like(hits, right.numel())


def evaluate_examples(
    objective: Objective,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    batches_per_pass: int = 8,
    mesh: Mesh | None = None,
) -> Score:
    """Loss and accuracy over all examples, with many micro-batches in each pass over the weights.

    Args:
        objective: of the model.
        examples: at least one.
        batch_size: examples in a micro-batch.
        batches_per_pass: micro-batches that share a pass; each keeps its hidden states meanwhile.
        mesh: ranks that share the micro-batches; all of them call this with the same examples. The bits of the score
            are those of one rank.
    """
    groups = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    dealt = [range(len(groups))] if mesh is None else deal_evenly(len(groups), mesh.world_size)
    own = dealt[0 if mesh is None else mesh.rank]
    rows = torch.zeros(max(map(len, dealt)), 5, dtype=torch.float64)  # of each micro-batch: its figures, its tokens
    with mesh.together("an evaluation") if mesh is not None else nullcontext():
        for first in range(own.start, own.stop, batches_per_pass):
            part = range(first, min(first + batches_per_pass, own.stop))
            batches = [objective.batch(groups[i]) for i in part]
            figures = evaluate(objective.model, [objective.evaluation(b) for b in batches])
            for i, batch, values in zip(part, batches, figures, strict=True):
                rows[i - own.start] = torch.tensor([*values.tolist(), batch.num_tokens], dtype=torch.float64)
    gathered = rows[None] if mesh is None else mesh.exchange.gather(rows)
    totals = torch.zeros(5, dtype=torch.float64)
    for row in (row for part, values in zip(dealt, gathered, strict=True) for row in values[: len(part)]):
        totals += row
    loss, count, hits, answers, num_tokens = totals.tolist()
    return Score(loss / count, hits / answers, len(examples), int(num_tokens))
