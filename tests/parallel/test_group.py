"""Ranks that share steps: bit-identical replicas, equal to one rank with the same lanes; errors that reach all."""

from __future__ import annotations

import collections
import functools
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import torch
from parallel_cases import MESHES, assert_same_run, assert_same_weights
from parallel_ranks import Died, Ranks

from distzo2.record.journal import read_journal

CASES = [(name, slices, torch.float32) for name in MESHES for slices in (False, True)]
CASES += [(name, i % 2 == 1, torch.bfloat16) for i, name in enumerate(MESHES)]


@pytest.mark.parametrize("steps", [6, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize(("name", "slices", "dtype"), CASES)
def test_every_mesh_has_the_bits_of_one_rank(ranks: Ranks, alone: Any, name, slices, dtype, steps, tmp_path: Path):
    shape, lanes = MESHES[name]
    same = {"dtype": dtype, "steps": steps, **({"lr": 1e-3} if steps == 200 else {}), **lanes}
    places = ["disk", "host" if slices else "device", *(["host"] if steps == 200 and not slices else [])]
    for weights in places if dtype == torch.float32 or steps == 200 else ["disk"]:
        options = {"journal": f"{weights}.jsonl", "verify_every": 3 if steps == 6 else 50}
        run = functools.partial(cases.train, weights=weights, slices=slices, **options, **same)
        for result in ranks.values(run, shape[0] * shape[1], shape, tmp_path, timeout=600.0):
            assert_same_run(result, alone(**same))


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_lanes_that_make_unequal_numbers_of_passes(ranks: Ranks, alone: Any, shape, slices, tmp_path: Path):
    """A rank whose lanes have ended serves its slices while others go on."""
    run = functools.partial(cases.train, weights="disk" if slices else "host", slices=slices, make=cases.written_by)
    for result in ranks.values(run, 2, shape, tmp_path):
        assert_same_run(result, alone(make=cases.written_by))


WIDE = {"dtype": torch.bfloat16, "compute": torch.float32}


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("name", ["pert=2", "data=2", "pert=2,data=2"])
def test_a_mesh_that_computes_in_another_dtype(ranks: Ranks, alone: Any, name: str, slices: bool, tmp_path: Path):
    """It has the bits of one rank, and one rank goes on with its journal."""
    shape, _ = MESHES[name]
    run = functools.partial(cases.train, slices=slices, journal="journal.jsonl", **WIDE)
    expected, before = alone(**WIDE), functools.partial(run, steps=3)
    for history, _ in ranks.values(before, shape[0] * shape[1], shape, tmp_path):
        assert history == expected[0][:3]
    fingerprint = read_journal(tmp_path / "journal.jsonl").header["fingerprint"]
    assert fingerprint["mesh"] == {"pert": shape[0], "data": shape[1]}
    assert len(fingerprint["ranks"]) == shape[0] * shape[1]
    history, state = cases.train(0, 1, None, tmp_path, weights="host", journal="journal.jsonl", resume=True, **WIDE)
    assert_same_run((expected[0][:3] + history, state), expected)
    assert expected[0] != alone(dtype=torch.bfloat16)[0]


@pytest.mark.parametrize(("shape", "slices", "sharded"), [((2, 1), True, False), ((1, 2), False, True)], ids=str)
def test_momentum_and_batches_of_each_probe(ranks: Ranks, alone: Any, shape, slices, sharded, tmp_path: Path):
    """Two ranks have the bits of one, and one goes on with their journal in the middle of the window."""
    options = {"num_probes": 3, "micro_batches": 6, "probe_batches": "own", "momentum": 0.6, "momentum_window": 4}
    run = functools.partial(cases.train, slices=slices, sharded=sharded, journal="journal.jsonl", **options)
    expected = alone(**options)
    for history, _ in ranks.values(functools.partial(run, steps=3), 2, shape, tmp_path):
        assert history == expected[0][:3]
    history, state = cases.train(0, 1, None, tmp_path, weights="host", journal="journal.jsonl", resume=True, **options)
    assert_same_run((expected[0][:3] + history, state), expected)


@pytest.mark.parametrize(
    ("shape", "slices", "sharded"),
    [((1, 4), False, True), ((2, 2), False, "data"), ((2, 2), True, True), ((2, 2), True, "data")],
    ids=str,
)
def test_lists_of_the_ranks_own_closures(ranks: Ranks, alone: Any, shape, slices, sharded: Any, tmp_path: Path):
    run = functools.partial(cases.train, sharded=sharded, slices=slices, micro_batches=5)
    for result in ranks.values(run, 4, shape, tmp_path):
        assert_same_run(result, alone(micro_batches=5))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2), {"sharded": True}),  # rank 0 has no lanes
        ((2, 1), {"weights": "host"}),
        ((1, 2), {"sharded": True, "slices": True}),
        ((2, 1), {"slices": True, "weights": "host"}),
        ((2, 2), {"slices": True}),
        ((1, 2), {"sharded": True, "known": True}),
    ],
    ids=str,
)
def test_sums_and_unused_units_on_ranks_have_the_bits_of_one(ranks: Ranks, shape, options, tmp_path: Path):
    """Rank 0 resumes its journal with the other ranks, and then alone."""
    size, run = shape[0] * shape[1], functools.partial(cases.half_used, **options)
    known = options.get("known", False)
    alone = cases.half_used(0, 1, None, tmp_path / "alone", weights="device", known=known)
    used = [unused for *_, unused in alone[0]]
    assert (
        used[0] == used[2] and used[1] == used[3] and used[0][0][0] > used[1][0][0] and used[0][0][1] == used[1][0][1]
    )
    for result in ranks.values(run, size, shape, tmp_path):
        assert_same_run(result, alone)
    for steps, resume in ((3, False), (4, True)):
        again = functools.partial(run, steps=steps, journal="journal.jsonl", resume=resume)
        for result in ranks.values(again, size, shape, tmp_path):
            assert result[0] == alone[0][steps - len(result[0]) : steps]
    last = cases.half_used(0, 1, None, tmp_path, weights="host", journal="journal.jsonl", resume=True, known=known)
    assert_same_run((last[0], last[1]), (alone[0][4:], alone[1]))


