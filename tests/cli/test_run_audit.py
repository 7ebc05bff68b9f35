"""journal verify --run: what a run leaves is in order, and whatever is not is named; its checkpoint above all."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from audited_runs import copied, flip, make_run, verify
from cli_runs import make_files
from safetensors.torch import load_file, save_file

from distzo2.cli.journal_audit import audit_journal
from distzo2.cli.main import main
from distzo2.cli.run_audit import audit_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("runs")
    files = make_files(root)
    best = [f"--eval={files.eval}", "--eval-every=2", "--score=loss", "--save=best"]
    return SimpleNamespace(files=files, best=best, run=make_run(files, root / "run", *best))


@pytest.fixture
def run(made: SimpleNamespace, tmp_path: Path) -> Path:
    return copied(made.run, tmp_path / "run")


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def change_record(run: Path, **values: Any) -> None:
    """None takes an entry away."""
    kept = {name: value for name, value in {**record(run), **values}.items() if value is not None}
    (run / "run.json").write_text(json.dumps(kept))


# In order


@pytest.mark.parametrize(
    "options", [[], ["--weights=disk", "--dtype=bfloat16"], ["--journal-chain", "--weights=device"]]
)
@pytest.mark.parametrize("save", ["last", "best", "none"])
def test_whole_runs_are_in_order(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], save: str
) -> None:
    run = make_run(made.files, tmp_path / "run", *made.best, f"--save={save}", *options)
    found = verify(capsys, run)
    assert found.findings == found.notes == []
    step = record(run).get("checkpoint_step")
    assert step == {"last": 8, "best": record(run)["best_step"], "none": None}[save]
    others = "every line, the base checkpoint, the training file, run.json, metrics.jsonl"
    checkpoint = f", 3 snapshots and the checkpoint of step {step}" if step is not None else " and 3 snapshots"
    assert ": in order: 8 steps" in found.last and found.last.endswith(f"; checked {others}{checkpoint}")
    # It goes on, with another checkpoint in the end.
    assert main(["finetune", "--resume", f"--out={run}", "--quiet", "--steps=10", "--save=last"]) == 0
    found = verify(capsys, run)
    assert found.findings == found.notes == [] and found.last.endswith("the checkpoint of step 10")


def test_a_branch_is_in_order(made: SimpleNamespace, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = run.with_name("new")
    options = ["--at-step=4", "--steps=6", "--lr=2e-3", "--quiet", f"--out={new}"]
    assert main(["finetune", f"--branch-from={run}", *options]) == 0
    found = verify(capsys, new)
    assert found.findings == found.notes == []
    shutil.copytree(run / "snapshots", new / "snapshots", dirs_exist_ok=True)
    found = verify(capsys, new).findings  # a branch's journal has another header
    assert len(found) == 3 and all("are not those it holds" in text or "holds 6 steps" in text for text in found)


def test_an_interrupted_run_is_in_order(made: SimpleNamespace, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped before its end, or killed while it saved: what is not there yet is no damage."""
    shutil.rmtree(run / "checkpoint")
    before = {"checkpoint_step": None, "checkpoint_files": None, "checkpoint_contents": None, "steps_done": None}
    change_record(run, status="running", **before)
    assert verify(capsys, run).findings == []
    change_record(run, saving_step=8)
    found = verify(capsys, run)
    assert found.findings == [] and "was not written to its end" in found.notes[0]
    (run / "checkpoint").mkdir()  # partly removed, say
    found = verify(capsys, run)
    assert found.findings == [] and "may not be written, or not be removed, to its end" in found.notes[0]
    assert main(["finetune", "--resume", f"--out={run}", "--quiet"]) == 0
    assert verify(capsys, run).findings == []


