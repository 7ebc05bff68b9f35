"""Options: types and ranges, the files they come from, and those of resumed and branched runs."""

from __future__ import annotations

import json
import os
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import pytest
from cli_runs import finetune, one_line, record, steps_in

from distzo2.cli.main import main, parse
from distzo2.errors import UsageError
from distzo2.estimators.registry import ESTIMATORS
from distzo2.option_groups import OWN_BATCHES
from distzo2.option_types import num_bytes
from distzo2.run.options import FinetuneOptions, changed

pytestmark = pytest.mark.usefixtures("own_directory")

FULL = ["--model=m", "--train=t", "--out=o", "--steps=10"]
BASE = {"model": "m", "train": "t", "out": "o", "steps": 10, "lr": 2e-5, "batch-size": 8, "train_mode": True}


def options_of(*arguments: str) -> FinetuneOptions:
    name, options = parse(["finetune", *arguments])
    assert name == "finetune"
    return options


def write_config(name: str, values: dict[str, Any]) -> None:
    toml = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    Path(name).write_text(toml if name.endswith(".toml") else json.dumps(values))  # JSON is YAML too


@pytest.mark.parametrize("name", ["c.json", "c.toml", "c.yaml"])
def test_the_command_line_wins_over_a_file(name: str) -> None:
    write_config(name, BASE)
    options = options_of(f"--config={name}", "--batch-size=4", "--eps", "2e-3", "--memory-budget=2MiB")
    assert (options.model, options.steps, options.lr, options.train_mode) == ("m", 10, 2e-5, True)
    assert (options.batch_size, options.eps, options.max_coef) == (4, 2e-3, 10.0)
    assert options.memory_budget == 2 << 20
    with pytest.raises(FrozenInstanceError):
        options.lr = 1.0


def test_none() -> None:
    write_config("c.json", BASE | {"max-coef": None, "threads": None})
    assert options_of("--config=c.json").max_coef is None
    assert options_of("--config=c.json", "--max-coef=3").max_coef == 3
    assert options_of("--config=c.json", "--max-coef=none").max_coef is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"learning-rate": 1}, "'learning-rate' is not an option"),
        ({"lr": "fast"}, "lr: fast: expected a valid number"),
        ({"lr": [1]}, "lr: [1]: expected a valid number"),
        ({"lr": None}, "lr: null: expected a valid number"),
        ({"steps": True}, "steps: true: expected a number, not true"),
        ({"steps": 1.5}, "steps: 1.5: expected a valid integer"),
        (
            {"noise": "pink"},
            "noise: pink: expected 'normal', 'rademacher', 'sign-r1', 'sign-r4', 'normal-r1' or 'normal-r4'",
        ),
        ({"quiet": "yes"}, "quiet: yes: expected a valid boolean"),
        ({"eps": 0}, "eps: 0: expected a number greater than 0"),
        ({"model": 3}, "model: 3: expected a valid string"),
        ({"journal_chain": True}, "journal_chain: is no longer an option: "),
    ],
)
def test_a_bad_value_of_a_file(values: dict[str, Any], reason: str, capsys) -> None:
    write_config("bad.json", values)
    assert main(["finetune", "--config=bad.json"]) == 2
    assert f"bad.json: {reason}" in one_line(capsys)


