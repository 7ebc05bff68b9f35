"""What the ranks of a node share: its memory, and slices where they are faster, or the only way."""

from __future__ import annotations

import re
from pathlib import Path

import parallel_cases as cases
import slice_cases
import torch
import torch.distributed as dist
from parallel_ranks import Ranks, mesh_of

import distzo2.parallel
from distzo2.parallel import node
from distzo2.parallel.node import backend_of, shares_of
from distzo2.parallel.slice_rounds import SliceExchange
from distzo2.weights.units import Unit


def test_ranks_of_a_machine_divide_one_reading_of_its_memory(ranks: Ranks) -> None:
    """Each read another number, as they do once some have begun to take memory; rank 2 has a machine to itself."""
    results = ranks.values(cases.pools_of_machines, 3, ["one", "one", "two"], [1_000_000, 600_000, 300_000], None)
    for share, (wide, narrow) in results[:2]:
        assert share == (2, None, 600_000, 300_000)
        assert narrow == "fits"
        assert "only 270000 bytes may be taken by each of 2 ranks" in wide
        assert "cgroup limit leaves: no limit, MemAvailable: 600000 bytes, RLIMIT_MEMLOCK: " in wide
    share, (wide, narrow) = results[2]
    assert share == (1, None, 300_000, 300_000)
    assert narrow == "fits"
    assert "only 270000 bytes may be taken (" in wide
    # As asked, for the ranks of a machine together, whatever is available.
    results = ranks.values(cases.pools_of_machines, 3, ["one", "one", "two"], [1000, 1000, 1000], 580_000)
    assert [row[0][3] for row in results] == [290_000, 290_000, 580_000]
    assert [row[1][1] for row in results] == ["fits"] * 3
    assert "by each of 2 ranks (host_memory= or --host-memory: 580000 bytes, " in results[0][1][0]


def test_shares_follow_the_rates_of_links():
    assert shares_of([2.0, 2.2, 2.4]) == [1.0, 1.0, 1.0]
    assert shares_of([1.0, 2.0]) == [1.0, 0.5]


def test_gathers_go_through_nccl_between_gpus_of_the_ranks_own_only(ranks: Ranks, alone, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert backend_of(torch.device("cuda:1"), [[7, 8], [7]]) == "nccl"  # of two nodes
    assert backend_of(torch.device("cuda:1"), [[7, 7], [8]]) == "gloo"
    assert backend_of(torch.device("cpu"), [[0]]) == "gloo"
    for result in ranks.values(slice_cases.on_cpus_beside_gpus, 2, tmp_path):
        cases.assert_same_run(result, alone())


def test_nccl_makes_its_communicator_before_memory_is_divided(monkeypatch):
    calls, connect = [], SliceExchange.connect
    for name in ("gather", "wait"):
        monkeypatch.setattr(SliceExchange, name, lambda *args, name=name: calls.append((name, args[-1])) or [None])
    monkeypatch.setattr(SliceExchange, "connect", lambda self, _: calls.append("connect") or connect(self, "gloo"))
    monkeypatch.setattr(node, "backend_of", lambda device, gpus: "nccl")
    unit = Unit(0, "unit", [], [], resident=False)
    try:
        slicing = node.choose_slices(mesh_of(1, 1, slice=True, log=str), [unit], torch.device("cpu"), "host", None)
    finally:
        distzo2.parallel.shutdown()
    assert slicing.backend == "nccl"
    assert calls == ["connect", ("gather", "nccl"), ("wait", "nccl")]


def test_what_is_chosen_is_said(ranks: Ranks, tmp_path: Path):
    first, second = ranks.values(slice_cases.chosen, 2, tmp_path, "host", None)
    assert first == ["slices: off (weights in memory are used where they are; slice= or --slice sets it)", "False"]
    assert second == ["False"]
    first, second = ranks.values(slice_cases.chosen, 2, tmp_path, "disk", 20_000)
    assert re.fullmatch(
        r"slices: on \(a copy for each rank, .*, does not fit into the .* of disk to be had; .*\)", first[0]
    )
    assert first[1:] == second == ["True"]
    first, second = ranks.values(slice_cases.chosen, 2, tmp_path, "disk", None)
    figures = r"of \d+\.\d MiB slices come in [\d.]+ ms and are gathered in [\d.]+ ms, the whole comes in [\d.]+ ms"
    told = re.fullmatch(rf"slices: (on|off) \({figures}; slice= or --slice sets it(; .* a rank)?\)", first[0])
    assert told and first[1:] == second == [str(told[1] == "on")]
