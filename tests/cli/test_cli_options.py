"""The options of `distzo2 finetune`, from files and from the command line; help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import environment, one_line

from distzo2.cli.main import build_parser, main
from distzo2.errors import UsageError
from distzo2.run.finetune_options import parse_finetune


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parse(*arguments: str):
    return parse_finetune(build_parser()[1]["finetune"], arguments)


def test_options_of_a_file_and_of_the_command_line() -> None:
    base = {"model": "m", "train": "t", "out": "o", "steps": 10, "lr": 2e-5, "batch-size": 8, "train_mode": True}
    Path("c.json").write_text(json.dumps({**base, "max-coef": None}))
    Path("c.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in base.items()))
    for name in ("c.json", "c.toml"):
        options = parse(f"--config={name}", "--lr=1e-4", "--eps", "2e-3")
        assert (options.model, options.steps, options.batch_size) == ("m", 10, 8)
        assert options.lr == 1e-4 and options.eps == 2e-3 and options.train_mode is True
    assert parse("--config=c.json").max_coef is None and parse("--config=c.toml").max_coef == 10.0

    for content, reason in [
        ({"learning-rate": 1}, "'learning-rate' is not an option"),
        ({"lr": "fast"}, "lr: invalid number value: 'fast'"),
        ({"lr": [1]}, "a string or a number was expected"),
        ({"steps": True}, "a string or a number was expected"),
        ({"steps": 1.5}, "steps: invalid integer value"),
        ({"noise": "pink"}, "noise: invalid choice: 'pink'"),
        ({"quiet": "yes"}, "true or false was expected"),
        ({"eps": 0}, "a positive number was expected"),
    ]:
        Path("bad.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match=r"^bad\.json: ") as error:
            parse("--config=bad.json")
        assert reason in str(error.value)
    Path("bad.toml").write_text("lr = ")
    with pytest.raises(UsageError, match=r"bad\.toml"):
        parse("--config=bad.toml")
    with pytest.raises(UsageError, match="--model is missing"):
        parse()
    Path("no-out.toml").write_text("steps = 3")
    for given in ((), ("--config=no-out.toml",)):
        with pytest.raises(UsageError, match="--resume needs --out"):
            parse("--resume", *given)


def test_help_names_every_option(capsys) -> None:
    _, commands = build_parser()
    for name, sub in commands.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        for action in sub._actions:
            assert action.help, action
            assert all(flag in text for flag in action.option_strings)
            if type(action.default) in (int, float) and "default" not in action.help:
                assert f"(default: {action.default})" in " ".join(text.split()), action
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    one_line(capsys)


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from distzo2.cli.main import main
try:
    main(["finetune", "--help"])
finally:
    assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True).returncode == 0
