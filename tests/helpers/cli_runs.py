"""What the tests of the command line share: a small checkpoint with data, and runs of the program."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from same_bits import assert_same_tensors
from tiny_text import choice_lines, make_checkpoint, write_jsonl

from distzo2.cli.main import main

STEPS = ["--steps=4", "--batch-size=4", "--lr=1e-3", "--quiet"]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint and data that no test changes."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test in an empty directory."""
    monkeypatch.chdir(tmp_path)


def make_files(root: Path) -> SimpleNamespace:
    return SimpleNamespace(
        model=make_checkpoint(root / "model", layers=5),
        train=write_jsonl(root / "train.jsonl", choice_lines(20)),
        eval=write_jsonl(root / "eval.jsonl", choice_lines(6)),
    )


def finetune(files: SimpleNamespace, *options: str) -> int:
    return main(["finetune", f"--model={files.model}", f"--train={files.train}", "--out=out", *STEPS, *options])


def environment() -> dict[str, str]:
    return dict(os.environ)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("distzo2") and text.count("\n") == 1, text
    return text


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def assert_same_bits(first: str | Path, second: str | Path) -> None:
    """Of two checkpoints' directories."""
    assert_same_tensors(weights(first), weights(second))
