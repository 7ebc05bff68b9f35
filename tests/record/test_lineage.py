"""Branches, and runs that continue elsewhere: base and journal are all of the run, and its bits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import kill_cases
import pytest
from cli_runs import assert_same_bits, finetune, make_files, one_line

from distzo2.cli.main import main
from distzo2.errors import DistZO2Error
from distzo2.record.header import parents_of
from distzo2.record.journal import read_journal
from distzo2.record.lineage import BranchPoint, branch_of, first_like_step, first_own_step, parent_differences
from distzo2.run.metrics import read_metrics
from distzo2_core import FAMILIES

pytestmark = pytest.mark.usefixtures("own_directory")


def updates(run: str) -> list:
    return [entry.update for entry in read_journal(f"{run}/journal.jsonl").entries]


def branch(*options: str) -> int:
    return main(["finetune", "--branch-from=out", "--out=new", *options])


def test_a_branch_with_the_same_options_has_the_parents_bits(files: SimpleNamespace) -> None:
    assert finetune(files, "--steps=6", "--schedule=linear", f"--eval={files.eval}") == 0
    assert branch("--at-step=4") == 0
    assert_same_bits("out/checkpoint", "new/checkpoint")
    ours, theirs = (read_journal(f"{run}/journal.jsonl").entries for run in ("new", "out"))
    assert ours == [dataclasses.replace(entry, seconds=e.seconds) for entry, e in zip(theirs, ours, strict=True)]
    # The steps that were taken over are in the metrics too; the branch is evaluated where it begins and ends.
    lines = read_metrics("new/metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(6))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 6]
    (parent,) = parents_of(read_journal("new/journal.jsonl").header)
    assert (parent["name"], parent["steps"]) == ("out", 4)
    assert parent_differences(read_journal("new/journal.jsonl").header, "out/journal.jsonl") == []


def test_a_branch_with_other_options_is_replayed_from_the_base(files: SimpleNamespace) -> None:
    assert finetune(files, "--steps=5") == 0
    # Other estimate, noise and groups; and the parent is gone when the branch is replayed and continues.
    options = ["--noise=rademacher", "--probes=2", "--estimator=fzoo", "--lr=1e-2", "--weight-decay=0.1"]
    assert branch("--at-step=3", "--steps=6", *options) == 0
    parent, ours = updates("out"), updates("new")
    assert [u.terms for u in ours[:3]] == [u.terms for u in parent[:3]] and ours[3] != parent[3]
    assert [len(u.groups) for u in ours] == [2] * 6 and all(u.groups[0] == u.groups[1] for u in ours[:3])
    shutil.rmtree("out")
    assert main(["replay", "new", "--out=again", "--quiet"]) == 0
    assert_same_bits("new/checkpoint", "again")
    assert main(["finetune", "--resume", "--out=new", "--steps=8"]) == 0
    assert main(["replay", "new", "--out=later", "--quiet"]) == 0
    assert_same_bits("new/checkpoint", "later")
    assert len(updates("new")) == 8


def test_a_branch_from_noise_of_low_rank_has_such_noise(files: SimpleNamespace, capsys) -> None:
    """The table of dense noise would not tell a replay which of the parent's weights had low-rank noise."""
    assert finetune(files, "--steps=3", "--noise=sign-r1") == 0
    assert branch("--noise=rademacher", "--steps=5") == 1
    assert "the parent's noise is sign-r1: a branch has low-rank noise too, not rademacher" in capsys.readouterr().err
    assert branch("--noise=normal-r4", "--steps=5") == 0
    assert {term.family for u in updates("new") for term in u.terms} == {FAMILIES["sign-r1"], FAMILIES["normal-r4"]}
    assert read_journal("new/journal.jsonl").header["purposes"].keys() >= {"sign-r1", "normal-r4"}
    assert main(["replay", "new", "--out=again", "--quiet"]) == 0
    assert_same_bits("new/checkpoint", "again")


def test_a_branch_of_a_branch_without_decay_keeps_its_groups(files: SimpleNamespace, capsys) -> None:
    """And the weights at the start, to which its first steps pulled."""
    assert finetune(files, "--steps=4", "--weight-decay=0.1", "--anchor=0.5") == 0
    assert main(["finetune", "--resume", "--out=out", "--steps=5", "--anchor=0"]) == 2
    assert "--anchor was 0.5 and is 0.0: start a new run for that, or a branch" in capsys.readouterr().err
    assert branch("--at-step=3", "--weight-decay=0", "--anchor=0") == 0
    assert {group.anchor for u in updates("new") for group in u.groups} == {0.5, 0.0}
    assert main(["finetune", "--resume", "--out=new", "--steps=5"]) == 0
    assert main(["finetune", "--branch-from=new", "--at-step=2", "--out=third", "--steps=3"]) == 0
    parents = parents_of(read_journal("third/journal.jsonl").header)
    assert [(parent["name"], parent["steps"]) for parent in parents] == [("out", 3), ("new", 2)]
    for run in ("new", "third"):
        assert main(["replay", run, f"--out={run}-again", "--quiet"]) == 0
        assert_same_bits(f"{run}/checkpoint", f"{run}-again")
    assert updates("third")[:2] == updates("out")[:2]


