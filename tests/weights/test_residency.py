"""What stays on the device by a budget, and what is not written back at every step: the bits are those of any mode."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distzo2
from distzo2.errors import DistZO2Error
from distzo2.weights.residency import blocks_to_stream

CPU = torch.device("cpu")


def blocks_that_stay(budget: int, num_blocks: int = 10) -> list[int]:
    """Numbers of the blocks that do not stream: of blocks of 4096 bytes beside a resident unit of 1000, 3 slots."""
    resident = SimpleNamespace(resident=True, num_bytes=1000, trainable=True)
    blocks = [SimpleNamespace(number=i, resident=False, num_bytes=4096, trainable=True) for i in range(num_blocks)]
    streaming = blocks_to_stream([resident, *blocks], CPU, budget, 3, lambda: 0)
    return [i for i, block in enumerate(blocks) if block not in streaming]


LEAST = 1000 + 2 * (4096 + 1000) + 3 * 4096  # residents, two perturbed copies of a block and of the resident, the ring


@pytest.mark.parametrize("num_staying", [0, 1, 2, 5, 6])
def test_blocks_that_stay_are_spread(num_staying: int) -> None:
    staying = blocks_that_stay(LEAST + num_staying * 4096 + 4095)
    assert len(staying) == num_staying
    gaps = [b - a for a, b in zip([-1, *staying], [*staying, 10], strict=True)]
    assert max(gaps) <= -(-10 // (num_staying + 1)) + 1


def test_all_stay_where_no_ring_is_needed() -> None:
    everything = 1000 + 2 * (4096 + 1000) + 10 * 4096
    assert len(blocks_that_stay(everything - 1)) == 6  # the ring takes three, and one more does not fit by a byte
    assert blocks_that_stay(everything) == list(range(10))


def test_a_budget_that_is_too_small_says_why() -> None:
    with pytest.raises(
        DistZO2Error, match=r"streaming needs at least .* on cpu \(resident units 1000 bytes, perturbed"
    ):
        blocks_that_stay(LEAST - 1)


def build() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=67, hidden_size=64, num_hidden_layers=7, intermediate_size=96, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(config).bfloat16().eval()


def train(
    directory: Path,
    weights: str,
    budget: int | str | None = None,
    steps: int = 4,
    estimator: str = "spsa",
    every: int = 1,
) -> tuple[list, dict, list, dict]:
    model = distzo2.offload(build(), weights=weights, directory=directory, memory_budget=budget, write_every=every)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3, weight_decay=0.1, num_probes=2, estimator=estimator)
    losses = []
    for step in range(steps):
        ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(step))
        opt.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss.float())
        losses.append(opt.last.losses)
        if step % 3 == 1:
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
    runtime = distzo2.runtime_of(model)
    result = (
        losses,
        model.state_dict(),
        [c for c in runtime.weights.copies if c.block < 0 and not c.unit.resident],
        runtime.stats(),
    )
    runtime.close()
    return result


def test_the_bits_do_not_depend_on_the_budget(tmp_path: Path) -> None:
    losses, state, _, stats = train(tmp_path, "device")
    _, _, none_stay, streamed = train(tmp_path, "disk")
    assert none_stay == []
    block = streamed["streamed_bytes"] // 7
    residents, slots = streamed["resident_bytes"], streamed["slot_bytes"]
    least = residents + 2 * (residents + block) + slots
    uploads = []
    for num_staying, budget in ((0, least), (2, least + 2 * block), (7, "auto")):
        got, other, staying, stats = train(tmp_path, "disk", budget)
        assert len(staying) == num_staying
        assert got == losses, budget
        assert all(torch.equal(other[key], value) for key, value in state.items()), budget
        assert stats["streamed_bytes"] == (7 - num_staying) * block
        uploads.append(stats.get("bytes_up", 0))
    assert uploads[0] > uploads[1] > uploads[2] == 0


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
def test_blocks_that_are_written_in_turn(estimator: str, tmp_path: Path) -> None:
    losses, state, _, _ = train(tmp_path, "device", steps=12, estimator=estimator)
    written = {}
    for every in (1, 3, 100):
        got, other, _, stats = train(tmp_path, "disk", steps=12, estimator=estimator, every=every)
        assert got == losses, every
        assert all(torch.equal(other[key], value) for key, value in state.items()), every
        written[every] = stats["bytes_down"]  # reading the state at the end writes what is behind, once
    assert written[3] < 0.5 * written[1] and written[100] < 0.2 * written[1]


def test_a_forward_alone_writes_nothing_that_is_not_due(tmp_path: Path) -> None:
    model = distzo2.offload(build(), weights="disk", directory=tmp_path, write_every=50)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3)
    ids = torch.randint(3, 67, (2, 9))
    opt.step(lambda: model(input_ids=ids, labels=ids).loss.float())
    runtime = distzo2.runtime_of(model)
    runtime.reset_stats()
    with torch.no_grad():
        first = model(input_ids=ids, labels=ids).loss
        again = model(input_ids=ids, labels=ids).loss
    assert first == again and runtime.stats()["bytes_down"] == 0
    runtime.weights.flush()
    assert runtime.stats()["bytes_down"] > 0
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss == first
    runtime.close()