def test_what_was_left_is_told_as_what_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = [
        ".distzo2-checkpoint-0123456789abcdef", ".journal.jsonl.1234.tmp", "metrics.tmp", "run.json.tmp",
        "weights-1234.dzo2",
    ]  # fmt: skip
    for name in (*left, "report.png", "trace.json", "run.lock", "mine\x1b[2J\r\n.txt"):
        (run / name).touch()
    found = verify(capsys, run)
    assert found.findings == []
    told = dict(text.removeprefix(f"note: {run}/").split(": ", 1) for text in found.notes)
    assert [name for name, text in told.items() if "left by a killed run" in text] == left
    assert told["mine\\x1b[2J .txt"] == "not a file that a run leaves, and not looked at" and len(told) == 6
    with open(run / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        notes = verify(capsys, run).notes
        assert len(notes) == 2 and "is at work there" in notes[0]


# The checkpoint


def test_every_changed_file_of_the_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoint"
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert record(run)["checkpoint_contents"].keys() == set(names)
    for name in names:
        flip(checkpoint / name, (checkpoint / name).stat().st_size - 1)
        found = verify(capsys, run).findings
        assert len(found) == 1 and found[0].startswith(f"{checkpoint / name}: CRC-32 "), found
        flip(checkpoint / name, (checkpoint / name).stat().st_size - 1)
    assert verify(capsys, run).findings == []
    for name in names:
        with open(checkpoint / name, "ab") as file:
            file.write(b" ")
    found = verify(capsys, run).findings
    named = [text.split(": ")[0] for text in found if "were written" in text]
    assert named == [str(checkpoint / name) for name in names] and len(found) == len(names) + 1
    assert found[-1].startswith(f"{checkpoint}/model.safetensors: too long")


def test_files_that_came_and_went_are_named(
    made: SimpleNamespace, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoint"
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "config.json").rename(run / "config.json")
    (checkpoint / "config.json").symlink_to(run / "config.json")
    (checkpoint / "deep\x1b").mkdir()
    (checkpoint / "deep\x1b" / "pipe").touch()
    found = verify(capsys, run).findings
    told = [text.removeprefix(str(checkpoint)) for text in found]
    assert told == [
        "/config.json: a link, where a file was expected",
        ": 'tokenizer.json' is not there any more",
        "/deep\\x1b: not written by this run",
        "/deep\\x1b/pipe: not written by this run",
    ]
    (checkpoint / "deep\x1b" / "pipe").unlink()
    os.mkfifo(checkpoint / "deep\x1b" / "pipe")
    assert "neither a file nor a directory" in verify(capsys, run).findings[1]
    shutil.rmtree(checkpoint)
    shutil.copytree(made.run / "checkpoint", checkpoint)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to(made.run / "checkpoint" / "model.safetensors")
    (found,) = verify(capsys, run).findings  # and it is not read
    assert found == f"{checkpoint / 'model.safetensors'}: a link, where a file was expected"
    shutil.rmtree(checkpoint)
    (found,) = verify(capsys, run).findings
    step = record(run)["checkpoint_step"]
    assert found == f"{checkpoint}: not there, and run.json says that it was written at step {step}"
    checkpoint.symlink_to(run)
    (found,) = verify(capsys, run).findings
    assert "a link, where the checkpoint's directory was expected" in found


def test_the_checkpoint_of_another_step_is_named(
    made: SimpleNamespace, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the same tensors: only what was noted when it was written can tell."""
    step = record(run)["checkpoint_step"]
    shutil.rmtree(run / "checkpoint")
    assert main(["replay", str(run), f"--to-step={step - 1}", "-o", str(run / "checkpoint"), "--quiet"]) == 0
    (found,) = verify(capsys, run).findings
    assert found.startswith(f"{run}/checkpoint/model.safetensors: CRC-32 ")
    # The right one, made again, is the one that was written.
    shutil.rmtree(run / "checkpoint")
    assert main(["replay", str(run), f"--to-step={step}", "-o", str(run / "checkpoint"), "--quiet"]) == 0
    assert verify(capsys, run).findings == []


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "is in none of its files": lambda tensors: tensors.pop("model.norm.weight"),
    "is not in a checkpoint of this run": lambda tensors: tensors.update(other=torch.zeros(2)),
    "is float16 [32], that of the run is float32 [32]": lambda tensors: tensors.update(
        {"model.norm.weight": tensors["model.norm.weight"].half()}
    ),
    "is float32 [2, 16], that of the run is float32 [32]": lambda tensors: tensors.update(
        {"model.norm.weight": tensors["model.norm.weight"].reshape(2, 16)}
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_run_that_noted_no_contents_is_told_so(run: Path, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    change_record(run, checkpoint_contents=None)
    found = verify(capsys, run)
    step = record(run)["checkpoint_step"]
    assert found.findings == [] and f"replay RUN --to-step {step} --out DIR" in found.notes[0]
    assert found.last.endswith(f"and the tensors' names, dtypes and shapes of the checkpoint of step {step}")
    path = run / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    CHANGES[reason](tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (found,) = verify(capsys, run).findings
    assert reason in found
    os.truncate(path, path.stat().st_size - 1)
    (found,) = verify(capsys, run).findings
    assert "truncated" in found
    path.unlink()
    found = verify(capsys, run).findings
    assert len(found) == 2 and "expected model.safetensors or" in found[1]


def test_a_checkpoint_of_the_wrong_step_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = record(run)["checkpoint_step"]
    for change, reason in (
        ({"checkpoint_step": 9}, "the checkpoint is of step 9, and 8 steps are in the journal"),
        (
            {"best_step": step + 1},
            f"--save best is a checkpoint of step {step + 1}, and one of step {step} was written",
        ),
        ({"checkpoint_step": "\x1b"}, "checkpoint_step is '\\x1b', where a number of steps was expected"),
        ({"checkpoint_step": None}, "and none was written"),
        ({"checkpoint_contents": {"config.json": 3}}, "checkpoint_contents is not what a run writes there"),
        ({"checkpoint_contents": {"../x": {"num_bytes": 1, "crc32": "0" * 8}}}, "'../x' is not there any more"),
    ):
        before = (run / "run.json").read_bytes()
        change_record(run, **change)
        found = verify(capsys, run).findings
        assert any(reason in text for text in found), (change, found)
        (run / "run.json").write_bytes(before)
    assert verify(capsys, run).findings == []


# From anyone


def test_no_link_and_no_device_is_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "run.json"):
        (run / name).rename(tmp_path / name)
        os.mkfifo(run / name)
        assert f"{run / name}: neither a file nor a directory" in verify(capsys, run).findings[0]
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / name)
        assert f"{run / name}: a link" in verify(capsys, run).findings[0]
        (run / name).unlink()
        shutil.copy(tmp_path / name, run / name)
    (run / "snapshots").rename(tmp_path / "elsewhere")
    (run / "snapshots").symlink_to(tmp_path / "elsewhere")  # as on a larger disk
    seen = verify(capsys, run)
    assert seen.findings == [] and any("snapshots: a link, which is not followed" in note for note in seen.notes)
    (run / "metrics.jsonl").unlink()
    assert verify(capsys, run).findings == [f"{run / 'metrics.jsonl'}: not there"]
    (run / "journal.jsonl").unlink()
    os.mkfifo(run / "journal.jsonl")
    assert main(["journal", "verify", str(run), "--run"]) == 1
    error = capsys.readouterr().err
    assert "neither a file nor a directory" in error and error.count("\n") == 1


def test_a_directory_that_cannot_be_read_hides_nothing_else(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listdir, refused = os.listdir, ["run", "snapshots"]

    def refusing(path: Any) -> list[str]:
        if Path(path).name in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    flip(run / "checkpoint" / "config.json", 1)
    found = verify(capsys, run).findings
    assert found[:2] == [f"{run}: Permission denied", f"{run / 'snapshots'}: Permission denied"]
    assert found[2].startswith(f"{run / 'checkpoint' / 'config.json'}: CRC-32") and len(found) == 3
    refused.append("checkpoint")
    assert verify(capsys, run).findings[2] == f"{run / 'checkpoint'}: Permission denied"


ODD = [None, True, -1, 1 << 70, 1e300, "\x1b\ud800\0", [], [[]], {}, {"\x1b": {"x": []}}]


def test_whatever_the_record_says_the_look_ends_in_lines(run: Path) -> None:
    whole = record(run)
    audit = audit_journal(run / "journal.jsonl")
    names = [*whole, "saving_step", "journal_chain", "launch"]
    for name, value in itertools.product(names, ODD):
        (run / "run.json").write_text(json.dumps(whole | {name: value}))
        report = audit_run(audit)
        assert all(isinstance(text, str) for text in report.findings)
    for name, value in itertools.product(("model", "train", "seed", "save"), ODD):
        (run / "run.json").write_text(json.dumps(whole | {"options": whole["options"] | {name: value}}))
        assert bool(audit_run(audit).findings) == (name != "save")
    (run / "run.json").write_text(json.dumps(whole))
    pieces = {"a": ["float32", [1], [[0, [1], 0, [1], 0, [1]]]], "b": ["float8_e5m2", [1], [[0, [1], 0, [1], 0, [1]]]]}
    maps = [{"params": value, "tensors": []} for value in (*ODD, pieces)] + [{"params": pieces, "tensors": {}}]
    for value in (*ODD, *maps):
        audit.header["map"] = value
        found = audit_run(audit).findings
        assert all(
            "which tensors it must hold" in text or "is not in a checkpoint of this run" in text for text in found
        )
        assert found


def test_a_run_without_a_readable_header_is_looked_at(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "journal.jsonl", 5)
    flip(run / "checkpoint" / "config.json", 1)
    found = verify(capsys, run).findings
    assert "line 1: not the header" in found[0] and found[-1].startswith(f"{run / 'checkpoint' / 'config.json'}: CRC")


def test_a_large_training_file_is_not_read_at_once(run: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    large.touch()
    os.truncate(large, 64 << 20)
    change_record(run, options=record(run)["options"] | {"train": str(large)})
    audit = audit_journal(run / "journal.jsonl")
    tracemalloc.start()
    try:
        (found,) = audit_run(audit).findings
        assert found == f"{large}: not the training file that the run began with"
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
