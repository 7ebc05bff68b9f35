"""Written answers: a model answers questions, and its text is compared with right ones word by word.

F1 and exact match (EM) follow the evaluation of SQuAD 1.1 (https://arxiv.org/abs/1606.05250): case, punctuation and
a, an, the do not count; the best over a question's right answers does.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distzo2.generation.generate import generate_batch
from distzo2.parallel.group import Mesh
from distzo2.parallel.mesh import deal_evenly

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """What a model is to continue, and the texts that are right."""

    tokens: Sequence[int]
    answers: tuple[str, ...]


def words_of(text: str) -> list[str]:
    """The words of an answer that count."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def f1(text: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, each counted as often as it is there; 0 without a common
    one."""

    def one(answer: str) -> float:
        found, wanted = words_of(text), words_of(answer)
        common = (Counter(found) & Counter(wanted)).total()
        precision, recall = common / max(1, len(found)), common / max(1, len(wanted))
        return 2 * precision * recall / (precision + recall) if common else 0.0

    return max(map(one, answers))


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the words are those of an answer, else 0."""
    return float(words_of(text) in map(words_of, answers))


def answer_scores(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    stop: Sequence[str] = (),
    max_new_tokens: int = 50,
    batch_size: int = 16,
    pad_id: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[float, float]:
    """Mean F1 and mean EM of a model's greedy answers.

    Args:
        mesh: ranks that share the questions; all of them call this with the same ones.
        others: as for `generate_batch`.
    """
    dealt = [range(len(questions))] if mesh is None else deal_evenly(len(questions), mesh.world_size)
    own = dealt[0 if mesh is None else mesh.rank]
    rows = torch.zeros(len(dealt[0]), 2, dtype=torch.float64)
    with mesh.together("an evaluation") if mesh is not None else nullcontext():
        texts = generate_batch(
            model,
            [questions[i].tokens for i in own],
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            stop=stop,
            batch_size=batch_size,
            pad_id=pad_id,
        )
        for row, i, made in zip(rows, own, texts, strict=False):
            text, answers = made.text.strip(), questions[i].answers
            row[0], row[1] = f1(text, answers), exact_match(text, answers)
    gathered = rows[None] if mesh is None else mesh.exchange.gather(rows)
    scores = torch.cat([values[: len(part)] for part, values in zip(dealt, gathered, strict=True)])
    mean_f1, mean_em = scores.mean(0).tolist()
    return mean_f1, mean_em
