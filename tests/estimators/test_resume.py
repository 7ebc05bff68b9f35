"""What an estimator remembers, and an eps that changes, survive every way of going on, to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from block_models import IDS, Blocks, stepping
from cli_runs import assert_same_bits, finetune
from same_bits import assert_same_tensors

import distzo2
from distzo2.cli.main import main
from distzo2.estimators.schedules import factor_of
from distzo2.estimators.shaped import ES
from distzo2.record.journal import read_journal
from distzo2.record.lineage import BranchPoint
from distzo2.run.metrics import read_metrics

FACTOR = factor_of("cosine", 6, final=0.1, rises=False)


def steps_to(end: int, model: Blocks, opt: distzo2.ZOSGD) -> list[tuple]:
    history = []
    while opt.step_count < end:
        opt.eps = 1e-2 * FACTOR(opt.step_count)
        opt.step(lambda: model(IDS) * (float("nan") if opt.step_count == 1 else 1))
        history.append((opt.last.losses[1], opt.last.coefs, opt.last.memory, opt.last.eps))
    return history


@pytest.mark.parametrize("way", ["journal", "branch", "state"])
def test_a_second_moment_and_a_schedule_of_eps(way: str, tmp_path: Path) -> None:
    options = {"estimator": "meazo", "num_probes": 2, "eps": 1e-2, "lr": 1e-2}
    model, opt = stepping(Blocks(), journal=tmp_path / "whole", **options)
    steps_to(3, model, opt)
    state, weights = opt.state_dict(), model.state_dict()
    expected = steps_to(6, model, opt)
    opt.close()
    entries = read_journal(tmp_path / "whole").entries
    assert len({entry.eps for entry in entries}) == 6
    assert entries[1].extra == {"memory": entries[0].extra["memory"]}

    if way == "journal":
        part, first = stepping(Blocks(), journal=tmp_path / "part", **options)
        steps_to(3, part, first)
        first.close()
        again, more = stepping(Blocks(), journal=tmp_path / "part", resume=True, **options)
    elif way == "branch":
        parent = BranchPoint(tmp_path / "whole", 3)
        again, more = stepping(Blocks(), journal=tmp_path / "part", branch_from=parent, **options)
    else:
        again, more = stepping(Blocks(), **{**options, "eps": 0.5}, seed=9)
        again.load_state_dict(weights)
        more.load_state_dict(state)
        assert more.eps == entries[2].eps
    assert steps_to(6, again, more) == expected
    assert_same_tensors(again.state_dict(), model.state_dict())
    more.close()
    if way != "state":
        assert [e.extra for e in read_journal(tmp_path / "part").entries] == [e.extra for e in entries]


def test_a_memory_of_another_estimator(tmp_path: Path) -> None:
    state = stepping(Blocks(), estimator="meazo")[1].state_dict()
    for memory in (None, [1.0], ["a", "b"], [1.0, 2.0, 3.0], "ab"):
        _, opt = stepping(Blocks(), estimator="meazo", seed=1)
        with pytest.raises(distzo2.DistZO2Error, match="memory of the estimator: 2 numbers were expected, found"):
            opt.load_state_dict({**state, "distzo2": {**state["distzo2"], "memory": memory}})
    with pytest.raises(distzo2.DistZO2Error, match="memory of the estimator: 0 numbers"):
        stepping(Blocks(), seed=1)[1].load_state_dict(state)


def test_an_eps_that_is_none(tmp_path: Path) -> None:
    _, opt = stepping(Blocks())
    for eps in (0.0, -1.0, float("nan"), 1e39, "x", None):
        with pytest.raises(distzo2.DistZO2Error, match=r"^eps=.*: expected a positive number that float32 can hold"):
            opt.eps = eps
    with pytest.raises(distzo2.DistZO2Error, match="estimator is 'ES\\(ranks\\)' in the journal and 'ES\\(zscore\\)'"):
        for shape, resume in (("ranks", False), ("zscore", True)):
            made = ES(shape)
            journal = {"journal": tmp_path / "journal", "resume": resume}
            stepping(Blocks(), estimator=made, num_probes=2, **journal)[1].close()


@pytest.mark.usefixtures("own_directory")
def test_a_run_with_a_schedule_of_eps_is_branched(files: SimpleNamespace) -> None:
    options = ["--estimator=meazo", "--probes=2", "--lr=1e-3", "--eps-schedule=wsd", "--decay=0.5", "--warmup=1"]
    assert finetune(files, "--steps=6", *options) == 0
    lines = [line for line in read_metrics("out/metrics.jsonl") if line["kind"] == "step"]
    assert [line["eps"] for line in lines] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 7e-4, 4e-4], rel=1e-6)
    assert main(["finetune", "--branch-from=out", "--at-step=3", "--out=new"]) == 0
    assert_same_bits("out/checkpoint", "new/checkpoint")
