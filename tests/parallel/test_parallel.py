"""Ranks that share steps: bit-identical replicas, equal to one rank with the same lanes; errors that reach all."""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import torch
from mesh_runs import MESHES, assert_same_run
from parallel_ranks import Died, Ranks

from distzo2.record.journal import read_journal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_has_the_bits_of_one_rank(ranks: Ranks, alone: Any, name: str, dtype: torch.dtype, tmp_path: Path):
    shape, options = MESHES[name]
    for weights in ("disk", "device") if dtype == torch.float32 else ("disk",):
        run = functools.partial(cases.train, weights=weights, dtype=dtype, **options)
        for result in ranks.values(run, shape[0] * shape[1], shape, tmp_path):
            assert_same_run(result, alone(dtype=dtype, **options))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["device", "host", "disk"])
@pytest.mark.parametrize("slice", [False])
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_has_the_bits_of_one_rank_after_200_steps(ranks, alone, name, slice, weights, dtype, tmp_path):
    shape, options = MESHES[name]
    options = {"steps": 200, "lr": 1e-3, **options}
    run = functools.partial(
        cases.train, weights=weights, dtype=dtype, slices=slice, journal="journal.jsonl", verify_every=50, **options
    )
    for result in ranks.values(run, shape[0] * shape[1], shape, tmp_path, timeout=600.0):
        assert_same_run(result, alone(dtype=dtype, **options))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_killed_runs_resume_to_the_same_bits(ranks: Ranks, alone: Any, tmp_path: Path):
    for case in range(20):
        (tmp_path / str(case)).mkdir()
        kill_and_resume(ranks, alone, case, tmp_path / str(case))


def test_ranks_of_a_machine_divide_one_reading_of_its_memory(ranks: Ranks) -> None:
    """Each read another number, as they do once some have begun to take memory; rank 2 has a machine to itself."""
    results = ranks.values(cases.pools_of_machines, 3, ["one", "one", "two"], [1_000_000, 600_000, 300_000])
    for share, (wide, narrow) in results[:2]:
        assert share == (2, None, 600_000, 300_000)
        assert narrow == "fits"
        assert "only 270000 bytes may be taken by each of 2 ranks" in wide
        assert "cgroup limit leaves: no limit, MemAvailable: 600000 bytes, RLIMIT_MEMLOCK: " in wide
    share, (wide, narrow) = results[2]
    assert share == (1, None, 300_000, 300_000)
    assert narrow == "fits"
    assert "only 270000 bytes may be taken (" in wide


@pytest.mark.parametrize("sharded", [True, "data"])
@pytest.mark.parametrize("shape", [(1, 4), (2, 2)], ids=str)
def test_lists_of_the_ranks_own_closures(
    ranks: Ranks, alone: Any, shape: tuple[int, int], sharded: Any, tmp_path: Path
):
    options = {"micro_batches": 5}
    run = functools.partial(cases.train, sharded=sharded, **options)
    for result in ranks.values(run, 4, shape, tmp_path):
        assert_same_run(result, alone(**options))


def test_a_distributed_sampler_loses_no_data(ranks: Ranks, tmp_path: Path):
    seen = ranks.values(cases.sampled, 4, tmp_path)
    together = [index for part in seen for index in part]
    assert sorted(set(together)) == list(range(24))
    assert all(together.count(index) == 2 for index in range(24))  # both signs


