"""Tasks as rows of a TOML file: how a row of a data set becomes a prompt and what may follow it.

Templates hold fields in braces, with transforms behind bars: `{question|strip}`. A dot goes into a field:
`{answers.text.0}`. Nothing in a file is executed. The rows of tasks.toml are the eleven tasks of MeZO
(https://arxiv.org/abs/2305.17333).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distzo2.errors import DataError, UsageError
from distzo2.text import brief, first_reason

_PUBLISHED = Path(__file__).with_name("tasks.toml")


def _lower_first(text: str) -> str:
    first, space, rest = text.partition(" ")
    return f"{first if first == 'I' else first.lower()}{space}{rest}"


TRANSFORMS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "rstrip": str.rstrip,
    "lower": str.lower,
    "capital": lambda text: text[:1].upper() + text[1:],  # the first letter alone
    "lower_first": _lower_first,  # the first word, unless it is "I"
    "no_stop": lambda text: text.removesuffix("."),
    "question": lambda text: text if text.endswith("?") else text + "?",
}


@dataclass(frozen=True)
class Asked:
    """A row of a data set as text."""

    where: str  # "file, row N", for errors
    prompt: str
    options: tuple[str, ...]  # what may follow; none where the model is to write it
    label: int  # of the option that is learned
    right: tuple[int, ...]  # options that count as right answers
    completion: str  # what is learned to follow
    answers: tuple[str, ...]  # texts that count as right answers, where the model writes one
    blank: str | None  # the prompt without content, for calibration


class Task(BaseModel):
    """A row of the table of tasks. `docs/tasks.md` explains the fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    data: str = ""
    config: str | None = None
    train: str = "train"
    eval: str = "validation"
    prompt: str
    options: list[str] = []
    each: str | None = None
    placeholder: str | None = None
    label: str | None = None
    labels: list[bool | int | str] | None = None
    completion: str | None = None
    answers: str | None = None
    blank: str | None = None
    stop: str = "\n"
    metric: Literal["accuracy", "f1", "em"] = "accuracy"
    loss: Literal["choices", "text", "completion"] = "choices"
    map: dict[str, dict[str, str]] = {}
    replace: dict[str, dict[str, str]] = {}
    num_train: int = Field(1000, ge=1)
    num_dev: int = Field(500, ge=1)
    num_eval: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _is_whole(self) -> Task:
        for template in self._templates():
            _parsed(template)
        written = (self.completion, self.answers)
        if self.generates and (self.options or None in written or self.loss == "choices"):
            raise ValueError(
                f"metric {self.metric!r} needs completion, answers, a loss of text or completion, no options"
            )
        if not self.generates and (self.completion is not None or not self.options):
            raise ValueError("metric 'accuracy' needs options, and no completion")
        if self.each is not None:
            if len(self.options) != 1 or None in (self.placeholder, self.answers) or self.label is not None:
                raise ValueError("each needs one option with a placeholder, and answers in place of label")
        elif self.options and (self.label is None or len(self.options) < 2):
            raise ValueError("two options or more and a label, or each, were expected")
        if self.labels is not None and len({str(each).lower() for each in self.labels}) != len(self.options):
            raise ValueError(f"labels: {len(self.options)} different ones were expected, one for each option")
        return self

    @property
    def generates(self) -> bool:
        """Whether the model writes its answer."""
        return self.metric != "accuracy"

    @cached_property
    def fields(self) -> list[str]:
        """The fields of a data set that the task reads."""
        paths = [path for template in self._templates() for _, path, _ in _parsed(template) if path]
        paths += filter(None, (self.each, self.label, self.answers))
        return list(dict.fromkeys(path.partition(".")[0] for path in paths))

    def _templates(self) -> list[str]:
        return [t for t in (self.prompt, *self.options, self.completion, self.blank) if t is not None]

    def ask(self, record: Mapping[str, Any], where: str) -> Asked:
        """A row of a data set as text.

        Raises:
            DataError: a field is missing or not of its kind, or the row has no right answer.
        """
        record = {name: self._mapped(name, value, where) for name, value in record.items()}

        def text(template: str) -> str:
            result = ""
            for before, path, names in _parsed(template):
                value = _value(record, path, where) if path else ""
                if not isinstance(value, str | int | float):
                    raise DataError(f"{where}: {path}: text was expected, it is {brief(value)}")
                result += before + reduce(lambda part, name: TRANSFORMS[name](part), names, str(value))
            return result

        options, label, right = [text(option) for option in self.options], 0, ()
        answers = () if self.answers is None else tuple(_strings(record, self.answers, where))
        if self.each is not None:
            items = list(dict.fromkeys(_strings(record, self.each, where)))
            if self.placeholder not in options[0]:
                raise DataError(f"{where}: {self.placeholder!r} is not in {brief(options[0])}")
            options = [options[0].replace(self.placeholder, item) for item in items]
            right = tuple(items.index(answer) for answer in answers if answer in items)
            if not answers or answers[0] not in items:
                raise DataError(
                    f"{where}: {self.answers}: {brief(answers[0]) if answers else 'none'} is not in {self.each}"
                )
            label = right[0]
        elif self.label is not None:
            label = self._label(_value(record, self.label, where), where)
            right = (label,)
        elif not answers:
            raise DataError(f"{where}: {self.answers}: no answer")
        completion = options[label] if options else text(self.completion)
        blank = None if self.blank is None else text(self.blank)
        return Asked(where, text(self.prompt), tuple(options), label, right, completion, answers, blank)

    def _mapped(self, name: str, value: Any, where: str) -> Any:
        for old, new in self.replace.get(name, {}).items():
            value = value.replace(old, new) if isinstance(value, str) else value
        known = self.map.get(name)
        if known is not None and str(value) not in known:
            raise DataError(f"{where}: {name}: {' or '.join(map(repr, known))} was expected, it is {brief(value)}")
        return value if known is None else known[str(value)]

    def _label(self, value: Any, where: str) -> int:
        """The option that a label names; TSV spells values as text."""
        known = [str(each).lower() for each in (self.labels or range(len(self.options)))]
        if str(value).lower() in known:
            return known.index(str(value).lower())
        hidden = " (a test split hides its labels)" if str(value) == "-1" else ""
        raise DataError(f"{where}: {self.label}: {', '.join(known)} were expected, it is {brief(value)}{hidden}")


