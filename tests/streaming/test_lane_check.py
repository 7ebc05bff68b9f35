"""Lanes that share a pass do not see each other through the model's Python state, or it is noticed."""

from __future__ import annotations

import collections

import pytest
import torch
from block_models import IDS, Blocks, offloaded
from both_ways import run_both
from torch import nn

import distzo2

OTHER = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(2))
BATCHES = [lambda model: model(IDS), lambda model: model(OTHER)]


class Masked(Blocks):
    """The root sets a mask that blocks read later."""

    def forward(self, ids):
        for block in self.blocks:
            block.__class__ = _ReadsMask
        self.mask = (ids % 3 > 0).float()[..., None]
        _ReadsMask.owner = self
        return super().forward(ids)


class _ReadsMask(nn.Sequential):
    owner: Masked

    def forward(self, x):
        return super().forward(x) * self.owner.mask


class Auxiliary(Blocks):
    """Blocks leave a term on themselves, which the closure sums."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: setattr(module, "l_aux", output.square().mean()))

    def terms(self):
        return sum(block.l_aux for block in self.blocks)


class Lists(Blocks):
    """The root begins a list of its own in each forward; blocks add to it."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: self.hidden.append(output))

    def forward(self, ids):
        self.hidden = []
        loss = super().forward(ids)
        return loss + torch.stack(self.hidden).square().mean()


class Deleted(Blocks):
    """An attribute that is set and deleted within a forward; without it another way is taken."""

    def forward(self, ids):
        scale = 2.0 if hasattr(self, "seen") else 1.0
        self.seen = True
        loss = super().forward(ids) * scale
        del self.seen
        return loss


LOSSES = {
    Masked: BATCHES,
    Auxiliary: [lambda model: model(IDS) + model.terms(), lambda model: model(OTHER) + model.terms()],
    Lists: BATCHES,
    Deleted: BATCHES,
}


