"""A power cut at any call of a run that changes a file: what was synced leads to the bits of a run that went through,
whatever else the disk kept. DISTZO2_ALL_FAULTS=1 cuts at every call (`make faults`)."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_forms import ALL, arguments
from power_cut import Disk, read_record
from same_run import assert_same_run
from shimmed_runs import ShimmedRuns

RARELY_SYNCED = ["--snapshot-every=0", "--eval-every=0", "--save=last"]  # nothing but the journal needs an fsync


def go_on(runs: ShimmedRuns, directory: Path, command: list[str]) -> str:
    """Continues with what a cut has left, to the run's end; returns what it says."""
    where = sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))
    if (directory / "out/run.json").exists():
        command = ["finetune", "--resume", "--out=out"]
    answer = runs.run(directory, command)
    assert answer.status == 0, (where, answer.text)
    return answer.text


@pytest.mark.parametrize("keeps", ["what was synced", "some of the rest"])
def test_a_power_cut_loses_nothing(files, runs, undisturbed, tmp_path, keeps):
    whole, record = tmp_path / "whole", tmp_path / "record"
    whole.mkdir()
    answer = runs.run(whole, arguments(files), record=record)
    assert answer.status == 0, answer.text
    calls = read_record(record)
    disk, rng = Disk(whole / "out"), random.Random(3)
    chosen = range(len(calls)) if ALL else {*rng.sample(range(len(calls)), 5), len(calls) - 1}
    outcomes: Counter[str] = Counter()
    for number, (fields, data) in enumerate(calls):
        disk.play(fields, data)
        if number not in chosen:
            continue
        directory = tmp_path / f"{number}"
        directory.mkdir()
        disk.leave(directory / "out", rng if keeps == "some of the rest" else None)
        text = go_on(runs, directory, arguments(files))
        # A block is committed after its bytes, and after the journal's lines.
        assert "made from the base again" not in text, (number, fields, text)
        outcomes["from the weight file" if "from weights.dzo2: " in text else "from the base"] += 1
        assert_same_run(directory / "out", undisturbed.path)
        shutil.rmtree(directory)
    print(f"{keeps}: cuts at {len(chosen)} of {len(calls)} calls, {dict(outcomes)}")


@pytest.fixture(scope="module")
def rarely_synced(files, runs, tmp_path_factory) -> SimpleNamespace:
    """A run that nothing happens to; it has four probes, so that its journal has more than a page."""
    path = tmp_path_factory.mktemp("rarely")
    command = arguments(files, *RARELY_SYNCED, "--probes=4")
    answer = runs.run(path, command)
    assert answer.status == 0, answer.text
    return SimpleNamespace(path=path / "out", command=command)


@pytest.mark.parametrize("options", [["--fsync-every=64"], ["--fsync-every=5"]])
def test_a_power_cut_with_lines_that_are_not_synced(files, runs, rarely_synced, tmp_path, options):
    whole, record = tmp_path / "whole", tmp_path / "record"
    whole.mkdir()
    command = [*rarely_synced.command, *options]
    answer = runs.run(whole, command, record=record)
    assert answer.status == 0, answer.text
    calls = read_record(record)
    disk, rng = Disk(whole / "out"), random.Random(3)
    lines = [i for i, (fields, data) in enumerate(calls) if fields[0] == "W" and data.startswith(b'{"step":')]
    assert len(lines) > 6
    chosen = set(lines if ALL else lines[5::3])
    outcomes: Counter[str] = Counter()
    for number, (fields, data) in enumerate(calls):
        disk.play(fields, data)
        for keeps in (None, rng, rng) if number in chosen else ():
            directory = tmp_path / f"{number}"
            directory.mkdir()
            disk.leave(directory / "out", keeps)
            journal = directory / "out/journal.jsonl"
            outcomes["with holes"] += journal.exists() and b"\0" in journal.read_bytes()
            text = go_on(runs, directory, command)
            outcomes["torn"] += "torn and left out" in text
            outcomes["cuts"] += 1
            assert_same_run(directory / "out", rarely_synced.path)
            shutil.rmtree(directory)
    print(f"{options}: {dict(outcomes)}")
    assert outcomes["with holes"] and outcomes["torn"] >= outcomes["with holes"]


def test_the_player_ends_with_what_is_there(files, runs, tmp_path):
    """With everything synced at the end, the disk holds what the run left."""
    record = tmp_path / "record"
    assert runs.run(tmp_path, arguments(files), record=record).status == 0
    disk = Disk(tmp_path / "out")
    for fields, data in read_record(record):
        disk.play(fields, data)

    def sync(folder):
        folder.sync()
        for node in folder.now.values():
            sync(node) if hasattr(node, "now") else node.sync()

    sync(disk.top)
    disk.leave(tmp_path / "played")
    left, played = (
        {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (tmp_path / "out", tmp_path / "played")
    )
    assert played == left and "journal.jsonl" in left
