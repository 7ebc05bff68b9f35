"""Steps of a streamed model beside the plain loop's, bit for bit."""

from __future__ import annotations

import functools
from contextlib import nullcontext

from block_models import offloaded
from plain import flat_losses, plain_loop
from same_bits import assert_same

import distzo2


def run_both(
    build,
    loss,
    tmp_path,
    *,
    steps=3,
    prepare=lambda model: None,
    around=None,
    plain_loss=None,
    max_lanes=None,
    trainable=lambda name: True,
    **options,
):
    """Streams from disk and runs the plain loop; asserts the same bits of losses and weights.

    `loss` is a function of the model, or a list of them, one for each micro-batch; `plain_loss` is the reference's,
    where it is another. What is not `trainable` by its name is frozen. `prepare` changes the model that `build` makes
    before it is handed over; steps run within `around`. Returns the losses of each step, and both models.
    """
    model, reference = build(), build().eval()
    prepare(model)
    for name, param in model.named_parameters():
        if not trainable(name):
            param.requires_grad_(False)
    offloaded(model, tmp_path, **options)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3, max_lanes=max_lanes)

    def closures(functions, of):
        functions = functions if isinstance(functions, list) else [functions]
        return [functools.partial(function, of) for function in functions]

    losses = []
    for _ in range(steps):
        with around or nullcontext():
            opt.step(closures(loss, model))
        losses.append(flat_losses(opt))
    expected = plain_loop(
        reference, [closures(plain_loss or loss, reference)] * steps, lr=lambda step: 1e-2, eps=1e-3, seed=3,
        trainable=trainable,
    )  # fmt: skip
    assert_same((losses, model.state_dict()), (expected, reference.state_dict()))
    assert losses[0][0] != losses[0][-1]
    return losses, model, reference
