"""Data files: JSONL lines are read, checked and tokenized into examples. Errors name file and line number.

A line is one of
    {"prompt": str, "completion": str}             learn the completion
    {"prompt": str, "choices": [str], "label": i}  learn which of the choices follows the prompt
    {"messages": [{"role": str, "content": str}]}  learn every turn of the assistant
    {"text": str}                                  learn the whole text
Other keys are ignored. A file holds either lines with choices or lines without.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distzo2.errors import DataError, DistZO2Error

KINDS = ("completion", "choices", "messages", "text")
TRUNCATIONS = ("error", "left", "right")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TOKENIZE_LINES = 1024  # lines handed to the tokenizer at a time


@dataclass(frozen=True)
class Line:
    """A checked line: its kind, the parsed object, and where it stands."""

    kind: str
    record: dict[str, Any]
    where: str  # "file:line"


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
        DistZO2Error: the directory has none, or it cannot be loaded.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DistZO2Error(f"{directory}: expected a checkpoint directory, got no directory of that name")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise DistZO2Error(f"{directory}: no tokenizer (none of {', '.join(_TOKENIZER_FILES[:4])}, ...)")
    from transformers import AutoTokenizer

    from distzo2.checkpoint.weight_files import read_json

    if (config := directory / "config.json").is_file():  # transformers looks there for the tokenizer's class
        read_json(config)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the many tokenizer classes raise on damaged files
        reason = " ".join(str(error).split())
        raise DistZO2Error(f"{directory}: the tokenizer cannot be loaded: {reason[:200]}") from error


def max_positions(config: Any) -> int | None:
    """How many positions a model of this config has, or None where it has no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def sequence_limit(directory: str | os.PathLike, max_length: int | None = None) -> int | None:
    """The longest sequence for a checkpoint's model: its positions, or `max_length` where that is less.

    Raises:
        DistZO2Error: the checkpoint's configuration cannot be read.
    """
    from transformers import AutoConfig

    from distzo2.checkpoint.weight_files import read_json

    if (config := Path(directory) / "config.json").is_file():
        read_json(config)
    try:
        positions = max_positions(AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # whatever a configuration class raises on values it does not take
        reason = " ".join(str(error).split())[:200]
        raise DistZO2Error(f"{directory}: not a configuration that transformers knows: {reason}") from error
    return min((n for n in (positions, max_length) if n is not None), default=None)


def read_lines(path: str | os.PathLike) -> list[Line]:
    """Reads and checks a JSONL file. Blank lines are skipped.

    Raises:
        DataError: the file cannot be read, holds no example, or a line is malformed (file, line number, reason).
    """
    path = os.fspath(path)
    try:
        raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    lines = []
    for number, content in enumerate(raw.splitlines(), start=1):
        if content.strip():
            lines.append(_check_line(content, f"{path}:{number}"))
    if not lines:
        raise DataError(f"{path}: holds no examples")
    first = lines[0]
    for line in lines:
        if (line.kind == "choices") != (first.kind == "choices"):
            raise DataError(f"{line.where}: a {line.kind!r} line in a file that begins with a {first.kind!r} line")
    return lines


def _check_line(content: bytes, where: str) -> Line:
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise DataError(f"{where}: not valid JSON: {reason} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object was expected, not {_name(record)}")
    kinds = [kind for kind in KINDS if kind in record]
    if len(kinds) != 1:
        found = f"both {kinds[0]!r} and {kinds[1]!r}" if kinds else "none of them"
        raise DataError(f"{where}: one of {', '.join(map(repr, KINDS))} was expected, it has {found}")
    kind = kinds[0]
    if kind in ("completion", "choices"):
        _check_text(record, "prompt", where, allow_empty=True)
    if kind == "completion":
        _check_text(record, "completion", where)
    elif kind == "text":
        _check_text(record, "text", where)
    elif kind == "choices":
        _check_choices(record, where)
    else:
        _check_messages(record["messages"], where)
    return Line(kind, record, where)


def _name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def _check_text(record: dict[str, Any], key: str, where: str, *, allow_empty: bool = False) -> None:
    if key not in record:
        raise DataError(f"{where}: {key!r} is missing")
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, not {_name(value)}")
    if not value and not allow_empty:
        raise DataError(f"{where}: {key!r} is empty")
    _check_encodable(value, repr(key), where)


def _check_encodable(text: str, name: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell, and which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where}: {name} holds {half}, half of a surrogate pair, at character {error.start}"
        ) from error


