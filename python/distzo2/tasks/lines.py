"""Data files: JSONL lines are read and checked. Errors name file and line number.

A line is one of
    {"prompt": str, "completion": str}             learn the completion
    {"prompt": str, "choices": [str], "label": i}  learn which of the choices follows the prompt
    {"messages": [{"role": str, "content": str}]}  learn every turn of the assistant
    {"text": str}                                  learn the whole text; a classifier learns its "label", a number
or, where a reward judges what the model writes, a row with any other keys and one of
    {"prompt": str}                                continue it
    {"messages": [{"role": str, "content": str}]}  write the assistant's next turn
Other keys are ignored. A file holds either lines with choices or lines without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from distzo2.errors import DataError
from distzo2.text import brief, first_reason

_Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)  # no number for a string, and no boolean for a number


class _CompletionLine(_Strict):
    prompt: str
    completion: _Text


class _ChoicesLine(_Strict):
    prompt: str
    choices: Annotated[list[_Text], Field(min_length=2)]
    label: int

    @model_validator(mode="after")
    def _label_is_of_a_choice(self) -> _ChoicesLine:
        last = len(self.choices) - 1
        if len(set(self.choices)) <= last:
            raise ValueError("two choices are the same")
        if not 0 <= self.label <= last:
            raise ValueError(f"label {brief(self.label)} is out of range: there are {last + 1} choices (0 to {last})")
        return self


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class _MessagesLine(_Strict):
    messages: list[_Message]

    @model_validator(mode="after")
    def _assistant_speaks(self) -> _MessagesLine:
        if not any(message.role == "assistant" and message.content for message in self.messages):
            raise ValueError("no message of the assistant, so there is nothing to learn")
        return self


class _TextLine(_Strict):
    text: _Text


class _PromptLine(_Strict):
    prompt: str


class _AskingLine(_Strict):
    messages: Annotated[list[_Message], Field(min_length=1)]

    @model_validator(mode="after")
    def _others_speak_last(self) -> _AskingLine:
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's, whose turn the model is to write")
        return self


Kinds = Mapping[str, type[_Strict]]  # of lines, by the key that tells them
LEARNED: Kinds = {"completion": _CompletionLine, "choices": _ChoicesLine, "messages": _MessagesLine, "text": _TextLine}
PROMPTS: Kinds = {"prompt": _PromptLine, "messages": _AskingLine}


@dataclass(frozen=True)
class Line:
    """A checked line: its kind, the parsed object, and where it stands."""

    kind: str
    record: dict[str, Any]
    where: str  # "file:line"


class BadLines:
    """Skips a file's bad lines as far as they are allowed, and counts them."""

    def __init__(self, allowed: int = 0) -> None:
        self.allowed, self.count, self.first = allowed, 0, ""  # `first`: what was wrong with the first of them

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Suppresses the DataError of one line, unless it is one too many."""
        try:
            yield
        except DataError as error:
            self.count += 1
            self.first = self.first or str(error)
            if self.count > self.allowed:
                before = f" (and {self.allowed} bad lines before it were skipped)" if self.allowed else ""
                raise DataError(f"{error}{before}") from error


def read_lines(path: str | os.PathLike, bad: BadLines | None = None, kinds: Kinds = LEARNED) -> list[Line]:
    """Reads and checks a JSONL file. Blank lines are skipped, and bad ones as far as `bad` allows. `kinds`: `LEARNED`,
    or `PROMPTS` for rows of a reward.

    Raises:
        DataError: the file cannot be read, holds no example, or a line is malformed (file, line number, reason).
    """
    path, bad = os.fspath(path), bad or BadLines()
    try:
        raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    first, _, rest = raw.lstrip().partition(b"\n")
    opens = first.rstrip()[-1:] in b"[{" or (first.rstrip()[-1:] in b",:" and rest.lstrip()[:1] != b"{")
    if first[:1] == b"[" or (first[:1] == b"{" and opens):
        what = "an array" if first[:1] == b"[" else "an object of several lines"
        raise DataError(f"{path}: JSONL was expected, an object on each line; the file begins with {what}")
    lines: list[Line] = []
    for number, content in enumerate(raw.splitlines(), start=1):
        if content.strip():
            with bad.skipped():
                line = read_line(content, f"{path}:{number}", kinds)
                kind = lines[0].kind if lines else line.kind
                if (line.kind == "choices") != (kind == "choices"):
                    begins = f"a file that begins with a {kind!r} line"
                    raise DataError(f"{line.where}: a {line.kind!r} line in {begins}")
                lines.append(line)
    if not lines:
        raise DataError(f"{path}: holds no examples")
    return lines


def read_line(content: bytes, where: str, known: Kinds = LEARNED) -> Line:
    """Checks one line of a file; `where` names file and line in errors.

    Raises:
        DataError: the line is malformed.
    """
    try:
        record = from_json(content)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {str(error).replace('line 1 column', 'column')}") from error
    kinds = [kind for kind in known if kind in record] if isinstance(record, dict) else []
    if len(kinds) != 1:
        found = f"both {kinds[0]!r} and {kinds[1]!r}" if kinds else "none of them"
        raise DataError(f"{where}: an object with one of {', '.join(map(repr, known))} was expected, it has {found}")
    try:
        known[kinds[0]].model_validate(record)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{where}: {place}{': ' if place else ''}{first_reason(error)}") from error
    return Line(kinds[0], record, where)
