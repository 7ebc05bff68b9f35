"""`distzo2 finetune` on ranks: files, arguments, the run of one rank, and what ranks in kept processes run."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cli_runs import weights
from tiny_text import choice_lines, make_checkpoint, write_jsonl

from distzo2.cli.main import main
from distzo2.record.journal import read_journal
from distzo2.run.metrics import read_metrics


def make_files(root: Path) -> SimpleNamespace:
    return SimpleNamespace(
        root=root,
        model=make_checkpoint(root / "model", layers=4),
        train=write_jsonl(root / "train.jsonl", choice_lines(20)),
        eval=write_jsonl(root / "eval.jsonl", choice_lines(11)),
    )


def arguments(files: SimpleNamespace, steps: int, *more: str) -> list[str]:
    return [
        "finetune", f"--model={files.model}", f"--train={files.train}", f"--steps={steps}", "--batch-size=6",
        "--micro-batches=3", "--lr=1e-3", "--quiet", "--threads=1", "--weights=disk", "--out=out", *more,
    ]  # fmt: skip


def run_alone(directory: Path, arguments: list[str]) -> Path:
    """The run of one rank."""
    before, threads = os.getcwd(), torch.get_num_threads()
    directory.mkdir()
    os.chdir(directory)
    try:
        assert main(arguments) == 0
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    return directory / "out"


def assert_same_weights(checkpoint: Path, expected: Path) -> None:
    ours, theirs = weights(checkpoint), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8)), name


def assert_same_run(run: Path, expected: Path, num_steps: int) -> None:
    ours, theirs = (read_journal(path / "journal.jsonl").entries for path in (run, expected))
    assert len(ours) == num_steps
    assert [(e.update, e.losses, e.tokens) for e in ours] == [(e.update, e.losses, e.tokens) for e in theirs]
    evals = [
        [(line["step"], line["loss"], line["accuracy"], line["tokens"]) for line in read_metrics(path / "metrics.jsonl")
         if line["kind"] == "eval"]
        for path in (run, expected)
    ]  # fmt: skip
    assert evals[0] == evals[1]
    assert_same_weights(run / "checkpoint", expected / "checkpoint")


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
    """On rank 1, a step of a run fails, or the weight file of rank 0 is not seen."""
    from distzo2.optim.zosgd import ZOSGD
    from distzo2.record.weight_file import WeightFile

    step, path_of = ZOSGD.step, WeightFile.path_of
    if kind == "blind" and rank == 1:
        WeightFile.path_of = lambda self, rank: Path("unseen/weights.dzo2").absolute()

    def spoilt(self, closures, **options):
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
