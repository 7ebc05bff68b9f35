"""Trainers on ranks: the bits of one rank, batches by data coordinate, slices that evaluation and saving are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_cases
import numpy as np
import pytest
import torch
from parallel_ranks import Died, Raised, Ranks
from tiny_text import make_checkpoint
from transformers import LlamaForCausalLM

# Of one rank; with data=2 each has one micro-batch.
STEP = {"gradient_accumulation_steps": 2, "max_steps": 4, "include_num_input_tokens_seen": "all"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, "hf_cases", "distzo2.integrations.trl")
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: str) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [hf_cases.on_ranks(0, 1, tmp_path_factory.mktemp("alone"), STEP, which) for which in (None, base)]
    torch.set_num_threads(threads)
    return found


MESHES = {
    "pert": {"zo_pert": 2} | STEP,
    "data": {"zo_data": 2} | STEP | {"gradient_accumulation_steps": 1},
    "slices": {"zo_pert": 2, "zo_slice": True, "zo_weights": "host", "zo_verify_every": 2} | STEP,
    "by itself": STEP,
}


@pytest.mark.parametrize(
    ("name", "trl"),
    [*((name, False) for name in MESHES), ("data", True), ("slices", True)],
    ids=lambda value: {False: "Trainer", True: "SFTTrainer"}.get(value, value),
)
def test_the_bits_of_one_rank(ranks: Ranks, alone: Any, base: str, tmp_path: Path, name: str, trl: bool) -> None:
    results = ranks.values(hf_cases.on_ranks, 2, tmp_path, MESHES[name], base if trl else None)
    expected, rows, _ = alone[trl]
    for weights, found, wrapper in results:
        assert wrapper == "LlamaForCausalLM"  # and not accelerate's wrapper
        for key, value in expected.items():
            np.testing.assert_array_equal(weights[key], value, err_msg=key)
        assert [row.get("loss") for row in found] == [row.get("loss") for row in rows]
        assert [row["eval_loss"] for row in found if "eval_loss" in row] == pytest.approx(
            [row["eval_loss"] for row in rows if "eval_loss" in row]
        )
    for name in ("num_tokens", "num_input_tokens_seen", "total_flos"):
        assert [row.get(name) for row in results[0][1]] == [row.get(name) for row in rows]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(loaded[key], torch.from_numpy(value)) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "killed", "again"), [("pert", (0, 1), 1), ("data", (1,), 2), ("slices", (0,), 2), ("slices", (0,), 1)]
)
def test_a_killed_run_continues(
    ranks: Ranks, alone: Any, tmp_path: Path, name: str, killed: tuple[int, ...], again: int
) -> None:
    """On the ranks that it had or on one, to the bits of a run that nothing killed; the rank that is left names what
    happened."""
    ended = ranks.run(hf_cases.on_ranks, 2, tmp_path, MESHES[name], None, killed)
    for rank, found in enumerate(ended):
        if rank in killed:
            assert found == Died(-9)
        else:
            assert isinstance(found, Raised) and f"rank {killed[0]} was lost" in found.text, found
    fields = (MESHES[name] if again == 2 else STEP) | {"zo_existing": "resume"}
    for weights, rows, _ in ranks.values(hf_cases.on_ranks, again, tmp_path, fields):
        for key, value in alone[0][0].items():
            np.testing.assert_array_equal(weights[key], value, err_msg=key)
        assert [row["loss"] for row in rows if "loss" in row][-1] == [r["loss"] for r in alone[0][1] if "loss" in r][-1]
