"""Batches: which examples a step sees, and how they become tensors.

The order is a function of (seed, epoch) alone, and the batch of any step is computed directly: a resumed run sees the
same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from distzo2.tasks.tokenize import Example
from distzo2_core import permutation


class DataOrder:
    """An endless sequence of examples: one permutation of all of them an epoch, epoch after epoch."""

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self._num_examples, self._batch_size = num_examples, batch_size
        self._permutation = lru_cache(maxsize=2)(lambda epoch: permutation(num_examples, seed, epoch))

    def batch(self, step: int) -> list[int]:
        """The indices of the examples of step `step`. A batch may begin in one epoch and end in the next."""
        first = step * self._batch_size
        places = (divmod(p, self._num_examples) for p in range(first, first + self._batch_size))
        return [int(self._permutation(epoch)[i]) for epoch, i in places]


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors, with what is scored in it.

    A score is the log-likelihood of one token at one position; scores belong to spans (a choice, or a completion), and
    spans to examples. Choices of one token share the row of their prompt, and a row that begins another is left out, so
    there may be fewer rows than choices. This holds for causal models and decoders, whose logits depend on the past
    only. Words in the place of a mask token share its row too. For a classifier nothing is scored but whole rows.
    """

    input_ids: torch.Tensor  # int64 [rows, positions]; of an encoder-decoder model what its decoder reads
    attention_mask: torch.Tensor | None  # int64 [rows, positions]; 1 on tokens; None: of a causal model, all tokens
    keep: torch.Tensor | None  # int64 [kept], ascending: the positions whose logits are read; None: all of them
    rows: torch.Tensor  # int64 [scored]: distinct (row, kept position) pairs
    columns: torch.Tensor  # int64 [scored]: indices into the kept positions
    scored: torch.Tensor  # int64 [scores]: index of a score's (row, position) pair
    tokens: torch.Tensor  # int64 [scores]: the token whose likelihood is asked
    spans: torch.Tensor  # int64 [spans, longest]: scores of a span in order; `num_scores` where it is shorter
    span_lengths: torch.Tensor  # int64 [spans]
    choices: torch.Tensor | None  # int64 [examples, most choices]: spans of an example; `num_spans` where it has fewer
    labels: torch.Tensor | None  # int64 [examples]: the right choice or class
    right: torch.Tensor | None  # bool [examples, most choices]: choices that count as right; None: those of `labels`
    source_ids: torch.Tensor | None  # int64 [rows, positions of the encoder]
    source_mask: torch.Tensor | None  # of it, as `attention_mask`
    num_tokens: int  # that the model reads, padding left out


def collate(examples: Sequence[Example], *, pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Makes the tensors of a micro-batch, padded on the right.

    Args:
        examples: of one kind of model; all with choices, or all without.
        pad_id: token that fills rows up; any, since no scored position sees it.
        device: where the tensors go.
    """
    sequences: list[np.ndarray] = []
    sources: list[np.ndarray] = []  # of each sequence, where there is an encoder
    scores: list[tuple[int, int, int]] = []  # (row, position whose logits are read, token)
    spans: list[list[int]] = []
    choices: list[list[int]] = []
    for example in examples:
        if example.targets is not None:
            (places,) = np.nonzero(example.targets)
            spans.append(list(range(len(scores), len(scores) + len(places))))
            scores += [(len(sequences), int(p) - 1, int(example.tokens[p])) for p in places]
            # A decoder is given no more than what it needs, as transformers makes it from labels.
            sequences.append(example.tokens if example.source is None else example.tokens[:-1])
        elif not example.options:
            sequences.append(example.tokens)
        else:
            rows, first = _option_rows(example, sequences), len(spans)
            asked = len(example.tokens) - 1 if example.place is None else example.place
            leads = example.lead or (0,) * len(rows)
            for option, row, lead in zip(example.options, rows, leads, strict=True):
                spans.append(list(range(len(scores), len(scores) + len(option) - lead)))
                scores += [(row, asked + i, int(token)) for i, token in enumerate(option) if i >= lead]
            if example.chooses:
                choices.append(list(range(first, len(spans))))
        if example.source is not None:
            sources += [example.source] * (len(sequences) - len(sources))

    input_ids, mask = _padded(sequences, pad_id), _padded([np.ones(len(s)) for s in sequences], 0)
    source_mask = _padded([np.ones(len(s)) for s in sources], 0) if sources else np.ones((0, 0))
    # Encoders warn that a mask is missing where a text holds the padding token, for which they look at it.
    causal = examples[0].place is None and (bool(examples[0].options) or not examples[0].chooses)
    width = input_ids.shape[1]
    pairs = [(row, position) for row, position, _ in scores]
    distinct = sorted(set(pairs))
    index = {pair: i for i, pair in enumerate(distinct)}
    kept = sorted({position for _, position in distinct})
    column = {position: i for i, position in enumerate(kept)}

    def tensor(values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

    return Batch(
        input_ids=tensor(input_ids),
        # A model that is given a mask asks whether it is all ones; on a GPU that waits behind all transfers.
        attention_mask=None if causal and mask.all() else tensor(mask),
        keep=tensor(kept) if len(kept) < width else None,
        rows=tensor([row for row, _ in distinct]),
        columns=tensor([column[p] if len(kept) < width else p for _, p in distinct]),
        scored=tensor([index[pair] for pair in pairs]),
        tokens=tensor([token for _, _, token in scores]),
        spans=tensor(_padded(spans, len(scores))),
        span_lengths=tensor([len(span) for span in spans]),
        choices=tensor(_padded(choices, len(spans))) if choices else None,
        labels=tensor([e.label for e in examples]) if examples[0].chooses else None,
        right=_right(examples).to(device) if any(e.right for e in examples) else None,
        source_ids=tensor(_padded(sources, pad_id)) if sources else None,
        source_mask=None if source_mask.all() else tensor(source_mask),
        num_tokens=int(mask.sum() + source_mask.sum()),
    )


def _right(examples: Sequence[Example]) -> torch.Tensor:
    """bool [examples, most choices]: which choices of each count as right."""
    result = torch.zeros(len(examples), max(len(e.options) for e in examples), dtype=torch.bool)
    for row, example in zip(result, examples, strict=True):
        row[list(example.right or (example.label,))] = True
    return result


def _option_rows(example: Example, sequences: list[np.ndarray]) -> list[int]:
    """Appends the rows that an example's choices need to `sequences`; returns the row of each choice.

    A choice's last token is only predicted, never read, so its row is the prompt and all tokens but the last.
    """
    wanted = [option[:-1] for option in example.options]
    rows = [0] * len(wanted)
    made: list[tuple[int, np.ndarray]] = []
    for i in sorted(range(len(wanted)), key=lambda i: -len(wanted[i])):
        fits = (row for row, other in made if np.array_equal(other[: len(wanted[i])], wanted[i]))
        row = next(fits, None)
        if row is None:
            row = len(sequences)
            sequences.append(np.concatenate([example.tokens, wanted[i]]))
            made.append((row, wanted[i]))
        rows[i] = row
    return rows


def _padded(lists: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """int64 [lists, longest]: the lists, filled up on the right."""
    result = np.full((len(lists), max(1, *(len(items) for items in lists)) if lists else 1), fill, dtype=np.int64)
    for row, items in enumerate(lists):
        result[row, : len(items)] = items
    return result
