"""How a command ends: SIGTERM as Ctrl-C, an expected error as one line, and the exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distzo2.errors import DistZO2Error, UsageError
from distzo2.text import printable

INTERRUPTED = 130
TERMINATED = 143


def end_with(error: BaseException, terminated: bool) -> int:
    """Reports what ended a command; returns the exit status."""
    from distzo2.parallel import group as parallel
    from distzo2.run import launch

    error = launch.first_cause(error, terminated)
    interrupted = isinstance(error, KeyboardInterrupt)
    if not interrupted and os.environ.get("DISTZO2_TRACEBACK"):
        raise error
    text = " ".join(text_of(error).split()) or ("interrupted" if interrupted else type(error).__name__)
    if not interrupted and not _expected(error):
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"unexpected {type(error).__name__} at {place.filename}:{place.lineno}: {text} "
            "(DISTZO2_TRACEBACK=1 shows what led to it)"
        )
    text = printable(text)

    def show(text: str) -> None:
        print(f"distzo2: {'' if interrupted else 'error: '}{text}", file=sys.stderr, flush=True)

    launch.report(error, text, show)
    parallel.shutdown(error)
    if interrupted:
        return TERMINATED if terminated else INTERRUPTED
    return 2 if isinstance(error, UsageError) else 1


def text_of(error: BaseException) -> str:
    """The message of an error; of a system error, the file and the reason without the number."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _expected(error: Exception) -> bool:
    """Whether the cause of an error lies outside the program, so that a traceback would help nobody."""
    if isinstance(error, DistZO2Error | OSError | MemoryError | UnicodeDecodeError):
        return True
    import torch

    from distzo2_core import BackendError

    return isinstance(error, BackendError | torch.OutOfMemoryError)


@contextmanager
def terminated_as_interrupted() -> Iterator[list[int]]:
    """Makes SIGTERM end a run as Ctrl-C does, at a point where the step in flight is whole or dropped. The list is
    empty until it comes.

    A process that was started to ignore Ctrl-C, as with nohup, continues to ignore it.
    """
    came: list[int] = []

    def terminate(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        signal.raise_signal(signal.SIGINT)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt

    handlers = {signal.SIGTERM: terminate}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        handlers[signal.SIGINT] = interrupt
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