def test_a_distributed_sampler_loses_no_data(ranks: Ranks, tmp_path: Path):
    seen = ranks.values(cases.sampled, 4, tmp_path)
    counts = collections.Counter(index for part in seen for index in part)
    assert counts.keys() == set(range(24)) and min(counts.values()) == 2  # both signs
    assert sum(counts.values()) == 2 * 24 + 4 * 2 * 3  # both first lanes of each rank ran once more, alone


DIFFERENCES = {
    "closures": r"the number of closures: 4 on rank\w* 0.*, 3 on rank 1",
    "step": r"the step: 1 on rank\w* 0.*, 2 on rank 1|the ranks do different things: step 1 on rank.*step 2 on rank 1",
    "lr": r"lr: \[0.0099.*\] on rank\w* 0.*\[0.5\] on rank 1",
    "tokens": r"tokens \(.*sharded=True\): 5 on rank.*, 6 on rank 1",
    "count": r"count: 4\.0 on rank.*, 5\.0 on rank 1",
    "kind": r"the ranks do different things: step 1 on rank.*, comparing replicas at step 1 on rank 1",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_do_different_things_are_all_told(ranks: Ranks, what: str, tmp_path: Path):
    results = ranks.values(cases.disagree, 4, (2, 2), tmp_path, what)
    assert results == results[:1] * 4  # the next step is made
    assert re.search(f"RanksDisagreeError: .*({DIFFERENCES[what]})", results[0][0]), results[0][0]


SUMS = r"\([0-9a-f]{16} on rank 0, [0-9a-f]{16} on rank 1\)"


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("seed", "RanksDisagreeError", "seed: 11 on rank 0, 12 on rank 1"),
        ("frozen", "RanksDisagreeError", "the parameters: "),
        ("weights", "ReplicasDifferError", f"first in unit '[a-z0-9.]*' {SUMS}$"),
        ("journal options", "RanksDisagreeError", "fsync_every: 1 on rank 0, 4 on rank 1"),
        ("a bit", "ReplicasDifferError", f"after 4 steps the ranks differ, first in unit 'blocks.3' {SUMS}$"),
    ],
)
def test_ranks_with_different_models_are_refused(ranks: Ranks, what: str, kind: str, text: str, tmp_path: Path):
    for result in ranks.run(cases.differ, 2, tmp_path, what):
        assert result.kind == kind
        assert re.search(text, result.text), result.text


