"""What the ranks of test_torchrun run: the command line, in processes that are kept."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from typing import Any

from distzo2.cli.main import main


def command(rank: int, world_size: int, directory: Path, arguments: list[str], trouble: str = "") -> dict[str, Any]:
    """`distzo2 ARGUMENTS` in `directory`, as torchrun would start it: status and what was printed."""
    environment = {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(directory)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _trouble(trouble, rank):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


@contextlib.contextmanager
def _trouble(kind: str, rank: int):
    """On rank 1, step 2 of a run fails, or the file system of rank 0 is not seen."""
    from distzo2.optim.zosgd import ZOSGD
    from distzo2.record import snapshot_resume

    step, find_same = ZOSGD.step, snapshot_resume.find_same
    if kind == "blind" and rank == 1:
        snapshot_resume.find_same = lambda directory, *rest: find_same("/nowhere", *rest)

    def spoilt(self, closures, **options):
        if self.step_count == 2 and rank == 1 and kind == "full":
            raise OSError(28, "No space left on device", "somewhere")
        if self.step_count == 2 and rank == 1 and kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, closures, **options)

    ZOSGD.step = spoilt
    try:
        yield
    finally:
        ZOSGD.step, snapshot_resume.find_same = step, find_same
