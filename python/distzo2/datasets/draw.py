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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distzo2.datasets.rows import Asked, Task
from distzo2.datasets.tables import read_split
from distzo2.errors import DataError, UsageError
from distzo2.rewards.functions import Reward
from distzo2.rewards.objective import Question, Writing
from distzo2.tasks.examples import CausalLines
from distzo2.tasks.held_out import HeldOut, question
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
        raise DataError(f"{directory}: {len(drawn)} rows to train on, and {num_dev} of them are for development")
    train, dev = drawn[: len(drawn) - num_dev], drawn[len(drawn) - num_dev :]
    if len(train) < num_train:
        logger.warning("%s: %d rows to train on, not %d: there are no more", directory, len(train), num_train)
    return Drawn(train, dev, rows(task.eval, num_eval))


class TaskReader:
    """Turns the rows of a task into examples for a causal model."""

    def __init__(
        self, task: Task, tokenizer: Any, *, max_new_tokens: int = 50, stop: Sequence[str] = (), **options: Any
    ) -> None:
        """
        Args:
            task: what is asked.
            tokenizer: as `load_tokenizer` returns it.
            max_new_tokens: room that a written answer needs.
            stop: strings that end one; none: the task's own.
            options: of `Tokenize`; `truncate` is "left" also where it is None: of a text that is too long the beginning
                goes, except the special tokens at its start.

        Raises:
            UsageError: the model is not causal, or `truncate` is "right".
        """
        options = options | {"truncate": options.get("truncate") or "left"}
        if (kind := options["kind"]).name != "causal":
            raise UsageError(f"--task {task.name}: a causal language model was expected, {kind.model} is not one")
        if options["truncate"] == "right":
            raise UsageError("--truncate right: at the end of a task's text stands its answer; left was expected")
        self.task, self.tokenizer, self.max_new_tokens, self.stop = task, tokenizer, max_new_tokens, stop
        self._lines, self._num_cut = CausalLines(tokenizer, **options), 0
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._first = next((np.int32(i) for i in special if i is not None), None)

    def learned(self, rows: Sequence[Asked], loss: str) -> list[Example]:
        """Examples as a step learns them: over the options ("choices"), the whole text ("text") or what follows the
        prompt ("completion")."""
        if loss == "choices":
            return self.asked(rows)
        room, examples = self.max_new_tokens if self.task.generates else 0, []
        for row in rows:
            ((tokens, num_behind),) = self._texts(row, row.prompt, [row.completion], room=room)
            first = 1 if loss == "text" else len(tokens) - num_behind
            examples.append(Example(tokens, np.arange(len(tokens)) >= first))
        return self._checked(rows, examples)

    def asked(self, rows: Sequence[Asked], shots: Sequence[Asked] = ()) -> list[Example]:
        """Examples with choices, `shots` before them as demonstrations."""
        before = _demonstrations(shots)
        return self._checked(rows, [self._choices(row, row.prompt, before) for row in rows])

    def blanks(self, rows: Sequence[Asked]) -> list[Example]:
        """The choices of rows behind a prompt without content, for calibration.

        Raises:
            UsageError: the task names no such prompt.
        """
        if self.task.blank is None:
            raise UsageError(f"--calibrate: task {self.task.name} has no prompt without content (blank)")
        return [self._choices(row, row.blank, "") for row in rows]

    def questions(self, rows: Sequence[Asked], shots: Sequence[Asked] = ()) -> list[Question]:
        """Prompts that the model is to continue, and what counts as right."""
        before = _demonstrations(shots)
        ids = self._encode([(before + row.prompt).strip(" ").lstrip() for row in rows])
        pairs = list(zip(ids, rows, strict=True))
        asked = [
            question(tokens, {"answers": list(row.answers)}, self._lines, self.max_new_tokens, row.prompt)
            for tokens, row in pairs
        ]
        self._num_cut += sum(len(q.tokens) < len(tokens) for q, (tokens, _) in zip(asked, pairs, strict=True))
        self._report_cut()
        return asked

    def held_out(
        self,
        rows: Sequence[Asked],
        loss: str,
        shots: Sequence[Asked] = (),
        calibrate: bool = False,
        rewards: Mapping[str, Reward] | None = None,
    ) -> HeldOut:
        """Rows in the forms in which a model is judged by them; with `rewards`, these judge written answers too.

        Raises:
            UsageError: `calibrate` or `rewards`, and the task has no prompt without content, or no answers to write.
        """
        if rewards and not self.task.generates:
            raise UsageError(f"--score: the answers of task {self.task.name} are options, not written")
        asked = self.asked(rows, shots) if self.task.options else ()
        stop = self.stop or ([self.task.stop] if self.task.stop else [])
        return HeldOut(
            asked if loss == "choices" else self.learned(rows, loss),
            asked if loss != "choices" else (),
            self.blanks(rows) if calibrate else (),
            self.questions(rows, shots) if rewards else (),
            Writing(self.tokenizer, self._lines.kind.padding(self.tokenizer), self.max_new_tokens, stop),
            rewards or {},
        )

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, with the special tokens at its start."""
        return [self._lines.without_tail(ids) for ids in self._lines.ids(texts)]

    def _texts(
        self, row: Asked, prompt: str, behind: Sequence[str], before: str = "", room: int = 0
    ) -> list[tuple[np.ndarray, int]]:
        """Of each text behind a prompt, with `before` in front: the tokens of the whole that fit the limit less `room`,
        int32, and how many of the last are its own."""
        # A written answer is learned with its newline, and with the spaces at its end.
        alone = [prompt + text if self.task.generates else (prompt + text).strip(" ") for text in behind]
        wholes = [(before + text).strip(" ").lstrip() for text in alone]
        (start, *encoded), result = self._encode([prompt.strip(" "), *alone, *wholes]), []
        for i, (ids, whole) in enumerate(zip(encoded[: len(alone)], encoded[len(alone) :], strict=True)):
            tokens = np.asarray(whole, dtype=np.int32)[self._lines.fitting(row, len(whole), room)]
            self._num_cut += len(tokens) < len(whole)
            num_behind = len(ids) - len(start)
            if num_behind == len(tokens) and self._first is not None:  # a prompt without content may have no tokens
                tokens = np.r_[self._first, tokens]
            num_behind = min(num_behind, len(tokens) - 1)
            if num_behind < 1:
                raise DataError(f"{row.where}: option {i} has no token that another predicts")
            result.append((tokens, num_behind))
        return result

    def _choices(self, row: Asked, prompt: str, before: str) -> Example:
        texts = self._texts(row, prompt, row.options, before)
        contexts = [tokens[:-num_scored].tolist() for tokens, num_scored in texts]
        border = min(common_prefix(contexts[0], context) for context in contexts)
        lead = tuple(len(context) - border for context in contexts)
        options = tuple(tokens[border:] for tokens, _ in texts)
        right = row.right if len(row.right) > 1 else ()
        return Example(texts[0][0][:border], None, options, row.label, lead=lead if any(lead) else (), right=right)

    def _checked(self, rows: Sequence[Asked], examples: list[Example]) -> list[Example]:
        for row, example in zip(rows, examples, strict=True):  # entities may be spelled alike
            self._lines.check(row, example, alike=self.task.each is not None)
        self._report_cut()
        return examples

    def _report_cut(self) -> None:
        if self._num_cut:
            what = f"texts longer than {self._lines.limit} tokens lose their beginning, demonstrations first"
            logger.warning("task %s: %s (%d of them)", self.task.name, what, self._num_cut)
        self._num_cut = 0


def loss_of(task: Task, objective: str | None) -> tuple[str, str]:
    """What a run of a task learns, in the words of `Task.loss`, and the objective that does; `objective`: as asked
    for, None: the task's own."""
    if objective is None:
        return task.loss, "choices" if task.loss == "choices" else "lm"
    return "choices" if objective != "lm" and task.options else "completion", objective


def _demonstrations(shots: Sequence[Asked]) -> str:
    """Rows with their answers, to stand before a prompt."""
    return "".join((row.prompt + row.completion).strip() + SEPARATOR for row in shots)
