"""`distzo2 finetune` on several ranks: the files and bits of one rank, one message for an error, going on after one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torchrun_cases as cases
from cli_runs import assert_same_bits
from same_run import assert_same_run
from tiny_text import write_jsonl

from distzo2.cli.main import main
from distzo2.record.journal import read_journal
from distzo2.run.metrics import read_metrics

STEPS = 6


def arguments(files: SimpleNamespace, *more: str) -> list[str]:
    return cases.arguments(files, STEPS, f"--eval={files.eval}", "--eval-every=2", "--eval-batch-size=2", *more)


@pytest.fixture(scope="module")
def alone(files: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.run_alone(tmp_path_factory.mktemp("torchrun") / "alone", arguments(files))


def one_message(results: list[dict[str, Any]]) -> str:
    lines = [line for result in results for line in result["err"].splitlines()]
    assert len(lines) == 1, lines
    assert all(result["status"] not in (0, None) for result in results)
    return lines[0]


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (2, ["--parallel=pert=2", "--verify-every=2"]),
        (4, ["--parallel=pert=2,data=2"]),
        (3, []),
        (2, ["--save=best"]),
        (4, ["--slice=on", "--weights=host", "--verify-every=2"]),
        (2, ["--slice=on", "--weights=disk", "--save=best"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_run_has_the_files_and_bits_of_one_rank(ranks, files, alone, tmp_path, world_size, more):
    results = ranks.values(cases.command, world_size, tmp_path, arguments(files, *more))
    assert [r["status"] for r in results] == [0] * world_size
    assert not any(r["out"] or r["err"] for r in results[1:]) and not results[0]["err"]
    if not any("parallel" in option for option in more):
        mesh = {2: "pert=1,data=2|pert=2,data=1", 3: "pert=1,data=3", 4: "pert=2,data=2"}[world_size]
        assert re.search(f"mesh of {world_size} ranks: ({mesh}) ", results[0]["out"])
    if "--save=best" not in more:
        assert_same_run(tmp_path / "out", alone)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"checkpoint", "journal.jsonl", "metrics.jsonl", "run.json"}


def test_ranks_settle_together_what_they_compute_in(ranks, files, tmp_path):
    options = arguments(files, "--dtype=bfloat16", "--eps=1e-5")
    alone = cases.run_alone(tmp_path / "alone", options)
    results = ranks.values(cases.command, 4, tmp_path, [*options, "--slice=on", "--parallel=pert=2,data=2"])
    assert [r["status"] for r in results] == [0] * 4 and "computing in float32" in results[0]["out"]
    assert_same_run(tmp_path / "out", alone)
    assert read_journal(alone / "journal.jsonl").header["compute_dtype"] == "float32"


def test_answers_that_ranks_write_are_scored_as_those_of_one(ranks, files, tmp_path):
    """Whole blocks are gathered from slices for each token, and ranks have different numbers of answers to write."""
    lines = [{"prompt": "the " + word, "completion": f" {word} is"} for word in ("cat", "film", "graph", "dog", "mat")]
    data = write_jsonl(tmp_path / "answers.jsonl", lines)
    more = [f"--train={data}", f"--eval={data}", "--score=f1", "--max-new-tokens=5", "--eval-batch-size=1"]
    results = ranks.values(cases.command, 2, tmp_path, cases.arguments(files, 1, *more, "--slice=on", "--weights=host"))
    assert [r["status"] for r in results] == [0, 0]
    runs = (tmp_path / "out", cases.run_alone(tmp_path / "alone", cases.arguments(files, 1, *more)))
    kept = ("step", "loss", "f1", "em")
    evals = [[line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "eval"] for run in runs]
    scores, others = ([[line[key] for key in kept] for line in some] for some in evals)
    assert scores == others and len(scores) == 2 and scores[0][2] > 0


REWARD = """
def uneven(prompts, completions, rows):
    if rows[0]["n"] in (1, 6):  # in one micro-batch of a step: on one rank
        raise ValueError("no reward")
    return [len(set(text)) for text in completions]
