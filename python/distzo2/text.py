"""Values in messages: what a file of unknown origin holds is shown short, on one line, and escaped."""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_BRIEF = 80  # characters of a value in a message


def brief(value: Any) -> str:
    """The beginning of a value's repr, on one line."""
    text = reprlib.repr(value) if isinstance(value, (dict, list, tuple, int)) else repr(value)
    return text if len(text) <= MAX_BRIEF else text[:MAX_BRIEF] + "..."


def printable(text: str) -> str:
    """`text` for a terminal: each character that is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def gib(num_bytes: float) -> str:
    """A number of bytes with a unit from KiB to GiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.2f} {unit}" if num_bytes < 100 * scale else f"{num_bytes / scale:.0f} {unit}"
    return f"{num_bytes:.0f} bytes"


def first_reason(error: ValidationError) -> str:
    """What pydantic found wrong first, in the words of our messages: "expected a number greater than 0"."""
    text = error.errors(include_url=False, include_context=False)[0]["msg"].removeprefix("Value error, ")
    text = re.sub(r"^\w+ should (be|have) ", "expected ", text).replace("Field required", "missing")
    return re.sub("expected (?=greater|less)", "expected a number ", text)


def dtype_name(dtype: object) -> str:
    """A torch dtype as options, journals and files spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
