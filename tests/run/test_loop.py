"""The loop of a run: rates, the best step, and how it ends."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_runs import assert_same_bits, finetune, one_line, record, resume, weights
from safetensors.torch import load_file, save_file

from distzo2.cli.main import main
from distzo2.record.journal import Journal, JournalError, read_journal
from distzo2.record.writer import JournalWriter
from distzo2.run import loop
from distzo2.run.directory import RunDirectory
from distzo2.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("own_directory")


@contextmanager
def failing_updates(monkeypatch, error: BaseException, fails: Callable[[dict], bool]) -> Iterator[None]:
    """Updates of run.json for whose values `fails` is true raise `error`."""
    update = RunDirectory.update

    def failing(self, **values):
        if fails(values):
            raise error
        update(self, **values)

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "update", failing)
        yield


def test_the_best_step_is_known_after_a_kill_between_metrics_and_record(files, capsys, monkeypatch) -> None:
    options = [f"--eval={files.eval}", "--eval-every=1", "--score=loss", "--save=best", "--steps=4"]
    assert finetune(files, *options, "--out=whole") == 0
    best = record("whole")["best_step"]
    evals = [line for line in read_metrics("whole/metrics.jsonl") if line["kind"] == "eval"]
    assert best == record("whole")["checkpoint_step"] == min(evals, key=lambda line: line["loss"])["step"]
    at_best = lambda values: values.get("best_step") == best and "status" not in values  # noqa: E731
    with failing_updates(monkeypatch, SystemExit("killed"), at_best), pytest.raises(SystemExit, match="killed"):
        finetune(files, *options)
    assert best > 0 and record().get("best_step") != best
    assert resume() == 0
    keys = ("best_step", "best", "checkpoint_step")
    assert [record()[key] for key in keys] == [record("whole")[key] for key in keys]


def test_a_best_step_of_evaluations_that_count_no_more_is_forgotten(files, capsys) -> None:
    options = [f"--eval={files.eval}", "--eval-every=1", "--score=loss", "--save=best"]
    assert finetune(files, *options, "--steps=2") == 0
    assert record()["best_step"] is not None
    assert resume("--eval=", "--eval-every=0", "--save=last", "--steps=3") == 0
    assert record()["best_step"] is record()["best"] is None and record()["checkpoint_step"] == 3


def test_a_branch_without_a_finite_score_ends_in_one_line_or_well(files, capsys) -> None:
    """Its first evaluation is not of step 0."""
    assert finetune(files, "--steps=1", "--max-coef=none", "--lr=1e38", "--save=none", "--out=parent") == 0
    branch = ["finetune", "--branch-from=parent", "--at-step=1", "--out=out", "--steps=2", f"--eval={files.eval}"]
    capsys.readouterr()
    status = main([*branch, "--score=loss", "--lr=1e-3", "--quiet", "--no-check", "--save=best"])
    text = capsys.readouterr().err
    assert "Traceback" not in text and (status == 0 or text.count("\n") == 1), text
    assert record()["best_step"] == 1


def test_what_an_update_is_made_of(files) -> None:
    """Momentum, a percentile and a batch for each probe: resumed to the same bits."""
    made = ["--momentum=0.6", "--clip-percentile=50", "--probe-batches=own", "--probes=2", "--save=last"]
    assert finetune(files, *made, "--steps=20") == 0
    assert finetune(files, *made, "--steps=18", "--out=cut") == 0
    assert resume("--steps=20", out="cut") == 0
    assert_same_bits("out/checkpoint", "cut/checkpoint")
    ours, theirs = (read_journal(Path(out, "journal.jsonl")).entries for out in ("out", "cut"))
    assert [(e.update, e.losses) for e in ours] == [(e.update, e.losses) for e in theirs]
    assert [len(e.losses) for e in ours] == [4] * 20 and len(ours[-1].update.terms) == 2 * 10
    lines = read_metrics("cut/metrics.jsonl")
    assert [line["coefs"] for line in lines if line["kind"] == "step"] == [e.coefs for e in ours]


def test_a_loss_that_is_not_finite(files, tmp_path: Path, capsys) -> None:
    model = shutil.copytree(files.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert finetune(files, f"--model={model}", "--max-skipped=2", "--no-check") == 1
    assert "non-finite loss" in one_line(capsys)
    entries = read_journal("out/journal.jsonl").entries
    assert [e.skipped for e in entries] == ["non-finite loss"] * 2
    assert all(not e.update.terms for e in entries)
    lines = read_metrics("out/metrics.jsonl")
    assert [line["loss"] for line in lines] == [None, None] and lines[0]["skipped"] == "non-finite loss"
    assert record()["status"].startswith("stopped: ")


@pytest.mark.parametrize(
    ("steps", "durable", "error"),
    [
        (3, 3, lambda path: OSError(errno.EIO, os.strerror(errno.EIO), path)),  # at the end
        (100_000, 2, lambda path: JournalError(f"{path}: {os.strerror(errno.EIO)}")),
    ],
)
def test_a_run_whose_journal_fails_has_not_finished(files, capsys, monkeypatch, steps, durable, error) -> None:
    sync = JournalWriter._sync

    def fails(self):
        if self._written >= durable:
            raise error(self.path)
        sync(self)

    monkeypatch.setattr(JournalWriter, "_sync", fails)
    assert finetune(files, f"--steps={steps}", "--save=none", "--fsync-every=100" if steps == 3 else "--quiet") == 1
    assert "journal.jsonl" in one_line(capsys)
    if steps == 3:
        assert record()["status"] != "finished"
    else:
        assert record()["status"].startswith("stopped: ") and record()["steps_done"] < steps


def test_a_run_whose_end_cannot_be_written_resumes(files, capsys, monkeypatch) -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO), "run.json.tmp")
    with failing_updates(monkeypatch, error, lambda values: values.get("status") == "finished"):
        assert finetune(files, "--steps=2") == 1
    assert "run.json.tmp: Input/output error" in one_line(capsys)
    assert record()["status"] == "running"
    before = weights("out/checkpoint")
    assert resume() == 0
    done = record()
    assert (done["status"], done["steps_done"], done["checkpoint_step"]) == ("finished", 2, 2)
    after = weights("out/checkpoint")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_no_checkpoint_is_ahead_of_the_durable_journal(files, monkeypatch) -> None:
    """Steps that a power cut may take back are synced before a checkpoint holds them."""
    save, durable = loop.save_pretrained, []

    def saves(model, path, **options):
        durable.append(made[-1].durable)
        return save(model, path, **options)

    made: list[Journal] = []
    create = Journal.create

    def creates(*args, **kwargs):
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Journal, "create", creates)
    monkeypatch.setattr(loop, "save_pretrained", saves)
    assert finetune(files, "--steps=3", "--fsync-every=1000000") == 0
    assert durable == [3]