@pytest.mark.parametrize("build", LOSSES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("max_lanes", [None, 1, 3])
def test_what_a_lane_sets_on_a_module_is_its_own(build, num_batches, max_lanes, tmp_path):
    run_both(build, LOSSES[build][:num_batches], tmp_path, max_lanes=max_lanes)


@pytest.mark.parametrize("max_lanes", [None, 1])
def test_the_last_lane_leaves_its_attributes(max_lanes, tmp_path):
    _, model, reference = run_both(Auxiliary, LOSSES[Auxiliary], tmp_path, steps=2, max_lanes=max_lanes)
    for block, expected in zip(model.blocks, reference.blocks, strict=True):
        assert torch.equal(block.l_aux, expected.l_aux)


def test_a_step_that_fails_leaves_the_attributes_as_they_were():
    model = offloaded(Auxiliary())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: model(IDS) + model.terms())
    before = [block.l_aux for block in model.blocks]

    def fails():
        raise KeyError(float(model(OTHER)))

    with pytest.raises(KeyError):
        opt.step(fails)
    assert all(block.l_aux is value for block, value in zip(model.blocks, before, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_attributes_set_in_compiled_blocks(compiled, tmp_path):
    class Sets(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            self.l_aux = y.square().mean()
            return y

    def build():
        model = Blocks()
        for block in model.blocks:
            block.__class__ = Sets
        return model

    def prepare(model):
        for block in model.blocks:
            if compiled:
                block.compile(backend="eager")

    torch._dynamo.reset()
    run_both(build, lambda model: model(IDS) + sum(b.l_aux for b in model.blocks), tmp_path, prepare=prepare)


# ---- what cannot be swapped is noticed ----------------------------------------------------------------------------

KEPT: dict[str, torch.Tensor] = {}


class Hooked(Blocks):
    """Hooks fill something that the closure reads after the forward."""

    def __init__(self, store) -> None:
        super().__init__()
        for i, block in enumerate(self.blocks):
            block.register_forward_hook(lambda module, args, output, i=i: store(i, output))


def _in_a_dict():
    kept = {}
    model = Hooked(kept.__setitem__)
    return model, lambda: model(IDS) + sum(v.square().mean() for v in kept.values()), None


def _in_a_global():
    def store(i, output):
        KEPT[str(i)] = output

    model = Hooked(store)
    return model, lambda: model(IDS) + sum(v.square().mean() for v in KEPT.values()), "global 'KEPT'"


def _in_a_list_that_grows():
    terms = []
    model = Hooked(lambda i, output: terms.append(output.square().mean()))

    def closure():
        loss = model(IDS) + sum(terms)
        terms.clear()
        return loss

    return model, closure, None


def _in_a_deque():
    last = collections.deque(maxlen=4)
    model = Hooked(lambda i, output: last.append(output))
    return model, lambda: model(IDS) + torch.stack(list(last)).square().mean(), "'last' of"


def _in_an_object():
    class State:
        hidden: torch.Tensor

    state = State()
    model = Hooked(lambda i, output: setattr(state, "hidden", output) if i == 0 else None)
    return model, lambda: model(IDS) + state.hidden.square().mean(), "'state' of"


def _in_a_dict_of_the_module():
    model = Hooked(lambda i, output: model.kept.update({i: output}))
    model.kept = {}
    return model, lambda: model(IDS) + sum(v.square().mean() for v in model.kept.values()), "model.kept"


def _in_a_tensor():
    model = Hooked(lambda i, output: model.total.add_(output.detach().square().mean()))
    model.total = torch.zeros(())

    def closure():
        model.total.zero_()
        return model(IDS) + model.total

    return model, closure, "model.total"


def _around_setattr():
    model = Hooked(lambda i, output: model.blocks[i].__dict__.update(l_aux=output.square().mean()))
    return model, lambda: model(IDS) + sum(block.l_aux for block in model.blocks), "blocks.0.l_aux"


CASES = [
    _in_a_dict, _in_a_global, _in_a_list_that_grows, _in_a_deque, _in_an_object, _in_a_dict_of_the_module, _in_a_tensor,
    _around_setattr,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
@pytest.mark.parametrize("where", ["step", "check"])
def test_what_cannot_be_kept_apart_is_noticed(case, where):
    model, closure, named = case()
    offloaded(model)
    before = model.state_dict()
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match=r"lanes see each other.*max_lanes=1") as error:
        opt.step(closure) if where == "step" else opt.check(closure)
    assert named is None or named in str(error.value), error.value
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
def test_with_one_lane_at_a_time_all_of_them_are_right(case, tmp_path):
    from plain import flat_losses, plain_loop

    model, closure, _ = case()
    reference, plain, _ = case()
    offloaded(model, tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3, max_lanes=1)
    opt.check(closure)
    losses = []
    for _ in range(3):
        opt.step(closure)
        losses.append(flat_losses(opt))
    assert losses == plain_loop(reference.eval(), [[plain]] * 3, lr=lambda step: 1e-2, eps=1e-3, seed=3)


def test_evaluations_that_share_a_pass_are_compared_too():
    kept = {}
    model = offloaded(Hooked(kept.__setitem__))

    def closure(ids):
        return lambda: model(ids) + sum(v.square().mean() for v in kept.values())

    with pytest.raises(distzo2.DistZO2Error, match="lanes see each other"):
        distzo2.evaluate(model, [closure(IDS), closure(OTHER)])


def test_shapes_that_meet_in_one_pass_are_explained():
    kept = {}
    model = offloaded(Hooked(kept.__setitem__))

    def closure(ids):
        return lambda: model(ids) + (kept[0] * ids[..., None]).mean()

    with pytest.raises(RuntimeError, match="must match") as error:
        distzo2.ZOSGD(model, lr=1e-2).step([closure(IDS), closure(OTHER)])
    assert any("max_lanes=1" in note for note in error.value.__notes__)


def test_a_forward_that_is_not_deterministic_is_no_company():
    model = offloaded(Blocks())
    noise = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="not deterministic"):
        distzo2.ZOSGD(model, lr=1e-2).step(lambda: model(IDS) + torch.rand((), generator=noise))


def test_the_comparison_is_made_once(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    calls = []

    def closure():
        calls.append(None)
        return model(IDS)

    for _ in range(3):
        opt.step(closure)
    assert len(calls) == 3 * 2 + 2
