"""SIGKILL at random instants of a run: while it loads, trains, copies weights, evaluates, replays and saves. Resumed,
it ends with the journal, the evaluations and the checkpoint of a run that nothing happened to.

DISTZO2_NUM_KILLS says how many times at least (`make faults`: 200).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import kill_cases
import pytest
import torch
from cli_runs import weights
from same_run import assert_same_run

NUM_KILLS = int(os.environ.get("DISTZO2_NUM_KILLS", "10"))
STEPS = 36


def arguments(files: SimpleNamespace, save: str, *more: str) -> list[str]:
    return [
        "finetune", f"--model={files.model}", f"--train={files.train}", f"--eval={files.eval}", "--out=out",
        f"--steps={STEPS}", "--batch-size=4", "--lr=1e-3", "--seed=6", "--quiet", "--threads=1",
        "--eval-every=9", "--score=loss", "--schedule=cosine", "--snapshot-every=5", "--snapshot-pace=1",
        f"--save={save}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Runs that nothing happens to, by what they save."""
    runs = {}
    for save in ("last", "best"):
        path = tmp_path_factory.mktemp(save)
        kill_cases.run(path, ["--help"])  # the server has started
        ended = kill_cases.run(path, arguments(files, save, "--weights=host"))
        assert ended.status == 0, ended.text
        best = json.loads((path / "out/run.json").read_text())["best_step"]
        assert 0 < best < STEPS  # so that saving it is replaying some of the steps
        runs[save] = SimpleNamespace(path=path / "out", seconds=ended.seconds)
    return runs


def phase_of(run: Path) -> str:
    """What a killed run was at, from what it left."""
    if not (run / "journal.jsonl").exists():
        return "starting" if (run / "run.json").exists() else "before anything was written"
    steps = (run / "journal.jsonl").read_bytes().count(b"\n") - 1
    if (run / "checkpoint").exists():
        hidden = [p for p in (run / "checkpoint").iterdir() if p.name.startswith(".")]
        return "saving" if hidden else "after saving"
    if steps >= STEPS:
        return "replaying or saving"
    return "training" if steps > 0 else "before the first step"


def instant(rng: random.Random, run: Path, seconds: float) -> tuple[float, Callable[[], bool]]:
    """So many seconds after something: after the start, after some step's line, or after the last one's, where the
    checkpoint is written."""
    journal, choice = run / "journal.jsonl", rng.random()
    if choice < 0.15:
        return rng.uniform(0, 0.5 * seconds), lambda: True
    steps = rng.randrange(STEPS) if choice < 0.75 else STEPS
    after = rng.uniform(0, 0.05) if choice < 0.75 else rng.uniform(0, 0.3)
    return after, lambda: journal.exists() and journal.read_bytes().count(b"\n") > steps


def test_killed_at_any_instant_a_run_ends_with_the_same_bits(files, undisturbed, tmp_path):
    rng = random.Random(int(os.environ.get("DISTZO2_KILL_SEED", "1")))
    phases: Counter[str] = Counter()
    total = 0
    for number in itertools.count():
        if total >= NUM_KILLS:
            break
        directory = tmp_path / str(number)
        directory.mkdir()
        save = rng.choice(["last", "best"])
        kinds = [f"--weights={rng.choice(['host', 'disk', 'device'])}" for _ in range(8)]
        command = arguments(files, save, kinds[0])
        num_kills, ended = rng.choice([1, 1, 2, 3]), None
        for attempt in range(num_kills):
            after, once = instant(rng, directory / "out", undisturbed[save].seconds)
            if attempt:
                command = ["finetune", "--resume", "--out=out", kinds[attempt]]
            ended = kill_cases.run(directory, command, after, once)
            if not ended.killed:
                break
            total += 1
            phases[phase_of(directory / "out")] += 1
            if not (directory / "out/run.json").exists():  # nothing to resume: it is said, and a new run may begin
                refused = kill_cases.run(directory, ["finetune", "--resume", "--out=out"])
                assert refused.status == 2 and refused.text.count("\n") == 1 and "holds no run" in refused.text
                command = arguments(files, save, kinds[attempt])
                break
        if ended.killed:
            if (directory / "out/run.json").exists():
                command = ["finetune", "--resume", "--out=out", kinds[-1]]
            ended = kill_cases.run(directory, command)
        assert ended.status == 0 and "Traceback" not in ended.text, (number, phases, ended.text)
        phases["resumed from a weight file"] += "from weights.dzo2: " in ended.text
        assert "made from the base again" not in ended.text, ended.text
        assert_same_run(directory / "out", undisturbed[save].path)
        shutil.rmtree(directory)
    print(f"{total} kills in {number} runs: {dict(phases)}")
    if NUM_KILLS >= 50:
        assert phases["resumed from a weight file"] and phases["training"], phases


def test_a_killed_replay_leaves_nothing_or_the_right_bits(files, undisturbed, tmp_path):
    """Killed at any instant, most of all while it writes, the output has no config.json or is whole; made again, it
    is whole."""
    rng = random.Random(2)
    run = undisturbed["last"].path
    command = ["replay", str(run), "--out=deep/out", "--quiet"]
    whole = kill_cases.run(tmp_path, command)
    assert whole.status == 0, whole.text
    shutil.rmtree(tmp_path / "deep")
    num_cut = 0
    for number in range(max(6, NUM_KILLS // 5)):
        if number % 2:  # from the first byte on disk

            def begun() -> bool:
                return (tmp_path / "deep/out/.distzo2-checkpoint").exists()

            kill_cases.run(tmp_path, command, rng.uniform(0, 0.03), begun)
        else:
            kill_cases.run(tmp_path, command, rng.uniform(0.3, 1.05) * whole.seconds)
        num_cut += (tmp_path / "deep/out/.distzo2-checkpoint").exists()
        if not (tmp_path / "deep/out/config.json").exists():
            again = kill_cases.run(tmp_path, command)
            assert again.status == 0, again.text
            assert not [p for p in (tmp_path / "deep/out").iterdir() if p.name.startswith(".")]
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
        a, b = weights(tmp_path / "deep/out"), weights(run / "checkpoint")
        assert all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in b)
        names = {p.name for p in (tmp_path / "deep/out").iterdir()} - {".distzo2-checkpoint"}
        assert names == {p.name for p in (run / "checkpoint").iterdir()}
        shutil.rmtree(tmp_path / "deep")
    assert num_cut
