"""The command line: bad input is one line, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runs import environment, finetune, make_files, one_line, weights
from safetensors.torch import load_file, save_file
from tiny_text import choice_lines, write_jsonl

from distzo2 import files as files_module
from distzo2.checkpoint.writing import DISK_SLACK_BYTES
from distzo2.cli.main import main
from distzo2.errors import UsageError
from distzo2.record.journal import Journal, read_journal
from distzo2.run import loop, preflight, train
from distzo2.run.directory import RunDirectory
from distzo2.run.metrics import read_metrics


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_files(tmp_path_factory.mktemp("cli"))


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def _without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "model: "),
        (_truncated, "model.safetensors"),
        (_corrupt, "model.safetensors"),
        (_without_tokenizer, "no tokenizer"),
        (_without_weights, "expected model.safetensors"),
        (lambda model: (model / "config.json").write_text('{"model_type": "nobody"}'), "not a configuration"),
    ],
)
def test_a_bad_checkpoint(files: SimpleNamespace, tmp_path: Path, capsys, damage, reason: str) -> None:
    shutil.copytree(files.model, tmp_path / "model")
    damage(tmp_path / "model")
    assert finetune(files, f"--model={tmp_path / 'model'}") == 1
    assert reason in one_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "bad.jsonl:2: not valid JSON"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 2}', "bad.jsonl:2: label 2 is out of range"),
        (json.dumps({"prompt": "cat " * 80, "choices": ["b", "c"], "label": 0}), "bad.jsonl:2: "),
    ],
)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_bad_data(files: SimpleNamespace, capsys, line: str, reason: str, which: str) -> None:
    path = write_jsonl(Path("bad.jsonl"), [choice_lines(1)[0], line])
    assert finetune(files, f"--{which}={path}") == 1
    assert reason in one_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--train=nowhere.jsonl"], 1, "nowhere.jsonl: No such file"),
        (["--device=tpu"], 2, "--device tpu"),
        (["--device=cpux"], 2, "--device cpux"),
        (["--device=cpu:3"], 2, "--device cpu:3: expected cpu"),
        (["--threads=1000000"], 2, "--threads 1000000: at most"),
        (["--trace=."], 2, "--trace .: a file was expected"),
        (["--objective=choices", "--train=text.jsonl"], 2, "text.jsonl: objective 'choices' needs"),
        (["--micro-batches=3"], 2, "does not divide"),
        (["--estimator=fzoo"], 2, "needs --probes 2"),
        (["--warmup=9"], 2, "--warmup 9"),
        (["--save=best"], 2, "needs --eval"),
        (["--resume"], 2, "holds no run"),
        (["--config=none.toml"], 2, "none.toml"),
        (["--objective=lm", "--max-length=4"], 1, "the limit is 4"),
    ],
)
def test_bad_options(files: SimpleNamespace, capsys, options: list[str], status: int, reason: str) -> None:
    write_jsonl(Path("text.jsonl"), ['{"text": "a cat"}'])
    assert finetune(files, *options) == status
    assert reason in one_line(capsys)
    assert [path.name for path in Path().iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize(
    "option",
    [
        *(
            "--lr=-1",
            "--eps=0",
            "--seed=-1",
            "--train=",
            "--out=",
            "--steps=0",
            "--max-coef=0.5",
            "--nonsense",
            "--lr=x",
        ),
        *(
            "--lr=1e60",
            "--lr=1e-60",
            "--eps=1e39",
            "--steps=4294967296",
            "--memory-budget=infGiB",
            "--keep=9",
            "--journal-chain",
        ),
    ],
)
def test_bad_values(files: SimpleNamespace, capsys, option: str) -> None:
    with pytest.raises(SystemExit) as error:
        finetune(files, option)
    assert error.value.code == 2
    assert option.split("=")[0] in one_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(files: SimpleNamespace, capsys) -> None:
    assert finetune(files, "--device=cuda") == 1
    assert "--device cuda" in one_line(capsys)
    assert not Path("out").exists()


def test_too_little_room(files: SimpleNamespace, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert finetune(files, "--weights=disk") == 1
    assert "are free on its disk" in one_line(capsys)
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 << 20))
    assert finetune(files) == 1  # told before the first step, not when the checkpoint is to be written
    assert "to spare 64.00 MiB" in one_line(capsys)
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    assert finetune(files, f"--out={Path.cwd() / 'out'}") == 1
    assert "of memory" in one_line(capsys)
    assert not Path("out").exists()


def test_a_missing_directory_is_called_that(files: SimpleNamespace, capsys) -> None:
    for command in ("eval", "generate"):
        option = f"--eval={files.eval}" if command == "eval" else "--prompt=a"
        assert main([command, "--model=nowhere", option]) == 1
        assert "nowhere: expected a checkpoint directory" in one_line(capsys)
    assert main(["eval", f"--model={files.model}", f"--eval={files.eval}", "--threads=99999"]) == 2
    assert "--threads 99999: at most" in one_line(capsys)
    assert main(["finetune", "--resume"]) == 2
    assert "--resume needs --out" in one_line(capsys)


def test_fewer_steps_than_were_made(files: SimpleNamespace, capsys) -> None:
    assert finetune(files, "--save=none") == 0
    record = Path("out/run.json").read_bytes()
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out=out", "--steps=3"]) == 2
    assert "--steps 3: out has made 4 already; distzo2 replay out --to-step 3" in one_line(capsys)
    assert Path("out/run.json").read_bytes() == record
    for options in (["--at-step=4"], []):
        assert main(["finetune", "--branch-from=out", "--out=new", "--steps=3", *options]) == 2
        assert "--steps 3: the branch takes over 4 steps" in one_line(capsys)
        assert not Path("new").exists()


def test_where_a_replay_cannot_write(files: SimpleNamespace, capsys) -> None:
    assert finetune(files, "--save=none") == 0
    capsys.readouterr()
    Path("file").write_text("")
    assert main(["replay", "out", "--out=file"]) == 2
    assert "--out file: a directory was expected" in one_line(capsys)
    assert main(["replay", f"--base={files.model}", "--journal=out", "--out=again", "--quiet"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["again", "file", "out"]


def test_a_run_is_not_overwritten(files: SimpleNamespace, capsys) -> None:
    Path("out").mkdir()
    Path("out/journal.jsonl").write_text("mine")
    assert finetune(files) == 2
    assert "already holds a run (journal.jsonl)" in one_line(capsys)
    assert Path("out/journal.jsonl").read_text() == "mine" and len(list(Path("out").iterdir())) == 1
    Path("file").write_text("")
    assert finetune(files, "--out=file") == 2
    assert "a directory was expected" in one_line(capsys)


def test_one_run_in_a_directory(files: SimpleNamespace, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from_pretrained = train.from_pretrained
    seen = []

    def while_the_first_loads(*args, **kwargs):  # it has no journal yet
        monkeypatch.setattr(train, "from_pretrained", from_pretrained)
        seen.append(finetune(files))
        seen.append(one_line(capsys))
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(train, "from_pretrained", while_the_first_loads)
    assert finetune(files) == 0
    assert seen[0] == 2 and "out: another distzo2 process is using this directory" in seen[1]
    assert len(read_journal("out/journal.jsonl").entries) == 4 and Path("out/checkpoint").is_dir()
    assert not Path("out/run.lock").exists()

    other = RunDirectory.resumed("out")
    other.claim()
    assert main(["finetune", "--resume", "--out=out", "--steps=5"]) == 2
    assert "is using this directory" in one_line(capsys) and Path("out/run.lock").exists()
    other.withdraw()  # not a run that it began
    other.release()
    assert {path.name for path in Path("out").iterdir()} == {"journal.jsonl", "run.json", "metrics.jsonl", "checkpoint"}


def test_a_run_that_was_killed_before_its_journal_was_there_begins_again(files: SimpleNamespace, capsys) -> None:
    assert finetune(files, "--steps=2") == 0
    record = json.loads(Path("out/run.json").read_text())
    for name in ("journal.jsonl", "metrics.jsonl"):
        Path("out", name).unlink()
    shutil.rmtree("out/checkpoint")
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out=out"]) == 2  # it had begun, and its journal is gone
    assert "the run has no journal" in one_line(capsys)
    Path("out/run.json").write_text(json.dumps({**record, "status": "starting"}))
    assert finetune(files) == 2
    assert "already holds a run (run.json): --resume it" in one_line(capsys)
    other = RunDirectory.unbegun("out")
    other.claim()
    assert main(["finetune", "--resume", "--out=out"]) == 2
    assert "is using this directory" in one_line(capsys)
    other.release()
    for leftover in (".journal.jsonl.0a1b2c3d.tmp", "weights-killed.dzo2"):
        Path("out", leftover).write_text("what it was at")
    assert main(["finetune", "--resume", "--out=out"]) == 0
    assert len(read_journal("out/journal.jsonl").entries) == 2
    assert {path.name for path in Path("out").iterdir()} == {"journal.jsonl", "run.json", "metrics.jsonl", "checkpoint"}


def test_a_claim_looks_again_and_takes_over_from_the_dead() -> None:
    first, second = RunDirectory.new("a/b"), RunDirectory.new("a/b")
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
    third = RunDirectory.new("c")
    third.claim()
    third.withdraw()
    assert not list(Path("c").iterdir())
    fourth = RunDirectory.new("d/e")
    fourth.claim()
    fourth.withdraw()
    assert not Path("d").exists()


def test_a_journal_of_another_program_is_left_alone(files: SimpleNamespace, capsys, monkeypatch) -> None:
    from_pretrained = train.from_pretrained

    def meanwhile(*args, **kwargs):
        Path("out/journal.jsonl").write_text("mine")
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(train, "from_pretrained", meanwhile)
    assert finetune(files) == 1
    assert "exists" in one_line(capsys)
    assert [path.name for path in Path("out").iterdir()] == ["journal.jsonl"]
    assert Path("out/journal.jsonl").read_text() == "mine"


def test_resuming_takes_the_room_that_the_run_had(files: SimpleNamespace, capsys, monkeypatch) -> None:
    assert finetune(files, "--weights=disk", "--steps=1") == 0
    size = sum(value.nbytes for value in weights("out/checkpoint").values())
    leftover = Path("out/weights-killed.dzo2")
    leftover.write_bytes(b"x" * size)

    def disk_usage(path):  # room for the block file, not for a second checkpoint
        return SimpleNamespace(free=0 if leftover.exists() else DISK_SLACK_BYTES + size * 3 // 2)

    monkeypatch.setattr(files_module, "shutil", SimpleNamespace(disk_usage=disk_usage))
    assert main(["finetune", "--resume", "--out=out", "--steps=2"]) == 0
    assert not leftover.exists() and len(read_journal("out/journal.jsonl").entries) == 2
    shutil.rmtree("out/checkpoint")
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out=out", "--steps=3"]) == 1
    assert "are free on its disk" in capsys.readouterr().err
    assert len(read_journal("out/journal.jsonl").entries) == 2 and not Path("out/run.lock").exists()


def test_a_run_whose_end_cannot_be_written_is_gone_on_with(files: SimpleNamespace, capsys, monkeypatch) -> None:
    update = RunDirectory.update

    def fails_at_the_end(self, **values):
        if values.get("status") == "finished":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path / "run.json.tmp"))
        update(self, **values)

    monkeypatch.setattr(RunDirectory, "update", fails_at_the_end)
    assert finetune(files, "--steps=2") == 1
    assert "run.json.tmp: Input/output error" in one_line(capsys)
    assert json.loads(Path("out/run.json").read_text())["status"] == "running"
    before = weights("out/checkpoint")
    monkeypatch.setattr(RunDirectory, "update", update)
    assert main(["finetune", "--resume", "--out=out", "--quiet"]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert (record["status"], record["steps_done"], record["checkpoint_step"]) == ("finished", 2, 2)
    after = weights("out/checkpoint")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_no_checkpoint_is_ahead_of_the_durable_journal(files: SimpleNamespace, monkeypatch) -> None:
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


def test_a_loss_that_is_not_finite(files: SimpleNamespace, tmp_path: Path, capsys) -> None:
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
    assert json.loads(Path("out/run.json").read_text())["status"].startswith("stopped: ")


def test_streams_that_are_not_as_usual(files: SimpleNamespace) -> None:
    """Standard input closed or no text, and an output whose encoding lacks most characters."""
    command = [sys.executable, "-m", "distzo2", "generate", f"--model={files.model}", "--max-new-tokens=5"]
    latin = {**environment(), "PYTHONIOENCODING": "ascii"}

    def generate(*options: str, **more: Any) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *options], capture_output=True, check=False, **more)

    closed = generate(env=environment(), stdin=None, preexec_fn=lambda: os.close(0))
    assert closed.returncode == 2 and b"standard input is closed" in closed.stderr
    no_text = generate(env={**environment(), "PYTHONIOENCODING": "utf-8:strict"}, input=b"cat \xff")
    assert no_text.returncode == 1
    assert no_text.stderr == b"distzo2: error: standard input: not utf-8: invalid start byte at byte 4\n"
    usual, escaped = generate("--prompt=the cat", env=environment()), generate("--prompt=the cat", env=latin)
    assert (usual.returncode, escaped.returncode) == (0, 0)
    assert not usual.stdout.isascii()
    assert escaped.stdout == usual.stdout.decode().encode("ascii", "backslashreplace")
