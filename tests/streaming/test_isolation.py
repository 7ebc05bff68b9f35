"""What is a lane's own: random streams, changed buffers and the caller's state, which is left as it was."""

from __future__ import annotations

import contextvars

import numpy as np
import torch
from block_models import IDS, Blocks, offloaded, stepping
from zoo import CONV

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

    model, opt = stepping(Counting(), lr=0.0)
    plain = Blocks().eval()(IDS).item()
    opt.step(lambda: model(IDS))
    assert np.allclose(opt.last.losses, 2 * plain, rtol=1e-2)
    assert float(model.calls) == 0


def test_the_callers_random_state_is_left_as_it_was(tmp_path):
    model = offloaded(Blocks(dropout=0.5), tmp_path, train=True)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    opt.step(lambda: model(IDS))
    assert torch.equal(torch.get_rng_state(), state)


def test_lanes_inherit_the_callers_context():
    variable = contextvars.ContextVar("variable", default=0)
    model, opt = stepping(Blocks())
    seen = []

    def closure():
        made = torch.empty(0)
        seen.append((variable.get(), torch.get_num_threads(), torch.is_grad_enabled(), made.dtype, made.device.type))
        variable.set(99)
        return model(IDS).float()

    variable.set(5)
    torch.set_num_threads(2)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            opt.step(closure)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [(5, 2, False, torch.float64, "meta")] * 4  # two lanes, and each once more alone
    assert variable.get() == 5


class _Plain:
    use_cache = True


class _Configured(Blocks):
    """Its configuration is a property."""

    @property
    def config(self):
        return self.kept

    def forward(self, ids):
        self.kept.seen = self.config.use_cache
        return super().forward(ids)


def test_a_cache_is_switched_off_wherever_its_configuration_is():
    model = _Configured()
    model.kept = _Plain()
    offloaded(model)
    distzo2.evaluate(model, [lambda: model(IDS)])
    assert model.kept.seen is False and model.kept.use_cache is True
    model.kept.use_cache = False  # by the user
    distzo2.evaluate(model, [lambda: model(IDS)])
    assert model.kept.use_cache is False
