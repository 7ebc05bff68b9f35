"""Parameters between and around forwards: countable, and named where their weights would be read or written."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, offloaded
from both_ways import run_both
from same_bits import assert_same_tensors, same_bits
from torch import nn

import distzo2
from distzo2.streaming.presence import AbsentParameter

READS = {
    "norm": lambda p: p.norm(),
    "data": lambda p: p.data.abs(),
    "index": lambda p: p[0],
    "numpy": np.asarray,
    "item": lambda p: p.tolist(),
    "matmul": lambda p: torch.ones(1, 8) @ p,
    "stack": lambda p: torch.stack([p, p]),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda p: torch.save(p, io.BytesIO()),
    "initialise": nn.init.zeros_,
    "in place": lambda p: p.add_(1),
    "data in place": lambda p: p.data.mul_(0.5),
    "assign": lambda p: p.__setitem__(0, 1.0),
    "data replaced": lambda p: setattr(p, "data", torch.zeros(8, 8)),
    "out": lambda p: torch.add(torch.ones(8, 8), 1, out=p),
    "state of torch's optimizers": lambda p: torch._foreach_add_([p], 1.0),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_between_steps_a_parameter_is_named(read, tmp_path):
    model = offloaded(Blocks(), tmp_path)
    with (
        pytest.raises(distzo2.DistZO2Error, match=r"blocks\.1\.0\.weight.*state_dict\(\).*edit\(model\)"),
        torch.no_grad(),
    ):
        read(model.blocks[1][0].weight)
    assert torch.isfinite(model(IDS))


def test_what_only_counts_works():
    model, plain = offloaded(Blocks()), Blocks()
    for (name, p), (expected_name, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == expected_name and isinstance(p, nn.Parameter)
        assert (p.shape, p.dtype, p.device, p.numel(), p.dim(), p.nbytes) == (
            (expected.shape, expected.dtype, expected.device, expected.numel(), expected.dim(), expected.nbytes)
        )
        assert p.data.numel() == p.detach().nelement() == p.size().numel() == expected.numel()
        assert p.is_floating_point() and not p.is_cuda and not p.is_sparse and p.grad is None and p.is_leaf
        assert torch.zeros_like(p).shape == torch.empty_like(p).shape == p.new_zeros(p.shape).shape == p.shape
        assert type(torch.zeros_like(p)) is torch.Tensor
        assert p.requires_grad
        assert name in repr(p) and "nan" not in repr(p) and "edit" in str(p.data)
        assert p in {p} and hash(p) == id(p)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    model.zero_grad()
    model.requires_grad_(True)
    assert all(p.requires_grad for p in model.parameters())
    distzo2.ZOSGD(model, lr=1e-2).step(lambda: model(IDS))
    assert "nan" not in repr(model)


def test_what_is_frozen_after_the_hand_over_is_left_alone():
    model = offloaded(Blocks())
    for p in model.blocks[1].parameters():
        p.requires_grad = False
    model.embedding.requires_grad_(False)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "0" not in n] == ["head.weight"]
    before = model.state_dict()
    opt = distzo2.ZOSGD(model, lr=1e-1, weight_decay=0.1)
    opt.step(lambda: model(IDS))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    trained = model.blocks[0].requires_grad_(False)
    with pytest.raises(distzo2.DistZO2Error, match=r"blocks\.0\.0\.weight is trained by an optimizer"):
        opt.step(lambda: model(IDS))
    trained.requires_grad_(True)
    opt.step(lambda: model(IDS))
    model.embedding.requires_grad_(True)
    with distzo2.edit(model):
        model.head.weight.requires_grad_(False)
        assert model.embedding.weight.requires_grad
    model.requires_grad_(True)
    with pytest.raises(distzo2.DistZO2Error, match=r"blocks\.1\.0\.weight was frozen when"):
        distzo2.ZOSGD(model, lr=1e-1)
    with distzo2.edit(model):
        model.requires_grad_(True)
    opt = distzo2.ZOSGD(model, lr=1e-1)
    before = model.state_dict()
    opt.step(lambda: model(IDS))
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("do", [lambda m: torch.jit.trace(m, (IDS,)), torch.jit.script], ids=["trace", "script"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:module forward hook")
def test_what_would_keep_weights_of_one_moment_is_named(do):
    with pytest.raises(distzo2.DistZO2Error, match=r"traced|scripted"):
        do(offloaded(Blocks()))


@pytest.mark.parametrize(
    "use", [lambda w: w.sum().item(), lambda w: nn.functional.linear(torch.ones(1, 8), w).argmax()]
)
def test_ordinary_forwards_are_watched(use, tmp_path):
    class TiedByHand(Blocks):
        def forward(self, ids):
            return super().forward(ids) + use(self.head.weight)

    model = offloaded(TiedByHand(), tmp_path)
    for _ in range(2):
        with pytest.raises(distzo2.DistZO2Error, match=r'head\.weight.*units=\["\."\]'), torch.no_grad():
            model(IDS)
    whole = offloaded(TiedByHand(), tmp_path / "whole", units=["."])
    with torch.no_grad():
        assert same_bits(whole(IDS), TiedByHand().eval()(IDS))


class Rooted(Blocks):
    """The root module has parameters, which its methods use outside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.7))
        self.shift = nn.Parameter(torch.full((8,), 0.1, dtype=torch.bfloat16))

    def encode(self, ids):
        x = self.embedding(ids) * self.scale
        for block in self.blocks:
            x = x + block(x)
        return x + self.shift

    def score(self, ids):
        return (self.head(self.encode(ids)).square().mean() + self.scale.sum()).float()


