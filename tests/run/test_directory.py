"""The directory of a run: one process at a time, and nothing of others is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import finetune, one_line, record, resume, steps_in, weights

from distzo2.errors import UsageError
from distzo2.run import preflight
from distzo2.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("own_directory")


def test_a_run_is_not_overwritten(files, capsys) -> None:
    Path("out").mkdir()
    Path("out/journal.jsonl").write_text("mine")
    assert finetune(files) == 2
    assert "already holds a run (journal.jsonl)" in one_line(capsys)
    assert Path("out/journal.jsonl").read_text() == "mine" and len(list(Path("out").iterdir())) == 1
    Path("file").write_text("")
    assert finetune(files, "--out=file") == 2
    assert "a directory was expected" in one_line(capsys)


def test_one_run_in_a_directory(files, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from_pretrained = preflight.from_pretrained
    seen = []

    def while_the_first_loads(*args, **kwargs):  # it has no journal yet
        monkeypatch.setattr(preflight, "from_pretrained", from_pretrained)
        seen.append(finetune(files))
        seen.append(one_line(capsys))
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(preflight, "from_pretrained", while_the_first_loads)
    assert finetune(files) == 0
    assert seen[0] == 2 and "out: already holds a run (run.json): --resume it" in seen[1]
    assert steps_in() == 4 and Path("out/checkpoint").is_dir()
    assert not Path("out/run.lock").exists()

    other = RunDirectory("out")
    assert other.check(resume=True)
    other.claim()
    assert resume("--steps=5") == 2
    assert "is using this directory" in one_line(capsys) and Path("out/run.lock").exists()
    other.withdraw()  # not a run that it began
    other.release()
    assert {path.name for path in Path("out").iterdir()} == {"journal.jsonl", "run.json", "metrics.jsonl", "checkpoint"}


def test_a_run_that_was_killed_before_its_journal_was_there_begins_again(files, capsys) -> None:
    assert finetune(files, "--steps=2") == 0
    began = record()
    for name in ("journal.jsonl", "metrics.jsonl"):
        Path("out", name).unlink()
    shutil.rmtree("out/checkpoint")
    capsys.readouterr()
    assert resume() == 2  # it had begun, and its journal is gone
    assert "the run has no journal" in one_line(capsys)
    Path("out/run.json").write_text(json.dumps({**began, "status": "starting"}))
    assert finetune(files) == 2
    assert "already holds a run (run.json): --resume it" in one_line(capsys)
    other = RunDirectory("out")
    assert not other.check(resume=True) and other.resumes
    other.claim()
    assert resume() == 2
    assert "is using this directory" in one_line(capsys)
    other.release()
    Path("out/.journal.jsonl.0a1b2c3d.tmp").write_text("what it was at")
    assert resume() == 0
    assert steps_in() == 2
    assert {path.name for path in Path("out").iterdir()} == {"journal.jsonl", "run.json", "metrics.jsonl", "checkpoint"}


def test_a_claim_looks_again_and_takes_over_from_the_dead() -> None:
    first, second = RunDirectory("a/b"), RunDirectory("a/b")
    second.withdraw()
    assert not Path("a").exists()
    first.claim()
    Path("a/b/journal.jsonl").write_text("mine")
    first.release()
    with pytest.raises(UsageError, match="already holds a run"):
        second.claim()
    second.withdraw()
    assert [path.name for path in Path("a/b").iterdir()] == ["journal.jsonl"]

    Path("c").mkdir()
    Path("c/run.lock").write_text("")  # of a process that was killed
    for path in ("c", "d/e"):
        run = RunDirectory(path)
        run.claim()
        run.withdraw()
    assert not list(Path("c").iterdir()) and not Path("d").exists()


def test_a_checkpoint_of_others_is_not_replaced(files, capsys) -> None:
    assert finetune(files, "--steps=2", "--save=none") == 0
    checkpoint = Path("out/checkpoint")
    checkpoint.mkdir()
    for name in ("model.safetensors", "adapter.safetensors"):
        (checkpoint / name).write_text("mine")
        assert resume("--steps=4", "--save=last") == 1
        assert f"out/checkpoint/{name}: not written by this run" in capsys.readouterr().err
        assert (checkpoint / name).read_text() == "mine" and steps_in() == 2  # refused before any step
        (checkpoint / name).unlink()
    assert resume("--steps=4", "--save=none") == 0


def test_other_files_in_a_checkpoint_stay(files) -> None:
    assert finetune(files, "--steps=2") == 0
    Path("out/checkpoint/NOTES.md").write_text("mine")
    Path("out/notes.tmp").write_text("mine too")
    before = weights("out/checkpoint")
    assert resume("--steps=3") == 0
    assert Path("out/checkpoint/NOTES.md").read_text() == "mine" and Path("out/notes.tmp").exists()
    assert any(not torch.equal(before[name], value) for name, value in weights("out/checkpoint").items())


@pytest.mark.parametrize("content", ["[" * 100_000, '{"options": {}}', '{"options": {"steps": 3}}', "{", "\x00"])
def test_a_damaged_record_is_refused(files, capsys, content) -> None:
    assert finetune(files, "--steps=2", "--save=none") == 0
    Path("out/run.json").write_text(content)
    capsys.readouterr()
    assert resume() in (1, 2)
    assert one_line(capsys)
    assert steps_in() == 2