FAILURES = {  # on the last rank, or on rank 0
    "closure": ("Boom: bang", "Boom: bang"),
    "interrupt": ("KeyboardInterrupt: ", "interrupted"),
    "argument": ("DistZO2Error: step expects a closure", "step expects a closure"),
    "estimator": ("DistZO2Error: estimator SPSA gave", "estimator SPSA gave"),
}


@pytest.mark.parametrize(
    ("what", "world_size", "slices"),
    [("closure", 4, False), ("interrupt", 2, False), ("argument", 2, False), ("estimator", 2, False),
     ("closure", 4, True), ("interrupt", 4, True), ("argument", 4, True)],
)  # fmt: skip
def test_an_error_on_one_rank_drops_the_step_on_all(ranks: Ranks, alone: Any, what, world_size, slices, tmp_path: Path):
    failed = 0 if what == "estimator" else world_size - 1
    own, others = FAILURES[what][0], f"RankFailedError: rank {failed} failed in step 2: {FAILURES[what][1]}"
    for rank, (told, state) in enumerate(ranks.values(cases.fail_once, world_size, tmp_path, what, slices)):
        assert told.startswith(own if rank == failed else others), told
        assert_same_weights(state, alone()[1])
    assert [e.step for e in read_journal(tmp_path / f"{what}.jsonl").entries] == list(range(6))


def test_a_line_is_durable_before_a_rank_may_store_its_update(ranks: Ranks, tmp_path: Path):
    """Where weights are on disk; elsewhere a rank learns with each update how far the journal is synced."""
    for weights, fsync_every, versions in (("disk", 1, [0, 1, 2, 3, 4]), ("host", 64, [0] * 5)):
        directory = tmp_path / weights
        directory.mkdir()
        assert ranks.values(cases.durable_versions, 2, directory, weights, fsync_every)[1] == versions


def test_a_fingerprint_that_differs_is_named(ranks: Ranks, tmp_path: Path):
    run = cases.threads_of_their_own
    assert ranks.values(run, 3, tmp_path, [1, 1, 2], False) == [
        ["rank 2 has num_threads 2 and rank 0 1: a run on another number of ranks may have other bits"], [], []
    ]  # fmt: skip
    told, *others = ranks.values(run, 2, tmp_path, [1, 1], True)
    assert others == [[]]
    assert told[0].endswith("num_threads was 1 (rank 0, 1), 2 (rank 2) and is 1: the bits of losses to come may differ")
    assert not any("device" in line or "torch" in line for line in told)


@pytest.mark.parametrize("slices", [False, True])
def test_lanes_of_ranks_that_enter_other_units(ranks: Ranks, slices: bool, tmp_path: Path):
    first, second = ranks.values(cases.differing_units, 2, tmp_path, slices)
    assert first == second
    assert first[0].startswith("step 1: the lanes of all ranks must enter the same units in the same order")
    assert "those of rank 1 entered others than those of rank 0" in first[0]