@pytest.mark.parametrize(
    "loss", [Rooted.score, lambda model, ids: model(ids) + model.scale.sum()], ids=["method", "after"]
)
def test_parameters_of_the_root_are_readable_in_all_its_methods(loss, tmp_path):
    _, model, reference = run_both(Rooted, lambda model: loss(model, IDS), tmp_path)
    with torch.no_grad():
        assert same_bits(model.score(IDS), reference.score(IDS))
        assert same_bits(model.scale * 2, reference.scale * 2)
        assert same_bits(distzo2.evaluate(model, [lambda: model.score(IDS)])[0], reference.score(IDS))
    for write in (lambda: model.scale.mul_(2), lambda: setattr(model.scale, "data", torch.ones(8))):
        with pytest.raises(distzo2.DistZO2Error, match="scale"), torch.no_grad():
            write()


def test_copies_and_pickles_are_refused_by_name():
    model = offloaded(Blocks())
    for part in (model, model.blocks[0], [model.head]):
        for do in (copy.deepcopy, copy.copy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            if do is copy.copy and isinstance(part, list):
                continue  # the list is copied, not the model
            with pytest.raises(distzo2.DistZO2Error, match=r"cannot be copied, pickled or scripted.*save_pretrained"):
                do(part)


def test_a_model_that_was_closed_is_named():
    model = offloaded(Blocks())
    distzo2.runtime_of(model).close()
    with pytest.raises(distzo2.DistZO2Error, match=r"embedding\.weight"):
        model.embedding.weight.sum()


class Tied(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


FROZEN = ("blocks.3.0.weight", "blocks.3.0.bias", "blocks.2.0.bias")


def scored(model, module):
    """A head applied by hand, around and inside of forwards."""
    with distzo2.present(module) as shown:
        assert shown is module
        bare = nn.functional.linear(model.embedding(IDS), model.head.weight)
        with distzo2.present(model.head.weight):  # of one parameter
            return model(IDS) + bare.square().mean() + model.head.weight.sum()


def of_parts(model):
    """Windows that overlap and close in another order than they opened."""
    total, (first, second) = model(IDS), (distzo2.present(model.blocks[i]) for i in (2, 0))
    with second:
        with first, distzo2.present(model.embedding):
            total = total + model.blocks[0][0].weight.square().sum() * model.blocks[2][0].weight.sum()
            total = total + model.embedding.weight.sum() + model(IDS)
        return total + model.blocks[0][0].bias.sum() + model.blocks[0](model.embedding(IDS)).sum()


@pytest.mark.parametrize("build", [Blocks, Tied])
@pytest.mark.parametrize("max_lanes", [None, 1])
@pytest.mark.parametrize(
    "loss",
    [lambda m: scored(m, m.head), lambda m: scored(m, m), of_parts],
    ids=["a head", "the model", "parts"],
)
def test_present_weights_have_the_plain_loops_bits(build, loss, max_lanes, tmp_path):
    batches = [loss, lambda model: loss(model) * 0.5]
    _, model, plain = run_both(
        build, batches, tmp_path, steps=2, max_lanes=max_lanes, slots=5, trainable=lambda name: name not in FROZEN
    )
    with torch.no_grad():
        assert same_bits(distzo2.evaluate(model, [lambda: loss(model)] * 2)[1], loss(plain))
        for _ in range(2):
            assert same_bits(loss(model), loss(plain))


@pytest.mark.parametrize("where", ["host", "disk"])
def test_present_weights_between_steps(where, tmp_path):
    model = distzo2.offload(Blocks(), weights=where, directory=tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: model(IDS))
    block, expected = model.blocks[1], model.state_dict()
    with pytest.raises(ZeroDivisionError), distzo2.present(block), distzo2.present(nn.Sequential(block, nn.Tanh())):
        assert type(block[0].weight) is nn.Parameter and not block[0].weight.requires_grad
        assert same_bits(block[0].weight.detach(), expected["blocks.1.0.weight"])
        assert isinstance(model.head.weight, AbsentParameter)
        with pytest.raises(distzo2.DistZO2Error, match="in the middle of a pass"):
            opt.step(lambda: model(IDS))
        _ = 1 / 0
    assert isinstance(block[0].weight, AbsentParameter)
    with distzo2.present(nn.Linear(2, 2)) as plain, distzo2.present(nn.ReLU()):
        assert plain.weight.isfinite().all()
    for where_written in (lambda write: write(), lambda write: opt.step(lambda: write() or model(IDS))):

        def write():
            with torch.no_grad(), distzo2.present(model.blocks[3]):
                model.blocks[3][0].bias.add_(1)

        with pytest.raises(distzo2.DistZO2Error, match=r"wrote blocks\.3\.0\.bias"):
            where_written(write)
    assert_same_tensors(model.state_dict(), expected)
    opt.step(lambda: model(IDS))


def test_more_present_blocks_than_slots_are_named(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    with pytest.raises(distzo2.DistZO2Error, match=r"4 blocks that stream .* 3 slots.*slots=5"), distzo2.present(model):
        pass
    with torch.no_grad(), distzo2.present(model.blocks[:2]):
        assert same_bits(model(IDS), Blocks().eval()(IDS))
