"""Blocks in slices, one a rank, gathered by turns: the same bits, the right bytes, and nobody waits for ever."""

from __future__ import annotations

import functools
import multiprocessing
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import slice_cases
import torch
from parallel_cases import assert_same_run, assert_same_weights
from parallel_ranks import Ranks
from safetensors.torch import load_file

from distzo2.parallel.sliced_store import cut


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


@pytest.mark.parametrize("what", ["unequal slices", "write_every", "memory_budget", "waves"])
def test_what_must_not_change_a_bit(ranks: Ranks, alone: Any, what: str, tmp_path: Path):
    for result in ranks.values(slice_cases.train_with, 4, (2, 2), tmp_path, what):
        assert_same_run(result, alone(steps=5))


@pytest.mark.parametrize(
    ("case", "shape", "how"),
    [
        (slice_cases.frozen, (2, 1), ()),
        (slice_cases.tiny, (1, 2), ()),
        (slice_cases.frozen, (2, 1), (torch.bfloat16, torch.float32)),
        (slice_cases.frozen, (1, 2), (torch.bfloat16, torch.float32, 3)),
        (slice_cases.frozen, (1, 2), (torch.bfloat16, None, 3, 0.5)),
        (slice_cases.anchored, (2, 1), ("host",)),
        (slice_cases.anchored, (2, 1), ("disk",)),
        (slice_cases.one_way, (2, 1), (None,)),
        (slice_cases.one_way, (1, 2), (torch.float32,)),
        (slice_cases.no_lanes, (1, 2), ()),
        (slice_cases.with_reference, (2, 1), ()),
        (slice_cases.with_reference, (1, 2), ()),
        (slice_cases.replaced, (1, 2), ("load_state_dict",)),
        (slice_cases.replaced, (1, 2), ("edit",)),
    ],
)
def test_frozen_parameters_replaced_weights_and_ranks_without_lanes(ranks: Ranks, case, shape, how, tmp_path: Path):
    expected = case(0, 1, tmp_path, None, *how)
    for result in ranks.values(case, 2, tmp_path, shape, *how):
        assert_same_run(result, expected)


@pytest.mark.parametrize(("weights", "how"), [("host", "frozen"), ("disk", "frozen"), ("disk", "gains")])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_packed_blocks_are_gathered_packed(ranks: Ranks, weights, how: str, shape: tuple[int, int], tmp_path: Path):
    tiny_gguf = pytest.importorskip("tiny_gguf", exc_type=ImportError)
    model = tiny_gguf.make_model("llama", num_hidden_layers=3)
    tiny_gguf.write(tmp_path / "model.gguf", "llama", model, "Q4_K", quantized=True)
    expected = slice_cases.packed(0, 1, tmp_path, None, weights, how)
    for result in ranks.values(slice_cases.packed, 2, tmp_path, shape, weights, how):
        assert_same_run(result, expected)


@pytest.mark.parametrize("store", ["affine8", "affine16"])
@pytest.mark.parametrize(
    ("weights", "shape", "more"),
    [("host", (2, 1), {}), ("disk", (1, 2), {}), ("host", (4, 1), {}), ("disk", (2, 1), {"write_every": 3})],
    ids=str,
)
def test_codes_are_cut_between_groups(ranks: Ranks, store: str, weights: str, shape, more, tmp_path: Path):
    """Each rank updates the codes of its slice by scales that lie in another."""
    slice_cases.small_llama(3).bfloat16().save_pretrained(tmp_path / "raw")
    expected = slice_cases.packed(0, 1, tmp_path, None, "device", store)
    run = functools.partial(slice_cases.packed, **more)
    for result in ranks.values(run, shape[0] * shape[1], tmp_path, shape, weights, store):
        assert_same_run(result, expected)


def test_every_rank_may_evaluate_generate_and_save(ranks: Ranks, alone: Any, tmp_path: Path):
    results = ranks.values(slice_cases.odd_ranks, 3, tmp_path)
    losses, _ = alone(steps=5, micro_batches=5)
    before = alone(steps=4, micro_batches=5)[1]
    assert all(result["losses"] == losses[-1][0] for result in results)
    plain = slice_cases.odd_ranks(0, 1, tmp_path / "plain")["seen"]
    for rank, result in enumerate(results):
        assert result["seen"] == [v for i in range(0, 12, 3) for v in plain[i : i + 3] * max(rank, 1)], rank
    assert_same_weights(results[1]["state"], before)
    for name, value in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert np.array_equal(value.view(torch.uint8).numpy(), before[name]), name


def test_a_slice_that_cannot_be_read_ends_all_ranks(ranks: Ranks, tmp_path: Path):
    results = ranks.run(slice_cases.broken_slice, 4, tmp_path)
    assert results[1].kind == "DistZO2Error" and "checksum" in results[1].text
    for result in (results[0], *results[2:]):
        assert result.kind == "RankFailedError"
        assert re.match(r"(this mesh cannot be used any more: )?rank 1: .*checksum", result.text)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_node_keeps_one_copy(ranks: Ranks, world_size: int, tmp_path: Path):
    results = ranks.values(slice_cases.kept, world_size, tmp_path)
    streamed = 6 * (512 * 512 + 512) * 4
    pools = sum(stats["slices"]["bytes_padded"] for stats in results)
    assert all(stats["streamed_bytes"] == streamed for stats in results)
    assert streamed <= pools <= 1.02 * streamed
    assert all(stats["resident_bytes"] == 2 * 32 * 512 * 4 for stats in results)  # embedding and head, whole on each


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_rank_reads_its_slices_only(ranks: Ranks, dtype: str | None, tmp_path: Path):
    model = slice_cases.small_llama(3)
    model.save_pretrained(tmp_path / "checkpoint")
    item = 4  # of the files
    for read, kept, state in ranks.values(slice_cases.load, 4, tmp_path, tmp_path / "checkpoint", dtype):
        assert read <= (kept * item // 4 if dtype is None else kept * item // 2 + 12 * (4 << 20))
        for name, value in model.state_dict().items():
            wanted = value if dtype is None else value.bfloat16()
            assert np.array_equal(state[name], wanted.float().numpy()), name


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply_async(slice_cases.train_with_nccl, (tmp_path, port, weights)).get(timeout=120)
    assert_same_run(result, cases.train(0, 1, None, tmp_path, weights=weights, device="cuda:0"))
