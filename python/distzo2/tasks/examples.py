"""Examples of each kind of model, from lines: what is learned of them, and where it is asked."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distzo2.errors import DataError, DistZO2Error, UsageError, blaming
from distzo2.tasks.kinds import CAUSAL, ModelKind
from distzo2.tasks.lines import BadLines, Line, read_lines
from distzo2.tasks.tokenize import Example, Tokenize, common_prefix, regrouped, special_counts

logger = logging.getLogger("distzo2")


class CausalLines(Tokenize):
    """A completion, the assistant's turns or a whole text are learned; or choices follow a prompt."""

    kinds = ("completion", "choices", "messages", "text")

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self._eos = tokenizer.eos_token_id
        self._told = False  # that no end is learned, or which

    def texts(self, line: Line) -> list[Any]:
        """Growing beginnings of the line's text, or the prompt and it with each choice."""
        record = line.record
        if line.kind == "choices":
            return [record["prompt"], *(record["prompt"] + choice for choice in record["choices"])]
        if line.kind == "completion":
            return [record["prompt"], record["prompt"] + record["completion"]]
        return ["", record["text"]] if line.kind == "text" else self.chat.turns(line)

    def encode(self, texts: Sequence[Sequence[Any]]) -> list[list[list[int]]]:
        flat = [text for some in texts for text in some]
        encoded = iter(self.ids([text for text in flat if isinstance(text, str)]))
        return regrouped([self._opened(text, encoded) for text in flat], texts)

    def _opened(self, text: str | list[int], encoded: Any) -> list[int]:
        """The tokens of a text, or those that a chat template made, with the special tokens at the start once."""
        head = self.num_head
        if not isinstance(text, str):
            if not head:
                return text
            start = self.ids([""])[0][:head]
            return text if text[:head] == start else start + text
        ids = self.without_tail(next(encoded))
        # A chat template writes the token at the start itself.
        return ids[head:] if self.chat.templated and head and ids[head : 2 * head] == ids[:head] else ids

    def example(self, line: Line, ids: list[list[int]]) -> Example:
        return self._choices(line, ids) if line.kind == "choices" else self._sequence(line, ids)

    def _sequence(self, line: Line, ids: list[list[int]]) -> Example:
        """`ids` are pairs (up to, with) of growing beginnings; the last is the whole sequence."""
        tokens = list(ids[-1])
        targets = np.zeros(len(tokens), dtype=bool)
        for before, after in zip(ids[::2], ids[1::2], strict=True):
            targets[common_prefix(before, tokens) : common_prefix(after, tokens)] = True
        if not self._ends_itself(line) and self._eos is not None and (not tokens or tokens[-1] != self._eos):
            tokens.append(self._eos)
            targets = np.append(targets, True)
        kept = self.fitting(line, len(tokens))
        tokens, targets = np.asarray(tokens, dtype=np.int32)[kept], targets[kept]
        targets[:1] = False  # nothing comes before the first that could predict it
        if not targets.any():
            raise DataError(f"{line.where}: no token is left to learn")
        return Example(tokens, targets)

    def _ends_itself(self, line: Line) -> bool:
        """Whether a special token ends what is learned of a line, or none is to be added."""
        by_template = line.kind == "messages" and self.chat.templated
        if by_template and (self.legacy or self.chat.ends_itself(line)):
            return True
        if (by_template or self._eos is None) and not self._told:
            self._told = True
            lacks = ["the chat template writes no special token behind the assistant's turns"] * by_template
            lacks += ["the tokenizer has no token for the end of a text"] * (self._eos is None)
            learned = "nothing teaches the model to stop" if self._eos is None else "the end of the text is learned"
            logger.warning("%s: %s", ", and ".join(lacks), learned)
        return False

    def _choices(self, line: Line, ids: list[list[int]]) -> Example:
        prompt, wholes = ids[0], ids[1:]
        # A tokenizer may merge across the border: options begin where the first of them leaves the prompt.
        border = min(common_prefix(prompt, whole) for whole in wholes)
        options = _options(line, [whole[border:] for whole in wholes])
        prompt = np.asarray(prompt[:border], dtype=np.int32)
        if not len(prompt):
            raise DataError(f"{line.where}: the prompt has no tokens, so nothing predicts the first token of a choice")
        longest = max(len(o) for o in options)
        kept = self.fitting(line, len(prompt), longest)
        if len(kept) < len(prompt) and len(kept) <= self.num_head:
            raise DataError(f"{line.where}: a choice of {longest} tokens leaves no room for the prompt")
        return Example(prompt[kept], None, options, line.record["label"])