def test_a_branch_that_torchrun_starts_anew_continues(files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finetune(files, "--steps=6") == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert branch("--at-step=3", "--steps=4") == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert branch("--at-step=3", "--steps=6") == 0
    assert updates("new") == updates("out")
    assert_same_bits("out/checkpoint", "new/checkpoint")


def test_a_branch_that_is_killed_before_it_begins_is_still_a_branch(files: SimpleNamespace) -> None:
    assert finetune(files, "--steps=5") == 0
    command = ["finetune", "--branch-from=out", "--at-step=3", "--out=new", "--steps=6"]
    killed = (
        "import os\nfrom distzo2.cli.main import main\nfrom distzo2.run import preflight\n"
        f"preflight.from_pretrained = lambda *a, **k: os._exit(9)\nmain({command})"
    )
    assert kill_cases.run(Path().absolute(), killed).status == 9
    assert not Path("new/journal.jsonl").exists()
    assert main(["finetune", "--resume", "--out=new"]) == 0
    (parent,) = parents_of(read_journal("new/journal.jsonl").header)
    assert (parent["name"], parent["steps"]) == ("out", 3)
    assert updates("new")[:3] == updates("out")[:3] and len(updates("new")) == 6


def test_what_cannot_be_branched_is_refused(files: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(files, "--steps=2") == 0
    capsys.readouterr()
    for options, status, reason in (
        (["--seed=5"], 2, "--seed was 0 in out and is 5"),
        (["--dtype=bfloat16"], 2, "--dtype was 'auto' in out and is 'bfloat16'"),
        (["--resume"], 2, "give one of them"),
        (["--at-step=3"], 1, "no branch at step 3: it holds 2 steps"),
    ):
        assert branch(*options) == status
        assert reason in one_line(capsys)
        assert not Path("new").exists()
    assert main(["finetune", "--resume", "--out=out", "--at-step=1"]) == 2
    assert "--at-step needs --branch-from" in one_line(capsys)
    other = make_files(Path("other").absolute())
    file = other.model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert branch(f"--model={other.model}") == 1
    assert "base checkpoint: model.safetensors is" in one_line(capsys) and not Path("new").exists()


def test_a_branch_that_joins_groups_is_refused(files: SimpleNamespace) -> None:
    assert finetune(files, "--steps=2", "--weight-decay=0.1") == 0
    header = read_journal("out/journal.jsonl").header
    joined = [{**row, "group": 0} for row in header["table"]]
    with pytest.raises(DistZO2Error, match="may split groups, not join them"):
        branch_of(BranchPoint("out/journal.jsonl"), {**header, "table": joined, "groups": [{}]}, list)
    frozen = [{**row, "group": None, "trainable": False} if row["index"] == 3 else row for row in header["table"]]
    with pytest.raises(DistZO2Error, match="trainable is True in the journal and False"):
        branch_of(BranchPoint("out/journal.jsonl"), {**header, "table": frozen}, list)


def test_coefficients_of_another_estimate_do_not_count() -> None:
    """What a branch's clip looks back on: its parents' steps, as far back as they are of its own kind."""

    def header(noise: str = "normal", **options: object) -> dict:
        return {"options": options, "table": [{"noise": noise, "group": 0}]}

    def parent(steps: int, noise: str = "normal", **options: object) -> dict:
        return {"steps": steps, "noise": noise, "options": options}

    for parents, first_like, first_own in (
        ([], 0, 0),
        ([parent(5, eps=1)], 0, 5),
        ([parent(5, eps=2)], 5, 5),
        ([parent(5, "rademacher", eps=1)], 5, 5),
        ([parent(3, eps=2), parent(5, eps=1)], 3, 5),
        ([parent(9, eps=2), parent(5, eps=1)], 5, 5),
        ([parent(3, eps=1), parent(5, eps=1)], 0, 5),
    ):
        made = header(eps=1) | {"parents": parents}
        assert (first_like_step(made), first_own_step(made)) == (first_like, first_own)


def test_a_run_continues_on_another_machine(files: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """Moved base and data, other threads: what differs is reported by name; base and journal lead to the weights."""
    assert finetune(files, "--steps=3", "--threads=1") == 0
    record = json.loads(Path("out/run.json").read_text())
    Path("there").mkdir()
    shutil.move("out", "there/run")
    shutil.copytree(files.model, "there/base")
    shutil.copy(files.train, "there/train.jsonl")
    moved = ["--model=there/base", "--train=there/train.jsonl", "--threads=2", "--steps=5"]
    assert main(["finetune", "--resume", "--out=there/run", *moved]) == 0
    assert "num_threads was 1 and is 2" in caplog.text
    assert json.loads(Path("there/run/run.json").read_text())["options"]["model"] != record["options"]["model"]
    assert main(["replay", "there/run", "--out=again", "--quiet"]) == 0
    assert_same_bits("there/run/checkpoint", "again")
    assert len(updates("there/run")) == 5
