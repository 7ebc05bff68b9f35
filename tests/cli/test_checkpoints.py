"""Checkpoints that people bring, on the command line: they work, or end in one line that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import finetune, make_files, one_line

from distzo2.cli.main import main


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    return make_files(tmp_path)


def adapter(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/7b", "peft_type": "LORA"}))


BROUGHT: dict[str, tuple[Callable[[Path], object], str]] = {  # tests/models has the others
    "adapter": (adapter, "for the base model 'acme/7b'"),
    "without a tokenizer": (lambda model: [file.unlink() for file in model.glob("tokenizer*")], "no tokenizer"),
}


@pytest.mark.parametrize("case", BROUGHT)
def test_what_cannot_be_read_is_one_line(files, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BROUGHT[case]
    change(files.model)
    capsys.readouterr()
    for run in (
        lambda: finetune(files),
        lambda: main(["eval", f"--model={files.model}", f"--eval={files.eval}"]),
        lambda: main(["generate", f"--model={files.model}", "--prompt=a b", "--max-new-tokens=2"]),
    ):
        assert run() not in (0, None)
        assert message in one_line(capsys) and not Path("out").exists()
