"""A power cut at any call of a run that changes a file: what was synced leads to the bits of a run that went through,
whatever else the disk kept. DISTZO2_ALL_FAULTS=1 cuts at every call (`make faults`)."""

from __future__ import annotations

import random
import shutil
from collections import Counter

import pytest
from power_cut import Disk, read_record
from test_disk_faults import ALL, arguments, files, runs, undisturbed  # noqa: F401  (fixtures)
from test_kills import assert_same_run


@pytest.mark.parametrize("keeps", ["what was synced", "some of the rest"])
def test_a_power_cut_loses_nothing(files, runs, undisturbed, tmp_path, keeps):  # noqa: F811
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
        where = (number, fields, sorted(str(p.relative_to(directory)) for p in directory.rglob("*")))
        if (directory / "out/run.json").exists():
            answer = runs.run(directory, ["finetune", "--resume", "--out=out"])
        else:
            answer = runs.run(directory, arguments(files))
        assert answer.status == 0, (where, answer.text)
        # A snapshot's name comes after all that it names, and after the journal's lines.
        assert "cannot be used" not in answer.text, (where, answer.text)
        outcomes["from a snapshot" if "went on from" in answer.text else "from the base"] += 1
        assert_same_run(directory / "out", undisturbed.path)
        shutil.rmtree(directory)
    print(f"{keeps}: cuts at {len(chosen)} of {len(calls)} calls, {dict(outcomes)}")


def test_the_player_ends_with_what_is_there(files, runs, tmp_path):  # noqa: F811
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
