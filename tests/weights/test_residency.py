"""What stays on the device by a budget, and what is not written back at every step: the bits are those of any mode."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from block_models import IDS, Blocks
from same_bits import assert_same

import distzo2
from distzo2.errors import DistZO2Error
from distzo2.weights.residency import blocks_to_stream
from distzo2.weights.scratch import least_bytes

CPU = torch.device("cpu")


def blocks_that_stay(budget: int, num_blocks: int = 10) -> list[int]:
    """Numbers of the blocks that do not stream: of blocks of 4096 bytes beside a resident unit of 1000, 3 slots."""
    more = {"trainable": True, "converts": False, "beside": None}
    resident = SimpleNamespace(resident=True, stored_bytes=1000, seen_bytes=1000, **more)
    blocks = [
        SimpleNamespace(number=i, resident=False, stored_bytes=4096, seen_bytes=4096, **more) for i in range(num_blocks)
    ]
    streaming = blocks_to_stream([resident, *blocks], CPU, budget, 3, lambda: 0)
    return [i for i, block in enumerate(blocks) if block not in streaming]


LEAST = 1000 + 2 * 4096 + 3 * 4096  # residents, two perturbed copies of a block (the resident is as small), the ring


@pytest.mark.parametrize("num_staying", [0, 1, 2, 5, 6])
def test_blocks_that_stay_are_spread(num_staying: int) -> None:
    staying = blocks_that_stay(LEAST + num_staying * 4096 + 4095)
    assert len(staying) == num_staying
    gaps = [b - a for a, b in zip([-1, *staying], [*staying, 10], strict=True)]
    assert max(gaps) <= -(-10 // (num_staying + 1)) + 1


def test_all_stay_where_no_ring_is_needed() -> None:
    everything = 1000 + 2 * 4096 + 10 * 4096
    assert len(blocks_that_stay(everything - 1)) == 6  # the ring takes three, and one more does not fit by a byte
    assert blocks_that_stay(everything) == list(range(10))


def test_a_budget_that_is_too_small_says_why() -> None:
    with pytest.raises(DistZO2Error, match=r"needs at least .* on cpu \(resident units 1000 bytes, perturbed"):
        blocks_that_stay(LEAST - 1)


def test_copies_are_counted_by_classes_of_sizes() -> None:
    """An embedding and a head of its size share two copies, in the dtype that they are computed in. What is packed
    shares one."""

    def unit(resident: bool, seen_bytes: int, trainable: bool = True, packed: object = None) -> SimpleNamespace:
        return SimpleNamespace(resident=resident, seen_bytes=seen_bytes, trainable=trainable, packed=packed)

    residents = [unit(True, 8 << 20), unit(True, 9 << 20), unit(True, 100)]
    assert least_bytes([*residents, unit(False, 5 << 20), unit(False, 4 << 20)]) == 2 * ((9 << 20) + 100 + (5 << 20))
    assert least_bytes([*residents, unit(False, 5 << 20, False)]) == 2 * ((9 << 20) + 100) + (5 << 20)
    assert least_bytes([unit(i < 2, (9 - i) << 20, False, "packed") for i in range(4)]) == 9 << 20


def train(
    directory: Path, weights: str, steps: int = 4, estimator: str = "spsa", **options
) -> tuple[tuple[list, dict], int, dict]:
    """Losses and weights; how many blocks stay on the device; the figures."""
    model = Blocks(width=64, num_blocks=7).bfloat16()
    distzo2.offload(model, weights=weights, directory=directory, **options)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3, weight_decay=0.1, num_probes=2, estimator=estimator)
    losses = []
    for step in range(steps):
        opt.step(lambda ids=(IDS + step) % 32: model(ids))
        losses.append(opt.last.losses)
        if step % 3 == 1:
            with torch.no_grad():
                losses.append(model(IDS).item())
    runtime = distzo2.runtime_of(model)
    num_staying = sum(c.block < 0 and not c.unit.resident for c in runtime.weights.copies)
    result = (losses, model.state_dict()), num_staying, runtime.stats()
    runtime.close()
    return result


def test_the_bits_do_not_depend_on_the_budget(tmp_path: Path) -> None:
    expected, _, _ = train(tmp_path, "device")
    _, none_stay, streamed = train(tmp_path, "disk")
    assert none_stay == 0
    block = streamed["streamed_bytes"] // 7
    residents, slots = streamed["resident_bytes"], streamed["slot_bytes"]
    least = residents + 2 * block + slots
    uploads = []
    for num_staying, budget in ((0, least), (2, least + 2 * block), (7, "auto")):
        got, staying, stats = train(tmp_path, "disk", memory_budget=budget)
        assert staying == num_staying
        assert_same(got, expected)
        assert stats["streamed_bytes"] == (7 - num_staying) * block
        uploads.append(stats.get("bytes_up", 0))
    assert uploads[0] > uploads[1] > uploads[2] == 0


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
def test_blocks_that_are_written_in_turn(estimator: str, tmp_path: Path) -> None:
    expected, _, _ = train(tmp_path, "device", 12, estimator)
    written = {}
    for every in (1, 3, 100):
        got, _, stats = train(tmp_path, "disk", 12, estimator, write_every=every)
        assert_same(got, expected)
        written[every] = stats["bytes_down"]  # reading the state at the end writes what is behind, once
    assert written[3] < 0.5 * written[1] and written[100] < 0.2 * written[1]


def test_a_forward_alone_writes_nothing_that_is_not_due(tmp_path: Path) -> None:
    model = distzo2.offload(Blocks(), weights="disk", directory=tmp_path, write_every=50)
    distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3).step(lambda: model(IDS))
    runtime = distzo2.runtime_of(model)
    runtime.reset_stats()
    with torch.no_grad():
        first = model(IDS)
        assert model(IDS) == first and runtime.stats()["bytes_down"] == 0
        runtime.weights.flush()
        assert model(IDS) == first and runtime.stats()["bytes_down"] > 0
    runtime.close()
