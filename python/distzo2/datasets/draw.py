"""The examples of a task: rows are drawn by a seed, asked as the task says, and become tokens for a causal model.

An option is scored by the mean log-likelihood of its tokens: the last len(encode(prompt + option)) -
len(encode(prompt)) of the whole text, each text tokenized by itself, without spaces at both ends. These are the rules
of MeZO's script.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distzo2.datasets.rows import Asked, Task
from distzo2.datasets.tables import read_split
from distzo2.errors import DataError, UsageError
from distzo2.generation.answers import Question
from distzo2.tasks.examples import CausalLines
from distzo2.tasks.held_out import HeldOut, question
from distzo2.tasks.kinds import ModelKind
from distzo2.tasks.tokenize import Example, common_prefix

SEPARATOR = "\n\n"  # between demonstrations

logger = logging.getLogger("distzo2")


@dataclass(frozen=True)
class Drawn:
    """Rows of a task, as text."""

    train: list[Asked]
    dev: list[Asked]
    eval: list[Asked]

    def digest(self) -> str:
        """SHA-256 of what is trained on."""
        return hashlib.sha256(json.dumps([asdict(row) for row in self.train]).encode()).hexdigest()


def draw(
    task: Task, directory: str | os.PathLike, seed: int, *, num_train: int = 0, num_dev: int = 0, num_eval: int = 0
) -> Drawn:
    """Draws rows as MeZO's script does: the first of a permutation of each split by numpy's generator.

    Args:
        task: what is asked.
        directory: of its data set.
        seed: of the permutations, from 0 to 2**32 - 1.
        num_train: rows to train on, or demonstrations; of them and `num_dev` together the first.
        num_dev: development rows: the last of the drawn training rows. Where the split has fewer than both, training
            has fewer.
        num_eval: rows to evaluate on, of the split for evaluation; 0: none.

    Raises:
        DataError: a split is missing, too small or has other fields; or a row is wrong (file, row, reason).
    """

    def rows(split: str, count: int) -> list[Asked]:
        if not count:
            return []
        table = read_split(directory, split, task.fields, task.config)
        places = np.random.RandomState(seed).permutation(table.num_rows)[:count].tolist()
        records = table.rows(places)
        return [task.ask(r, f"{table.source}, row {i + 1}") for i, r in zip(places, records, strict=True)]

    drawn = rows(task.train, num_train + num_dev)
    if num_dev and len(drawn) <= num_dev:
        raise DataError(
            f"{directory}: {len(drawn)} rows to train on, of which {num_dev} are for development: none is left"
        )
    train, dev = drawn[: len(drawn) - num_dev], drawn[len(drawn) - num_dev :]
    if len(train) < num_train:
        logger.warning(
            "%s: %d rows to train on, fewer than the %d that were asked for", directory, len(train), num_train
        )
    return Drawn(train, dev, rows(task.eval, num_eval))


class TaskReader:
    """Turns the rows of a task into examples for a causal model."""

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        *,
        kind: ModelKind,
        truncate: str | None = None,
        max_new_tokens: int = 50,
        **more: Any,
    ) -> None:
        """
        Args:
            task: what is asked.
            tokenizer: as `load_tokenizer` returns it.
            kind: of the model.
            truncate: "left", also None: a text that is too long loses its beginning, but for the special tokens at the
                start; "error": it is refused.
            max_new_tokens: room that generation leaves.
            more: as for `Tokenize`.

        Raises:
            UsageError: the model is not causal, or `truncate` is "right".
        """
        if kind.name != "causal":
            raise UsageError(f"--task {task.name}: a causal language model was expected, {kind.model} is not one")
        if truncate == "right":
            raise UsageError("--truncate right: at the end of a task's text stands its answer; left was expected")
        self.task, self.tokenizer, self.max_new_tokens = task, tokenizer, max_new_tokens
        self._lines = CausalLines(tokenizer, kind=kind, truncate=truncate or "left", **more)

    def learned(self, rows: Sequence[Asked], loss: str) -> list[Example]:
        """Examples as a step learns them: over the options ("choices"), the whole text ("text") or what follows the
        prompt ("completion")."""
        if loss == "choices":
            return self.asked(rows)
        # What the model is to write keeps its newline; only spaces are stripped.
        wholes = self._encode([(row.prompt + row.completion).strip(" ").lstrip() for row in rows])
        lengths = self._num_behind([row.prompt for row in rows], [[row.completion] for row in rows], rows)
        room = self.max_new_tokens if self.task.generates else 0
        examples = []
        for row, whole, (length,) in zip(rows, wholes, lengths, strict=True):
            tokens = self._fitted(row, whole, room)
            first = 1 if loss == "text" else max(1, len(tokens) - length)
            targets = np.arange(len(tokens)) >= first
            if not targets.any():
                raise DataError(f"{row.where}: no token is left to learn")
            examples.append(Example(tokens, targets))
        return examples

    def asked(self, rows: Sequence[Asked], shots: Sequence[Asked] = ()) -> list[Example]:
        """Examples with choices, `shots` before them as demonstrations."""
        return self._choices(rows, [row.prompt for row in rows], _demonstrations(shots))

    def blanks(self, rows: Sequence[Asked]) -> list[Example]:
        """The choices of rows behind a prompt without content, for calibration.

        Raises:
            UsageError: the task names no such prompt.
        """
        if self.task.blank is None:
            raise UsageError(f"--calibrate: task {self.task.name} has no prompt without content (blank)")
        return self._choices(rows, [row.blank or "" for row in rows], "")

    def questions(self, rows: Sequence[Asked], shots: Sequence[Asked] = ()) -> list[Question]:
        """Prompts that the model is to continue, and what counts as right."""
        before = _demonstrations(shots)
        ids = self._encode([(before + row.prompt).strip(" ").lstrip() for row in rows])
        pairs = zip(ids, rows, strict=True)
        return [question(tokens, row.answers, self._lines, self.max_new_tokens) for tokens, row in pairs]

    def held_out(
        self,
        rows: Sequence[Asked],
        loss: str,
        *,
        shots: Sequence[Asked] = (),
        calibrate: bool = False,
        write: bool = False,
    ) -> HeldOut:
        """Rows in the forms in which a model is judged by them; with `write`, answers are written and compared too.

        Raises:
            UsageError: `calibrate` or `write`, and the task has no prompt without content, or no answers to write.
        """
        if write and not self.task.generates:
            raise UsageError(f"--score f1 and em: the answers of task {self.task.name} are options, not written")
        asked = self.asked(rows, shots) if self.task.options else ()
        return HeldOut(
            asked if loss == "choices" else self.learned(rows, loss),
            asked if loss != "choices" else (),
            self.blanks(rows) if calibrate else (),
            self.questions(rows, shots) if write else (),
            (self.task.stop,) if self.task.stop else (),
            self.max_new_tokens,
            self.tokenizer,
            self._lines.kind.padding(self.tokenizer),
        )

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, with the special tokens at its start."""
        return [self._lines.without_tail(ids) for ids in self._lines.ids(texts)]

    def _num_behind(self, prompts: list[str], behind: list[list[str]], rows: Sequence[Asked]) -> list[list[int]]:
        """How many tokens each of `behind` adds to its prompt."""
        before = list(map(len, self._encode([prompt.strip(" ") for prompt in prompts])))
        # A written answer is not stripped: its newline and the spaces before it are learned.
        strip = (lambda text: text) if self.task.generates else (lambda text: text.strip(" "))
        flat = iter(self._encode([strip(p + text) for p, some in zip(prompts, behind, strict=True) for text in some]))
        counts = [[len(next(flat)) - n for _ in some] for n, some in zip(before, behind, strict=True)]
        for row, some in zip(rows, counts, strict=True):
            if min(some) < 1:
                raise DataError(f"{row.where}: option {some.index(min(some))} has no tokens")
        return counts

    def _choices(self, rows: Sequence[Asked], prompts: list[str], before: str) -> list[Example]:
        options = [list(row.options) for row in rows]
        counts = self._num_behind(prompts, options, rows)
        texts = [
            (before + (p + o).strip(" ")).strip(" ").lstrip()
            for p, some in zip(prompts, options, strict=True)
            for o in some
        ]
        flat = iter(self._encode(texts))
        examples = []
        for row, some in zip(rows, counts, strict=True):
            wholes = [self._opened(self._fitted(row, next(flat), 0), count) for count in some]
            some = [min(count, len(whole) - 1) for count, whole in zip(some, wholes, strict=True)]
            if min(some) < 1:
                raise DataError(f"{row.where}: option {some.index(min(some))} has no token that another predicts")
            contexts = [whole[: len(whole) - count] for whole, count in zip(wholes, some, strict=True)]
            border = min(common_prefix(contexts[0].tolist(), each.tolist()) for each in contexts)
            behind = tuple(whole[border:] for whole in wholes)
            lead = tuple(len(each) - count for each, count in zip(behind, some, strict=True))
            right = row.right if len(row.right) > 1 else ()
            examples.append(
                Example(wholes[0][:border], None, behind, row.label, lead=lead if any(lead) else (), right=right)
            )
        return examples

    def _opened(self, tokens: np.ndarray, num_scored: int) -> np.ndarray:
        """With a token before the first where all are scored: a prompt without content may have none."""
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        first = next((i for i in special if i is not None), None)
        return tokens if first is None or len(tokens) > num_scored else np.r_[np.int32(first), tokens]

    def _fitted(self, row: Asked, ids: list[int], room: int) -> np.ndarray:
        """int32: tokens without what the limit, less `room`, cuts off the beginning."""
        lines = self._lines
        kept = lines.fitting(row, len(ids), room)
        return np.asarray(ids, dtype=np.int32)[kept]


def loss_of(task: Task, objective: str | None) -> tuple[str, str]:
    """What a run of a task learns, in the words of `Task.loss`, and the objective that does; `objective`: as asked
    for, None: the task's own."""
    if objective is None:
        return task.loss, "choices" if task.loss == "choices" else "lm"
    return "choices" if objective != "lm" and task.options else "completion", objective


def _demonstrations(shots: Sequence[Asked]) -> str:
    """Rows with their answers, to stand before a prompt."""
    return "".join((row.prompt + row.completion).strip() + SEPARATOR for row in shots)
