"""A pass over the weights: all lanes enter the same units, one pass runs at a time, and Ctrl-C leaves no trace."""

from __future__ import annotations

import threading

import pytest
from block_models import IDS, Blocks, offloaded, stepping
from same_bits import same_bits
from torch import nn

import distzo2


def test_a_lane_that_skips_a_block_is_named():
    class Skipping(Blocks):
        def forward(self, ids, skip=None):
            x = self.embedding(ids)
            for i, block in enumerate(self.blocks):
                if i != skip:
                    x = x + block(x)
            return self.head(x).float().square().mean()

    model, opt = stepping(Skipping())
    opt.step([lambda: model(IDS, skip=1)] * 2)  # all lanes alike is no difference
    with pytest.raises(distzo2.DistZO2Error, match=r"position 2 .*'blocks\.1'.*'blocks\.2'"):
        opt.step([lambda: model(IDS), lambda: model(IDS, skip=1)])
    with pytest.raises(distzo2.DistZO2Error, match=r"'blocks\.3'.*'head'"):
        opt.step([lambda: model(IDS), lambda: model(IDS, skip=3)])
    opt.step([lambda: model(IDS)] * 2)


def test_a_lane_that_ends_early_is_named():
    model, opt = stepping(Blocks())
    with pytest.raises(distzo2.DistZO2Error, match="no further unit"):
        opt.step([lambda: model(IDS), lambda: model.embedding(IDS).sum()])


def test_a_closure_that_never_enters_the_model():
    model, other = offloaded(Blocks()), Blocks()
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="without entering any unit"):
        opt.step(lambda: other(IDS))


def test_a_closure_must_not_step_again():
    model, opt = stepping(Blocks())

    def closure():
        opt.step(lambda: model(IDS))

    with pytest.raises(distzo2.DistZO2Error, match="middle of a pass"):
        opt.step(closure)


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
    assert len(errors) == 4 and "thread" in errors[0]


def test_a_forward_that_was_interrupted_leaves_the_model_usable(tmp_path):
    class Interrupted(nn.Linear):
        armed = False

        def forward(self, x):
            if Interrupted.armed:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Blocks()
    model.blocks[1][0] = Interrupted(8, 8)
    offloaded(model, tmp_path)
    expected = model(IDS)
    for resume in (lambda: model(IDS), lambda: distzo2.ZOSGD(model, lr=0.0), model.state_dict):
        Interrupted.armed = True
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
        Interrupted.armed = False
        resume()
        assert same_bits(model(IDS), expected)
