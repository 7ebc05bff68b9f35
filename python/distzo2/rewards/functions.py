"""Rewards: functions of prompts, completions and rows of data, each a list, to a number for each; higher is better.

    exact, em      1 if the completion is a right answer, word by word
    f1             the harmonic mean of precision and recall of its words
    number         1 if the last number in it is that of a right answer
    regex:PATTERN  1 if the pattern matches all of it
    json:FILE      1 if it is JSON that the schema in the file allows
    FILE.py:NAME   a function of that name

F1 and exact match (EM) follow the evaluation of SQuAD 1.1 (https://arxiv.org/abs/1606.05250): case, punctuation and
a, an, the do not count; the best over a row's right answers does. This module needs neither torch nor numpy, since a
process that runs rewards begins with it.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import json
import math
import numbers
import re
import string
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from distzo2.errors import MissingPackageError, RewardError, UsageError, one_line
from distzo2.text import brief

Row = Mapping[str, Any]  # a line of data
Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], Sequence[float]]

FIGURES = ("loss", "accuracy", "reward")  # what a score is called that is the name of no reward
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A minus is not the dash of 10-12, and a comma not that of 1,2.
_NUMBER = re.compile(r"(?:(?<![^\s=(])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


# ---- what is compared with right answers ----------------------------------------------------------------------------


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


def same_number(text: str, answers: Sequence[str]) -> float:
    """1 if the last number in the text, as in "so it is $1,234.50", is the last one of an answer, else 0."""
    return float((found := _last_number(text)) is not None and found in map(_last_number, answers))


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


_COMPARES = {"exact": exact_match, "em": exact_match, "f1": f1, "number": same_number}


def answers_of(row: Row) -> list[str]:
    """The right answers of a row: its "answers", or else its "answer" or "completion".

    Raises:
        ValueError: it has none of them, or they are no texts.
    """
    found = next((row[name] for name in ("answers", "answer", "completion") if name in row), None)
    answers = found if isinstance(found, list) else [found]
    if not answers or not all(isinstance(each, str | int | float) for each in answers):
        raise ValueError("answers: a list of texts was expected, or one in answer or completion")
    return [str(each) for each in answers]


# ---- by name --------------------------------------------------------------------------------------------------------


def parsed(name: str) -> tuple[str, str]:
    """The kind of a reward (exact, em, f1, number, regex, json, file) and its pattern, file, or FILE.py:NAME.

    Raises:
        ValueError: no reward has this name.
    """
    kind, _, rest = name.partition(":")
    if (kind in _COMPARES and name == kind) or (kind in ("regex", "json") and rest):
        return kind, rest
    file, _, function = name.rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return "file", name
    raise ValueError("expected exact, f1, number, regex:PATTERN, json:FILE or FILE.py:FUNCTION")


def figure_of(name: str, reward: str | None = None) -> str:
    """What a score's mean is called, for the name of a reward, "reward", "loss" or "accuracy". Beside a run's own
    `reward`, another function of a file is FILE.FUNCTION."""
    if name in FIGURES:
        return name
    if reward is not None and parsed(name)[0] == "file" and absolute(name) != absolute(reward):
        file, _, function = name.rpartition(":")
        return f"{Path(file).stem}.{function}"
    kind = parsed(name)[0]
    return {"exact": "em", "file": "reward"}.get(kind, kind)


def file_of(name: str) -> str | None:
    """The file that a reward is read from; None if there is none."""
    kind, rest = parsed(name)
    return {"json": rest, "file": rest.rpartition(":")[0]}.get(kind)


def absolute(name: str) -> str:
    """A reward's name with the absolute path of its file."""
    kind, rest = parsed(name)
    if kind in ("json", "file"):
        return f"json:{Path(rest).absolute()}" if kind == "json" else str(Path(name).absolute())
    return name


def digest(name: str) -> str | None:
    """SHA-256 of the file that a reward is read from; None if there is none.

    Raises:
        UsageError: the file cannot be read.
    """
    return None if (file := file_of(name)) is None else hashlib.sha256(_read(file)).hexdigest()


