"""Lines become examples: text is tokenized, and it is marked which tokens are learned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from distzo2.checkpoint.pretrained import load_config
from distzo2.checkpoint.tensor_files import one_line
from distzo2.checkpoint.writing import tokenizer_files
from distzo2.errors import DataError, DistZO2Error
from distzo2.tasks.lines import Line, read_lines

_TOKENIZER_FILES = "tokenizer.json tokenizer_config.json tokenizer.model spiece.model vocab.json vocab.txt tekken.json"
_TOKENIZE_LINES = 1024  # lines handed to the tokenizer at a time


@dataclass(frozen=True)
class Example:
    """A tokenized line.

    Without choices, `tokens` is the whole sequence, and `targets` says which are learned. With choices, `tokens` is
    the prompt, `options` are the tokens of each choice, and `label` is the right one.
    """

    tokens: np.ndarray  # int32 [num_tokens]
    targets: np.ndarray | None  # bool [num_tokens]; the first token is never a target
    options: tuple[np.ndarray, ...] = ()  # int32 [num_tokens of the choice] each
    label: int = 0

    @property
    def num_tokens(self) -> int:
        """Length of the longest sequence that the model sees for this example."""
        return len(self.tokens) + max((len(o) for o in self.options), default=0)


def load_tokenizer(directory: str | os.PathLike) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        DistZO2Error: the directory is no checkpoint, has no tokenizer, or it cannot be loaded.
    """
    load_config(Path(directory))  # checked: transformers looks there for the tokenizer's class
    names = {*_TOKENIZER_FILES.split()} | tokenizer_files(Path(directory))
    if not any(os.path.isfile(os.path.join(directory, name)) for name in names):
        raise DistZO2Error(f"{directory}: no tokenizer (none of {', '.join(_TOKENIZER_FILES.split()[:4])}, ...)")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the many tokenizer classes raise on damaged files
        raise DistZO2Error(f"{directory}: the tokenizer cannot be loaded: {one_line(error)}") from error


