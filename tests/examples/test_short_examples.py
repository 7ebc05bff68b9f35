"""The short examples run, learn, and stay short."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from runpy import run_path

import pytest
import torch
from parallel_ranks import Ranks
from torchrun_cases import run_example

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


def test_two_ranks_have_the_weights_of_one() -> None:
    path, threads = ROOT / "examples/two_ranks.py", torch.get_num_threads()
    try:
        alone = run_path(str(path))["main"]()
    finally:
        torch.set_num_threads(threads)
    with closing(Ranks(2)) as ranks:
        assert ranks.values(run_example, 2, path) == [alone] * 2


def test_the_trainer_learns_and_continues(tmp_path: Path) -> None:
    main = run_path(str(ROOT / "examples/trainer.py"))["main"]
    once = main(str(tmp_path / "run"), 80)["eval_loss"]
    assert main(str(tmp_path / "run"), 100)["eval_loss"] < once < 2.5  # 16 tokens: log 16 is 2.77


def test_sft_with_an_adapter_learns(tmp_path: Path) -> None:
    losses = run_path(str(ROOT / "examples/sft_lora.py"))["main"](str(tmp_path / "run"))
    assert losses[-1] < losses[0] and (tmp_path / "run/adapter_model.safetensors").is_file()
