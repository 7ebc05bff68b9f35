"""Lanes in threads: what one raises comes as it was raised, the others are unwound, and no thread is left behind."""

from __future__ import annotations

import functools
import gc
import json
import threading

import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from same_bits import assert_same_tensors
from torch import nn

import distzo2
from distzo2.streaming.presence import AbsentParameter
from distzo2.weights import scratch


def watched(directory):
    """An optimizer of a model of 4 blocks, its closure, and a list that blocks add to: (block, sign, unit is held)."""
    seen = []
    model = Blocks()
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: seen.append((i, *state(i))))
    offloaded(model, directory)
    runtime = distzo2.runtime_of(model)

    def state(i):
        unit = next(u for u in runtime.units if u.name == f"blocks.{i}")
        terms = runtime._lanes.running.emission.terms
        return (terms[0].c > 0) - (terms[0].c < 0) if terms else 0, unit.index in runtime.weights._present

    def closure():
        return model(IDS)

    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(closure)  # code that is new
    seen.clear()
    return opt, closure, seen


def test_the_order_turns_at_each_block_and_slots_are_released_before_it_computes(tmp_path):
    opt, closure, seen = watched(tmp_path)
    opt.step(closure)
    assert [(i, sign) for i, sign, _ in seen] in (
        [(0, 1), (0, -1), (1, -1), (1, 1), (2, 1), (2, -1), (3, -1), (3, 1)],
        [(0, -1), (0, 1), (1, 1), (1, -1), (2, -1), (2, 1), (3, 1), (3, -1)],
    )
    assert not any(held for *_, held in seen)
    seen.clear()
    opt.check(closure)  # clean weights are used where they are
    assert all(held for _, sign, held in seen if not sign) and sum(held for *_, held in seen) >= 8


def test_a_lane_goes_on_through_units_in_place():
    opt, closure, seen = watched(None)
    opt.step(closure)
    assert [(i, sign) for i, sign, _ in seen] in (
        [(i, sign) for sign in signs for i in range(4)] for signs in ((1, -1), (-1, 1))
    )
    seen.clear()
    opt.check(closure)  # where they take turns at each block, so that they see what others leave
    assert [i for i, *_ in seen[:16]] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


class Called(nn.Module):
    """One block that is called three times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, x):
        for block in self.blocks:
            x = block(block(block(x)))
        return x.square().mean()


@pytest.mark.parametrize("weights", ["device", "disk"])
def test_no_copy_is_made_twice_and_no_block_comes_back(weights, tmp_path, monkeypatch):
    """With two micro-batches, and units of which scratch has room for no more than one."""
    monkeypatch.setattr(scratch, "CLASS_BYTES", 0)
    model = distzo2.offload(Called(), weights=weights, directory=tmp_path)
    opt, x = distzo2.ZOSGD(model, lr=1e-3), torch.randn(2, 64)
    closures = [lambda: model(x)] * 2
    opt.step(closures)
    runtime = distzo2.runtime_of(model)
    runtime.weights.flush()
    runtime.reset_stats()
    runtime.weights.enable_trace()
    for _ in range(4):
        opt.step(closures)
    runtime.weights.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("cat") == "materialize" for event in events) == 4 * 2
    if weights == "disk":
        assert runtime.stats()["bytes_up"] <= 4 * sum(unit.num_bytes for unit in runtime.units)


def test_the_end_of_an_iterator_comes_as_it_was_raised(tmp_path):
    model, opt = stepping(Blocks(), tmp_path)
    batches = iter(())
    for _ in range(2):
        with pytest.raises(StopIteration):
            opt.step(lambda: model(next(batches)))
    opt.step(lambda: model(IDS))


class Boom(Exception):
    pass


def test_an_exception_in_the_middle_of_a_block_comes_as_it_was_raised(tmp_path):
    class Fragile(nn.Linear):
        armed = False

        def forward(self, x):
            y = super().forward(x)
            if Fragile.armed:
                raise Boom("in the middle")
            return y

    model = Blocks()
    model.blocks[2][0] = Fragile(8, 8)
    offloaded(model, tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: model(IDS))
    before = model.state_dict()
    threads = threading.active_count()
    Fragile.armed = True
    for _ in range(3):
        with pytest.raises(Boom, match="in the middle"):
            opt.step(lambda: model(IDS))
    Fragile.armed = False
    assert threading.active_count() <= threads  # fewer, where models of other tests are dropped meanwhile
    assert opt.step_count == 1
    assert_same_tensors(model.state_dict(), before)
    assert all(isinstance(p, AbsentParameter) for p in model.parameters())
    opt.step(lambda: model(IDS))
    assert opt.step_count == 2


def test_only_one_lane_raises(tmp_path):
    model, opt = stepping(Blocks(), tmp_path)
    calls = []

    def closure():
        calls.append(None)
        loss = model(IDS)
        if len(calls) == 2:
            raise KeyError("second")
        return loss

    with pytest.raises(KeyError, match="second"):
        opt.step(closure)
    assert len(calls) == 2
    opt.step(lambda: model(IDS))


def test_a_model_that_is_dropped_takes_its_threads_with_it(tmp_path):
    def lanes() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("distzo2-lane")]

    def use() -> list[threading.Thread]:
        model = offloaded(Blocks(), tmp_path)
        distzo2.ZOSGD(model, lr=1e-2).step(lambda: model(IDS))
        return [thread for thread in lanes() if thread not in before]

    before = lanes()
    threads = use()
    assert len(threads) == 2
    gc.collect()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
@pytest.mark.parametrize("max_lanes", [None, 1])
def test_a_closure_knows_which_evaluation_it_is(estimator, max_lanes):
    seen, model = [], offloaded(Blocks())
    options = {"noise": "rademacher"} if estimator == "fzoo" else {}
    opt = distzo2.ZOSGD(model, lr=0, num_probes=3, estimator=estimator, max_lanes=max_lanes, **options)

    def closure(batch):
        lane = distzo2.current_lane()
        loss = model(IDS) * (1 + batch)
        assert distzo2.current_lane() is lane and lane.batch == batch
        seen.append((lane, float(loss)))
        return loss

    closures = [functools.partial(closure, batch) for batch in range(2)]
    for step in range(3):
        seen.clear()
        opt.step(closures)
        assert distzo2.current_lane() is None
        losses = {(lane.step, lane.index, lane.batch, (lane.probe, lane.sign)): loss for lane, loss in seen}
        assert losses == {
            (step, index, batch, evaluation): loss
            for index, evaluation in enumerate(opt.last.evaluations)
            for batch, loss in enumerate(opt.last.losses[index])
        }
        # Also where lanes of new code run once more, alone.
        assert sorted((lane.index, lane.batch) for lane, _ in seen if lane.first) == [(0, 0), (0, 1)]
    seen.clear()
    opt.check(closures[0])
    opt.signal(closures)
    assert len(seen) > 4 and not any(lane.first for lane, _ in seen)
    assert distzo2.evaluate(model, [lambda: (model(IDS), distzo2.current_lane())])[0][1] is None
