"""Runs of the command line, and scripts, in processes that can be killed: forked from a server that has imported
everything."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import forked


@dataclass(frozen=True)
class Ended:
    """How a run ended: `killed` by us, or with a status; and what it said on both of its streams."""

    killed: bool
    status: int | None
    text: str
    seconds: float


def run(
    directory: Path,
    arguments: list[str] | str,
    kill_after: float | None = None,
    once: Callable[[], bool] = lambda: True,
    limit: float = 300.0,
    signum: int = signal.SIGKILL,
) -> Ended:
    """`distzo2 ARGUMENTS`, or a script, in `directory`, killed (or sent `signum`) so many seconds after `once` became
    true, unless it ends before."""
    log = directory / "log"
    process = forked.context().Process(target=_serve, args=(str(directory), arguments, str(log)), daemon=True)
    start = time.monotonic()
    process.start()
    try:
        while kill_after is not None and process.exitcode is None and not once():
            assert time.monotonic() - start < limit, log.read_text()
            time.sleep(0.001)
        process.join(limit if kill_after is None else kill_after)
        alive = process.exitcode is None
        if alive and kill_after is None:
            raise AssertionError(f"{arguments} has not ended after {limit} s: {log.read_text()}")
        if alive:
            with suppress(ProcessLookupError):  # it ends just now
                os.kill(process.pid, signum)
            process.join(limit)
    finally:
        if process.exitcode is None:
            process.kill()
            process.join()
    seconds = time.monotonic() - start
    text = log.read_text() if log.exists() else ""
    return Ended(process.exitcode == -signal.SIGKILL, process.exitcode, text, seconds)


def _serve(directory: str, arguments: list[str] | str, log: str) -> None:
    from distzo2.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the test run may ignore it
    os.chdir(directory)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    status = 0
    if isinstance(arguments, str):
        exec(compile(textwrap.dedent(arguments), "<script>", "exec"), {"__name__": "__main__"})
    else:
        status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
