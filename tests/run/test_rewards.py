"""Runs that are rewarded for what the model writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill_cases
import pytest
from cli_runs import STEPS, assert_same_bits, one_line, record, resume, steps_in
from cli_runs import finetune as finetune_lines
from tiny_kinds import make, word_tokenizer
from tiny_text import write_jsonl

from distzo2.cli.main import main
from distzo2.record.journal import read_journal

pytestmark = pytest.mark.usefixtures("own_directory")

CODE = """
import os, signal
from pathlib import Path

def varied(prompts, completions, rows):
    assert all(p.startswith("the") for p in prompts)
    if os.path.exists("kill") and (left := int(Path("kill").read_text())) >= 0:
        Path("kill").write_text(str(left - 1))
        if left == 0:
            os.kill(os.getppid(), signal.SIGKILL)
    return [len(set(text)) + row["n"] / 100 for text, row in zip(completions, rows)]

def fails(prompts, completions, rows):
    if any(row["n"] == 3 for row in rows):
        raise ValueError("three\\nis bad")
    return varied(prompts, completions, rows)
"""
OPTIONS = ["--objective=reward", "--max-new-tokens=4", "--eps=0.3", "--probes=2", "--micro-batches=2"]


@pytest.fixture
def asked(files: SimpleNamespace) -> SimpleNamespace:
    Path("mine.py").write_text(CODE)
    rows = [{"prompt": f"the cat {'sat ' * (i % 3)}", "n": i} for i in range(8)]
    return SimpleNamespace(model=files.model, train=write_jsonl(Path("rows.jsonl"), rows))


def finetune(asked: SimpleNamespace, *options: str, reward: str = "mine.py:varied") -> int:
    return finetune_lines(asked, *OPTIONS, f"--reward={reward}", *options)


def entries(out: str) -> list[Any]:
    return [(e.step, e.update, e.losses, e.counts, e.skipped) for e in read_journal(Path(out, "journal.jsonl")).entries]


def test_a_killed_run_continues_to_the_same_bits(asked, tmp_path: Path, capfd) -> None:
    held_out = f"--eval={asked.train}"
    assert finetune(asked, held_out, "--eval-every=2", "--out=whole", "--save=best") == 0
    assert "step 4: held-out reward " in capfd.readouterr().out
    assert len({loss for _, _, losses, _, _ in entries("whole") for row in losses for loss in row}) > 3
    Path("kill").write_text("24")  # calls of the reward
    arguments = ["--out=out", *STEPS, *OPTIONS, "--reward=mine.py:varied", held_out, "--eval-every=2", "--save=best"]
    ended = kill_cases.run(tmp_path, ["finetune", f"--model={asked.model}", f"--train={asked.train}", *arguments])
    assert ended.killed, ended.text
    assert 0 < steps_in() < 4
    Path("kill").unlink()
    assert resume() == 0
    assert entries("out") == entries("whole")
    assert_same_bits("out/checkpoint", "whole/checkpoint")
    assert record()["best"] == record("whole")["best"] and record()["best"].keys() == {"loss", "reward"}
    assert record()["best"]["reward"] == -record()["best"]["loss"]
    assert (record()["options"]["estimator"], record()["objective"]) == ("es", "reward")


def test_sampling_is_a_function_of_the_seed(asked) -> None:
    for out in ("first", "second"):
        assert finetune(asked, "--temperature=0.7", "--top-k=5", "--stop=\\n", "--steps=2", f"--out={out}") == 0
    assert finetune(asked, "--steps=2", "--out=greedy") == 0
    assert entries("first") == entries("second") != entries("greedy")
    assert record("first")["options"]["stop"] == ["\n"]
    assert main(["finetune", "--resume", "--out=first", "--steps=3", "--quiet", "--stop=\\n"]) == 0


def test_a_step_without_rewards_is_dropped_and_named(asked, caplog, capsys) -> None:
    assert finetune(asked, "--steps=4", "--no-check", reward="mine.py:fails") == 0
    skipped = [e[-1] for e in entries("out")]
    assert skipped.count("the reward failed") == 2 and skipped.count(None) == 2  # two of four batches of 8 hold row 3
    assert "the reward failed: ValueError: three (" in caplog.text
    bad = [e for e in entries("out") if e[-1]]
    assert all(not e[1].terms and not e[1].groups[0].lr for e in bad)
    capsys.readouterr()
    write_jsonl(Path("rows.jsonl"), [{"prompt": "the", "n": 3}])
    for inline in ([], ["--reward-inline"]):
        out = f"--out=bad{len(inline)}"
        assert finetune(asked, out, "--steps=9", "--max-skipped=2", "--no-check", *inline, reward="mine.py:fails") == 1
        text = capsys.readouterr().err.splitlines()[-1]
        assert text == "distzo2: error: step 1: the reward failed, for 2 steps in a row; none of them was applied"


def test_rewards_by_name_and_conversations(asked, files, capsys) -> None:
    rows = [{"messages": [{"role": "user", "content": "the cat"}], "answer": "sat", "n": 1}] * 4
    train = write_jsonl(Path("chat.jsonl"), rows)
    held_out = [f"--eval={train}", "--score=regex:.*a.*"]
    assert finetune(asked, f"--train={train}", *held_out, "--steps=1", reward="f1") == 0
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["reward"] <= 1 and line["regex"] in (0, 1) for line in lines if line["kind"] == "eval")
    assert main(["report", "out"]) == 0 and Path("out/report.png").exists()
    lines = write_jsonl(Path("lines.jsonl"), [{"prompt": "the cat", "completion": "sat", "n": 2}] * 3)
    capsys.readouterr()
    evaluate = ["eval", f"--model={files.model}", f"--eval={lines}", "--json", "--max-new-tokens=4"]
    for score, name in (("number", "number"), ("regex:[^q]*", "regex"), ("mine.py:varied", "reward")):
        assert main([*evaluate, f"--score={score}"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.keys() == {"loss", "accuracy", name, "examples", "objective"}
        assert name != "regex" or found["regex"] == 1.0


def test_questions_that_eval_reads_and_a_score_that_fails(asked, capsys) -> None:
    evaluate = ["eval", f"--model={asked.model}", "--max-new-tokens=4", "--json"]
    assert main([*evaluate, f"--eval={asked.train}", "--score=mine.py:varied"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"loss", "reward", "examples", "objective"} and found["loss"] == -found["reward"] != 0
    assert main([*evaluate, f"--eval={asked.train}", "--score=mine.py:fails"]) == 1
    assert "--score mine.py:fails: the reward failed: ValueError: three" in one_line(capsys)
    assert main([*evaluate, f"--eval={asked.train}", "--score=number"]) == 1
    assert "rows.jsonl:1: answers: a list of texts was expected" in one_line(capsys)
    rows = [{"prompt": "the cat", "completion": "sat", "answers": 3, "answer": {}}, {"prompt": "a", "completion": "b"}]
    lines = write_jsonl(Path("lines.jsonl"), rows)
    assert main([*evaluate, f"--eval={lines}", "--score=regex:.*"]) == 0  # which needs no answers


def test_the_score_of_a_run_is_checked_and_compared(asked, capsys) -> None:
    held_out = f"--eval={asked.train}"
    assert finetune(asked, held_out, "--score=f1") == 1
    assert "rows.jsonl:1: answers: a list of texts was expected" in one_line(capsys)
    asked.train = write_jsonl(Path("lines.jsonl"), [{"prompt": "the cat", "completion": "sat", "n": 1}] * 2)
    more = [f"--eval={asked.train}", "--score=mine.py:varied", "--max-new-tokens=2", "--steps=1", "--save=none"]
    assert finetune_lines(asked, *more) == 0
    Path("mine.py").write_text(CODE + "\n")
    capsys.readouterr()
    assert record()["options"]["score"] == f"{Path('mine.py').absolute()}:varied"
    assert resume("--steps=2") == 2
    assert f"the score is not the one that the run began with: {Path('mine.py').absolute()}" in one_line(capsys)
    assert resume("--steps=2", "--score=loss") == 0 and record()["score_sha256"] is None


def test_another_reward_is_refused_by_a_resumed_run_and_taken_by_a_branch(asked, capsys) -> None:
    assert finetune(asked, "--steps=2", "--save=none") == 0
    Path("mine.py").write_text(CODE + "\n")
    capsys.readouterr()
    assert resume("--steps=3") == 2
    assert f"the reward is not the one that the run began with: {Path('mine.py').absolute()} changed" in one_line(
        capsys
    )
    for option in ("--reward=mine.py:fails", "--max-new-tokens=5", "--temperature=1"):
        assert resume("--steps=3", option) == 2
        assert f"{option.partition('=')[0]} was " in one_line(capsys)
    assert main(["finetune", "--branch-from=out", "--out=new", "--steps=3", "--quiet", "--save=none"]) == 0
    assert steps_in("new") == 3 and record("new")["reward_sha256"] != record()["reward_sha256"]


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--reward=mine.py:absent"], 2, "mine.py: has no function absent"),
        (["--reward=mine.py"], 2, "--reward mine.py: expected exact, f1, number, regex:PATTERN, json:FILE or FILE.py"),
        (["--reward=f1"], 1, "rows.jsonl:1: answers: a list of texts was expected"),
        (["--max-new-tokens=0"], 2, "--max-new-tokens 0: expected a number greater than or equal to 1"),
        (["--max-new-tokens=60"], 1, "rows.jsonl:3: a prompt of 5 tokens and 60 new ones, the limit is 64"),
        (["--max-new-tokens=64", "--truncate=left"], 1, "rows.jsonl:1: the prompt has no tokens: 64 new ones leave"),
        (["--objective=lm"], 2, "--reward needs --objective reward"),
        (["--score=loss", "--eval=rows.jsonl"], 2, "--score loss: with --objective reward there is none"),
        (["--train=said.jsonl"], 1, "said.jsonl:1: the last message is the assistant's, whose turn"),
        (["--model=masked"], 2, "--objective reward: masked: BertForMaskedLM generates no text"),
        (["--estimator=es", "--probes=1"], 2, "needs --probes 2 or more"),
    ],
)
def test_what_is_refused_in_one_line(asked, capsys, options: list[str], status: int, text: str) -> None:
    if "--model=masked" in options:
        make(Path("masked"), "BertForMaskedLM", word_tokenizer())
    write_jsonl(Path("said.jsonl"), [{"messages": [{"role": "assistant", "content": "yes"}]}])
    capsys.readouterr()
    try:
        found = finetune(asked, *options)
    except SystemExit as ended:  # of the command line
        found = ended.code
    assert found == status and text in one_line(capsys) and not Path("out").exists()
