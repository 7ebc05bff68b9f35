"""A frozen base streams one way, beside what is trained, which is resident; the bits are those of any division."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from block_models import IDS, Blocks, adapted
from plain import flat_losses, plain_loop
from same_bits import assert_same, assert_same_tensors, same_bits
from zoo import BY_NAME

import distzo2
from distzo2.weights import scratch, units

MODES = ["device", "host", "disk"]
DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
OPTIONS = {"eps": 1e-2, "seed": 11, "num_probes": 2, "weight_decay": 0.1}
STEPS = 4


def offloaded(directory: Path, weights: str, dtype=torch.float32, computed=None, *, num_blocks=4, **options):
    options |= {"weights": weights, "directory": directory, "compute_dtype": computed}
    model = distzo2.offload(adapted(dtype, num_blocks=num_blocks), **options)
    return model, distzo2.runtime_of(model)


def closures(model, step: int):
    return [lambda m=m: model((IDS + 2 * step + m) % 32) for m in range(2)]


def train(model, opt, steps: int = STEPS) -> list[list[float]]:
    losses = []
    for _ in range(steps):
        opt.step(closures(model, opt.step_count))
        losses.append(flat_losses(opt))
    return losses


def in_one(monkeypatch) -> None:
    """Divides models as before there were parts of blocks."""
    monkeypatch.setattr(units, "SMALL_SHARE", 10**9)


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize(("dtype", "computed"), DTYPES, ids=str)
def test_it_trains_as_the_plain_loop(weights, dtype, computed, tmp_path):
    reference = adapted(dtype)
    trained = {name for name, p in reference.named_parameters() if p.requires_grad}
    plan = [closures(reference, step) for step in range(STEPS)]
    losses = plain_loop(
        reference, plan, lr=lambda step: 1e-1, trainable=trained.__contains__, compute=computed, **OPTIONS
    )
    model, runtime = offloaded(tmp_path, weights, dtype, computed)
    opt = distzo2.ZOSGD(model, lr=1e-1, **OPTIONS)
    found = train(model, opt)
    state = distzo2.state_dict(model)
    assert_same((found, state), (losses, reference.state_dict()))
    only = distzo2.state_dict(model, trainable_only=True)
    assert_same_tensors(only, {name: state[name] for name in trained})
    assert all(only[name].dtype == torch.float32 for name in trained if "head" not in name)
    with torch.no_grad():
        expected = reference.float() if computed else reference
        assert same_bits(model(IDS), expected(IDS))
    runtime.close()


@pytest.mark.parametrize("max_lanes", [None, 3])
@pytest.mark.parametrize("computed", [None, torch.float32])
def test_it_is_read_once_a_pass_and_never_written(computed, max_lanes, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "CLASS_BYTES", 0)  # as of blocks that are not small
    monkeypatch.setattr(scratch, "SMALL_BYTES", 0)
    model, runtime = offloaded(tmp_path, "disk", torch.bfloat16, computed)
    opt = distzo2.ZOSGD(model, lr=1e-1, max_lanes=max_lanes, **OPTIONS)
    train(model, opt, 1)
    runtime.reset_stats()
    runtime.weights.enable_trace()
    train(model, opt)
    runtime.weights.flush()
    stats, passes = runtime.stats(), STEPS * (1 if max_lanes is None else 3)
    assert stats["bytes_down"] == stats["bytes_written"] - stats["bytes_used"] == 0
    assert stats["bytes_up"] <= passes * stats["streamed_bytes"] + stats["slot_bytes"]
    runtime.weights.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    made = Counter(e["name"] for e in events if e.get("cat") == "materialize")
    for unit in runtime.units:  # one clean copy for all lanes, or none; noise for what is trained alone
        if unit.trainable:
            assert unit.resident and made[unit.name] >= passes
        elif unit.resident:
            assert made[unit.name] <= passes * unit.converts
        else:
            assert made[unit.name] == passes * unit.converts
    assert all(copy.version == 0 for copy in runtime.weights.copies if not copy.unit.trainable)
    runtime.close()


def test_what_is_small(tmp_path):
    def parts(model) -> list[tuple[str, bool, int]]:
        runtime = distzo2.runtime_of(distzo2.offload(model, weights="disk", directory=tmp_path))
        found = [(u.name, u.resident, len(u.params)) for u in runtime.units if u.name.startswith("blocks.1")]
        runtime.close()
        return found

    assert parts(adapted()) == [("blocks.1", False, 2), ("blocks.1 (trained)", True, 2)]
    assert parts(Blocks()) == [("blocks.1", False, 2)]  # all of it is trained
    model = Blocks(width=4)  # biases are a fifth
    for block in model.blocks:
        block[0].weight.requires_grad_(False)
    assert parts(model) == [("blocks.1", False, 2)]
    frozen = adapted()
    frozen.blocks[1].requires_grad_(False)
    assert parts(frozen) == [("blocks.1", False, 4)]


@pytest.mark.parametrize("resumed", MODES)
@pytest.mark.parametrize("begun", ["host", "disk"])
@pytest.mark.parametrize("earlier", [False, True], ids=["as now", "made before"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(earlier, begun, resumed, tmp_path, monkeypatch):
    """What a crash leaves is a copy of the files at some instant. Steps without the last block are in the journal."""

    def start(run: Path, weights: str, resume: bool = False):
        kept = distzo2.WeightFile(run / "weights.dzo2", run / "journal", 2, pace=1.0)
        model, _ = offloaded(run, weights, torch.bfloat16, weight_file=kept)
        model.depth = 3
        return model, distzo2.ZOSGD(model, lr=1e-1, journal=run / "journal", resume=resume, **OPTIONS)

    def finish(model, opt):
        opt.close()
        state = model.state_dict()
        distzo2.runtime_of(model).close()
        return state

    with monkeypatch.context() as patch:
        if earlier:
            in_one(patch)
        model, opt = start(tmp_path / "run", begun)
        train(model, opt, 8)
        opt.journal.sync()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        train(model, opt, 4)
        expected = finish(model, opt)
    model, opt = start(tmp_path / "copy", resumed, resume=True)
    assert opt.step_count == 8
    train(model, opt, 4)
    assert_same_tensors(finish(model, opt), expected)


def test_frozen_blocks_of_a_weight_file_are_written_once(tmp_path):
    def start(resume: bool):
        kept = distzo2.WeightFile(tmp_path / "weights.dzo2", tmp_path / "journal", 2, pace=1.0)
        model, runtime = offloaded(tmp_path, "disk", weight_file=kept)
        return model, runtime, distzo2.ZOSGD(model, lr=1e-1, journal=tmp_path / "journal", resume=resume, **OPTIONS)

    for resume in (False, True):
        model, runtime, opt = start(resume)
        assert (runtime.stats()["bytes_written"] == 0) is resume
        train(model, opt, 6)
        opt.close()
        kept = runtime.kept
        held = [copy.unit for copy in kept.copies]
        assert held == [u for u in runtime.units if not u.resident] + [u for u in runtime.units if u.trainable]
        assert not any(kept.file.version(i) for i, unit in enumerate(held) if not unit.trainable)
        assert runtime.stats()["bytes_down"] == 0
        runtime.close()


def test_blocks_that_stay_by_a_budget_have_the_same_bits(tmp_path):
    model, runtime = offloaded(tmp_path, "disk", num_blocks=7)
    opt = distzo2.ZOSGD(model, lr=1e-1, **OPTIONS)
    expected, stats = (train(model, opt), model.state_dict()), runtime.stats()
    runtime.close()
    block = stats["streamed_bytes"] // 7
    trained = [u.num_bytes for u in runtime.units if u.trainable]
    least = stats["resident_bytes"] + 2 * sum(sorted(trained)[-2:]) + stats["slot_bytes"]
    for num_staying in (0, 2):
        model, runtime = offloaded(tmp_path, "disk", num_blocks=7, memory_budget=least + num_staying * block)
        assert sum(c.block >= 0 for c in runtime.weights.copies) == 7 - num_staying
        opt = distzo2.ZOSGD(model, lr=1e-1, **OPTIONS)
        assert_same((train(model, opt), model.state_dict()), expected)
        runtime.close()


def test_libraries_count_what_is_trained(capsys):
    from peft import LoraConfig, get_peft_model

    case = BY_NAME["llama"]
    model = get_peft_model(case.build(), LoraConfig(r=1, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = model.get_nb_trainable_parameters()
    assert 0 < expected[0] < expected[1]
    distzo2.offload(model)
    opt, seen = distzo2.ZOSGD(model, lr=1e-2), []

    def count() -> tuple[int, int]:
        model.print_trainable_parameters()
        assert capsys.readouterr().out.startswith(f"trainable params: {expected[0]:,} ||")
        base = model.base_model.model
        return base.num_parameters(only_trainable=True), base.num_parameters()

    def loss() -> torch.Tensor:
        seen.append(count())
        return case.closure(model)()

    opt.step(loss)
    assert {*seen, count()} == {expected}
    assert distzo2.state_dict(model, trainable_only=True).keys() == names
    assert distzo2.state_dict(model).keys() == model.state_dict().keys()


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("computed", [None, torch.float32], ids=str)
def test_small_parts_of_a_16_bit_base_are_trained_in_32(weights, computed, tmp_path):
    """Biases of blocks are stored in float32, and modules see them in what they declare; a matrix stays as it is."""

    def made() -> Blocks:
        model = Blocks(width=64).bfloat16()
        for name, p in model.named_parameters():
            p.requires_grad_("bias" in name or "embedding" in name)
        return model

    reference = made()
    trained = {name for name, p in reference.named_parameters() if p.requires_grad}
    plan = [closures(reference, step) for step in range(STEPS)]
    losses = plain_loop(
        reference, plan, lr=lambda step: 1e-1, trainable=trained.__contains__, compute=computed,
        wide=lambda name: "bias" in name, **OPTIONS,
    )  # fmt: skip
    model = distzo2.offload(made(), weights=weights, directory=tmp_path, compute_dtype=computed, widen=True)
    found = train(model, distzo2.ZOSGD(model, lr=1e-1, **OPTIONS))
    assert_same((found, distzo2.state_dict(model)), (losses, reference.state_dict()))
    assert {name for name, p in model.state_dict().items() if p.dtype == torch.float32} == trained - {
        "embedding.weight"
    }

    held = model.state_dict()
    with distzo2.edit(model):  # hands the model over anew
        model.blocks[0][0].bias.requires_grad_(False)
    held["blocks.0.0.bias"] = held["blocks.0.0.bias"].bfloat16()
    assert_same_tensors(model.state_dict(), held)
    dtypes = {name: p.dtype for name, p in model.state_dict().items() if "bias" in name}
    assert dtypes.pop("blocks.0.0.bias") == torch.bfloat16 and set(dtypes.values()) == {torch.float32}
    assert model(IDS).isfinite()
