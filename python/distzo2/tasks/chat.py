"""Conversations as text: how a chat template writes them, and what it may not depend on."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from transformers.utils import chat_template_utils

from distzo2.errors import DataError, DistZO2Error, UsageError, refusing
from distzo2.tasks.lines import Line

_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(")  # what jinja has that differs from one rendering to the next

_NEXT = {"role": "assistant", "content": "."}  # stands for a turn that is to be written

logger = logging.getLogger("distzo2")


class Chat:
    """Writes the conversations of lines with a tokenizer's chat template, or as `Role: text` where it has none."""

    def __init__(self, tokenizer: Any, *, clock: datetime | None = None, sanitized: bool = False) -> None:
        """
        Args:
            tokenizer: whose `apply_chat_template` is called.
            clock: the time that templates see; None: now.
            sanitized: whether templates are rendered to tokens, and special tokens that messages spell are text.

        Raises:
            UsageError: this transformers cannot do that.
        """
        self.tokenizer, self.clock = tokenizer, clock or datetime.now()
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._write = partial(tokenizer.apply_chat_template, tokenize=False)
        if sanitized and self.templated:
            if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
                raise UsageError("--split-special-tokens: chat templates need a newer transformers for that")
            self._write = partial(tokenizer.apply_chat_template, return_dict=False, sanitize_control_tokens=True)
        self._nothing: Any = [] if sanitized else ""
        self._marks = [t for t in (*tokenizer.get_added_vocab(), tokenizer.eos_token) if t and not t.isspace()]
        self._examined = False

    def turns(self, line: Line) -> list[Any]:
        """For each turn of the assistant what comes up to it and what comes with it: text, or tokens (`sanitized`).

        Raises:
            DataError: the template refuses the messages.
            DistZO2Error: what it writes is left to chance.
        """
        messages = line.record["messages"]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"]]
        if not self.templated:
            texts, so_far = [], ""
            for i, message in enumerate(messages[: turns[-1] + 1]):
                head = f"{message['role'].capitalize()}:"
                if i in turns:
                    texts += [so_far + head, f"{so_far}{head} {message['content']}"]
                so_far += f"{head} {message['content']}\n"
            return texts
        what = f"{line.where}: the chat template refuses these messages"  # such as for roles that it does not take
        with refusing(what, DataError), _time_is(self.clock) as asked:
            fronts = [self._write(messages[:i], add_generation_prompt=True) if i else self._nothing for i in turns]
            pairs = [(front, self._write(messages[: i + 1])) for front, i in zip(fronts, turns, strict=True)]
            if not self._examined:
                self._examine(pairs[-1][1] != self._write(messages[: turns[-1] + 1]), bool(asked))
        # Some templates rewrite earlier turns once later ones follow: then only the last turn is learned.
        whole = pairs[-1][1]
        kept = [(a, b) for a, b in pairs[:-1] if whole[: len(b)] == b and b[: len(a)] == a]
        return [each for pair in [*kept, pairs[-1]] for each in pair]

    def prompt(self, line: Line) -> Any:
        """What comes up to the assistant's next turn: text, or tokens (`sanitized`). Raises as `turns` does."""
        return self.turns(Line(line.kind, {"messages": [*line.record["messages"], _NEXT]}, line.where))[-2]

    def ends_itself(self, line: Line) -> bool:
        """Whether the template writes a special token behind the last turn of the assistant."""
        if not self.templated:
            return False
        messages = line.record["messages"]
        turn = next(i for i, m in reversed([*enumerate(messages)]) if m["role"] == "assistant" and m["content"])
        with _time_is(self.clock):
            text = self.tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        behind = text.rpartition(messages[turn]["content"].strip())[2]
        return any(mark in behind for mark in self._marks)

    def _examine(self, differs: bool, tells_time: bool) -> None:
        """Refuses, or says, what the template depends on: `differs` from one rendering to the next, or the time."""
        self._examined = True
        template = self.tokenizer.chat_template
        templates = template.values() if isinstance(template, dict) else [template]
        if differs or any(_CHANCE.search(text) for text in templates):
            raise DistZO2Error("the chat template leaves what it writes to chance: a run could not be resumed")
        if tells_time:
            time = self.clock.isoformat(" ", "minutes")
            logger.warning("the chat template asks for the time: in this run it is %s to the end, resumed or not", time)


@contextmanager
def _time_is(clock: datetime) -> Iterator[list[datetime]]:
    """Makes transformers' `strftime_now` tell templates this time; yields a list that grows as they ask."""
    before, asked = chat_template_utils.datetime, []
    chat_template_utils.datetime = SimpleNamespace(now=lambda *_: asked.append(clock) or clock)
    try:
        yield asked
    finally:
        chat_template_utils.datetime = before