@pytest.mark.parametrize(
    ("name", "text"),
    [("b.toml", "lr = "), ("b.json", "{"), ("b.json", "[1]"), ("b.yaml", "a: [1"), ("b.yaml", "3: 4"), ("b.yml", "x")],
)
def test_a_file_that_is_no_file_of_options(name: str, text: str, capsys) -> None:
    Path(name).write_text(text)
    assert main(["finetune", f"--config={name}"]) == 2
    assert f"--config {name}: " in one_line(capsys)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--lr=-1", "expected a number greater than or equal to 0"),
        ("--lr=x", "expected a valid number"),
        ("--lr=1e60", "expected a number in the range of float32"),
        ("--lr=1e-60", "expected a number in the range of float32"),
        ("--lr=nan", "expected a "),
        ("--eps=0", "expected a number greater than 0"),
        ("--seed=-1", "expected a number greater than or equal to 0"),
        ("--seed=18446744073709551616", "expected a number less than 184467440737"),
        ("--threads=9999", "expected a number less than or equal to 1024"),
        ("--steps=0", "expected a number greater than or equal to 1"),
        ("--steps=4294967296", "expected a number less than 4294967296"),
        ("--max-coef=0.5", "expected a number greater than 1"),
        ("--momentum=1", "expected a number less than 1"),
        ("--clip-percentile=0", "expected a number greater than 0"),
        ("--probe-batches=none", "expected 'shared' or 'own'"),
        ("--snapshot-pace=2", "expected a number less than or equal to 1"),
        ("--memory-budget=infGiB", "expected a number of bytes (such as 12GiB), or auto"),
        ("--host-memory=0", "expected a number of bytes (such as 12GiB), or auto"),
        ("--weights=tape", "expected 'device', 'host' or 'disk'"),
        ("--train=", "expected "),
        ("--out=", "expected "),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--shots=4", "--shots is an option of distzo2 eval"),
        ("--keep=2", "--keep is no longer an option: OUT/weights.dzo2 holds one copy"),
        ("--journal-chain", "is no longer an option: journals are no longer chained; `sha256sum journal.jsonl`"),
    ],
)
def test_a_bad_value_of_the_command_line(files, option: str, reason: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        finetune(files, option)
    assert error.value.code == 2
    text = one_line(capsys)
    assert reason in text and option.split("=")[0] in text


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "--model is missing"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--config=no-out.toml"], "--resume needs --out"),
        (["--resume", "--branch-from=a"], "give one of them"),
        ([*FULL, "--micro-batches=3"], "--micro-batches 3 does not divide --batch-size 16"),
        ([*FULL, "--estimator=fzoo"], "--estimator fzoo needs --probes 2"),
        ([*FULL, "--estimator=es", "--es-one-sided"], "--estimator es needs --probes 2"),
        ([*FULL, "--es-shape=ranks"], "--es-shape needs --estimator es"),
        ([*FULL, "--es-one-sided"], "--es-one-sided needs --estimator es"),
        ([*FULL, "--temperature=1"], "--temperature needs --objective reward"),
        ([*FULL, "--objective=reward", "--reward=f1", "--top-k=5"], "--top-k needs --temperature"),
        ([*FULL, "--reward-inline"], "--reward-inline needs --reward, or a --score of answers"),
        ([*FULL, "--decay=0.5", "--schedule=cosine"], "--decay needs --schedule wsd, or --eps-schedule wsd"),
        ([*FULL, "--eps-final=0.5"], "--eps-final needs --eps-schedule"),
        ([*FULL, "--momentum-window=4"], "--momentum-window needs --momentum"),
        (
            [*FULL, "--momentum=0.9", "--momentum-window=11"],
            "--momentum-window 11 is longer than the run, of --steps 10",
        ),
        ([*FULL, "--probe-batches=own"], "--probe-batches own: --estimator spsa or meazo or spsa-sign, and --probes 2"),
        ([*FULL, "--probe-batches=own", "--probes=4", "--estimator=fzoo"], "--probe-batches own: --estimator spsa"),
        (
            [*FULL, "--probe-batches=own", "--probes=3"],
            "--probes 3 x --micro-batches 1 does not divide --batch-size 16",
        ),
        ([*FULL, "--warmup=11"], "--warmup 11 is more than --steps 10"),
        ([*FULL, "--fsync-every=2", "--weights=disk"], "every step is synced"),
        ([*FULL, "--anchor=1", "--store=affine8"], "--anchor with --store affine8: gains and codes keep no start"),
        ([*FULL, "--anchor=1", "--tune=gain"], "--anchor with --tune gain: gains and codes keep no start"),
        ([*FULL, "--slice=on", "--weights=device"], "--slice on: slices are of weights in host memory or on disk"),
        ([*FULL, "--at-step=1"], "--at-step needs --branch-from"),
        ([*FULL, "--save=best"], "--save best needs --eval"),
        ([*FULL, "--eval-every=2"], "--eval-every needs --eval"),
        ([*FULL, "--score=f1"], "--score needs --eval"),
    ],
)
def test_options_that_are_missing_or_do_not_go_together(given: list[str], reason: str) -> None:
    Path("no-out.toml").write_text("steps = 3")
    with pytest.raises(UsageError, match=reason):
        options_of(*given)


def test_numbers_of_bytes() -> None:
    assert [num_bytes(text) for text in ("auto", "1", "1.5KiB", "2GiB", 7)] == ["auto", 1, 1536, 2 << 30, 7]
    for wrong in ("0", "-1", "12Gx", "nan", "infGiB", "", True):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            num_bytes(wrong)


