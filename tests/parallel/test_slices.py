"""Blocks in slices, one a rank, gathered by turns: the same bits, the right bytes, and nobody waits for ever."""

from __future__ import annotations

import functools
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import slice_cases
import torch
from mesh_runs import MESHES, assert_same_run
from parallel_ranks import Died, Ranks

from distzo2.parallel.node import shares_of
from distzo2.parallel.sliced_store import cut

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- where slices are cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [1, 255, 256, 257, 1000, 12_288, 12_289, 1_000_003])
@pytest.mark.parametrize("shares", [[1.0], [1.0, 1.0], [2.5] * 7, [1.0, 3.0], [1e-9, 1.0, 1.0], [3.0, 1.0, 0.5, 2.0]])
def test_slices_are_whole_multiples_of_256_bytes_that_cover_a_block(num_bytes: int, shares: list[float]):
    bounds = cut(num_bytes, shares)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and len(sizes) == len(shares)
    assert all(b % 256 == 0 for b in bounds) and all(sizes >= 256)
    assert num_bytes <= bounds[-1] < num_bytes + 256 * (len(shares) + 1)
    if len(set(shares)) == 1:
        assert len(set(sizes)) == 1
    else:
        wanted = np.array(shares) / sum(shares) * num_bytes
        assert np.abs(sizes - wanted).max() <= 256 * (len(shares) + 1)


def test_shares_follow_the_rates_of_links():
    assert shares_of([2.0, 2.2, 2.4]) == [1.0, 1.0, 1.0]
    assert shares_of([1.0, 2.0]) == [1.0, 0.5]


# ---- bits -------------------------------------------------------------------------------------------------------

FEW = ("pert=2", "pert=2,data=2", "data=2 of 3 micro-batches", "pert=2 of fzoo")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_slices_have_the_bits_of_one_rank(ranks: Ranks, alone: Any, name: str, dtype: torch.dtype, tmp_path: Path):
    shape, options = MESHES[name]
    for weights in ("host", "disk") if dtype == torch.float32 else ("disk",):
        run = functools.partial(cases.train, weights=weights, dtype=dtype, slices=True, verify_every=3, **options)
        for result in ranks.values(run, shape[0] * shape[1], shape, tmp_path):
            assert_same_run(result, alone(dtype=dtype, **options))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["host", "disk"])
@pytest.mark.parametrize("name", MESHES)
def test_slices_have_the_bits_of_one_rank_after_200_steps(ranks, alone, name, weights, dtype, tmp_path):
    shape, options = MESHES[name]
    options = {"steps": 200, "lr": 1e-3, **options}
    run = functools.partial(
        cases.train, weights=weights, dtype=dtype, slices=True, journal="journal.jsonl", verify_every=50, **options
    )
    for result in ranks.values(run, shape[0] * shape[1], shape, tmp_path, timeout=600.0):
        assert_same_run(result, alone(dtype=dtype, **options))


@pytest.mark.parametrize("what", ["unequal slices", "write_every", "memory_budget", "waves"])
def test_what_must_not_change_a_bit(ranks: Ranks, alone: Any, what: str, tmp_path: Path):
    for result in ranks.values(slice_cases.train_with, 4, (2, 2), tmp_path, what):
        assert_same_run(result, alone(steps=5))


@pytest.mark.parametrize("sharded", [True, "data"])
def test_lists_of_the_ranks_own_closures(ranks: Ranks, alone: Any, sharded: Any, tmp_path: Path):
    run = functools.partial(cases.train, sharded=sharded, slices=True, micro_batches=5)
    for result in ranks.values(run, 4, (2, 2), tmp_path):
        assert_same_run(result, alone(micro_batches=5))


def test_frozen_parameters(ranks: Ranks, tmp_path: Path):
    expected = slice_cases.frozen(0, 1, None, tmp_path)
    for result in ranks.values(slice_cases.frozen, 2, (2, 1), tmp_path):
        assert_same_run(result, expected)


@pytest.mark.parametrize("how", ["load_state_dict", "edit"])
def test_weights_that_are_replaced(ranks: Ranks, how: str, tmp_path: Path):
    expected = slice_cases.replaced(0, 1, tmp_path, None, how)
    for result in ranks.values(slice_cases.replaced, 2, tmp_path, (1, 2), how):
        assert_same_run(result, expected)


# ---- ranks that want different things ---------------------------------------------------------------------------


def test_every_rank_may_evaluate_generate_and_save(ranks: Ranks, alone: Any, tmp_path: Path):
    results = ranks.values(slice_cases.odd_ranks, 3, tmp_path)
    losses, _ = alone(steps=5, micro_batches=5)
    before = alone(steps=4, micro_batches=5)[1]
    assert all(result["losses"] == losses[-1][0] for result in results)
    plain = slice_cases.forwards(tmp_path)
    for rank, result in enumerate(results):
        assert result["seen"] == [v for step in plain for v in (step if rank == 0 else (step * 2)[: 3 * rank])], rank
    for name, value in before.items():
        assert np.array_equal(results[1]["state"][name], value), name
    from safetensors.torch import load_file

    for name, value in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert np.array_equal(value.view(torch.uint8).numpy(), before[name]), name


def test_a_rank_without_lanes_serves_the_others(ranks: Ranks, tmp_path: Path):
    expected = slice_cases.no_lanes(0, 1, tmp_path, None)
    for result in ranks.values(slice_cases.no_lanes, 2, tmp_path, (1, 2)):
        assert_same_run(result, expected)


def test_lanes_of_ranks_that_enter_other_units_are_told(ranks: Ranks, tmp_path: Path):
    first, second = ranks.values(slice_cases.differing, 2, tmp_path)
    assert first == second
    assert first.startswith("step 1: the lanes of all ranks must enter the same units in the same order")