def _parsed(template: str) -> list[tuple[str, str, list[str]]]:
    """A template in pieces: the text before a field, the field's path ("" at the end), and its transforms."""
    pieces = []
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}") from error
    for before, field, spec, conversion in parsed:
        path, *names = (field or "").split("|")
        unknown = [name for name in names if name not in TRANSFORMS]
        if unknown or spec or conversion or (field is not None and not path):
            known = ", ".join(TRANSFORMS)
            raise ValueError(f"{template!r}: {{field}} or {{field|transform}} was expected, of transforms {known}")
        pieces.append((before, path, names))
    return pieces


def _value(record: Mapping[str, Any], path: str, where: str) -> Any:
    value: Any = record
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            held = f", of {', '.join(value)}" if isinstance(value, Mapping) and value else ""
            raise DataError(f"{where}: no field {path!r} ({part!r} is missing{held})") from None
    return value


def _strings(record: Mapping[str, Any], path: str, where: str) -> list[str]:
    value = _value(record, path, where)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise DataError(f"{where}: {path}: a list of texts was expected, it is {brief(value)}")
    return value


def read_tasks(path: str | os.PathLike | None = None) -> dict[str, Task]:
    """The published tasks by name, and those of a TOML file of the user's, which go before them.

    Raises:
        UsageError: the file cannot be read, or a row of it is wrong (file, task, key, reason).
    """
    tasks: dict[str, Task] = {}
    for file in filter(None, (_PUBLISHED, path)):
        try:
            rows = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--task-file {file}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"--task-file {file}: {' '.join(str(error).split())}") from error
        for name, row in rows.items():
            if not isinstance(row, dict):
                raise UsageError(f"--task-file {file}: [{name}] was expected, a table for each task")
            try:
                tasks[name.lower()] = Task.model_validate(row | {"name": name.lower()})
            except ValidationError as error:
                place = ".".join(map(str, error.errors()[0]["loc"]))
                raise UsageError(
                    f"--task-file {file}: [{name}] {place}{': ' * bool(place)}{first_reason(error)}"
                ) from error
    return tasks


def find_task(name: str, path: str | os.PathLike | None = None) -> Task:
    """A task by name, whatever its case.

    Raises:
        UsageError: there is none; the message lists those that there are.
    """
    tasks = read_tasks(path)
    if name.lower() not in tasks:
        raise UsageError(f"--task {name}: no such task; known are {', '.join(tasks)}")
    return tasks[name.lower()]


def table_of_tasks(tasks: Mapping[str, Task]) -> list[str]:
    """The lines of `distzo2 tasks`: each task with its data set, what is learned, the metric, and the fields read."""
    forms = {"choices": "the options", "text": "the whole text", "completion": "what follows the prompt"}
    rows = [("task", "data set", "loss over", "metric", "train/dev/eval", "fields")]
    for t in tasks.values():
        draw = f"{t.num_train}/{t.num_dev}/{t.num_eval}"
        metric = f"{t.metric} of {'written text' if t.generates else 'options'}"
        rows.append((t.name, t.data, forms[t.loss], metric, draw, ", ".join(t.fields)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]) for row in rows]
