"""Long trainings with weights on disk, disturbed as users disturb them, against the same with resident weights."""

from __future__ import annotations

import functools

import pytest
import torch
from block_models import IDS, Blocks
from same_bits import assert_same

import distzo2
import distzo2_core

build = functools.partial(Blocks, width=16, num_blocks=6)


def train(weights: str, directory, num_steps: int, dtype: torch.dtype, **options):
    """Losses of every step and evaluation, and the weights at the end."""
    model = distzo2.offload(build().to(dtype), weights=weights, directory=directory, **options)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=5, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=num_steps)
    generator = torch.Generator().manual_seed(8)
    losses = []
    for step in range(num_steps):
        ids = torch.randint(0, 32, (2, 6), generator=generator)
        losses.append(opt.step(lambda ids=ids: model(ids)))
        schedule.step()
        if step % 17 == 0:  # a forward between two steps sees every update made so far
            with torch.no_grad():
                losses.append(model(ids).item())
        if step % 83 == 0:  # and so does whoever reads the weights
            losses.append(float(sum(v.double().sum() for v in model.state_dict().values())))
    state = model.state_dict()
    distzo2.runtime_of(model).close()
    return [float(loss) for loss in losses], state


LONG = pytest.param(1000, marks=pytest.mark.slow)


@pytest.mark.parametrize("num_steps", [60, LONG])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {"slots": 2}), (torch.float32, {"write_every": 3}),
     (torch.bfloat16, {"write_every": 3})],
    ids=str,
)  # fmt: skip
def test_a_long_training_from_disk_has_the_bits_of_a_resident_one(num_steps, dtype, options, tmp_path):
    expected = train("device", None, num_steps, dtype)
    assert_same(train("disk", tmp_path, num_steps, dtype, **options), expected)
    initial = build().to(dtype).state_dict()
    for name, value in expected[1].items():
        assert value.isfinite().all() and not torch.equal(value, initial[name]), name  # else equal bits say little


@pytest.mark.parametrize("weights", ["device", "disk"])
def test_nothing_is_allocated_in_the_steady_state(weights, tmp_path):
    """Of what is ours, and large: pools, slots, scratch. (The forward's own tensors are the user's.)"""
    model = distzo2.offload(build(), weights=weights, directory=tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-3, eps=1e-3)
    made = []
    for _ in range(110):
        opt.step(lambda: model(IDS))
        made.append(distzo2_core._C.arenas_made())
    assert made[9] == made[109] > 0
    distzo2.runtime_of(model).close()
