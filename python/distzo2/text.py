"""Values in messages: what a file of unknown origin holds is shown short, on one line, and escaped."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_BRIEF = 80  # characters of a value in a message


def brief(value: Any) -> str:
    """The beginning of a value's repr, on one line."""
    text = reprlib.repr(value) if isinstance(value, (dict, list, tuple, int)) else repr(value)
    return text if len(text) <= MAX_BRIEF else text[:MAX_BRIEF] + "..."


def printable(text: str) -> str:
    """`text` for a terminal: each character that is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
