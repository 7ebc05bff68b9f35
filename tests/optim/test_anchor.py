"""Decay towards the start: the bits of a plain loop wherever weights live, resumed, replayed, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, adapted
from same_bits import assert_same, assert_same_tensors
from torch import nn
from zoo import BY_NAME

import distzo2
import distzo2_core
from distzo2.errors import DistZO2Error
from distzo2.models.replay import replay
from distzo2.record.journal import read_journal
from distzo2.record.line import JournalError
from distzo2.record.lineage import BranchPoint
from distzo2_core.reference import fma

RUN = {"lr": 2e-2, "eps": 1e-3, "seed": 3, "weight_decay": 0.1, "anchor": 0.5}


def kept(model: nn.Module, weights: str = "host", **options) -> nn.Module:
    return distzo2.offload(model, weights=weights, keep_start=True, **options)


def advance(model: nn.Module, opt: distzo2.ZOSGD, until: int) -> list:
    losses = []
    while opt.step_count < until:
        opt.step(lambda: model(IDS))
        losses.append(opt.last.losses)
    return losses


def fused(a: float, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(fma(np.float32(a), b.numpy(), c.numpy()))


def test_steps_are_those_of_a_plain_loop():
    reference = Blocks().eval().requires_grad_(False)
    model = kept(Blocks())
    opt = distzo2.ZOSGD(model, **RUN)
    params = [p.data for p in reference.parameters()]
    start = [w.clone() for w in params]
    for step in range(5):
        place = {"seed": RUN["seed"], "step": step}
        noise = [distzo2_core.normal(w.numel(), **place, param=i).view(w.shape) for i, w in enumerate(params)]
        losses = []
        for sign in (+1, -1):
            clean = [w.clone() for w in params]
            for w, z in zip(params, noise, strict=True):
                w.copy_(fused(sign * np.float32(RUN["eps"]), z, w))
            losses.append(float(reference(IDS)))
            for w, before in zip(params, clean, strict=True):
                w.copy_(before)
        coef = np.float32((losses[0] - losses[1]) / (2 * float(np.float32(RUN["eps"]))))
        for w, w0, z in zip(params, start, noise, strict=True):
            a = w * np.float32(RUN["weight_decay"]) if w.dim() > 1 else torch.zeros_like(w)  # of all that is trained
            a = fused(coef, z, fused(RUN["anchor"], w - w0, a))
            w.copy_(fused(-np.float32(RUN["lr"]), a, w))
        opt.step(lambda: model(IDS))
        assert opt.last.coefs == [float(coef)]
    assert_same_tensors(model.state_dict(), reference.state_dict())


def partly_frozen(seed: int = 5) -> Blocks:
    model = Blocks(width=64, num_blocks=6, seed=seed).bfloat16()
    model.blocks[2].requires_grad_(False)
    model.blocks[3][0].bias.requires_grad_(False)
    model.blocks[4].float()
    model.blocks[4].register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    model.blocks[4].register_forward_hook(lambda module, inputs, output: output.bfloat16())
    return model


def train(weights: str, directory: Path, steps: int = 6, *, anchor: float = 0.5, **options) -> tuple[tuple, dict]:
    model = kept(partly_frozen(), weights, directory=directory if weights == "disk" else None, **options)
    opt = distzo2.ZOSGD(model, **(RUN | {"anchor": anchor}), momentum=0.5, momentum_window=3)
    result = advance(model, opt, steps), model.state_dict()
    stats = distzo2.runtime_of(model).stats()
    distzo2.runtime_of(model).close()
    return result, stats


def test_the_bits_do_not_depend_on_where_weights_live(tmp_path: Path):
    expected, _ = train("device", tmp_path)
    disk, stats = train("disk", tmp_path)
    assert_same(disk, expected)
    residents, block = stats["resident_bytes"], stats["slot_bytes"] // 3
    budget = residents + 2 * block + stats["slot_bytes"] + 2 * block
    for weights, options in (("host", {}), ("disk", {"write_every": 3}), ("disk", {"memory_budget": budget})):
        assert_same(train(weights, tmp_path, **options)[0], expected)
    assert train("device", tmp_path, anchor=0.0)[0][0] != expected[0]
    start = {name: w.float() for name, w in partly_frozen().state_dict().items()}
    far, near = (train("device", tmp_path, 12, anchor=anchor)[0][1] for anchor in (0.0, 30.0))
    moved = [sum(float((w.float() - start[n]).square().sum()) for n, w in state.items()) for state in (far, near)]
    assert moved[1] < 0.7 * moved[0]


def test_without_an_anchor_nothing_changes(tmp_path: Path):
    states, journals = [], []
    for keep_start in (False, True):
        model = distzo2.offload(partly_frozen(), keep_start=keep_start)
        opt = distzo2.ZOSGD(model, **(RUN | {"anchor": 0.0}), journal=tmp_path / f"{keep_start}")
        states.append((advance(model, opt, 4), model.state_dict()))
        opt.close()
        journals.append(read_journal(tmp_path / f"{keep_start}"))
    assert_same(states[1], states[0])
    assert journals[1].header == journals[0].header
    assert journals[0].header["journal"] == 3 and "anchor" not in journals[0].header["groups"][0]
    lines = (tmp_path / "True").read_bytes().splitlines()
    assert all(len(group) == 4 for line in lines[1:] for group in json.loads(line)["groups"])


def test_a_journal_with_an_anchor_is_of_another_version(tmp_path: Path):
    model = kept(Blocks())
    opt = distzo2.ZOSGD(model, **RUN, journal=tmp_path / "journal")
    advance(model, opt, 2)
    opt.close()
    contents = read_journal(tmp_path / "journal")
    assert contents.header["journal"] == 4 and contents.header["groups"][0]["anchor"] == 0.5
    assert contents.entries[1].update.groups[1] == (*np.float32([2e-2, 0, 1, 1]).tolist(), 0.5)
    lines = (tmp_path / "journal").read_bytes().splitlines()
    assert all(len(group) == 5 for line in lines[1:] for group in json.loads(line)["groups"])
    # A run that begins without one gets none; a branch of it may have one, and one of the other may have none.
    opt = distzo2.ZOSGD(model, **(RUN | {"anchor": 0.0}), journal=tmp_path / "plain")
    advance(model, opt, 1)
    opt.param_groups[0]["anchor"] = 0.5
    with pytest.raises(JournalError, match="step 1: an anchor is no member of version 3: the run began without one"):
        advance(model, opt, 2)
    opt.close()
    for anchor in (0.5, 0.0):
        branch = BranchPoint(tmp_path / "journal")
        again = kept(Blocks())
        opt = distzo2.ZOSGD(again, **(RUN | {"anchor": anchor}), journal=tmp_path / f"b{anchor}", branch_from=branch)
        advance(again, opt, 3)
        opt.close()
        assert read_journal(tmp_path / f"b{anchor}").header["journal"] == 4


@pytest.mark.parametrize(("begun", "resumed"), [("disk", "disk"), ("host", "disk"), ("disk", "host"), ("", "disk")])
def test_resumes_to_the_same_bits(tmp_path: Path, begun: str, resumed: str):
    """Blocks of the weight file bring their start along; without a file it is the base."""
    model = kept(partly_frozen())
    opt = distzo2.ZOSGD(model, **RUN, journal=tmp_path / "whole")
    expected = advance(model, opt, 9)
    opt.close()

    def placed(weights: str) -> nn.Module:
        file = distzo2.WeightFile(tmp_path / "weights.dzo2", tmp_path / "journal", every=2, pace=1.0)
        return kept(partly_frozen(), weights or "host", weight_file=file if begun else None, **where)

    where = {} if begun else {"directory": tmp_path}
    first = placed(begun)
    opt = distzo2.ZOSGD(first, **RUN, journal=tmp_path / "journal")
    losses = advance(first, opt, 6)
    opt.close()
    distzo2.runtime_of(first).close()
    again = placed(resumed)
    runtime = distzo2.runtime_of(again)
    if begun == "disk":
        assert any(runtime.kept.versions[c.unit.index] > 0 for c in runtime.weights.copies if c.starts)
    opt = distzo2.ZOSGD(again, **RUN, journal=tmp_path / "journal", resume=True)
    assert_same((losses + advance(again, opt, 9), again.state_dict()), (expected, model.state_dict()))
    opt.close()
    runtime.close()


def test_an_adapter_is_pulled_to_its_start(tmp_path: Path):
    results = []
    for weights in ("device", "disk"):
        model = kept(adapted(torch.bfloat16), weights, directory=tmp_path if weights == "disk" else None)
        opt = distzo2.ZOSGD(model, **RUN)
        results.append((advance(model, opt, 4), model.state_dict()))
        streamed = [c for c in distzo2.runtime_of(model).weights.copies if c.streams]
        assert not any(c.starts for c in streamed)  # what is frozen has none
        distzo2.runtime_of(model).close()
    assert_same(results[1], results[0])


@pytest.mark.parametrize("how", ["load_state_dict", "edit", "optimizer"])
def test_replaced_weights_and_a_new_optimizer_start_anew(tmp_path: Path, how: str):
    model = kept(partly_frozen(), "disk", directory=tmp_path)
    advance(model, distzo2.ZOSGD(model, **RUN), 3)
    if how == "load_state_dict":
        model.load_state_dict(partly_frozen(seed=9).state_dict())
    elif how == "edit":
        with distzo2.edit(model), torch.no_grad():
            model.blocks[0][0].weight.mul_(0.5)
    fresh = partly_frozen()
    fresh.load_state_dict(model.state_dict())
    results = []
    for each in (model, kept(fresh)):
        opt = distzo2.ZOSGD(each, **RUN)
        results.append((advance(each, opt, 3), each.state_dict()))
        distzo2.runtime_of(each).close()
    assert_same(*results)


def test_replay_has_the_start_at_hand(tmp_path: Path):
    case, base = BY_NAME["opt-tied"], tmp_path / "base"
    case.build().to(torch.bfloat16).save_pretrained(base)
    model = distzo2.from_pretrained(base, weights="disk", directory=tmp_path, keep_start=True)
    opt = distzo2.ZOSGD(model, **RUN, num_probes=2, journal=tmp_path / "journal.jsonl")
    for step in range(5):
        opt.step(case.closure(model, step))
    opt.close()
    distzo2.save_pretrained(model, tmp_path / "live")
    replay(base, tmp_path / "journal.jsonl", tmp_path / "out", progress=False, piece_bytes=5000)
    files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("out", "live")]
    assert files[0] == files[1]


def test_refusals(tmp_path: Path):
    model = distzo2.offload(Blocks())
    with pytest.raises(DistZO2Error, match=r"anchor of parameter group 0 is 0.5: hand the model over with keep_start="):
        distzo2.ZOSGD(model, **RUN)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.param_groups[0]["anchor"] = 0.5
    with pytest.raises(DistZO2Error, match="keep_start=True, which keeps a copy of the weights at the start"):
        advance(model, opt, 1)
    for anchor, message in ((-1.0, "anchor of parameter group 0 is -1.0; 0 or more"), (float("nan"), "anchor of")):
        with pytest.raises(DistZO2Error, match=message):
            distzo2.ZOSGD(kept(Blocks()), lr=1e-2, anchor=anchor)
    model = kept(Blocks())
    opt = distzo2.ZOSGD(model, **RUN)
    advance(model, opt, 2)
    state = opt.state_dict()
    opt.load_state_dict(state)  # its own, as libraries do
    with pytest.raises(DistZO2Error, match="the state has an anchor, and not the weights that it pulls to: resume a"):
        distzo2.ZOSGD(kept(Blocks()), **RUN).load_state_dict(state)
    del state["param_groups"][0]["anchor"]  # of an older version
    state["param_groups"][1]["anchor"] = 0.0
    loaded = distzo2.ZOSGD(kept(Blocks()), **RUN)
    loaded.load_state_dict(state)
    assert loaded._scalars()[0].anchor == 0.0


@pytest.mark.parametrize(("how", "why"), [("affine8", "stored as codes"), ("gain", "of gains")])
def test_codes_and_gains_are_not_pulled(tmp_path: Path, how: str, why: str):
    slice_cases = pytest.importorskip("slice_cases")
    slice_cases.small_llama(2).bfloat16().save_pretrained(tmp_path / "raw")
    store = {"store": "affine8"} if how == "affine8" else {"store": "affine4", "prepare": distzo2.gains}
    model = distzo2.from_pretrained(tmp_path / "raw", **store, keep_start=True)
    with pytest.raises(DistZO2Error, match=rf"anchor of parameter group 0 is 0.5: \S+ is {why}, which no anchor pulls"):
        distzo2.ZOSGD(model, lr=1e-2, anchor=0.5)
