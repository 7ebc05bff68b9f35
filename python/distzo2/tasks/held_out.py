"""What a run is judged by: the loss of held-out examples, and how often the model gives the right answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distzo2.errors import DataError, UsageError
from distzo2.generation.answers import Question, answer_scores
from distzo2.parallel.group import Mesh
from distzo2.tasks.examples import examples_digest, load_examples, tokenize_for
from distzo2.tasks.lines import BadLines, read_lines
from distzo2.tasks.objectives import Objective, Score, evaluate_examples
from distzo2.tasks.tokenize import Example, Tokenize


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples in the forms in which they are asked."""

    learned: Sequence[Example] = ()  # as a step learns them: the loss
    asked: Sequence[Example] = ()  # with choices: the accuracy; none: `learned` tells it too
    blanks: Sequence[Example] = ()  # their choices behind a prompt without content, for calibration
    questions: Sequence[Question] = ()  # to be answered in writing: F1 and EM
    stop: tuple[str, ...] = ()  # what ends an answer, besides the end of a text
    max_new_tokens: int = 50
    tokenizer: Any = None
    pad_id: int | None = None  # that fills rows of questions up

    def __bool__(self) -> bool:
        return bool(self.learned)

    def digest(self) -> str:
        """SHA-256 of all that decides a score."""
        asked = [(list(question.tokens), question.answers) for question in self.questions]
        written = repr((asked, self.stop, self.max_new_tokens)) if asked else ""
        parts = [examples_digest(each) for each in (self.learned, self.asked, self.blanks)]
        return hashlib.sha256("".join([*parts, written]).encode()).hexdigest()

    def score(self, objective: Objective, *, batch_size: int, mesh: Mesh | None = None) -> Score:
        """Evaluates the model of `objective`; on all ranks of `mesh`, which share the work."""
        more = {"batch_size": batch_size, "mesh": mesh}
        first = self.blanks if not self.asked else ()
        score = evaluate_examples(objective, self.learned, blanks=first, **more)
        if self.asked:
            chosen = evaluate_examples(objective.named("choices"), self.asked, blanks=self.blanks, **more)
            tokens = score.num_tokens + chosen.num_tokens
            score = replace(score, accuracy=chosen.accuracy, num_tokens=tokens)
        if self.questions:
            f1, em = answer_scores(
                objective.model, self.tokenizer, self.questions, stop=self.stop, max_new_tokens=self.max_new_tokens,
                pad_id=self.pad_id, **more,
            )  # fmt: skip
            score = replace(score, f1=f1, em=em)
        return score


def question(tokens: Sequence[int], answers: Sequence[str], reader: Tokenize, max_new_tokens: int) -> Question:
    """A question whose text loses its beginning where the limit leaves no room for the answer; the special tokens at
    the start stay."""
    tokens, head = list(tokens), reader.num_head
    if reader.limit is not None and (excess := len(tokens) + max_new_tokens - reader.limit) > 0:
        tokens = tokens[:head] + tokens[head + excess :]
    return Question(tokens, tuple(answers))


def load_held_out(
    path: str | os.PathLike,
    tokenizer: Any,
    *,
    write: bool = False,
    max_new_tokens: int = 50,
    skip_bad_lines: int = 0,
    **options: Any,
) -> HeldOut:
    """The examples of a JSONL file, and with `write` its prompts as questions: the right answer is the completion, or
    those in a list "answers". Other arguments are those of `load_examples`.

    Raises:
        DataError: as `load_examples` raises it.
        UsageError: answers are to be written, and a line has no completion.
    """
    examples = load_examples(path, tokenizer, skip_bad_lines=skip_bad_lines, **options)
    questions = []
    if write:
        reader = tokenize_for(tokenizer, **options)
        for line in read_lines(path, BadLines(skip_bad_lines)):
            if line.kind != "completion":
                raise UsageError(f"{line.where}: --score f1 and em need lines with prompt and completion")
            answers = line.record.get("answers", [line.record["completion"]])
            if not (isinstance(answers, list) and answers and all(isinstance(each, str) for each in answers)):
                raise DataError(f"{line.where}: answers: a list of texts was expected")
            questions.append(question(reader.prompt(line.record["prompt"]), answers, reader, max_new_tokens))
    pad_id = reader.kind.padding(tokenizer) if write else None
    return HeldOut(examples, questions=questions, max_new_tokens=max_new_tokens, tokenizer=tokenizer, pad_id=pad_id)
