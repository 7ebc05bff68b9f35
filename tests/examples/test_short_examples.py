"""The short examples run, learn, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short_and_has_a_page_that_shows_it(path: Path) -> None:
    assert path.read_text().count("\n") < (120 if path.stem == "custom_trainer" else 60)
    page = (ROOT / f"docs/examples/{path.stem}.md").read_text()
    assert f"\n[examples/{path.name}](../../examples/{path.name})\n" in page  # the site puts the file there
    assert f"](examples/{path.stem}.md)" in (ROOT / "docs/examples.md").read_text()


def test_the_own_loop_learns(device: str, capsys: pytest.CaptureFixture) -> None:
    accuracy = run_path(str(ROOT / "examples/own_loop.py"))["main"](device)
    assert accuracy > 0.9 and f"accuracy {accuracy:.1%}" in capsys.readouterr().out  # chance is a quarter


def test_two_ranks_have_the_weights_of_one(tmp_path: Path) -> None:
    path, threads = ROOT / "examples/two_ranks.py", torch.get_num_threads()
    try:
        alone = run_path(str(path))["main"]()
    finally:
        torch.set_num_threads(threads)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT / "python"), str(ROOT)))}
    ran = subprocess.run(
        [*torchrun, str(path)], cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert f"checksum of the weights {alone & (2**64 - 1):016x}" in ran.stdout and "pert=2" in ran.stdout


def test_the_trainer_learns_and_continues(tmp_path: Path) -> None:
    main = run_path(str(ROOT / "examples/trainer.py"))["main"]
    once = main(str(tmp_path / "run"), 80)["eval_loss"]
    assert main(str(tmp_path / "run"), 100)["eval_loss"] < once < 2.5  # 16 tokens: log 16 is 2.77


def test_sft_with_an_adapter_learns(tmp_path: Path) -> None:
    losses = run_path(str(ROOT / "examples/sft_lora.py"))["main"](str(tmp_path / "run"))
    assert losses[-1] < losses[0] and (tmp_path / "run/adapter_model.safetensors").is_file()
