"""The errors that a user can do something about. The command line prints them as one line and exits with 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DistZO2Error(Exception):
    """Base of every expected error: bad input, too little memory, a device that is not there. Messages are one line."""


class UsageError(DistZO2Error):
    """The options do not go together, or one is out of range. The command line exits with 2."""


class DataError(DistZO2Error):
    """A data file cannot be used; the message names file, line number and reason."""


class RewardError(DistZO2Error):
    """A reward gives no numbers for a micro-batch. `reason` says why in general, `text` what happened."""

    RAISED, SLOW, NO_NUMBERS = "the reward failed", "the reward took too long", "the reward gave no numbers"

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason, self.text = reason, text


def one_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or the error's type, and its notes; shortened."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return "; ".join([first, *getattr(error, "__notes__", ())])[:1000]


class MissingPackageError(DistZO2Error, ImportError):
    """A package that is optional is asked for, and is not installed, or is too old."""


@contextmanager
def refusing(what: str, kind: type[DistZO2Error] = DistZO2Error) -> Iterator[None]:
    """Turns whatever a library raises about what a user brings into an error of this kind: `what`, and the reason."""
    try:
        yield
    except DistZO2Error:
        raise
    except Exception as error:
        raise kind(f"{what}: {one_line(error)}") from error


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turns what a library raises about `what`, such as a user's model or tokenizer, into a DistZO2Error."""
    try:
        yield
    except (DistZO2Error, OSError, MemoryError):
        raise
    except Exception as error:
        raise DistZO2Error(f"{what}: {type(error).__name__}: {one_line(error)}") from error