class EncoderDecoderLines(Tokenize):
    """The encoder reads the prompt; the decoder learns the completion, or choices are scored there."""

    kinds = ("completion", "choices")
    wants = "lines with a prompt for its encoder, and a completion or choices for its decoder"

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        encode = lambda texts, **more: tokenizer(text_target=texts, **more)  # noqa: E731
        self._head, self._tail = special_counts(tokenizer, encode)

    def texts(self, line: Line) -> list[str]:
        return [line.record["prompt"], *_answers(line)]

    def encode(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        prompts = self.ids([some[0] for some in texts])
        answers = regrouped(self.ids([t for some in texts for t in some[1:]], as_target=True), [t[1:] for t in texts])
        return [[prompt, *ids] for prompt, ids in zip(prompts, answers, strict=True)]

    def example(self, line: Line, ids: list[list[int]]) -> Example:
        source, answers = self.fitted(line, ids[0]), ids[1:]
        start = self.kind.start_id
        if start is None and self._tail:  # of mBART and its like: the language, which ends a text
            start = answers[0][-1]
        if start is None:
            raise DistZO2Error(
                f"config.json has no decoder_start_token_id, with which {self.kind.model} begins to answer"
            )
        if line.kind == "completion":
            kept = self.fitting(line, len(answers[0]), 1)
            tokens = np.asarray([start, *answers[0]], dtype=np.int32)[np.r_[0, 1 + kept]]
            if len(tokens) < 2:
                raise DataError(f"{line.where}: no token is left to learn")
            return Example(tokens, np.arange(len(tokens)) > 0, source=source)
        options = _options(line, [answer[self._head : len(answer) - self._tail] for answer in answers])
        tokens = np.asarray([start, *answers[0][: self._head]], dtype=np.int32)
        longest = len(tokens) + max(len(o) for o in options)
        if self.limit is not None and longest > self.limit:
            raise DataError(f"{line.where}: a choice of {longest} tokens, the limit is {self.limit}")
        return Example(tokens, None, options, line.record["label"], source=source)


class MaskedLines(Tokenize):
    """The word that the mask token of a prompt stands for is learned, or it is one of the choices."""

    kinds = ("completion", "choices")

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self._mask = tokenizer.mask_token
        if self._mask is None:
            raise DistZO2Error(f"{self.kind.model} fills masks in, and the tokenizer has no mask token")
        if self.splits:
            raise UsageError(f"--split-special-tokens: the prompts for {self.kind.model} hold its mask token")
        self.wants = f"lines with a prompt that holds its mask token {self._mask}, and choices or a completion"

    def texts(self, line: Line) -> list[str]:
        before, *behind = line.record["prompt"].split(self._mask)
        if len(behind) != 1:
            found = f"{len(behind)} mask tokens" if behind else "no mask token"
            needs = f"{self.kind.model} fills in one {self._mask}, in whose place the words are scored"
            raise DataError(f"{line.where}: the prompt has {found}: {needs}")
        filled = []
        for word in _answers(line):
            # A word by itself, as the mask is, however the spaces are dealt to prompt and choice.
            apart = before[-1:].isalnum() or (before and word[:1].isspace() and not before[-1:].isspace())
            filled.append(f"{before}{' ' * bool(apart)}{word.strip()}{behind[0]}")
        return [line.record["prompt"], *filled]

    def example(self, line: Line, ids: list[list[int]]) -> Example:
        prompt, mask = ids[0], self.tokenizer.mask_token_id
        place, options = prompt.index(mask), []
        for answer, filled in zip(_answers(line), ids[1:], strict=True):
            if [*filled[:place], mask, *filled[place + 1 :]] != prompt:
                size = len(filled) - len(prompt) + 1
                why = f"{size} tokens" if size != 1 else "no word by itself there"
                raise DataError(f"{line.where}: {answer!r} is {why}: a mask token stands for one")
            options.append(np.asarray([filled[place]], dtype=np.int32))
        tokens = self.fitted(line, prompt)
        (places,) = np.nonzero(tokens == mask)
        if len(places) != 1:
            raise DataError(f"{line.where}: the mask token is cut off")
        label = line.record["label"] if line.kind == "choices" else 0
        return Example(tokens, None, tuple(options), label, place=int(places[0]))


class ClassifierLines(Tokenize):
    """The class of a text is learned."""

    kinds = ("text",)
    wants = 'lines with a "text" and its "label"'

    def texts(self, line: Line) -> list[str]:
        label, classes = line.record.get("label"), self.kind.num_classes
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise DataError(
                f"{line.where}: label: expected a class of {self.kind.model}, a number from 0 to {classes - 1}"
            )
        return [line.record["text"]]

    def example(self, line: Line, ids: list[list[int]]) -> Example:
        return Example(self.fitted(line, ids[0]), None, (), line.record["label"])


_OF_KIND: dict[str, Callable[..., Tokenize]] = {
    "causal": CausalLines,
    "encoder-decoder": EncoderDecoderLines,
    "masked": MaskedLines,
    "classifier": ClassifierLines,
}


def _answers(line: Line) -> list[str]:
    return line.record["choices"] if line.kind == "choices" else [line.record["completion"]]


def _options(line: Line, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
    for i, option in enumerate(ids):
        if not len(option):
            raise DataError(f"{line.where}: choice {i} has no tokens")
    return tuple(np.asarray(option, dtype=np.int32) for option in ids)


def tokenize_for(tokenizer: Any, kind: ModelKind = CAUSAL, **options: Any) -> Tokenize:
    """What turns lines into examples for a kind of model; for the options see `Tokenize`."""
    return _OF_KIND[kind.name](tokenizer, kind=kind, **options)


def load_examples(path: str | os.PathLike, tokenizer: Any, *, skip_bad_lines: int = 0, **options: Any) -> list[Example]:
    """Reads, checks and tokenizes a JSONL file; see `read_lines` and `tokenize_for`.

    Raises:
        DataError: a line is bad, and `skip_bad_lines` were skipped before; or none is left.
    """
    bad = BadLines(skip_bad_lines)
    lines = read_lines(path, bad)
    with blaming(f"{tokenizer.name_or_path}: the tokenizer fails"):
        examples = tokenize_for(tokenizer, **options)(lines, bad)
    if bad.count:
        logger.warning("%s: %d bad lines skipped, the first: %s", os.fspath(path), bad.count, bad.first)
    if not examples:
        raise DataError(f"{os.fspath(path)}: holds no examples")
    return examples


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of all that a step can see of tokenized examples, in order."""
    sha256 = hashlib.sha256()
    for e in examples:
        parts = (e.tokens, e.targets, e.source, *e.options)
        shapes = [None if part is None else len(part) for part in parts]
        more = [each for each in (e.lead, e.right) if each]
        sha256.update(repr((e.label, e.place, shapes, *more)).encode())
        for part in parts:
            sha256.update(b"" if part is None else part.tobytes())
    return sha256.hexdigest()
