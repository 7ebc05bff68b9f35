"""examples/custom_trainer.py learns, and its updates give its weights again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import distzo2_core as core

PATH = Path(__file__).parents[2] / "examples" / "custom_trainer.py"
spec = importlib.util.spec_from_file_location("custom_trainer", PATH)
example = sys.modules["custom_trainer"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def test_it_learns(device: str, capsys: pytest.CaptureFixture) -> None:
    losses, accuracy = example.main(device)
    assert len(losses) == 300 and sum(losses[:10]) > 2 * sum(losses[-10:])
    assert accuracy > 0.75  # chance is about a quarter
    assert f"accuracy {accuracy:.1%}" in capsys.readouterr().out


def test_its_weights_are_those_of_the_journal(device: str) -> None:
    """Its updates, replayed by the reference on plain tensors, give its weights bit for bit."""
    trainer = example.Trainer(device)
    expected = [trainer.pool.tensor(block).view(torch.bfloat16).clone() for block in range(2)]
    journal = []
    for step in range(1, 4):
        trainer.step(step, *example.batch_of(step))
        journal += trainer.pending
    for update in journal:
        for param, weights in enumerate(expected):
            table = core.SegmentTable(
                [core.Segment(0, weights.numel(), torch.bfloat16, param, 0, 0, 1, weights.numel())]
            )
            core.materialize(
                weights.view(torch.uint8), table, seed=example.SEED, updates=[update], write_back=True,
                backend="reference",
            )  # fmt: skip
    for got, weights in zip(trainer.finish(), expected, strict=True):
        assert torch.equal(got.view(-1), weights)


def test_it_needs_the_core_alone() -> None:
    text = PATH.read_text()
    assert "import distzo2\n" not in text and "from distzo2 " not in text
