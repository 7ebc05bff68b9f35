"""What the tests of the command line share: a small checkpoint with data, and runs of the program."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from same_bits import assert_same_tensors
from tiny_text import choice_lines, make_checkpoint, write_jsonl

from distzo2.cli.main import main
from distzo2.record.journal import read_journal

STEPS = ["--steps=4", "--batch-size=4", "--lr=1e-3", "--quiet"]


def make_files(root: Path, layers: int = 5) -> SimpleNamespace:
    return SimpleNamespace(
        model=make_checkpoint(root / "model", layers=layers),
        train=write_jsonl(root / "train.jsonl", choice_lines(20)),
        eval=write_jsonl(root / "eval.jsonl", choice_lines(6)),
    )


def finetune(files: SimpleNamespace, *options: str) -> int:
    return main(["finetune", f"--model={files.model}", f"--train={files.train}", "--out=out", *STEPS, *options])


def resume(*options: str, out: str = "out") -> int:
    return main(["finetune", "--resume", f"--out={out}", "--quiet", *options])


def record(out: str = "out") -> dict[str, Any]:
    return json.loads(Path(out, "run.json").read_text())


def steps_in(out: str = "out") -> int:
    return len(read_journal(Path(out, "journal.jsonl")).entries)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("distzo2") and text.count("\n") == 1, text
    return text


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def assert_same_bits(first: str | Path, second: str | Path) -> None:
    """Of two checkpoints' directories."""
    assert_same_tensors(weights(first), weights(second))
