"""Objectives: what a step minimizes, and what evaluation reports. All of it is computed in float32 from the logits.

lm         mean cross-entropy of the tokens that are learned (a completion, the assistant's turns, a text)
choices    cross-entropy over the choices, a choice's score being the mean log-likelihood of its tokens; or over the
           classes of a classifier
error      1 - accuracy: of the choices, or of the tokens that are learned. No gradient exists, none is needed
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from distzo2.errors import DistZO2Error, UsageError
from distzo2.parallel.group import Mesh
from distzo2.parallel.mesh import deal_evenly
from distzo2.streaming.offload import evaluate
from distzo2.tasks.batches import Batch, collate
from distzo2.tasks.kinds import ModelKind
from distzo2.tasks.tokenize import Example

BATCHES_PER_PASS = 8  # of an evaluation; each keeps its hidden states meanwhile
_CHECKED_TOKENS = 64  # of a line, by which a model's causality is checked


@dataclass(frozen=True)
class Score:
    """The result of an evaluation. `loss` is a mean over tokens (lm) or examples (choices), or minus a mean reward."""

    loss: float
    accuracy: float | None  # None: the model only writes
    num_examples: int
    num_tokens: int  # that the model read
    written: Mapping[str, float] = field(default_factory=dict)  # of written answers: means over questions, by name

    def figures(self) -> dict[str, float]:
        """Loss, accuracy, and those of written answers, by name."""
        return {"loss": self.loss, **({} if self.accuracy is None else {"accuracy": self.accuracy}), **self.written}

    def __str__(self) -> str:
        parts = [] if self.accuracy is None else [f"loss {self.loss:.4f}", f"accuracy {self.accuracy:.2%}"]
        for name, value in self.written.items():
            parts.append(f"{name.upper()} {value:.2%}" if name in ("f1", "em") else f"{name} {value:.4f}")
        return ", ".join(parts)


def resolve_objective(name: str | None, examples: Sequence[Example], source: str = "the data") -> str:
    """The objective called `name`, or the data's own where it is None; `source` is the data's file.

    Raises:
        UsageError: the data is not of the kind that the objective needs.
    """
    if name == "reward":
        raise UsageError("objective 'reward' is for distzo2 finetune")
    first = examples[0]
    if name is None:
        return "choices" if first.chooses else "lm"
    if name == "choices" and not first.chooses:
        raise UsageError(f"{source}: objective 'choices' needs lines with 'choices' and 'label'")
    if name == "lm" and first.chooses and not first.options:
        raise UsageError(f"{source}: objective 'lm' needs tokens to learn, and a classifier learns classes")
    return name


def right_choice(example: Example) -> Example:
    """An example with choices as a sequence whose right choice is learned, as `lm` reads it; others as they are."""
    if not example.options:
        return example
    right = example.options[example.label]
    if example.place is not None:
        return replace(example, options=(right,), label=0)
    tokens = np.concatenate([example.tokens, right])
    first = len(example.tokens) + (example.lead[example.label] if example.lead else 0)
    return Example(tokens, np.arange(len(tokens)) >= first, source=example.source)


class Objective:
    """Makes closures of micro-batches, for `ZOSGD.step` and for evaluation."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        pad_id: int,
        device: torch.device | str = "cpu",
        in_front: int = 0,
    ) -> None:
        """
        Args:
            model: that reads the batches.
            name: "lm", "choices" or "error".
            pad_id: token that fills rows up.
            device: where batches go.
            in_front: positions in the logits before those of a batch, which a prompt of peft adds.
        """
        self.model, self.name, self._pad_id, self._device, self._in_front = model, name, pad_id, device, in_front
        # What closures return, for a mean over the micro-batch or over all of a step; see `closure`.
        self.rule: Literal["mean", "sum"] = "mean"
        if torch.device(device).type == "cuda":
            _never_packed()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PeftModel
        self._takes_keep = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The tensors of a micro-batch."""
        examples = [right_choice(e) for e in examples] if self.name == "lm" else examples
        return collate(examples, pad_id=self._pad_id, device=self._device)

    def closure(self, batch: Batch) -> Callable[[], Any]:
        """A closure for a step.

        Returns:
            The micro-batch's loss, float32 scalar; under the rule "sum" (sum of losses, float64 scalar; number of
            them), a loss being a token's or, with choices or classes, an example's.
        """

        number = (batch.tokens if batch.labels is None else batch.labels).numel()

        def loss() -> torch.Tensor | tuple[torch.Tensor, int]:
            logits, likelihoods = self._token_scores(batch)
            if self.name == "error":
                hits, count = _hits(batch, logits, likelihoods)
                return 1.0 - hits / count if self.rule == "mean" else (count - hits, number)
            losses = _losses(batch, likelihoods)
            return losses.mean() if self.rule == "mean" else (losses.double().sum(), number)

        return loss

    def named(self, name: str) -> Objective:
        """Another objective of the same model."""
        other = copy(self)
        other.name = name
        return other

    def evaluation(self, batch: Batch, blanks: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        """A closure that returns float64 [4]: sum of losses, number of them, right answers, number of them.

        With `blanks`, float32 [examples, most choices], an answer is the choice whose log-likelihood exceeds its
        likelihood behind a prompt without content by most (https://arxiv.org/abs/2104.08315); losses are as without.
        """

        def figures() -> torch.Tensor:
            logits, likelihoods = self._token_scores(batch)
            losses = _losses(batch, likelihoods)
            hits, count = _hits(batch, logits, likelihoods, blanks)
            if self.name == "error":
                return torch.stack([count - hits, count, hits, count])
            return torch.stack([losses.double().sum(), torch.full_like(count, losses.numel()), hits, count])

        return figures

    def check_causal(self, example: Example, kind: ModelKind) -> None:
        """Runs the model on the beginning of a line, twice, the second time with another token at its end.

        Raises:
            DistZO2Error: logits before the last token changed by a bit (in float32, and with experts, whose matrix
                products a token changes in size: by more than rounding). A model that sees the token that it is asked
                for cannot be trained as a causal one. No-op for models that answer at a mask or for a whole text.
        """
        if kind.name not in ("causal", "encoder-decoder"):
            return
        start = right_choice(example).tokens[:_CHECKED_TOKENS]
        other = start.copy()
        other[-1] = start[-1] - 1 if start[-1] else 1
        batches = [
            collate([replace(example, tokens=t, targets=None, options=())], pad_id=self._pad_id, device=self._device)
            for t in (start, other)
        ]
        training = self.model.training
        self.model.eval()  # dropout would differ
        try:
            runs = evaluate(self.model, [lambda b=b: self.model(**_inputs(b)).logits[0, :-1].float() for b in batches])
        finally:
            self.model.train(training)
        change = (runs[0] - runs[1]).abs().max()
        dtype = next(self.model.parameters()).dtype
        rounds = kind.has_experts or dtype == torch.float32  # rounding there is far less than what a token does
        if change > (8 * torch.finfo(dtype).eps * runs[0].abs().max() if rounds else 0):
            raise DistZO2Error(
                f"{kind.model} sees the tokens that it is asked to predict (another last token changes the logits "
                "before it): it cannot learn as a causal language model"
            )

    def _token_scores(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, float32 [scored, vocabulary], and log-likelihoods, float32 [scores]; of a classifier its logits,
        float32 [examples, classes], twice."""
        inputs = _inputs(batch)
        if batch.choices is None and batch.labels is not None:
            logits = self.model(**inputs).logits.float()
            return logits, logits
        columns, keep = batch.columns, batch.keep
        if keep is None and self._in_front:
            columns = columns + self._in_front
        elif keep is not None:
            keep = keep + self._in_front if self._in_front else keep
            if self._takes_keep:
                inputs["logits_to_keep"] = keep
            else:
                columns = keep[columns]
        logits = self.model(**inputs).logits[batch.rows, columns].float()
        return logits, logits[batch.scored, batch.tokens] - logits.logsumexp(-1)[batch.scored]


@functools.cache
def _never_packed() -> None:
    """Keeps transformers from asking whether a row without a mask holds several sequences, which ours never do: the
    answer is read from the GPU, behind all transfers."""
    from transformers import masking_utils

    if hasattr(masking_utils, "find_packed_sequence_indices"):
        masking_utils.find_packed_sequence_indices = lambda position_ids: None


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the model is called with."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.source_ids is not None:
        inputs = {"input_ids": batch.source_ids, "attention_mask": batch.source_mask}
        inputs["decoder_input_ids"] = batch.input_ids
    return {name: value for name, value in inputs.items() if value is not None}


def choice_scores(batch: Batch, likelihoods: torch.Tensor, mean: bool = True) -> torch.Tensor:
    """float32 [examples, most choices]: mean (or sum) of the log-likelihoods of each choice's tokens, -inf where there
    is no choice; or [examples, classes]: a classifier's logits."""
    if batch.choices is None:
        return likelihoods  # of classes
    padded = torch.cat([likelihoods, likelihoods.new_zeros(1)])
    scores = padded[batch.spans].sum(-1)
    if mean:
        scores = scores / batch.span_lengths
    return torch.cat([scores, scores.new_full((1,), -torch.inf)])[batch.choices]


def _losses(batch: Batch, likelihoods: torch.Tensor) -> torch.Tensor:
    """float32: of each token, or with choices of each example."""
    if batch.labels is None:
        return -likelihoods
    scores = choice_scores(batch, likelihoods)
    return scores.logsumexp(-1) - scores.gather(-1, batch.labels[:, None])[:, 0]


def _hits(
    batch: Batch, logits: torch.Tensor, likelihoods: torch.Tensor, blanks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 scalars: right answers, and answers."""
    if batch.labels is None:
        right = logits.argmax(-1)[batch.scored] == batch.tokens
    else:
        scores = choice_scores(batch, likelihoods, mean=blanks is None)
        chosen = (scores if blanks is None else scores - blanks).argmax(-1)
        right = chosen == batch.labels if batch.right is None else batch.right.gather(-1, chosen[:, None])[:, 0]
    hits = right.double().sum()
    return hits, torch.full_like(hits, right.numel())


def evaluate_examples(
    objective: Objective,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
    blanks: Sequence[Example] = (),
) -> Score:
    """Loss and accuracy over all examples, with many micro-batches in each pass over the weights.

    Args:
        objective: of the model.
        examples: at least one.
        batch_size: examples in a micro-batch.
        mesh: ranks that share the micro-batches; all of them call this with the same examples. The bits of the score
            are those of one rank.
        blanks: for each example its choices behind a prompt without content, to calibrate its answer; none: no
            calibration.
    """
    groups = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    dealt = [range(len(groups))] if mesh is None else deal_evenly(len(groups), mesh.world_size)
    own = dealt[0 if mesh is None else mesh.rank]
    rows = torch.zeros(max(map(len, dealt)), 5, dtype=torch.float64)  # of each micro-batch: its figures, its tokens
    with mesh.together("an evaluation") if mesh is not None else nullcontext():
        unspoken: Sequence[torch.Tensor | None] = [None] * len(own)
        if blanks:
            behind = [blanks[i * batch_size : (i + 1) * batch_size] for i in own]
            unspoken = _blank_scores(objective, behind)

        def evaluation(i: int, batch: Batch) -> Callable[[], torch.Tensor]:
            return objective.evaluation(batch, unspoken[i])

        passes = _in_passes(objective, [groups[i] for i in own], evaluation)
        for row, (batch, values) in zip(rows, passes, strict=False):
            row[:] = torch.tensor([*values.tolist(), batch.num_tokens], dtype=torch.float64)
    gathered = rows[None] if mesh is None else mesh.exchange.gather(rows)
    totals = torch.zeros(5, dtype=torch.float64)
    for row in chain.from_iterable(values[: len(part)] for part, values in zip(dealt, gathered, strict=True)):
        totals += row
    loss, count, hits, answers, num_tokens = totals.tolist()
    return Score(loss / count, hits / answers, len(examples), int(num_tokens))


def _in_passes(
    objective: Objective,
    groups: Sequence[Sequence[Example]],
    closure: Callable[[int, Batch], Callable[[], torch.Tensor]],
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The batch of each group and what its closure, of its number and batch, returns."""
    for first in range(0, len(groups), BATCHES_PER_PASS):
        batches = [objective.batch(group) for group in groups[first : first + BATCHES_PER_PASS]]
        yield from zip(
            batches, evaluate(objective.model, [closure(i, b) for i, b in enumerate(batches, first)]), strict=True
        )


def _blank_scores(objective: Objective, groups: Sequence[Sequence[Example]]) -> list[torch.Tensor]:
    """float32 [examples, most choices] of each group: log-likelihoods of choices behind prompts without content, 0
    where there is no choice. What is the same in many examples is computed once."""
    key = lambda e: (e.tokens.tobytes(), e.lead, *(option.tobytes() for option in e.options))  # noqa: E731
    distinct = {key(e): e for group in groups for e in group}
    size = max((len(group) for group in groups), default=1)
    parts = [list(distinct.values())[i : i + size] for i in range(0, len(distinct), size)]

    def sums(i: int, batch: Batch) -> Callable[[], torch.Tensor]:
        return lambda: choice_scores(batch, objective._token_scores(batch)[1], mean=False)

    passes = _in_passes(objective, parts, sums)
    scores = chain.from_iterable(values for _, values in passes)
    found = {k: row[: len(e.options)] for (k, e), row in zip(distinct.items(), scores, strict=True)}
    return [nn.utils.rnn.pad_sequence([found[key(e)] for e in group], batch_first=True) for group in groups]