def test_a_resumed_run_has_the_options_of_its_record(files) -> None:
    """Whatever an earlier version wrote there: options that left, and `trace` as a number of steps."""
    assert finetune(files, "--steps=2", "--seed=5", "--lr=1e-4", "--max-coef=none", "--save=none") == 0
    kept = record()
    kept["options"] |= {"journal_chain": True, "keep": 3, "config": None, "trace": 4}
    Path("out/run.json").write_text(json.dumps(kept))
    options = options_of("--resume", "--out=out", "--steps=3")
    assert (options.seed, options.lr, options.max_coef, options.trace, options.steps) == (5, 1e-4, None, None, 3)
    assert options_of("--branch-from=out", "--out=new").seed == 5
    with pytest.raises(UsageError, match="--seed was 5 in out and is 6: a branch keeps it"):
        options_of("--branch-from=out", "--out=new", "--seed=6")
    os.rename("out", "elsewhere")
    Path("run.toml").write_text('out = "elsewhere"\nsteps = 3\n')
    assert main(["finetune", "--resume", "--config=run.toml", "--quiet"]) == 0
    assert steps_in("elsewhere") == 3
    kept["options"]["colour"] = "red"
    Path("elsewhere/run.json").write_text(json.dumps(kept))
    with pytest.raises(UsageError, match=r"elsewhere/run.json: 'colour' is not an option"):
        options_of("--resume", "--out=elsewhere")


def test_what_a_branch_takes_over() -> None:
    """Not what belongs to another estimator or momentum than its own."""
    Path("old").mkdir()
    more = ["--estimator=es", "--probes=2", "--es-one-sided", "--noise=rademacher", "--lr=0.5", "--eps=0.5"]
    more += ["--momentum=0.9", "--momentum-window=4", "--schedule=wsd", "--decay=0.5"]
    Path("old/run.json").write_text(json.dumps({"options": asdict(options_of(*FULL, *more))}))
    branch = ["--branch-from=old", "--out=new"]
    same = options_of(*branch, "--estimator=es", "--schedule=cosine")  # whose decay does nothing
    assert (same.es_one_sided, same.noise, same.lr, same.eps, same.momentum_window) == (True, "rademacher", 0.5, 0.5, 4)
    other = options_of(*branch, "--estimator=fzoo", "--momentum=0")
    assert (other.es_one_sided, other.lr, other.eps, other.momentum_window) == (False, 2e-3, 1e-3, None)
    assert options_of(*branch, "--estimator=spsa", "--eps=0.1").lr == 1e-6
    for name, value in {"es_one_sided": False, "momentum": 0.5, "momentum_window": None}.items():
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} was .* or a branch of it"):
            changed(asdict(same), asdict(same) | {name: value}, "old")


@pytest.mark.parametrize("options", [["--peft=lora"], ["--tune=adapter"], ["--tune=gain", "--store=affine4"]])
def test_rates_of_what_is_tuned(options: list[str]) -> None:
    found = options_of(*FULL, *options)
    assert (found.lr, found.eps) == (1e-4, 1e-2)
    assert options_of(*FULL, *options, "--lr=5e-2").lr == 5e-2
    by_fzoo = options_of(*FULL, *options, "--estimator=fzoo", "--probes=2")
    assert (by_fzoo.lr, by_fzoo.eps) == (3e-2, 1e-2)
    assert options_of(*FULL, "--estimator=fzoo", "--probes=2").lr == 2e-3
    curved, plain = options_of(*FULL, "--estimator=1.5spsa"), options_of(*FULL)
    assert (curved.lr, curved.eps, curved.noise, plain.noise) == (1e-4, 1e-4, "rademacher", "normal")
    assert options_of(*FULL, "--estimator=1.5spsa", "--noise=normal").noise == "normal"
    of_mezo = options_of(*FULL, *options, "--protocol=mezo")  # which trains no gains
    assert (of_mezo.lr, of_mezo.eps) == (1e-4 if "--tune=gain" in options else 5e-5, 1e-2)


def test_estimators_with_batches_of_their_own_are_those_that_say_so():
    assert set(OWN_BATCHES) == {n for n, kind in ESTIMATORS.items() if getattr(kind, "own_batches", False)}