def _check_choices(record: dict[str, Any], where: str) -> None:
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' must be an array of at least two strings")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise DataError(f"{where}: choice {i} must be a string that is not empty")
        _check_encodable(choice, f"choice {i}", where)
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: two choices are the same")
    if "label" not in record:
        raise DataError(f"{where}: 'label' is missing")
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(f"{where}: 'label' must be an integer, not {_name(label)}")
    if not 0 <= label < len(choices):
        raise DataError(
            f"{where}: label {label} is out of range: there are {len(choices)} choices (0 to {len(choices) - 1})"
        )


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be an array that is not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {i} must be an object, not {_name(message)}")
        if message.get("role") not in _ROLES:
            raise DataError(f"{where}: message {i}: 'role' must be one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {i}: 'content' must be a string")
        _check_encodable(message["content"], f"message {i}", where)
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise DataError(f"{where}: no message of the assistant, so there is nothing to learn")


class Tokenize:
    """Turns checked lines into examples, with one tokenizer and one limit of positions."""

    def __init__(self, tokenizer: Any, *, limit: int | None, truncate: str = "error") -> None:
        """
        Args:
            tokenizer: as `load_tokenizer` returns it.
            limit: how many tokens a sequence may have; None: any number.
            truncate: what to do with a longer one: "error", "left" (drop its beginning, but for what the tokenizer puts
                at the start) or "right" (drop its end; of a line with choices, the end of the prompt).
        """
        if truncate not in TRUNCATIONS:
            raise DistZO2Error(f"truncate={truncate!r}: expected one of {', '.join(TRUNCATIONS)}")
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
        """What is tokenized for a line: growing beginnings of its text, or the prompt and each way to go on."""
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
            pairs = [
                (
                    self._tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
                    if i
                    else "",
                    self._tokenizer.apply_chat_template(messages[: i + 1], tokenize=False),
                )
                for i in turns
            ]
        except Exception as error:  # jinja's errors, raised by the template for roles it does not take
            reason = " ".join(str(error).split())
            raise DataError(f"{line.where}: the chat template refuses these messages: {reason[:200]}") from error
        # Some templates write earlier turns otherwise once later ones follow: then only the last turn is learned.
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
        if self._limit is not None and len(tokens) > self._limit:
            self._refuse_long(line, len(tokens))
            if self._truncate == "right":
                tokens, targets = tokens[: self._limit], targets[: self._limit]
            else:
                head = self._head(tokens)
                cut = len(tokens) - self._limit + head
                tokens, targets = tokens[:head] + tokens[cut:], np.append(targets[:head], targets[cut:])
        if len(targets):
            targets[0] = False  # nothing comes before it that could predict it
        if not targets.any():
            raise DataError(f"{line.where}: no token is left to learn")
        return Example(np.asarray(tokens, dtype=np.int32), targets)

    def _choices(self, line: Line, ids: list[list[int]]) -> Example:
        prompt, wholes = ids[0], ids[1:]
        # A tokenizer may merge across the border: options begin where the first of them leaves the prompt.
        border = min(_common_prefix(prompt, whole) for whole in wholes)
        options = [np.asarray(whole[border:], dtype=np.int32) for whole in wholes]
        prompt = list(prompt[:border])
        if not prompt:
            raise DataError(f"{line.where}: the prompt has no tokens, so nothing predicts the first token of a choice")
        for i, option in enumerate(options):
            if not len(option):
                raise DataError(f"{line.where}: choice {i} has no tokens")
        longest = max(len(o) for o in options)
        if self._limit is not None and len(prompt) + longest > self._limit:
            self._refuse_long(line, len(prompt) + longest)
            keep = self._limit - longest
            head = self._head(prompt)
            if keep <= head:
                raise DataError(f"{line.where}: a choice of {longest} tokens leaves no room for the prompt")
            prompt = prompt[:keep] if self._truncate == "right" else prompt[:head] + prompt[len(prompt) - keep + head :]
        return Example(np.asarray(prompt, dtype=np.int32), None, tuple(options), line.record["label"])

    def _head(self, tokens: list[int]) -> int:
        return min(self._num_head, len(tokens))

    def _refuse_long(self, line: Line, num_tokens: int) -> None:
        if self._truncate == "error":
            raise DataError(
                f"{line.where}: {num_tokens} tokens, the limit is {self._limit} (--truncate left or right shortens it)"
            )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def load_examples(
    path: str | os.PathLike, tokenizer: Any, *, limit: int | None = None, truncate: str = "error"
) -> list[Example]:
    """Reads, checks and tokenizes a JSONL file; see `read_lines` and `Tokenize`."""
    return Tokenize(tokenizer, limit=limit, truncate=truncate)(read_lines(path))