"""


@pytest.mark.parametrize("mesh", ["pert=2", "data=2"])
def test_rewards_on_ranks_have_the_bits_of_one_and_skip_together(ranks, files, tmp_path, mesh):
    """Lanes write texts of unequal lengths, and a reward that fails on one rank drops the step on all."""
    (tmp_path / "mine.py").write_text(REWARD)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "the " + "cat " * (n % 3), "n": n} for n in range(9)])
    more = [f"--train={data}", f"--eval={data}", "--objective=reward", f"--reward={tmp_path / 'mine.py'}:uneven"]
    more += ["--eps=0.3", "--probes=2", "--micro-batches=2", "--batch-size=2", "--max-new-tokens=4", "--no-check"]
    results = ranks.values(cases.command, 2, tmp_path, cases.arguments(files, 4, *more, f"--parallel={mesh}"))
    assert [r["status"] for r in results] == [0, 0]
    assert_same_run(tmp_path / "out", cases.run_alone(tmp_path / "alone", cases.arguments(files, 4, *more)))
    skipped = [entry.skipped for entry in read_journal(tmp_path / "out/journal.jsonl").entries]
    assert set(skipped) == {None, "the reward failed"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--parallel=pert=3"], "--parallel pert=3: a multiple of 3 ranks would be needed, and there are 2"),
        (["--parallel=pert=2,data=2"], "there are 2; on 2 ranks, pert=1,data=2 or pert=2,data=1 would fit"),
        (["--parallel=data=2", "--micro-batches=1"], "cannot be dealt to 2 data ranks; on 2 ranks, pert=2,data=1"),
        (["--train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--steps=0"], "--steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(ranks, files, tmp_path, more, text):
    assert text in one_message(ranks.values(cases.command, 2, tmp_path, arguments(files, *more)))
    assert not (tmp_path / "out").exists()


def test_a_mesh_without_torchrun(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(files, "--parallel=pert=2,data=2")) == 2
    assert "start it with torchrun --nproc-per-node 4 -m distzo2 finetune" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trouble", "statuses", "text"),
    [
        ("full", [1, 1], "No space left on device"),
        ("interrupt", [1, 130], "2 steps are in the journal|rank 1 failed in step 2: interrupted"),
    ],
)
def test_trouble_on_one_rank_ends_all_and_the_run_goes_on(ranks, files, alone, tmp_path, trouble, statuses, text):
    results = ranks.values(cases.command, 2, tmp_path, arguments(files, "--parallel=pert=2"), trouble)
    assert [r["status"] for r in results] == statuses
    assert re.search(text, one_message(results))
    assert json.loads((tmp_path / "out/run.json").read_text())["options"]["parallel"] == "pert=2,data=1"
    results = ranks.values(cases.command, 3, tmp_path, ["finetune", "--resume", "--out=out", "--parallel=data=3"])
    assert [r["status"] for r in results] == [0, 0, 0]
    assert "parallel pert=2,data=1 -> pert=1,data=3" in results[0]["out"]
    assert "at step 2 of 6" in results[0]["out"]
    assert_same_run(tmp_path / "out", alone)


@pytest.mark.parametrize("slices", [[], ["--slice=on"]], ids=["whole", "slices"])
def test_ranks_resume_from_a_weight_file_that_only_some_of_them_see(ranks, files, tmp_path, monkeypatch, slices):
    """Rank 1 makes the journal's updates again from the base, and has the same weights, or its slice of them."""
    options = ["--snapshot-every=3", "--snapshot-pace=1", "--verify-every=4", "--steps=34"]
    command = arguments(files, "--parallel=pert=2", *options, *slices)
    results = ranks.values(cases.command, 2, tmp_path, command, "full at step 30")
    assert all(r["status"] for r in results)
    assert {p.name for p in (tmp_path / "out").glob("weights*")} >= {"weights.dzo2", "weights.dzo2.json"}
    more = ["finetune", "--resume", "--out=out", "--parallel=data=3", *slices]
    results = ranks.values(cases.command, 3, tmp_path, more, "blind")
    assert [r["status"] for r in results] == [0, 0, 0], results
    assert "from weights.dzo2: " in results[0]["out"]
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(files, *options), "--out=alone"]) == 0
    assert_same_run(tmp_path / "out", tmp_path / "alone")


