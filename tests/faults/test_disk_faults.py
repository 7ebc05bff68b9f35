"""A full or broken disk at each call of a run that changes a file: the run continues, or ends in one line. Resumed, it
ends with the bits of a run that nothing happened to.

By default some eight calls are tried, others for each error; DISTZO2_ALL_FAULTS=1 tries every call with both
(`make faults`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter

import pytest
from fault_forms import ALL, arguments
from same_run import assert_same_run

KINDS = {  # of runs: where the weights are, and the options that differ
    "host": ["--weights=host"],
    "disk": ["--weights=disk"],
    "synced rarely": ["--weights=host", "--save=last", "--fsync-every=5", "--trace"],
    "branch": ["--weights=disk", "--at-step=5", "--lr=2e-4"],
}


def calls_to_fail(num_calls: int, error: int) -> range:
    stride = 1 if ALL else max(1, num_calls // 8)
    return range(1 + (0 if ALL else error % stride), num_calls + 1, stride)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("host", errno.ENOSPC), ("disk", errno.EIO), ("host", errno.EIO), ("disk", errno.ENOSPC),
        ("synced rarely", errno.ENOSPC), ("synced rarely", errno.EIO), ("branch", errno.EIO), ("branch", errno.ENOSPC),
    ],
)  # fmt: skip
def test_each_call_that_fails_ends_well(files, runs, undisturbed, tmp_path, kind, error):
    outcomes: Counter[str] = Counter()
    command = arguments(files, *KINDS[kind])
    if kind == "branch":
        command.append(f"--branch-from={undisturbed.path}")
    clean = runs.run(tmp_path, command)
    assert clean.status == 0, clean.text
    expected = (tmp_path / "out").rename(tmp_path / "clean")
    if kind in ("host", "disk"):
        assert_same_run(expected, undisturbed.path)
    for fail_at in calls_to_fail(clean.num_calls, error):
        directory = tmp_path / str(fail_at)
        directory.mkdir()
        answer = runs.run(directory, command, fail_at=fail_at, error=error, and_all_after=fail_at % 3 == 0)
        where = (fail_at, answer.text)
        assert "Traceback" not in answer.text, where
        if answer.status == 0:
            outcomes["went on"] += 1
        else:
            errors = [line for line in answer.text.splitlines() if line.startswith("distzo2")]
            assert answer.status == 1 and len(errors) == 1, where
            assert os.strerror(error) in errors[0] or "room" in errors[0], where
            again = command
            if (directory / "out/run.json").exists():
                outcomes["ended, went on when resumed"] += 1
                again = ["finetune", "--resume", "--out=out"]
            else:
                outcomes["ended before the first step"] += 1
            answer = runs.run(directory, again)
            assert answer.status == 0, (fail_at, where, answer.text)
        assert_same_run(directory / "out", expected)
        shutil.rmtree(directory)
    print(f"{kind}, {os.strerror(error)}: {clean.num_calls} calls, {dict(outcomes)}")
    assert outcomes["ended, went on when resumed"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_each_call_of_a_replay_that_fails_ends_well(runs, undisturbed, tmp_path, error):
    """In one line; made again, it writes the same bits, or says that they are there already. Or it continues: a copy
    that the kernel cannot make is made by hand."""
    command = ["replay", str(undisturbed.path), "--out=out/new", "--to-step=9", "--quiet"]
    clean = runs.run(tmp_path, command)
    assert clean.status == 0, clean.text
    expected = (tmp_path / "out/new").rename(tmp_path / "clean")
    outcomes: Counter[str] = Counter()
    for fail_at in calls_to_fail(clean.num_calls, error):
        for all_after in (False, True):
            directory = tmp_path / f"{fail_at}-{all_after}"
            directory.mkdir()
            answer = runs.run(directory, command, fail_at=fail_at, error=error, and_all_after=all_after)
            where = (fail_at, all_after, answer.text)
            assert answer.text.count("\n") == 1, where
            if answer.status == 0:
                outcomes["went on"] += 1
            else:
                assert answer.status == 1, where
                assert os.strerror(error) in answer.text or "room" in answer.text, where
                again = runs.run(directory, command)
                assert again.text.count("\n") == 1 and (again.status == 0 or "already holds" in again.text), (
                    where,
                    again,
                )
                outcomes["made again" if again.status == 0 else "was there"] += 1
            assert {p.name for p in (directory / "out/new").iterdir()} == {p.name for p in expected.iterdir()}, where
            assert {p.name for p in (directory / "out").iterdir()} == {"new"}, where
            for path in expected.iterdir():
                assert (directory / "out/new" / path.name).read_bytes() == path.read_bytes(), (where, path)
            shutil.rmtree(directory)
    print(f"replay, {os.strerror(error)}: {clean.num_calls} calls, {dict(outcomes)}")
    assert outcomes["made again"] > outcomes["was there"]


def test_the_shim_fails_the_call_that_it_is_told_to(files, runs, tmp_path):
    """The first call of all makes the run's directory."""
    answer = runs.run(tmp_path, arguments(files), fail_at=1, error=errno.ENOSPC)
    assert answer.status == 1 and "out: No space left on device" in answer.text
    assert not (tmp_path / "out").exists()
