"""What a run is judged by: the loss of held-out examples, and how often the model gives the right answer."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distzo2.errors import DataError, UsageError, blaming
from distzo2.parallel.group import Mesh
from distzo2.rewards.functions import WORDS, Reward, Row, answers_of, check_row
from distzo2.rewards.objective import Question, Writing, written_scores
from distzo2.tasks.examples import examples_digest, load_examples, tokenize_for
from distzo2.tasks.lines import PROMPTS, BadLines, Line, read_lines
from distzo2.tasks.objectives import Objective, Score, evaluate_examples
from distzo2.tasks.tokenize import Example, Tokenize

logger = logging.getLogger("distzo2")


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples in the forms in which they are asked."""

    learned: Sequence[Example] = ()  # as a step learns them: the loss
    asked: Sequence[Example] = ()  # with choices: the accuracy; none: `learned` tells it too
    blanks: Sequence[Example] = ()  # their choices behind a prompt without content, for calibration
    questions: Sequence[Question] = ()  # to be answered in writing
    writing: Writing | None = None  # how they are
    rewards: Mapping[str, Reward] = field(default_factory=lambda: WORDS)  # and judged, by the name of the figure

    def __bool__(self) -> bool:
        return bool(self.learned or self.questions)

    def digest(self) -> str:
        """SHA-256 of all that decides a score."""
        asked = [(list(question.tokens), tuple(answers_of(question.row))) for question in self.questions]
        written = repr((asked, tuple(self.writing.stop), self.writing.max_new_tokens)) if asked else ""
        parts = [examples_digest(each) for each in (self.learned, self.asked, self.blanks)]
        return hashlib.sha256("".join([*parts, written]).encode()).hexdigest()

    def score(self, objective: Objective, *, batch_size: int, mesh: Mesh | None = None) -> Score:
        """Evaluates the model of `objective`; on all ranks of `mesh`, which share the work."""
        more = {"batch_size": batch_size, "mesh": mesh}
        written = {}
        if self.questions:
            written = written_scores(objective.model, self.questions, self.rewards, self.writing, **more)
        if not self.learned:
            num_tokens = sum(len(question.tokens) for question in self.questions)
            return Score(-next(iter(written.values())), None, len(self.questions), num_tokens, written)
        first = self.blanks if not self.asked else ()
        score = evaluate_examples(objective, self.learned, blanks=first, **more)
        if self.asked:
            chosen = evaluate_examples(objective.named("choices"), self.asked, blanks=self.blanks, **more)
            tokens = score.num_tokens + chosen.num_tokens
            score = replace(score, accuracy=chosen.accuracy, num_tokens=tokens)
        return replace(score, written=written)


def question(tokens: Sequence[int], row: Row, reader: Tokenize, max_new_tokens: int, prompt: str = "") -> Question:
    """A question whose text loses its beginning where the limit leaves no room for the answer; the special tokens at
    the start stay."""
    tokens, head = list(tokens), reader.num_head
    if reader.limit is not None and (excess := len(tokens) + max_new_tokens - reader.limit) > 0:
        tokens = tokens[:head] + tokens[head + excess :]
    return Question(tokens, prompt, row)


def load_questions(
    path: str | os.PathLike,
    tokenizer: Any,
    *,
    rewards: Iterable[str],
    max_new_tokens: int = 50,
    skip_bad_lines: int = 0,
    **options: Any,
) -> list[Question]:
    """The rows of a JSONL file as questions for the rewards of these names. Other arguments are those of
    `load_examples`.

    Raises:
        DataError: a row is bad, lacks what a reward compares with, or its prompt leaves no room for the new tokens.
    """
    reader, bad, questions = tokenize_for(tokenizer, **options), BadLines(skip_bad_lines), []
    for line in read_lines(path, bad, PROMPTS):
        with bad.skipped(), blaming(f"{tokenizer.name_or_path}: the tokenizer fails"):
            for reward in rewards:
                _check_row(reward, line)
            text = reader.chat.prompt(line) if line.kind == "messages" else line.record["prompt"]
            tokens = reader.encode([[text]])[0][0]
            room = max_new_tokens
            if reader.kind.name == "encoder-decoder":  # its decoder begins with a start token
                room = 0 if reader.limit is None or max_new_tokens < reader.limit else max_new_tokens
            try:
                kept = reader.fitting(line, len(tokens), room)
            except DataError:
                sizes = f"a prompt of {len(tokens)} tokens and {max_new_tokens} new ones"
                advice = "--truncate left or right shortens the prompt"
                raise DataError(f"{line.where}: {sizes}, the limit is {reader.limit} ({advice})") from None
            if len(kept) <= reader.num_head:
                why = f"{max_new_tokens} new ones leave it no room" if tokens else "there is nothing to continue"
                raise DataError(f"{line.where}: the prompt has no tokens: {why}")
            text = text if isinstance(text, str) else tokenizer.decode(text)
            questions.append(Question([tokens[i] for i in kept], text, line.record))
    if bad.count:
        logger.warning("%s: %d bad lines skipped, the first: %s", os.fspath(path), bad.count, bad.first)
    if not questions:
        raise DataError(f"{os.fspath(path)}: holds no examples")
    return questions


def _check_row(reward: str, line: Line) -> None:
    try:
        check_row(reward, line.record)
    except ValueError as error:
        raise DataError(f"{line.where}: {error}") from None


def only_asks(path: str | os.PathLike) -> bool:
    """Whether the first line of a file that a reward can judge has a prompt and nothing to learn."""
    try:
        row = read_lines(path, BadLines(sys.maxsize), PROMPTS)[0].record
    except DataError:
        return False
    return not row.keys() & {"completion", "choices"}


def load_held_out(
    path: str | os.PathLike,
    tokenizer: Any,
    *,
    rewards: Mapping[str, Reward] | None = None,
    score: str | None = None,
    max_new_tokens: int = 50,
    stop: Sequence[str] = (),
    skip_bad_lines: int = 0,
    **options: Any,
) -> HeldOut:
    """The examples of a JSONL file, and with `rewards` its prompts as questions, which these judge; `score` is the
    name of the reward that lines are checked for. Other arguments are those of `load_examples`.

    Raises:
        DataError: as `load_examples` raises it, or a line lacks what `score` compares with.
        UsageError: answers are to be written, and a line has no completion.
    """
    examples = load_examples(path, tokenizer, skip_bad_lines=skip_bad_lines, **options)
    if not rewards:
        return HeldOut(examples)
    reader, questions = tokenize_for(tokenizer, **options), []
    for line in read_lines(path, BadLines(skip_bad_lines)):
        if line.kind != "completion":
            raise UsageError(f"{line.where}: --score of what is written needs lines with prompt and completion")
        if score is not None:
            _check_row(score, line)
        prompt, row = line.record["prompt"], {"answers": [line.record["completion"]]} | line.record
        questions.append(question(reader.prompt(prompt), row, reader, max_new_tokens, prompt))
    writing = Writing(tokenizer, reader.kind.padding(tokenizer), max_new_tokens, stop)
    return HeldOut(examples, questions=questions, writing=writing, rewards=rewards)