def reward_named(name: str, sha256: str | None = None) -> Reward:
    """The reward of that name. With `sha256`, its file is still the one with this digest.

    Raises:
        UsageError: the file, or the pattern in the name, cannot be used, or the file has changed.
        MissingPackageError: it needs a package that is not installed.
    """
    (kind, rest), file = parsed(name), file_of(name)
    content = b"" if file is None else _read(file)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise UsageError(f"{file}: has changed since the run began")
    if kind in _COMPARES:
        return _each(lambda text, row: _COMPARES[kind](text, answers_of(row)))
    if kind == "regex":
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise UsageError(f"reward {name}: not a regular expression: {error}") from None
        return _each(lambda text, row: float(pattern.fullmatch(text.strip()) is not None))
    return _by_schema(file, content) if kind == "json" else _by_code(file, content, rest.rpartition(":")[2])


def check_row(name: str, row: Row) -> None:
    """Raises ValueError if the reward of that name has nothing in `row` to compare with."""
    if parsed(name)[0] in _COMPARES:
        answers_of(row)


def _each(one: Callable[[str, Row], float]) -> Reward:
    return lambda prompts, completions, rows: list(map(one, completions, rows))


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error


def _by_schema(file: str, content: bytes) -> Reward:
    try:
        from jsonschema import SchemaError, validators
    except ImportError:
        raise MissingPackageError(
            f"reward json:{file}: pip install jsonschema, or the extra '.[rewards]' from the checkout"
        ) from None
    try:
        schema = json.loads(content)
        validator = validators.validator_for(schema)
        validator.check_schema(schema)
    except (ValueError, SchemaError) as error:
        raise UsageError(f"{file}: not a JSON schema: {one_line(error)}") from error

    def allows(text: str, row: Row) -> float:
        try:
            return float(validator(schema).is_valid(json.loads(text)))
        except (ValueError, RecursionError):
            return 0.0

    return _each(allows)


class _Content(importlib.abc.InspectLoader):
    """Loads a module of what was read of its file."""

    def __init__(self, content: bytes, path: str) -> None:
        self.content, self.path = content, path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.content)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.content, self.path)


def _by_code(file: str, content: bytes, name: str) -> Reward:
    """The function of a Python file, which may import modules beside it."""
    path = str(Path(file).absolute())
    loader = _Content(content, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(Path(file).stem, loader, origin=path))
    module.__file__ = path
    if str(Path(path).parent) not in sys.path:
        sys.path.append(str(Path(path).parent))
    sys.modules.setdefault(module.__name__, module)  # dataclasses and pickle look there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{file}: cannot be loaded: {_raised(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file}: has no function {name}")
    return partial(_named, path, function)


def _named(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a user's function."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise RewardError(RewardError.RAISED, _raised(error, path)) from error


def _raised(error: BaseException, path: str) -> str:
    """An error of a user's code on one line, with the last line of the file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{type(error).__name__}: {one_line(error)}" + (f" ({path}:{lines[-1]})" if lines else "")


def checked(values: Any, num_expected: int) -> list[float]:
    """What a reward returned, as finite floats.

    Raises:
        RewardError: it is anything but a finite number for each completion.
    """
    if isinstance(values, Mapping | Set):  # its order is not that of the completions
        raise RewardError(RewardError.NO_NUMBERS, f"a list was expected, it returned a {type(values).__name__}")
    try:
        values = list(values)
    except Exception as error:  # whatever a generator of the user's raises
        what = f"it returned {brief(values)}: {type(error).__name__}: {one_line(error)}"
        raise RewardError(RewardError.NO_NUMBERS, f"a list was expected, {what}") from error
    if len(values) != num_expected:
        raise RewardError(RewardError.NO_NUMBERS, f"{num_expected} were expected, it returned {len(values)}")
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    """A finite number, of Python, numpy or torch."""
    why = ""
    if isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0:
        try:
            if math.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError, OverflowError) as error:
            why = f": {type(error).__name__}: {one_line(error)}"
    raise RewardError(RewardError.NO_NUMBERS, f"it returned {brief(value)} for a completion{why}")


WORDS: Mapping[str, Reward] = {name: reward_named(name) for name in ("f1", "em")}  # by the names of their figures