@pytest.mark.parametrize(
    ("store", "weights", "mesh"),
    [("affine8", "disk", "pert=2"), ("affine16", "disk", "data=2"), ("affine16", "host", "pert=2")],
)
def test_codes_in_slices_have_the_bits_of_one_rank_after_a_kill(ranks, files, tmp_path, store, weights, mesh):
    options = arguments(files, f"--store={store}", f"--weights={weights}", "--lr=1e-2", "--eps=1e-2", "--no-signal")
    shared = ["--slice=on", f"--parallel={mesh}", "--verify-every=2"]
    died = ranks.run(cases.command, 2, tmp_path, [*options, *shared], "killed")
    assert [each.code for each in died] == [-signal.SIGKILL] * 2
    results = ranks.values(cases.command, 2, tmp_path, ["finetune", "--resume", "--out=out", *shared])
    assert [r["status"] for r in results] == [0, 0], results
    assert ("from weights.dzo2: " in results[0]["out"]) is (weights == "disk")
    assert_same_run(tmp_path / "out", cases.run_alone(tmp_path / "alone", options))


def test_ranks_branch_from_a_run_of_one(ranks, files, alone, tmp_path):
    branch = ["finetune", f"--branch-from={alone}", "--at-step=3", "--out=out", "--parallel=pert=2"]
    branch += ["--weight-decay=0.1"]
    results = ranks.values(cases.command, 2, tmp_path, branch)
    assert [r["status"] for r in results] == [0, 0] and "at step 3 of 6" in results[0]["out"]
    ours, theirs = (read_journal(path / "journal.jsonl").entries for path in (tmp_path / "out", alone))
    assert [e.update.terms for e in ours[:3]] == [e.update.terms for e in theirs[:3]] and len(ours) == STEPS
    assert ours[3].losses == theirs[3].losses and ours[4].losses != theirs[4].losses
    assert main(["replay", str(tmp_path / "out"), f"--out={tmp_path / 'again'}", "--quiet"]) == 0
    assert_same_bits(tmp_path / "again", tmp_path / "out" / "checkpoint")
    # A branch without decay of a run with it: all ranks must know that groups are kept apart.
    third = ["finetune", f"--branch-from={tmp_path / 'out'}", "--out=third", "--weight-decay=0", "--steps=7"]
    third += ["--parallel=data=2"]
    results = ranks.values(cases.command, 2, tmp_path, third)
    assert [r["status"] for r in results] == [0, 0], results
    assert {len(e.update.groups) for e in read_journal(tmp_path / "third" / "journal.jsonl").entries} == {2}


def test_torchrun_restarts_a_run_whose_rank_was_killed(files, tmp_path):
    options = arguments(files, "--steps=30", "--eval-every=15")  # it is not at its end when a busy machine kills it
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "-m", "distzo2", *options, "--parallel=pert=2", "--heartbeat-limit=30",
    ]  # fmt: skip
    journal = tmp_path / "out/journal.jsonl"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 200
            victim = None
            while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
                assert process.poll() is None
                victim = victim or _child_with_rank(process.pid, 1)
                time.sleep(0.002)
            os.kill(victim, signal.SIGKILL)
            assert process.wait(timeout=250) == 0
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                process.kill()
    text = (tmp_path / "log").read_text()
    assert "restart 1: continuing the run in out" in text
    assert "rank 1 was lost: its process" in text
    assert_same_run(tmp_path / "out", cases.run_alone(tmp_path / "alone", options))


def _child_with_rank(pid: int, rank: int) -> int | None:
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and f"\0RANK={rank}\0" in "\0" + (process / "environ").read_text():
                return int(process.name)
    return None
