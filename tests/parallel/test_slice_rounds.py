"""Slices where ranks differ, fail, leave or want different things: an error on all of them, or the right bits."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_streams
import pytest
import slice_cases
import torch
from parallel_cases import assert_same_weights
from parallel_ranks import Ranks, mesh_of

import distzo2.parallel
from distzo2.errors import DistZO2Error
from distzo2.parallel import slice_rounds
from distzo2.parallel.heartbeat import RankFailedError
from distzo2.parallel.slice_rounds import WANTS, SliceExchange, Word
from distzo2.parallel.sliced_store import SlicedStore, slices_of
from distzo2.weights.store import MemoryStore, Store, StoredCopy
from distzo2.weights.units import Unit
from distzo2_core import aligned_buffer


def test_an_edit_that_fails_on_one_rank_changes_nothing(ranks: Ranks, tmp_path: Path):
    results = ranks.values(slice_cases.edit_fails, 2, tmp_path)
    assert [told for told, _ in results] == [
        "RankFailedError: rank 1 failed in edit: ValueError: not like this",
        "ValueError: not like this",
    ]
    assert all(same for _, same in results)


@pytest.mark.parametrize("how", ["hand over", "load_state_dict"])
def test_ranks_with_other_weights_are_told(ranks: Ranks, how: str, tmp_path: Path):
    for result in ranks.run(slice_cases.other_weights, 2, tmp_path, how):
        assert result.kind == "RanksDisagreeError", result
        assert re.match(r"(load_state|handing).*: the ranks do not agree on the weights: .*'blocks.2", result.text)


HAND_OVER = {  # what rank 1 raises, and rank 0
    "directory": ("", r"rank 1 failed in .*: .*rank1"),
    "memory_budget": (r"handing over .*: the ranks do not agree on the blocks that stream \(memory_budget=\)",) * 2,
    "alone": (r"the ranks do different things: loading on rank 0, handing over a model on rank 1",) * 2,
}


@pytest.mark.parametrize("what", HAND_OVER)
def test_a_model_is_handed_over_by_all_ranks_or_none(ranks: Ranks, what: str, tmp_path: Path):
    first, second = ranks.run(slice_cases.hand_over, 2, tmp_path, what, timeout=60.0)
    assert re.match(HAND_OVER[what][1], first.text), first
    assert re.match(HAND_OVER[what][0], second.text), second


@pytest.mark.parametrize("what", ["EIO", "other"])
def test_a_checkpoint_that_one_rank_cannot_read_or_reads_alone(ranks: Ranks, what: str, tmp_path: Path):
    for rank in range(2):
        slice_cases.small_llama(rank if what == "other" else 0).save_pretrained(tmp_path / f"checkpoint{rank}")
    first, second = ranks.run(slice_cases.load_checkpoint, 2, tmp_path, what, timeout=60.0)
    if what == "EIO":
        assert (second.kind, first.kind) == ("OSError", "RankFailedError")
        assert re.match(r"rank 1 failed in loading.*: OSError: .*Input/output error", first.text)
        return
    for result in (first, second):
        assert result.kind == "RanksDisagreeError", result
        assert result.text.startswith("loading a checkpoint: the ranks do not agree on the source")


def test_a_model_that_is_closed_on_one_rank_only(ranks: Ranks, alone: Any, tmp_path: Path):
    losses, state = alone(steps=2)
    for result in ranks.values(slice_cases.two_models, 2, tmp_path, timeout=60.0):
        assert result[0] == losses[-1][0]
        assert_same_weights(result[1], state)


def test_ranks_whose_programs_end_serve_the_others_until_the_end(ranks: Ranks, alone: Any, tmp_path: Path):
    results = ranks.values(slice_cases.ends_first, 3, tmp_path, "read", timeout=60.0)
    assert_same_weights(results[0], alone(steps=1, micro_batches=3)[1])
    assert results[1:] == [None, None]
    results = ranks.run(slice_cases.ends_first, 3, tmp_path, "step", timeout=60.0)
    assert results[0].kind == "RankFailedError" and re.match(r"rank [12] has left the mesh", results[0].text)


@pytest.mark.parametrize("how", slice_cases.WAITS)
def test_a_rank_that_waits_serves_the_others(ranks: Ranks, how: str, tmp_path: Path):
    seen, losses = slice_cases.waits(0, 1, tmp_path, how)
    assert ranks.values(slice_cases.waits, 2, tmp_path, how, timeout=60.0) == [(seen, losses), ([], losses)]


def test_ranks_that_wait_for_different_things_are_told(ranks: Ranks, tmp_path: Path):
    for result in ranks.run(slice_cases.waits_for_another, 2, tmp_path, timeout=60.0):
        assert result.kind == "RanksDisagreeError"
        assert "step 0 on rank 0, torch.distributed.barrier on rank 1" in result.text


def test_an_interrupt_ends_a_long_wait_for_another_rank(ranks: Ranks, tmp_path: Path):
    assert ranks.values(slice_cases.interrupted, 2, tmp_path, timeout=60.0) == [True, True]


@pytest.mark.parametrize("numbers", [(0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 1, 0)], ids=str)
def test_slices_stay_within_their_node(ranks: Ranks, alone: Any, numbers: tuple[int, ...], tmp_path: Path):
    losses, state = alone(steps=4, micro_batches=4)
    results = ranks.values(slice_cases.on_nodes, 4, tmp_path, numbers, timeout=60.0)
    for rank, (node, last, mine) in enumerate(results):
        assert node == tuple(r for r in range(4) if numbers[r] == numbers[rank])
        assert last == losses[-1][0]
        assert_same_weights(mine, state)


def closed_by_peer() -> None:
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("where", ["start", "wait", "act", "connect"])
def test_an_error_that_follows_the_loss_of_a_rank_names_that_rank(where: str, monkeypatch):
    mesh = mesh_of(1, 1, slice=True)
    exchange, heartbeat, node = mesh.exchange, mesh.exchange.heartbeat, mesh.node
    try:
        node.connect("gloo")
        node.stores[node.new_store()] = lambda index, stamp, ours: closed_by_peer()
        calls = {
            "start": lambda: exchange.start(closed_by_peer),
            "wait": lambda: exchange.wait(SimpleNamespace(is_completed=lambda: True, wait=closed_by_peer)),
            "act": lambda: (node.say(Word(WANTS)), node.act()),
            "connect": lambda: SliceExchange(exchange, [[0]]).connect("gloo"),
        }
        monkeypatch.setattr(slice_rounds, "new_group", lambda ranks, backend: closed_by_peer())
        monkeypatch.setattr(heartbeat, "check", lambda: None)  # the loss is noticed after the call
        heartbeat.fail("rank 1 was lost: its process 7 has ended", 1)
        for _ in range(2):  # and so does whatever follows
            with pytest.raises(RankFailedError, match="rank 1 was lost: its process 7 has ended") as raised:
                calls[where]()
            assert raised.value.rank == 1
    finally:
        distzo2.parallel.shutdown()


def test_gathers_run_beside_compute(ranks: Ranks, tmp_path: Path):
    for num_ahead, num_gathers in ranks.values(slice_cases.ahead, 2, tmp_path):
        assert num_gathers == 8
        assert num_ahead >= 3  # the first of a pass cannot


class _Work:
    done = False

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.done = True


def test_a_buffer_is_filled_again_only_after_its_gather_has_ended(monkeypatch):
    """The gathers of this node end when they are waited for."""
    node, works = mesh_of(1, 1, slice=True).node, []
    monkeypatch.setattr(node, "gather", lambda parts, backend: works.append(_Work()) or works[-1:])
    monkeypatch.setattr(node, "wait", lambda work, backend: work.wait())

    class Weights:
        stamp = 0

        def stamp_of(self, unit: Unit) -> int:
            return self.stamp

        def write_up_to_date(self, copy: StoredCopy, stored: torch.Tensor, out: torch.Tensor) -> bool:
            assert all(work.done for work in works[:-2])  # of three buffers two may be in flight
            out.fill_(copy.block)
            return False

    units = [Unit(i, str(i), [], [], resident=False) for i in range(8)]
    device, weights = torch.device("cpu"), Weights()
    copies = slices_of(units, [1.0], 0)
    try:
        store = SlicedStore(
            MemoryStore(copies, device), copies, device, slots=3, node=node, shares=[1.0], backend="gloo"
        )
        store.serve(weights, 0)
        for index in range(8):
            store.begin(index, 0, ours=False)
        assert len(works) == 8
        weights.stamp = 1
        with pytest.raises(DistZO2Error, match="wanted with other updates"):
            store.begin(0, 0, ours=False)
        store.close()
    finally:
        distzo2.parallel.shutdown()


def test_a_buffer_on_a_gpu_is_filled_behind_its_readers_on_all_streams(monkeypatch):
    """The weight file reads a gathered block on a stream of its own; one event stands for all readers of a buffer."""
    cuda, reader = fake_streams.install(monkeypatch), fake_streams.Stream()
    device, unit = torch.device("cuda:1"), Unit(0, "unit", [], [], resident=False)
    copies = slices_of([unit], [1.0], 0)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: aligned_buffer(size))
    node = SimpleNamespace(index=0, stores={}, bring=lambda want, begun: begun() or store.begin(0, want.stamp, True))
    node.gather = lambda parts, backend: []
    before = cuda.work()  # on memory that becomes a buffer
    store = SlicedStore(Store(), copies, device, slots=2, node=node, shares=[1.0], backend="nccl")
    assert store._side.priority < 0
    monkeypatch.setattr(Store, "acquire", lambda self, copy: None)
    weights = SimpleNamespace(
        stamp=0, stamp_of=lambda unit: weights.stamp, write_up_to_date=lambda *args: bool(cuda.work())
    )
    store.serve(weights, 0)
    reads: list[Any] = []
    for stream in (reader, None):
        store.acquire(copies[0])
        assert store._side.is_behind(before)
        reads.append(cuda.work())
        if stream is not None:
            stream.wait_stream(cuda.compute)
            reads.append(stream.work())
        store.release(copies[0], False, stream)
    assert not any(store._side.is_behind(read) for read in reads)
    for weights.stamp in (1, 2):  # to the other buffer, and to this one
        store.begin(0, weights.stamp, False)
    assert all(store._side.is_behind(read) for read in reads)
