"""What a run does with files of its directory that others put there, changed or took away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_runs import finetune, make_files, one_line
from tiny_text import choice_lines, write_jsonl

from distzo2.cli.main import main
from distzo2.record.journal import JournalError, read_journal
from distzo2.record.line import encode_line
from distzo2.record.writer import JournalWriter
from distzo2.run.directory import RunDirectory
from distzo2.run.metrics import MAX_LINE_BYTES, read_metrics

RESUME = ["finetune", "--resume", "--out=out", "--quiet"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record() -> dict:
    return json.loads(Path("out/run.json").read_text())


def test_a_checkpoint_of_somebody_else_is_not_replaced(files, capsys) -> None:
    assert finetune(files, "--steps=2", "--save=none") == 0
    Path("out/checkpoint").mkdir()
    Path("out/checkpoint/precious.bin").write_text("mine")
    capsys.readouterr()
    assert main([*RESUME, "--steps=4", "--save=last"]) == 1
    assert "out/checkpoint/model.safetensors: not written by this run" in one_line(capsys)
    assert Path("out/checkpoint/precious.bin").read_text() == "mine"
    assert len(read_journal("out/journal.jsonl").entries) == 2  # told before any step
    assert main([*RESUME, "--steps=4", "--save=none"]) == 0
    assert Path("out/checkpoint/precious.bin").exists() and record()["steps_done"] == 4


def test_files_that_are_put_into_a_checkpoint_are_not_lost(files, capsys) -> None:
    assert finetune(files, "--steps=2", "--save=last") == 0
    Path("out/checkpoint/NOTES.md").write_text("mine")
    Path("out/notes.tmp").write_text("mine too")
    capsys.readouterr()
    assert main([*RESUME, "--steps=3"]) == 1
    assert "out/checkpoint/NOTES.md: not written by this run" in one_line(capsys)
    os.rename("out/checkpoint/NOTES.md", "NOTES.md")
    assert main([*RESUME, "--steps=3"]) == 0
    assert record()["checkpoint_step"] == 3 and Path("out/notes.tmp").read_text() == "mine too"


def test_a_link_in_the_place_of_the_checkpoint_is_left_alone(files, capsys) -> None:
    assert finetune(files, "--steps=2", "--save=last") == 0
    os.rename("out/checkpoint", "elsewhere")
    os.symlink(Path("elsewhere").absolute(), "out/checkpoint")
    capsys.readouterr()
    assert main([*RESUME, "--steps=3"]) == 1
    assert "out/checkpoint: the checkpoint's directory was expected" in one_line(capsys)
    assert len(list(Path("elsewhere").iterdir())) > 2 and len(read_journal("out/journal.jsonl").entries) == 2


def test_metrics_that_are_taken_away_end_the_run(files, capsys, monkeypatch) -> None:
    from distzo2.run import loop as train_loop

    evaluate = train_loop.evaluate_examples

    def removes(*args, **kwargs):
        Path("out/metrics.jsonl").unlink()
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train_loop, "evaluate_examples", removes)
    assert finetune(files, f"--eval={files.eval}", "--steps=2") == 1
    assert "metrics.jsonl: No such file" in one_line(capsys)


def test_the_best_step_is_known_after_a_kill_between_metrics_and_record(files, capsys, monkeypatch) -> None:
    options = [f"--eval={files.eval}", "--eval-every=1", "--score=loss", "--save=best", "--steps=4"]
    assert finetune(files, *options, "--out=whole") == 0
    best = json.loads(Path("whole/run.json").read_text())["best_step"]
    update = RunDirectory.update

    class Killed(BaseException):
        pass

    def killed(self, **values):
        if values.get("best_step") == best and "status" not in values:
            raise Killed
        update(self, **values)

    monkeypatch.setattr(RunDirectory, "update", killed)
    with pytest.raises(Killed):
        finetune(files, *options)
    monkeypatch.setattr(RunDirectory, "update", update)
    assert best > 0 and record().get("best_step") != best
    assert main(RESUME) == 0
    whole = json.loads(Path("whole/run.json").read_text())
    assert {k: record()[k] for k in ("best_step", "best", "checkpoint_step")} == {
        k: whole[k] for k in ("best_step", "best", "checkpoint_step")
    }


def test_a_best_step_of_evaluations_that_count_no_more_is_forgotten(files, capsys) -> None:
    options = [f"--eval={files.eval}", "--eval-every=1", "--score=loss", "--save=best"]
    assert finetune(files, *options, "--steps=2") == 0
    assert record()["best_step"] is not None
    assert main([*RESUME, "--eval=", "--eval-every=0", "--save=last", "--steps=3"]) == 0
    assert record()["best_step"] is record()["best"] is None and record()["checkpoint_step"] == 3
    assert main(["journal", "verify", "out", "--run"]) == 0


def test_a_run_of_a_file_of_options_is_resumed_by_it(files) -> None:
    assert finetune(files, "--steps=2", "--seed=5", "--lr=1e-4") == 0
    os.rename("out", "elsewhere")
    Path("run.toml").write_text('out = "elsewhere"\nsteps = 3\n')
    assert main(["finetune", "--resume", "--config=run.toml", "--quiet"]) == 0
    entries = read_journal("elsewhere/journal.jsonl").entries
    assert len(entries) == 3 and json.loads(Path("elsewhere/run.json").read_text())["options"]["seed"] == 5


def test_a_look_at_the_lock_keeps_nobody_out(files) -> None:
    """Who asks whether a directory is in use has its lock for an instant."""
    assert finetune(files, "--steps=1", "--save=none") == 0
    lock = Path("out/run.lock")
    lock.touch()  # of a run that was killed
    held = os.open(lock, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, (held,)).start()
    run = RunDirectory.resumed("out")
    run.claim()
    run.release()


def test_a_run_has_not_finished_before_its_journal_is_durable(files, capsys, monkeypatch) -> None:
    sync = JournalWriter._sync

    def fails_at_the_end(self):
        if self._written >= 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.path)
        sync(self)

    monkeypatch.setattr(JournalWriter, "_sync", fails_at_the_end)
    assert finetune(files, "--steps=3", "--save=none", "--fsync-every=100") == 1
    assert "journal.jsonl" in one_line(capsys)
    assert record()["status"] != "finished"


def test_a_journal_that_fails_is_what_stopped_the_run(files, capsys, monkeypatch) -> None:
    sync = JournalWriter._sync

    def fails_in_between(self):
        if self._written >= 2:
            raise JournalError(f"{self.path}: {os.strerror(errno.EIO)}")
        sync(self)

    monkeypatch.setattr(JournalWriter, "_sync", fails_in_between)
    assert finetune(files, "--steps=100000", "--save=none") == 1
    assert "journal.jsonl" in one_line(capsys)
    assert record()["status"].startswith("stopped: ") and record()["steps_done"] < 100000


def test_a_branch_without_a_finite_score_ends_in_one_line_or_well(files, capsys) -> None:
    """Its first evaluation is not of step 0."""
    assert finetune(files, "--steps=1", "--max-coef=none", "--lr=1e38", "--save=none", "--out=parent") == 0
    branch = ["finetune", "--branch-from=parent", "--at-step=1", "--out=out", "--steps=2", f"--eval={files.eval}"]
    capsys.readouterr()
    status = main([*branch, "--score=loss", "--lr=1e-3", "--quiet", "--no-check", "--save=best"])
    text = capsys.readouterr().err
    assert "Traceback" not in text and (status == 0 or text.count("\n") == 1), text
    assert record()["best_step"] == 1


def damaged(change) -> None:
    path = Path("out/metrics.jsonl")
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(change(line) if b'"eval","step":2' in line else line for line in lines))


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"loss":1', b'"loss":0'),
        lambda line: line[:9] + b"\xff" + line[10:],
        lambda line: encode_line({"kind": "eval", "step": 2, "loss": 0.0}, MAX_LINE_BYTES),
        lambda line: b'{"kind":"eval","step":2,"loss":0.0,"accuracy":1.0,"examples":6,"tokens":6,"data":null}\n',
        lambda line: b"[" * 100_000 + b"\n",
    ],
)
def test_a_damaged_evaluation_is_told_and_does_not_count(files, capsys, change) -> None:
    options = [f"--eval={files.eval}", "--eval-every=2", "--score=loss", "--save=best"]
    assert finetune(files, *options, "--steps=4") == 0
    before = Path("out/metrics.jsonl").read_bytes()
    damaged(change)
    assert Path("out/metrics.jsonl").read_bytes() != before
    capsys.readouterr()
    assert main(["journal", "verify", "out", "--run"]) == 1
    assert "metrics.jsonl: line 4 is left out: " in capsys.readouterr().out
    assert main([*RESUME, "--steps=6"]) == 0
    out = capsys.readouterr().out
    assert "metrics.jsonl: line 4 is left out: " in out
    evals = [line["step"] for line in read_metrics("out/metrics.jsonl") if line["kind"] == "eval"]
    assert evals == [0, 4, 6] and record()["best_step"] != 2
    assert main(["journal", "verify", "out", "--run"]) == 0


@pytest.mark.parametrize("content", ["[" * 100_000, '{"options": {}}', '{"options": {"steps": 3}}', "{", "\x00"])
def test_a_damaged_record_is_refused(files, capsys, content) -> None:
    assert finetune(files, "--steps=2", "--save=none") == 0
    Path("out/run.json").write_text(content)
    capsys.readouterr()
    assert main(RESUME) in (1, 2)
    assert one_line(capsys)
    assert len(read_journal("out/journal.jsonl").entries) == 2


def test_evaluations_on_other_examples_do_not_count(files, capsys, tmp_path) -> None:
    options = [f"--eval={files.eval}", "--eval-every=2", "--score=loss", "--save=best"]
    assert finetune(files, *options, "--steps=4") == 0
    other = write_jsonl(tmp_path / "other.jsonl", choice_lines(9))
    capsys.readouterr()
    assert main([*RESUME, "--steps=6", f"--eval={other}"]) == 0
    assert "evaluations on other examples, of steps 0, 2, 4, do not count" in capsys.readouterr().out
    assert record()["best_step"] == record()["checkpoint_step"] in (4, 6)
    evals = [(line["step"], line["examples"]) for line in read_metrics("out/metrics.jsonl") if line["kind"] == "eval"]
    assert [n for _, n in evals[:3]] == [6, 6, 6] and evals[-1] == (6, 9)


def test_a_relative_directory_of_weights_stays_where_it_was(files, monkeypatch) -> None:
    Path("scratch").mkdir()
    assert finetune(files, "--steps=2", "--save=none", "--weights=disk", "--weights-dir=scratch") == 0
    out = Path("out").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["finetune", "--resume", f"--out={out}", "--quiet", "--steps=3"]) == 0
    assert not list(Path().iterdir())
    shutil.rmtree(out)
