"""What is refused before the first step: one line, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_runs import finetune, one_line, resume, steps_in, weights
from tiny_text import choice_lines, write_jsonl

from distzo2.checkpoint.writing import DISK_SLACK_BYTES
from distzo2.cli.main import main
from distzo2.run import preflight
from distzo2.weights import residency
from distzo2_core import BlockFile

pytestmark = pytest.mark.usefixtures("own_directory")


@pytest.mark.parametrize(
    ("names", "damage", "reason"),
    [
        ("*", None, "model: "),
        ("model.safetensors", lambda content: b"\xff" * 16 + content[16:], "model.safetensors"),
        ("tokenizer*", None, "no tokenizer"),
        ("model.safetensors", None, "directory with model.safetensors"),
        ("config.json", lambda content: b'{"model_type": "nobody"}', "not a configuration"),
    ],
)
def test_a_bad_checkpoint(files, tmp_path: Path, capsys, names: str, damage, reason: str) -> None:
    shutil.copytree(files.model, tmp_path / "model")
    for file in (tmp_path / "model").glob(names):
        file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
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
def test_bad_data(files, capsys, line: str, reason: str, which: str) -> None:
    path = write_jsonl(Path("bad.jsonl"), [choice_lines(1)[0], line])
    assert finetune(files, f"--{which}={path}") == 1
    assert reason in one_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--train=nowhere.jsonl"], 1, "nowhere.jsonl: No such file"),
        (["--parallel=4"], 2, "--parallel 4: expected a mesh (such as pert=2,data=2)"),
        (["--device=tpu"], 2, "device tpu: expected cpu"),
        (["--trace=."], 2, "--trace .: expected a file"),
        (["--objective=choices", "--train=text.jsonl"], 2, "text.jsonl: objective 'choices' needs"),
        (["--resume"], 2, "holds no run"),
        (["--config=none.toml"], 2, "none.toml"),
        (["--objective=lm", "--max-length=4"], 1, "the limit is 4"),
        pytest.param(
            ["--device=cuda"],
            1,
            "device cuda cannot be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_options(files, capsys, options: list[str], status: int, reason: str) -> None:
    write_jsonl(Path("text.jsonl"), ['{"text": "a cat"}'])
    assert finetune(files, *options) == status
    assert reason in one_line(capsys)
    assert [path.name for path in Path().iterdir()] == ["text.jsonl"]


def test_too_little_room(files, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert finetune(files, "--weights=disk") == 1
    assert "are free on its disk" in one_line(capsys)
    monkeypatch.setattr(residency.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 << 20))
    assert finetune(files) == 1  # refused before the first step, not when the checkpoint is to be written
    assert "to spare 64.00 MiB" in one_line(capsys)
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    assert finetune(files, f"--out={Path.cwd() / 'out'}") == 1
    assert "of memory" in one_line(capsys)
    assert not Path("out").exists()


def test_a_missing_directory_is_called_that(files, capsys) -> None:
    for command, option in (("eval", f"--eval={files.eval}"), ("generate", "--prompt=a")):
        assert main([command, "--model=nowhere", option]) == 1
        assert "nowhere: expected a checkpoint directory" in one_line(capsys)


def test_fewer_steps_than_were_made(files, capsys) -> None:
    assert finetune(files, "--save=none") == 0
    record = Path("out/run.json").read_bytes()
    capsys.readouterr()
    assert resume("--steps=3") == 2
    assert "--steps 3: out has made 4 already; distzo2 replay out --to-step 3" in one_line(capsys)
    assert Path("out/run.json").read_bytes() == record
    for options in (["--at-step=4"], []):
        assert main(["finetune", "--branch-from=out", "--out=new", "--steps=3", *options]) == 2
        assert "--steps 3: the branch takes over 4 steps" in one_line(capsys)
        assert not Path("new").exists()


def test_resuming_takes_the_room_that_the_run_had(files, capsys, monkeypatch) -> None:
    assert finetune(files, "--weights=disk", "--steps=1") == 0
    size = sum(value.nbytes for value in weights("out/checkpoint").values())
    BlockFile("out/weights.dzo2", [4096], durable=True).close()  # of a killed process

    def disk_usage(path):  # no room for another block file
        return SimpleNamespace(free=DISK_SLACK_BYTES + size // 2)

    monkeypatch.setattr(residency, "shutil", SimpleNamespace(disk_usage=disk_usage))
    assert resume("--steps=2") == 0
    assert steps_in() == 2 and not list(Path("out").glob("weights*"))
    shutil.rmtree("out/checkpoint")
    capsys.readouterr()
    assert resume("--steps=3") == 1
    assert "are free on its disk" in capsys.readouterr().err
    assert steps_in() == 2 and not Path("out/run.lock").exists()


def test_a_relative_directory_of_weights_stays_where_it_was(files, monkeypatch) -> None:
    Path("scratch").mkdir()
    assert finetune(files, "--steps=2", "--save=none", "--weights=disk", "--weights-dir=scratch") == 0
    out = Path("out").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["finetune", "--resume", f"--out={out}", "--quiet", "--steps=3"]) == 0
    assert not list(Path().iterdir())
    shutil.rmtree(out)