DIFFERENCES = {
    "closures": r"the number of closures: 4 on rank\w* 0.*, 3 on rank 1",
    "step": r"the step: 1 on rank\w* 0.*, 2 on rank 1|the ranks do different things: step 1 on rank.*step 2 on rank 1",
    "lr": r"lr: \[0.0099.*\] on rank\w* 0.*\[0.5\] on rank 1",
    "tokens": r"tokens \(.*sharded=True\): 5 on rank.*, 6 on rank 1",
    "kind": r"the ranks do different things: step 1 on rank.*, comparing replicas at step 1 on rank 1",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_do_different_things_are_all_told(ranks: Ranks, what: str, tmp_path: Path):
    results = ranks.values(cases.disagree, 4, (2, 2), tmp_path, what)
    assert len({told for told, _ in results}) == 1
    assert re.search(DIFFERENCES[what], results[0][0]), results[0][0]
    assert results[0][0].startswith("RanksDisagreeError")
    assert len({losses for _, losses in results}) == 1  # the next step is made


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("seed", "RanksDisagreeError", "seed: 11 on rank 0, 12 on rank 1"),
        ("frozen", "RanksDisagreeError", "the parameters: "),
        ("weights", "ReplicasDifferError", "first in unit "),
        ("journal options", "RanksDisagreeError", "fsync_every: 1 on rank 0, 4 on rank 1"),
        ("snapshots", "RanksDisagreeError", "having snapshots: False on rank 0, True on rank 1"),
    ],
)
def test_ranks_with_different_models_are_refused(ranks: Ranks, what: str, kind: str, text: str, tmp_path: Path):
    for result in ranks.run(cases.disagree_at_first, 2, tmp_path, what):
        assert result.kind == kind
        assert text in result.text


@pytest.mark.parametrize(
    ("what", "world_size", "own", "others"),
    [
        ("closure", 4, "Boom: bang", "RankFailedError: rank 3 failed in step 2: Boom: bang"),
        ("interrupt", 2, "KeyboardInterrupt: ", "RankFailedError: rank 1 failed in step 2: interrupted"),
        ("argument", 2, "DistZO2Error: step expects a", "RankFailedError: rank 1 failed in step 2: step expects a"),
        ("estimator", 2, "DistZO2Error: estimator SPSA", "RankFailedError: rank 0 failed in step 2: estimator SPSA"),
    ],
)
def test_an_exception_on_one_rank_drops_the_step_on_all(
    ranks: Ranks, alone: Any, what: str, world_size: int, own: str, others: str, tmp_path: Path
):
    results = ranks.values(cases.fail_once, world_size, tmp_path, what)
    failed = 0 if what == "estimator" else world_size - 1
    for rank, (told, state) in enumerate(results):
        assert told.startswith(own if rank == failed else others)
        for name, value in alone()[1].items():
            assert np.array_equal(state[name], value), name
    assert [e.step for e in read_journal(tmp_path / f"{what}.jsonl").entries] == list(range(6))


def test_a_fingerprint_that_differs_is_named(ranks: Ranks, tmp_path: Path):
    run = cases.threads_of_their_own
    assert ranks.values(run, 3, tmp_path, [1, 1, 2], False) == [
        ["rank 2 has num_threads 2 and rank 0 1: a run on another number of ranks may have other bits"], [], []
    ]  # fmt: skip
    told, *others = ranks.values(run, 2, tmp_path, [1, 1], True)
    assert others == [[]]
    assert told[0].endswith("num_threads was 1 (rank 0, 1), 2 (rank 2) and is 1: the bits of losses to come may differ")
    assert not any("device" in line or "torch" in line for line in told)


def test_lanes_of_ranks_that_enter_other_units(ranks: Ranks, tmp_path: Path):
    for result in ranks.run(cases.differing_units, 2, tmp_path):
        assert result.kind == "DistZO2Error"
        assert "those of rank 1 entered others than those of rank 0" in result.text


def test_traffic_of_a_step_is_its_scalars_to_the_byte(ranks: Ranks, tmp_path: Path):
    steps, num_probes = 5, 2
    for shape, lanes in (((2, 2), 4), ((4, 1), 4), ((1, 2), 8)):
        size = shape[0] * shape[1]
        word, losses, outcome = 5 * 8, (2 + lanes) * 8, (4 + num_probes + 4) * 8
        for rank, stats in enumerate(ranks.values(cases.traffic, size, shape, tmp_path, steps)):
            assert stats == {
                "collectives": 3 * steps,
                "bytes_sent": steps * (word + losses + (outcome if rank == 0 else 0)),
                "bytes_received": steps * ((size - 1) * (word + losses) + (0 if rank == 0 else outcome)),
            }