# ---- errors -----------------------------------------------------------------------------------------------------

FAILURES = {
    "closure": ("Boom: bang", "RankFailedError: rank 3 failed in step 2: Boom: bang"),
    "interrupt": ("KeyboardInterrupt: ", "RankFailedError: rank 3 failed in step 2: interrupted"),
    "argument": ("DistZO2Error: step expects", "RankFailedError: rank 3 failed in step 2: step expects"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_an_error_on_one_rank_drops_the_step_on_all(ranks: Ranks, alone: Any, what: str, tmp_path: Path):
    results = ranks.values(slice_cases.fail_once, 4, tmp_path, what)
    own, others = FAILURES[what]
    for rank, (told, state) in enumerate(results):
        assert told.startswith(own if rank == 3 else others), told
        for name, value in alone()[1].items():
            assert np.array_equal(state[name], value), name


def test_a_slice_that_cannot_be_read_ends_all_ranks(ranks: Ranks, tmp_path: Path):
    results = ranks.run(slice_cases.broken_slice, 4, tmp_path)
    assert results[1].kind == "DistZO2Error" and "checksum" in results[1].text
    for rank in (0, 2, 3):
        assert results[rank].kind == "RankFailedError"
        assert re.match(r"(this mesh cannot be used any more: )?rank 1: .*checksum", results[rank].text)


def test_a_rank_that_is_lost_in_a_gather_ends_the_others(ranks: Ranks, tmp_path: Path):
    results = ranks.run(slice_cases.killed, 4, tmp_path, signal.SIGKILL, 30.0)
    assert results[1] == Died(-signal.SIGKILL)
    for rank in (0, 2, 3):
        assert results[rank].kind == "RankFailedError"
        assert "rank 1 was lost: its process" in results[rank].text
    results = ranks.run(slice_cases.killed, 2, tmp_path, signal.SIGSTOP, 4.0, timeout=60.0, patience=1.0)
    assert results[0].kind == "RankFailedError"
    assert "rank 1 has not been heard of for 4 s" in results[0].text


def test_ranks_that_hand_over_other_weights_are_told(ranks: Ranks, tmp_path: Path):
    for result in ranks.run(slice_cases.other_weights, 2, tmp_path):
        assert result.kind == "RanksDisagreeError"
        assert re.match(
            r"handing over a model's weights.*: the ranks do not agree on the weights: .*'blocks.2'", result.text
        )


# ---- figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_traffic_is_its_slices_and_scalars_to_the_byte(ranks: Ranks, weights: str, tmp_path: Path):
    steps, num_probes, word = 5, 2, 32
    for shape, lanes in (((2, 2), 4), ((1, 2), 8)):
        size = shape[0] * shape[1]
        results = ranks.values(slice_cases.traffic, size, shape, tmp_path, steps, weights)
        scalars = (5 + 2 + lanes) * 8
        outcome = (4 + num_probes + 4) * 8
        blocks = sum(results[0][1])
        for rank, (stats, _, parts, _) in enumerate(results):
            rounds = steps * (len(parts) + 3)  # before each of the three collectives all ranks meet
            whole = sum(sum(result[2]) for result in results)
            assert stats == {
                "collectives": 3 * steps,
                "bytes_sent": steps * (scalars + (outcome if rank == 0 else 0)),
                "bytes_received": steps * ((size - 1) * scalars + (0 if rank == 0 else outcome)),
                "slice_rounds": rounds,
                "slice_gathers": steps * len(parts),
                "slice_bytes_sent": steps * sum(parts) + rounds * word,
                "slice_bytes_received": steps * (whole - sum(parts)) + rounds * word * (size - 1),
            }
            assert blocks <= whole <= blocks + 256 * size * len(parts)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_node_keeps_one_copy(ranks: Ranks, world_size: int, tmp_path: Path):
    results = ranks.values(slice_cases.kept, world_size, tmp_path)
    streamed = 6 * (512 * 512 + 512) * 4
    pools = sum(stats["slices"]["bytes_padded"] for stats in results)
    assert all(stats["streamed_bytes"] == streamed for stats in results)
    assert streamed <= pools <= 1.02 * streamed
    assert all(stats["resident_bytes"] == 512 * 8 * 4 + 256 for stats in results)  # the head, whole on each


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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_rank_reads_its_slices_only(ranks: Ranks, dtype: str | None, tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=96,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "checkpoint")
    item = 4  # of the files
    for read, kept, state in ranks.values(slice_cases.load, 4, tmp_path, tmp_path / "checkpoint", dtype):
        assert read <= (kept * item // 4 if dtype is None else kept * item // 2 + 12 * (4 << 20))
        for name, value in model.state_dict().items():
            wanted = value if dtype is None else value.bfloat16()
            assert np.array_equal(state[name], wanted.float().numpy()), name


# ---- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("weights", ["host", "disk"])
@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_two_ranks_on_one_gpu(ranks: Ranks, shape: tuple[int, int], slices: bool, weights: str, tmp_path: Path):
    run = functools.partial(cases.train, weights=weights, device="cuda:0")
    expected = run(0, 1, None, tmp_path)
    for result in ranks.values(functools.partial(run, slices=slices), 2, shape, tmp_path):
        assert_same_run(result, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("weights", ["host", "disk"])
def test_one_rank_with_nccl(weights: str, tmp_path: Path):
    import multiprocessing
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply_async(slice_cases.train_with_nccl, (tmp_path, port, weights)).get(timeout=120)
    assert_same_run(result, cases.train(0, 1, None, tmp_path, weights=weights, device="cuda:0"))
