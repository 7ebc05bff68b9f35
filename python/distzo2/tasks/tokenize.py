"""Text becomes tokens: with the special tokens that the tokenizer puts around it, and cut to the model's limit."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from distzo2.checkpoint.writing import tokenizer_files
from distzo2.errors import DataError, DistZO2Error, refusing
from distzo2.formats.gguf import is_gguf
from distzo2.formats.gguf_config import gguf_tokenizer
from distzo2.models.pretrained import config_of
from distzo2.tasks.chat import Chat
from distzo2.tasks.kinds import CAUSAL, ModelKind
from distzo2.tasks.lines import BadLines, Line

_TOKENIZER_FILES = "tokenizer.json tokenizer_config.json tokenizer.model spiece.model vocab.json vocab.txt tekken.json"
_TOKENIZE_LINES = 1024  # lines handed to the tokenizer at a time

logger = logging.getLogger("distzo2")


@dataclass(frozen=True)
class Example:
    """A tokenized line.

    Without choices, `tokens` is the whole sequence, and `targets` says which are learned. With choices, `tokens` is
    the prompt, `options` are the tokens of each choice, and `label` is the right one.
    """

    tokens: np.ndarray  # int32 [num_tokens]; of an encoder-decoder model what the decoder reads
    targets: np.ndarray | None  # bool [num_tokens]; the first token is never a target
    options: tuple[np.ndarray, ...] = ()  # int32 [num_tokens of the choice] each; one alone is the word to learn
    label: int = 0  # or the class
    source: np.ndarray | None = None  # int32: what the encoder reads
    place: int | None = None  # of the mask token, where each option is a word in its place
    lead: tuple[int, ...] = ()  # tokens at the beginning of each option that are not scored; none: all are
    right: tuple[int, ...] = ()  # options that count as right answers; none: `label` alone

    @property
    def chooses(self) -> bool:
        """Whether one of several answers is right: of the choices, or of a classifier's classes."""
        return self.targets is None and (self.place is None or len(self.options) != 1)

    @property
    def num_tokens(self) -> int:
        """Length of the longest sequence that a causal model sees for this example."""
        return len(self.tokens) + max((len(o) for o in self.options), default=0)


