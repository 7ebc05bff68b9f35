"""A pass over the weights: all lanes enter the same units, one pass runs at a time, and Ctrl-C leaves no trace."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from same_bits import assert_same_tensors, same_bits
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


class Writing(Blocks):
    """Writes a parameter of the root module where it has an `error` to raise."""

    error = None

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        loss = super().forward(ids) * self.scale
        if self.error is not None:
            self.scale.mul_(1.0)
            raise self.error
        return loss


def test_a_pass_that_fails_after_it_wrote_weights_lets_go_of_every_unit(tmp_path):
    (model, opt), (other, plain) = stepping(Writing(), tmp_path), stepping(Writing())
    forward = functools.partial(model, IDS)
    distzo2.evaluate(model, [forward])  # code that is new is watched otherwise
    opt.step(forward)
    plain.step(lambda: other(IDS))
    model.error = ValueError("no loss")
    with pytest.raises(ValueError, match="no loss"):
        distzo2.evaluate(model, [forward])
    assert_same_tensors(model.state_dict(), other.state_dict())
