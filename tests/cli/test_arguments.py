"""The command line of the options classes: help, and that it is quick."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from cli_runs import one_line

from distzo2.cli.main import COMMANDS, main, parse


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kind, _) in COMMANDS.items() if kind])
def test_help_names_every_option(name: str, kind: type, capsys) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in fields(kind):
        shown = option.metadata
        flag = shown["metavar"] if shown.get("positional") else "--" + option.name.replace("_", "-")
        assert shown["help"] and flag in text
        if type(option.default) in (int, float) and "default" not in shown["help"]:
            assert f"(default: {option.default})" in text, option.name
        if option.default is not MISSING and option.default is not None:
            assert type(option.default) in (int, float, str, bool)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: command"),
        (["finetune", "--steps"], "--steps: expected one argument"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["eval", "--model=m"], "--eval is missing"),
        (["report"], "RUN is missing"),
        (["replay", "-o", "c"], "replay needs RUN, or BASE and JOURNAL, or both --base and --journal"),
        (["replay", "a", "b", "--base=a", "-o", "c"], "takes neither --base nor --journal"),
        (["plan", "--model=m", "--config=none.toml"], "--config none.toml: No such file"),
    ],
)
def test_usage(arguments: list[str], reason: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert reason in one_line(capsys)


@pytest.mark.parametrize("positional", [["a", "b"], ["a"]])
def test_positional_arguments(positional: list[str]) -> None:
    options = parse(["replay", *positional, "-o", "c"])[1]
    assert [options.run_dir, options.journal_file, options.out] == [*[*positional, None][:2], "c"]


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["eval", "--weights=tape"], ["plan"]])
def test_help_and_errors_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from distzo2.cli.main import main
try:
    main({arguments})
finally:
    assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AssertionError" not in done.stderr and done.returncode in (0, 2), done.stderr
