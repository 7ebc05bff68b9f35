"""Lanes in threads: what one raises comes as it was raised, the others are unwound, and no thread is left behind."""

from __future__ import annotations

import gc
import threading

import pytest
from block_models import IDS, Blocks, offloaded, stepping
from same_bits import assert_same_tensors
from torch import nn

import distzo2
from distzo2.streaming.presence import AbsentParameter


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
    assert threading.active_count() == threads
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