def load_tokenizer(directory: str | os.PathLike) -> Any:
    """The tokenizer of a checkpoint directory, or of a GGUF file.

    Raises:
        DistZO2Error: the directory is no checkpoint, has no tokenizer, or it cannot be loaded.
    """
    if is_gguf(directory):
        return gguf_tokenizer(directory)
    config_of(Path(directory))  # checked: transformers looks there for the tokenizer's class
    names = {*_TOKENIZER_FILES.split()} | tokenizer_files(Path(directory))
    if not any(os.path.isfile(os.path.join(directory, name)) for name in names):
        raise DistZO2Error(f"{directory}: no tokenizer (none of {', '.join(_TOKENIZER_FILES.split()[:4])}, ...)")
    with refusing(f"{directory}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):  # merges that are left out by chance: no two readings would be the same
        model.dropout = None
    return tokenizer


def special_counts(tokenizer: Any, encode: Callable[..., Any], legacy: bool = False) -> tuple[int, int]:
    """How many special tokens a tokenizer puts before a text and after it.

    Args:
        tokenizer: whose own tokens are the texts that are tried: the first that it does not drop tells.
        encode: `tokenizer`, or it for another kind of text.
        legacy: try the letter "a" alone, as earlier versions did.
    """
    texts = ["a"] if legacy else [*tokenizer.get_added_vocab(), *tokenizer.get_vocab()]
    for text in texts:
        special = encode([text], return_special_tokens_mask=True, verbose=False)["special_tokens_mask"][0]
        if 0 in special:
            return special.index(0), special[::-1].index(0)
    return 0, len(special)


class Tokenize(ABC):
    """Turns checked lines into examples for one kind of model (:mod:`distzo2.tasks.examples`)."""

    kinds: tuple[str, ...]  # of lines
    wants = "lines of another kind"

    def __init__(
        self,
        tokenizer: Any,
        *,
        limit: int | None = None,
        truncate: str = "error",
        kind: ModelKind = CAUSAL,
        split_special_tokens: bool = False,
        clock: datetime | None = None,
        legacy: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: as `load_tokenizer` returns it.
            limit: how many tokens a sequence may have; None: any number.
            truncate: what to do with a longer one: "error", "left" (drop its beginning, except the special tokens at
                the start) or "right" (drop its end; of a line with choices, the end of the prompt).
            kind: of the model.
            split_special_tokens: whether special tokens that the data spell are text.
            clock: the time that chat templates see; None: now.
            legacy: whether to tokenize as versions did that kept no hash of the examples.
        """
        self.tokenizer, self.kind, self.limit, self.truncate = tokenizer, kind, limit, truncate
        self.splits, self.legacy = split_special_tokens, legacy
        self.num_head, self.num_tail = special_counts(tokenizer, tokenizer, legacy)
        self.chat = Chat(tokenizer, clock=clock, sanitized=split_special_tokens)

    def __call__(self, lines: Sequence[Line], bad: BadLines | None = None) -> list[Example]:
        """One example for each line, but for those that `bad` allows to skip.

        Raises:
            DataError: the model learns nothing from such a line, it is too long, a token is not of the model's
                vocabulary, or nothing is left to learn (file, line number, reason).
        """
        examples, bad = [], bad or BadLines()
        for first in range(0, len(lines), _TOKENIZE_LINES):
            group: list[tuple[Line, list[Any]]] = []
            for line in lines[first : first + _TOKENIZE_LINES]:
                with bad.skipped():
                    if line.kind not in self.kinds:
                        raise DataError(
                            f"{line.where}: {self.kind.model} needs {self.wants}, this is a {line.kind!r} line"
                        )
                    group.append((line, self.texts(line)))
            encoded = self.encode([texts for _, texts in group])
            for (line, _), ids in zip(group, encoded, strict=True):
                with bad.skipped():
                    example = self.example(line, ids)
                    self.check(line, example)
                    examples.append(example)
        return examples

    @abstractmethod
    def texts(self, line: Line) -> list[Any]:
        """What is tokenized for a line."""

    @abstractmethod
    def example(self, line: Line, ids: list[list[int]]) -> Example:
        """The example of a line, from the tokens of its texts."""

    def encode(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The tokens of each text of each line, with the special tokens around it."""
        return regrouped(self.ids([text for some in texts for text in some]), texts)

    def ids(self, texts: list[str], as_target: bool = False) -> list[list[int]]:
        """The tokens of each text, with the special tokens around it."""
        if not texts:
            return []
        more = {"text_target" if as_target else "text": texts} | ({"split_special_tokens": True} if self.splits else {})
        return self.tokenizer(add_special_tokens=True, verbose=False, **more)["input_ids"]

    def without_tail(self, ids: list[int]) -> list[int]:
        """Without the special tokens after a text."""
        return ids[: len(ids) - self.num_tail] if self.num_tail else ids

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text that a model is to continue; of an encoder-decoder model, what its encoder reads."""
        (ids,) = self.ids([text])
        return ids if self.kind.name == "encoder-decoder" else self.without_tail(ids)

    def fitting(self, line: Line, num_tokens: int, num_behind: int = 0) -> np.ndarray:
        """int64: places of the tokens that fit the limit, with `num_behind` more behind them."""
        total = num_tokens + num_behind
        excess = 0 if self.limit is None else max(0, total - self.limit)
        if excess and self.truncate == "error":
            advice = "--truncate left or right shortens it"
            raise DataError(f"{line.where}: {total} tokens, the limit is {self.limit} ({advice})")
        first = max(0, num_tokens - excess) if self.truncate == "right" else min(self.num_head, num_tokens)
        return np.r_[:first, first + excess : num_tokens]

    def fitted(self, line: Line, ids: list[int]) -> np.ndarray:
        """int32: a text's tokens, cut to the limit between the special tokens around them."""
        if not ids:
            raise DataError(f"{line.where}: the text has no tokens")
        kept = self.fitting(line, len(ids) - self.num_tail, self.num_tail)
        return np.asarray(ids, dtype=np.int32)[np.r_[kept, len(ids) - self.num_tail : len(ids)]]

    def check(self, line: Any, example: Example, alike: bool = False) -> None:
        """Raises DataError where choices are the same tokens, unless they may be `alike`, or where a token is not of
        the model's vocabulary; `line.where` is what the example is of."""
        options = [] if alike or self.legacy else [option.tolist() for option in example.options]
        if same := next((o for o in options if options.count(o) > 1), None):
            first, second, *_ = (i for i, option in enumerate(options) if option == same)
            raise DataError(f"{line.where}: choices {first} and {second} are the same tokens to the model")
        size = self.kind.vocab_size
        for ids in (example.tokens, *example.options, *([] if example.source is None else [example.source])):
            if size is not None and len(ids) and (highest := int(ids.max())) >= size:
                token = self.tokenizer.convert_ids_to_tokens(highest)
                raise DataError(f"{line.where}: token {highest} ({token!r}): {self.kind.model} knows {size} tokens")


def regrouped(flat: Sequence[Any], like: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The items of `flat` in lists as long as those of `like`."""
    items = iter(flat)
    return [[next(items) for _ in some] for some in like]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of what both begin with."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