def max_positions(config: Any) -> int | None:
    """How many positions a model of this config has, or None where it has no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = (
        getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    )
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def sequence_limit(directory: str | os.PathLike, max_length: int | None = None) -> int | None:
    """The longest sequence for a checkpoint's model: its positions, or `max_length` where that is less.

    Raises:
        DistZO2Error: the checkpoint's configuration cannot be read.
    """
    positions = max_positions(load_config(Path(directory)))
    return min((n for n in (positions, max_length) if n is not None), default=None)


class Tokenize:
    """Turns checked lines into examples, with one tokenizer and one limit of positions."""

    def __init__(self, tokenizer: Any, *, limit: int | None, truncate: str = "error") -> None:
        """
        Args:
            tokenizer: as `load_tokenizer` returns it.
            limit: how many tokens a sequence may have; None: any number.
            truncate: what to do with a longer one: "error", "left" (drop its beginning, except the special tokens at
                the start) or "right" (drop its end; of a line with choices, the end of the prompt).
        """
        self._tokenizer, self._limit, self._truncate = tokenizer, limit, truncate
        self._eos = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._num_head = 0  # special tokens that the tokenizer puts before a text
        while self._num_head + len(bare) < len(probe) and probe[self._num_head : self._num_head + len(bare)] != bare:
            self._num_head += 1
        self._num_tail = max(0, len(probe) - self._num_head - len(bare))  # and after it: taken off again
        self._templated = bool(getattr(tokenizer, "chat_template", None))

    def __call__(self, lines: Sequence[Line]) -> list[Example]:
        """One example for each line.

        Raises:
            DataError: a sequence is too long, or nothing of it is left to learn (file, line number, reason).
        """
        examples = []
        for first in range(0, len(lines), _TOKENIZE_LINES):
            group = lines[first : first + _TOKENIZE_LINES]
            texts = [self._texts(line) for line in group]
            encoded = iter(self._encode([text for some in texts for text in some]))
            for line, some in zip(group, texts, strict=True):
                ids = [next(encoded) for _ in some]
                example = self._choices(line, ids) if line.kind == "choices" else self._sequence(line, some, ids)
                examples.append(example)
        return examples

    # ---- text -------------------------------------------------------------------------------------------------------

    def _texts(self, line: Line) -> list[str]:
        """What is tokenized for a line: growing beginnings of its text, or the prompt and it with each choice."""
        record = line.record
        if line.kind == "choices":
            return [record["prompt"], *(record["prompt"] + choice for choice in record["choices"])]
        if line.kind == "completion":
            return [record["prompt"], record["prompt"] + record["completion"]]
        if line.kind == "text":
            return ["", record["text"]]
        return self._turns(line)

    def _turns(self, line: Line) -> list[str]:
        """For each turn of the assistant: the text up to it and the text with it."""
        messages = line.record["messages"]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"]]
        if not self._templated:
            texts, so_far = [], ""
            for i, message in enumerate(messages[: turns[-1] + 1]):
                head = f"{message['role'].capitalize()}:"
                if i in turns:
                    texts += [so_far + head, f"{so_far}{head} {message['content']}"]
                so_far += f"{head} {message['content']}\n"
            return texts
        try:
            write = partial(self._tokenizer.apply_chat_template, tokenize=False)
            pairs = [
                (write(messages[:i], add_generation_prompt=True) if i else "", write(messages[: i + 1])) for i in turns
            ]
        except Exception as error:  # jinja's errors, raised by the template for roles it does not take
            raise DataError(f"{line.where}: the chat template refuses these messages: {one_line(error)}") from error
        # Some templates rewrite earlier turns once later ones follow: then only the last turn is learned.
        whole = pairs[-1][1]
        kept = [pair for pair in pairs[:-1] if whole.startswith(pair[1]) and pair[1].startswith(pair[0])]
        return [text for pair in [*kept, pairs[-1]] for text in pair]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
        result = []
        for ids in encoded:
            ids = ids[: len(ids) - self._num_tail] if self._num_tail else ids
            # A chat template writes the token at the start itself.
            if self._templated and self._num_head and ids[self._num_head : 2 * self._num_head] == ids[: self._num_head]:
                ids = ids[self._num_head :]
            result.append(ids)
        return result

    # ---- examples -----------------------------------------------------------------------------------------------

    def _sequence(self, line: Line, texts: list[str], ids: list[list[int]]) -> Example:
        """`ids` are pairs (up to, with) of growing beginnings; the last is the whole sequence."""
        tokens = list(ids[-1])
        targets = np.zeros(len(tokens), dtype=bool)
        for before, after in zip(ids[::2], ids[1::2], strict=True):
            targets[_common_prefix(before, tokens) : _common_prefix(after, tokens)] = True
        ends_itself = line.kind == "messages" and self._templated
        if self._eos is not None and not ends_itself and (not tokens or tokens[-1] != self._eos):
            tokens.append(self._eos)
            targets = np.append(targets, True)
        kept = self._fitting(line, len(tokens))
        tokens, targets = np.asarray(tokens, dtype=np.int32)[kept], targets[kept]
        targets[:1] = False  # nothing comes before the first that could predict it
        if not targets.any():
            raise DataError(f"{line.where}: no token is left to learn")
        return Example(tokens, targets)

    def _choices(self, line: Line, ids: list[list[int]]) -> Example:
        prompt, wholes = ids[0], ids[1:]
        # A tokenizer may merge across the border: options begin where the first of them leaves the prompt.
        border = min(_common_prefix(prompt, whole) for whole in wholes)
        options = [np.asarray(whole[border:], dtype=np.int32) for whole in wholes]
        prompt = np.asarray(prompt[:border], dtype=np.int32)
        if not len(prompt):
            raise DataError(f"{line.where}: the prompt has no tokens, so nothing predicts the first token of a choice")
        for i, option in enumerate(options):
            if not len(option):
                raise DataError(f"{line.where}: choice {i} has no tokens")
        longest = max(len(o) for o in options)
        kept = self._fitting(line, len(prompt), longest)
        if len(kept) < len(prompt) and len(kept) <= self._num_head:
            raise DataError(f"{line.where}: a choice of {longest} tokens leaves no room for the prompt")
        return Example(prompt[kept], None, tuple(options), line.record["label"])

    def _fitting(self, line: Line, num_tokens: int, num_behind: int = 0) -> np.ndarray:
        """int64: places of the tokens that fit the limit, with `num_behind` more behind them."""
        total = num_tokens + num_behind
        excess = 0 if self._limit is None else max(0, total - self._limit)
        if excess and self._truncate == "error":
            advice = "--truncate left or right shortens it"
            raise DataError(f"{line.where}: {total} tokens, the limit is {self._limit} ({advice})")
        first = max(0, num_tokens - excess) if self._truncate == "right" else min(self._num_head, num_tokens)
        return np.r_[:first, first + excess : num_tokens]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def load_examples(
    path: str | os.PathLike, tokenizer: Any, *, limit: int | None = None, truncate: str = "error"
) -> list[Example]:
    """Reads, checks and tokenizes a JSONL file; see `read_lines` and `Tokenize`."""
    return Tokenize(tokenizer, limit=limit, truncate=truncate)(read_lines(path))