def test_a_replica_that_changes_is_named(ranks: Ranks, tmp_path: Path):
    for result in ranks.run(cases.changed_replica, 2, tmp_path):
        assert result.kind == "ReplicasDifferError"
        assert "after 4 steps the ranks differ, first in unit 'blocks.3' (rank 0: " in result.text


# ---- ranks that die, hang, leave -----------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_others(ranks: Ranks, tmp_path: Path):
    results = ranks.run(cases.stop_in_step, 4, tmp_path, signal.SIGKILL, 30.0)
    assert results[1] == Died(-signal.SIGKILL)
    for rank in (0, 2, 3):
        assert results[rank].kind == "RankFailedError"
        assert re.match(r"rank 1 was lost: its process \d+ has ended", results[rank].text)


def test_a_rank_that_hangs_ends_the_others(ranks: Ranks, tmp_path: Path):
    results = ranks.run(cases.stop_in_step, 2, tmp_path, signal.SIGSTOP, 4.0, timeout=60.0, patience=1.0)
    assert results[0].kind == "RankFailedError"
    assert results[0].text.startswith("rank 1 has not been heard of for 4 s: it hangs, or is cut off")
    assert isinstance(results[1], Died)


@pytest.mark.parametrize(
    ("how", "text"), [("shutdown", "rank 1 has left the mesh"), ("raise", "rank 1: Boom: out of data")]
)
def test_a_rank_that_leaves_early_is_told(ranks: Ranks, how: str, text: str, tmp_path: Path):
    results = ranks.run(cases.left_early, 3, tmp_path, how)
    for rank in (0, 2):
        assert results[rank].kind == "RankFailedError"
        assert text in results[rank].text


@pytest.mark.parametrize("case", range(3))
def test_a_killed_run_resumes_to_the_same_bits(ranks: Ranks, alone: Any, case: int, tmp_path: Path):
    kill_and_resume(ranks, alone, case, tmp_path)


def kill_and_resume(ranks: Ranks, alone: Any, case: int, tmp_path: Path) -> None:
    random = np.random.default_rng(case)
    victim = (2, 0, 3, 1)[case % 4]
    run = functools.partial(cases.train, steps=40, journal="journal.jsonl", pace=0.02)
    killed, resumed = (
        functools.partial(run, slices=slices) for slices in ((False, False), (True, False), (True, True))[case % 3]
    )

    def kill(pids: list[int]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError):
                if len((tmp_path / "journal.jsonl").read_bytes().splitlines()) > 4:
                    break
            time.sleep(0.005)
        time.sleep(float(random.uniform(0, 0.2)))
        os.kill(pids[victim], signal.SIGKILL)

    results = ranks.run(killed, 4, (2, 2), tmp_path, meanwhile=kill)
    assert results[victim] == Died(-signal.SIGKILL)
    assert {r.kind for rank, r in enumerate(results) if rank != victim} == {"RankFailedError"}
    num_steps = len(read_journal(tmp_path / "journal.jsonl").entries)
    assert 4 <= num_steps < 40
    shape = ((2, 2), (2, 1), (1, 2))[case % 3]
    for result in ranks.values(functools.partial(resumed, resume=True), shape[0] * shape[1], shape, tmp_path):
        expected = alone(steps=40)
        assert result[0] == expected[0][num_steps:]
        assert_same_run((expected[0], result[1]), expected)


def test_one_rank_goes_on_with_the_journal_of_four(ranks: Ranks, alone: Any, tmp_path: Path):
    run = functools.partial(cases.train, journal="journal.jsonl")
    ranks.values(functools.partial(run, steps=3), 4, (2, 2), tmp_path)
    header = read_journal(tmp_path / "journal.jsonl").header
    assert header["fingerprint"]["mesh"] == {"pert": 2, "data": 2}
    assert len(header["fingerprint"]["ranks"]) == 4
    result = cases.train(0, 1, None, tmp_path, journal="journal.jsonl", resume=True)
    assert_same_run((alone()[0], result[1]), alone())
    assert result[0] == alone()[0][3:]