@pytest.mark.parametrize(
    ("shape", "lanes", "weights", "slices"),
    [((2, 2), 4, "device", False), ((4, 1), 4, "device", False), ((1, 2), 8, "device", False),
     ((2, 2), 4, "host", True), ((1, 2), 8, "disk", True)],
)  # fmt: skip
def test_traffic_is_scalars_and_slices_to_the_byte(ranks: Ranks, shape, lanes, weights, slices, tmp_path: Path):
    """`lanes` are those of the busiest rank."""
    steps, num_probes, size, round_bytes = 5, 2, shape[0] * shape[1], 32
    word, losses, outcome = 5 * 8, (3 + 1 + 2 * lanes) * 8, (5 + num_probes) * 8  # a bit for each unit in one word
    results = ranks.values(cases.traffic, size, shape, tmp_path, steps, weights, slices)
    whole = sum(sum(parts) for _, parts in results)
    for rank, (stats, parts) in enumerate(results):
        expected = {
            "collectives": 3 * steps,
            "bytes_sent": steps * (word + losses + (outcome if rank == 0 else 0)),
            "bytes_received": steps * ((size - 1) * (word + losses) + (0 if rank == 0 else outcome)),
        }
        if slices:
            rounds = steps * (len(parts) + 3)  # before each of the three collectives all ranks meet
            expected |= {
                "slice_rounds": rounds,
                "slice_gathers": steps * len(parts),
                "slice_bytes_sent": steps * sum(parts) + rounds * round_bytes,
                "slice_bytes_received": steps * (whole - sum(parts)) + rounds * round_bytes * (size - 1),
            }
        assert stats == expected


# ---- ranks that die, hang, leave -----------------------------------------------------------------------------------


STOPPED = {  # by a signal or otherwise: ranks, seconds of the heartbeat's limit, what the others say
    signal.SIGKILL: (4, 30.0, r"rank 1 was lost: its process \d+ has ended"),
    signal.SIGSTOP: (2, 4.0, "rank 1 has not been heard of for 4 s: it hangs, or is cut off"),
    "shutdown": (3, 30.0, "rank 1 has left the mesh"),
    "raise": (3, 30.0, "rank 1: Boom: out of data"),
}


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("how", STOPPED)
def test_a_rank_that_dies_hangs_or_leaves_ends_the_others(ranks: Ranks, how: Any, slices: bool, tmp_path: Path):
    world_size, limit, text = STOPPED[how]
    patience = 1.0 if how == signal.SIGSTOP else None
    results = ranks.run(cases.stop, world_size, tmp_path, how, limit, slices, timeout=60.0, patience=patience)
    stopped = results.pop(1)
    assert how != signal.SIGKILL or stopped == Died(-how)
    for result in results:
        assert result.kind == "RankFailedError" and re.search(text, result.text), result.traceback


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c > 2 else []) for c in range(20)])
def test_a_killed_run_resumes_to_the_same_bits(ranks: Ranks, alone: Any, case: int, tmp_path: Path):
    random = np.random.default_rng(case)
    victim = (2, 0, 3, 1)[case % 4]
    run = functools.partial(cases.train, steps=40, journal="journal.jsonl")
    slices = ((False, False), (True, False), (True, True))[case % 3]  # before and after

    def kill(pids: list[int]) -> None:
        deadline, journal = time.monotonic() + 60, tmp_path / "journal.jsonl"
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 4) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(float(random.uniform(0, 0.2)))
        os.kill(pids[victim], signal.SIGKILL)

    slow = functools.partial(run, slices=slices[0], pace=0.1)  # not at its end when a busy machine kills it
    results = ranks.run(slow, 4, (2, 2), tmp_path, meanwhile=kill)
    assert results.pop(victim) == Died(-signal.SIGKILL)
    assert [result.kind for result in results] == ["RankFailedError"] * 3, results
    num_steps = len(read_journal(tmp_path / "journal.jsonl").entries)
    assert 4 <= num_steps < 40
    shape = ((2, 2), (2, 1), (1, 2))[case % 3]
    resumed, expected = functools.partial(run, slices=slices[1], resume=True), alone(steps=40)
    for result in ranks.values(resumed, shape[0] * shape[1], shape, tmp_path):
        assert result[0] == expected[0][num_steps:]
        assert_same_run((expected[0], result[1]), expected)
