"""A trainer's run goes on from its journal: after a kill, from a checkpoint before, or as `zo_existing` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forked
import hf_cases
import pytest
from hf_cases import trained
from same_bits import assert_same_tensors

import distzo2
from distzo2.record.journal import read_journal

EVENTS = ("loss", "eval_loss", "learning_rate", "step", "epoch")


def history(trainer: Any) -> list[dict]:
    return [{k: row[k] for k in EVENTS if k in row} for row in trainer.state.log_history if "train_loss" not in row]


def steps(directory: Path) -> list:
    return [(e.step, e.update, e.losses) for e in read_journal(directory / "journal.jsonl").entries]


def killed(directory: Path, **fields: Any) -> int | None:
    """The exit code of a process that trains."""
    context = forked.context("hf_cases", "distzo2.integrations.trl")
    child = context.Process(target=trained, args=(directory,), kwargs=fields, daemon=True)
    child.start()
    child.join(120)
    return child.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = trained(tmp_path_factory.mktemp("whole"))
    assert trainer.state.global_step == 5  # early stopping ended it
    return trainer


@pytest.mark.parametrize(
    "fields", [{}, {"save_strategy": "steps", "save_steps": 2, "eval_steps": 1}], ids=["journal alone", "checkpoints"]
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, whole: Any, fields: dict) -> None:
    assert killed(tmp_path, kill_at=3, **fields) == -9
    assert len(steps(tmp_path)) in (2, 3)  # the last line is written beside the run
    trainer = trained(tmp_path, True, **fields)
    assert_same_tensors(trainer.model.state_dict(), whole.model.state_dict())
    assert trainer.state.global_step == whole.state.global_step
    assert trainer.state.best_metric == whole.state.best_metric
    assert history(trainer)[-2:] == history(whole)[-2:]
    assert steps(tmp_path) == steps(Path(whole.args.output_dir))


EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}  # of 3 steps
BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "max_steps": 4}


@pytest.mark.parametrize(("fields", "kills"), [(EPOCHS, (3, 6)), (BEST, (2, 4))], ids=["epochs", "best"])
def test_an_evaluation_that_a_kill_cut_off_is_made(tmp_path: Path, fields: dict, kills: tuple[int, int]) -> None:
    """The best weights are the same ones, also in a run that has made its last step."""
    fields = fields | {"load_best_model_at_end": True}
    whole = trained(tmp_path / "whole", **fields)
    for at in (*kills, kills[-1]):
        directory = tmp_path / str(at)
        if not directory.exists():
            assert killed(directory, kill_at=at, kill_evaluating=True, **fields) == -9
        trainer = trained(directory, True, **fields)
        assert_same_tensors(trainer.model.state_dict(), whole.model.state_dict())
        assert trainer.state.best_metric == whole.state.best_metric
        assert trainer.state.best_global_step == whole.state.best_global_step < whole.state.global_step
        evaluations = [[row for row in history(each) if "eval_loss" in row] for each in (trainer, whole)]
        assert evaluations[0] == evaluations[1]


def test_a_second_run_in_a_directory_is_a_choice(tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(distzo2.DistZO2Error, match=r'no run to resume; zo_existing="resume" begins one'):
        trained(tmp_path, True)
    first = trained(tmp_path, True, max_steps=2, save_strategy="steps", save_steps=1, zo_existing="resume")
    with pytest.raises(distzo2.DistZO2Error, match=r'holds a run: .*zo_existing="resume".*zo_existing="overwrite"'):
        trained(tmp_path, max_steps=2)
    with pytest.raises(distzo2.DistZO2Error, match=r"trained already"):
        first.train()
    again = trained(tmp_path, max_steps=2, zo_existing="resume")  # nothing is left to do
    assert_same_tensors(again.model.state_dict(), first.model.state_dict())
    before = steps(tmp_path)
    assert len(before) == again.state.global_step == 2

    caplog.clear()
    from_one = trained(tmp_path, str(tmp_path / "checkpoint-1"), max_steps=3, learning_rate=0.5)
    assert "learning_rate=0.5 has no effect: the run keeps the 1 it began with" in caplog.text
    assert steps(tmp_path)[:1] == before[:1] and len(steps(tmp_path)) == 3
    assert len(read_journal(tmp_path / "journal-1.jsonl").entries) == 2
    assert from_one.state.global_step == 3
    with pytest.raises(distzo2.DistZO2Error, match=r"at step 2.*of another run"):
        (tmp_path / "journal.jsonl").unlink()
        (tmp_path / "journal-1.jsonl").rename(tmp_path / "journal.jsonl")
        read = (tmp_path / "journal.jsonl").read_text().splitlines(True)
        (tmp_path / "journal.jsonl").write_text("".join(read[:2]))
        trained(tmp_path, str(tmp_path / "checkpoint-2"))
    trained(tmp_path, zo_existing="overwrite", max_steps=1)
    assert len(steps(tmp_path)) == 1 and not list(tmp_path.glob("checkpoint-*"))


def test_another_model_cannot_resume_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, max_steps=1)
    monkeypatch.setattr(hf_cases, "LLAMA", None)
    monkeypatch.setitem(
        hf_cases.KINDS, "llama", (*hf_cases.KINDS["llama"][:2], hf_cases.KINDS["llama"][2] | {"initializer_range": 0.5})
    )
    with pytest.raises(distzo2.DistZO2Error):
        trained(tmp_path, True, max_steps=2)


def test_without_a_journal_a_run_resumes_from_the_weights(tmp_path: Path) -> None:
    options = {"zo_journal": False, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "half", **options | {"max_steps": 4})
    resumed = trained(tmp_path / "half", str(tmp_path / "half/checkpoint-2"), **options)
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert not (tmp_path / "half/journal.jsonl").exists()
