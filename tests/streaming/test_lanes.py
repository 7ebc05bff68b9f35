"""Lanes: none sees another, all enter the same units, and the caller's state is left as it was."""

from __future__ import annotations

import contextvars
import gc
import threading

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, offloaded
from same_bits import same_bits
from torch import nn
from zoo import BY_NAME, CONV

import distzo2


def test_dropout_is_the_same_for_both_signs(tmp_path):
    model = offloaded(Blocks(dropout=0.5), tmp_path, train=True)
    assert model.training
    opt = distzo2.ZOSGD(model, lr=0.0, eps=1e-6, seed=3, num_probes=2)
    opt.step([lambda: model(IDS), lambda: model(IDS)])
    first = np.array(opt.last.losses)
    assert np.ptp(first, axis=0).max() < 1e-3  # signs and probes differ by eps alone
    assert abs(first[0, 0] - first[0, 1]) > 1e-2  # micro-batches have streams of their own
    opt.step([lambda: model(IDS), lambda: model(IDS)])
    assert abs(np.array(opt.last.losses)[0, 0] - first[0, 0]) > 1e-2  # and so have steps


def test_eval_is_the_default():
    model = Blocks(dropout=0.5)
    assert model.training
    assert not offloaded(model).training


def test_batch_norm_statistics_are_left_alone(tmp_path):
    model = offloaded(CONV.build().train(), tmp_path, train=True)
    before = {n: b.clone() for n, b in model.named_buffers()}
    opt = distzo2.ZOSGD(model, lr=1e-2, seed=3)
    single = []
    for step in range(3):
        opt.step([CONV.closure(model, step), CONV.closure(model, step)])
        losses = np.array(opt.last.losses)
        assert (losses[:, 0] == losses[:, 1]).all()  # a lane does not see what another did to the buffers
        single.append(losses[:, 0].tolist())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert single[0][0] != single[0][1]


def test_a_lane_sees_its_own_buffers():
    class Counting(Blocks):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids):
            self.calls += 1
            loss = super().forward(ids)
            self.calls += 1
            return loss * self.calls

    model = offloaded(Counting())
    opt = distzo2.ZOSGD(model, lr=0.0)
    plain = Blocks().eval()(IDS).item()
    opt.step(lambda: model(IDS))
    assert np.allclose(opt.last.losses, 2 * plain, rtol=1e-2)
    assert float(model.calls) == 0


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
    for name, value in model.state_dict().items():
        assert same_bits(value, before[name])
    assert all(torch.isnan(p).all() for p in model.parameters())
    opt.step(lambda: model(IDS))
    assert opt.step_count == 2


def test_only_one_lane_raises(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
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


def test_a_lane_that_skips_a_block_is_named():
    class Skipping(Blocks):
        def forward(self, ids, skip=None):
            x = self.embedding(ids)
            for i, block in enumerate(self.blocks):
                if i != skip:
                    x = x + block(x)
            return self.head(x).float().square().mean()

    model = offloaded(Skipping())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step([lambda: model(IDS, skip=1)] * 2)  # all lanes alike is no difference
    with pytest.raises(distzo2.DistZO2Error, match=r"position 2 .*'blocks\.1'.*'blocks\.2'"):
        opt.step([lambda: model(IDS), lambda: model(IDS, skip=1)])
    with pytest.raises(distzo2.DistZO2Error, match=r"'blocks\.3'.*'head'"):
        opt.step([lambda: model(IDS), lambda: model(IDS, skip=3)])
    opt.step([lambda: model(IDS)] * 2)


def test_a_lane_that_ends_early_is_named():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="no further unit"):
        opt.step([lambda: model(IDS), lambda: model.embedding(IDS).sum()])


def test_a_closure_that_never_enters_the_model():
    model, other = offloaded(Blocks()), Blocks()
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="without entering any unit"):
        opt.step(lambda: other(IDS))


def test_the_callers_random_state_is_left_as_it_was(tmp_path):
    model = offloaded(Blocks(dropout=0.5), tmp_path, train=True)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    opt.step(lambda: model(IDS))
    assert torch.equal(torch.get_rng_state(), state)


def test_lanes_inherit_the_callers_context():
    variable = contextvars.ContextVar("variable", default=0)
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    seen = []

    def closure():
        seen.append((variable.get(), torch.get_num_threads(), torch.is_grad_enabled(), torch.empty(0).dtype))
        variable.set(99)
        return model(IDS).float()

    variable.set(5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        opt.step(closure)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert seen == [(5, 1, False, torch.float64)] * 2
    assert variable.get() == 5


def test_default_device_modes_reach_the_lanes():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    seen = []

    def closure():
        seen.append(torch.empty(1).device.type)
        return model(IDS)

    with torch.device("meta"):
        opt.step(closure)
    assert seen == ["meta", "meta"]


def test_a_closure_must_not_step_again():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)

    def closure():
        opt.step(lambda: model(IDS))

    with pytest.raises(distzo2.DistZO2Error, match="middle of a pass"):
        opt.step(closure)


def test_per_example_losses_and_plain_numbers():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=0.0)
    scalar = float(opt.step(lambda: model(IDS)))
    assert float(opt.step(lambda: float(model(IDS)))) == pytest.approx(scalar, rel=1e-3)
    assert float(opt.step(lambda: model(IDS).repeat(4))) == pytest.approx(scalar, rel=1e-3)
    with pytest.raises(distzo2.DistZO2Error, match="dict"):
        opt.step(lambda: model(IDS) and {})


def test_check_finds_a_forward_that_is_not_deterministic():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.check(lambda: model(IDS))
    calls = iter(range(100))
    with pytest.raises(distzo2.DistZO2Error, match="not deterministic"):
        opt.check(lambda: model(IDS) + next(calls))


def test_two_threads_cannot_share_a_forward():
    model = offloaded(Blocks())
    errors = []

    def intruder():
        try:
            model(IDS)
        except distzo2.DistZO2Error as error:
            errors.append(str(error))

    def closure():
        thread = threading.Thread(target=intruder)
        thread.start()
        thread.join()
        return model(IDS)

    distzo2.ZOSGD(model, lr=1e-2).step(closure)
    assert len(errors) == 2 and "thread" in errors[0]


def test_language_model_under_dropout_in_train_mode(tmp_path):
    case = BY_NAME["gpt2"]
    model = offloaded(case.build().train(), tmp_path, train=True)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3)
    opt.step(case.closure(model))
    plus, minus = opt.last.losses[0][0], opt.last.losses[1][0]
    assert abs(plus - minus) < 0.05


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
