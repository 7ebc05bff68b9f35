"""`distzo2 finetune` on ranks: arguments, the run of one rank, and what ranks in kept processes run."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

from distzo2.cli.main import main


def arguments(files: SimpleNamespace, steps: int, *more: str) -> list[str]:
    return [
        "finetune", f"--model={files.model}", f"--train={files.train}", f"--steps={steps}", "--batch-size=6",
        "--micro-batches=3", "--lr=1e-3", "--quiet", "--threads=1", "--weights=disk", "--out=out", *more,
    ]  # fmt: skip


def run_alone(directory: Path, arguments: list[str]) -> Path:
    """The run of one rank."""
    directory.mkdir()
    with contextlib.chdir(directory):
        assert main(arguments) == 0
    return directory / "out"


def command(rank: int, world_size: int, directory: Path, arguments: list[str], trouble: str = "") -> dict[str, Any]:
    """`distzo2 ARGUMENTS` in `directory`, as torchrun would start it: status and what was printed."""
    _as_rank(rank, world_size)
    os.chdir(directory)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _trouble(trouble, rank):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def run_example(rank: int, world_size: int, path: Path) -> int:
    """`main()` of an example, as torchrun would start it."""
    _as_rank(rank, world_size)
    return run_path(str(path))["main"]()


def _as_rank(rank: int, world_size: int) -> None:
    environment = {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})


@contextlib.contextmanager
def _trouble(kind: str, rank: int):
    """On rank 1, a step of a run fails, or the weight file of rank 0 is not seen; or all ranks are killed at once."""
    from distzo2.optim.zosgd import ZOSGD
    from distzo2.record.weight_file import WeightFile

    step, path_of = ZOSGD.step, WeightFile.path_of
    if kind == "blind" and rank == 1:
        WeightFile.path_of = lambda self, rank: Path("unseen/weights.dzo2").absolute()

    def spoilt(self, closures, **options):
        if self.step_count == 4 and kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step_count == {"full": 2, "full at step 30": 30}.get(kind) and rank == 1:
            raise OSError(28, "No space left on device", "somewhere")
        if self.step_count == 2 and rank == 1 and kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, closures, **options)

    ZOSGD.step = spoilt
    try:
        yield
    finally:
        ZOSGD.step, WeightFile.path_of = step, path_of
