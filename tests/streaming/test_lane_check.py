"""Lanes that share a pass do not see each other through the model's Python state, or it is noticed."""

from __future__ import annotations

import typing

import pytest
import torch
from block_models import IDS, Blocks, offloaded
from both_ways import run_both
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import distzo2
from distzo2.streaming.isolation import switches

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


class Deleted(Blocks):
    """An attribute that is set and deleted within a forward; without it another way is taken."""

    def forward(self, ids):
        scale = 2.0 if hasattr(self, "seen") else 1.0
        self.seen = True
        loss = super().forward(ids) * scale
        del self.seen
        return loss


class Grown(Blocks):
    """A cache in a buffer that is not saved, and an attribute that says what it is for, as of growing rotary tables."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 2
        self.register_buffer("table", torch.zeros(2), persistent=False)

    def forward(self, ids):
        if ids.shape[1] > self.length:
            self.length = ids.shape[1]
            self.register_buffer("table", torch.arange(self.length) * 0.1, persistent=False)
        return super().forward(ids) + self.table[: ids.shape[1]].sum()


class Registered(Blocks):
    """Blocks leave a term in a buffer that was not there before."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: self.leave(module, output.square().mean()))

    def leave(self, module, term):
        module.register_buffer("term", term, persistent=False)


class HooksItself(Blocks):
    """Hooks are installed by the first forward, and an attribute says so, as transformers does to collect outputs."""

    def forward(self, ids):
        if not hasattr(self, "hooked"):
            for block in self.blocks:
                block.register_forward_hook(lambda module, args, output: self.hidden.append(output))
            self.hooked = True
        self.hidden = []
        loss = super().forward(ids)
        assert len(self.hidden) == 4
        return loss + torch.stack(self.hidden).square().mean()


class SharedBuffer(Blocks):
    """One tensor is a buffer of several modules, each of which changes it."""

    def __init__(self) -> None:
        super().__init__()
        shared = torch.ones(8)
        for block in self.blocks:
            block.register_buffer("shared", shared)

    def forward(self, ids):
        self.blocks[0].shared.fill_(1.0)
        for block in self.blocks:
            block.shared.mul_(1.5)
        loss = super().forward(ids) * self.blocks[0].shared.mean()
        self.blocks[3].shared.fill_(1.0)
        return loss


def _with_hooks(model, ids):
    """A closure that collects features by hooks of its own."""
    kept = []
    handles = [block.register_forward_hook(lambda module, args, output: kept.append(output)) for block in model.blocks]
    loss = model(ids)
    for handle in handles:
        handle.remove()
    return loss + torch.stack(kept).square().mean()


def _without_fused_attention(model, ids):
    """A closure that changes what holds for the whole process, and puts it back."""
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return model(ids) + torch.ones(1).element_size()
    finally:
        torch.set_default_dtype(kind)


LOSSES = {
    Masked: BATCHES,
    Auxiliary: [lambda model: model(IDS) + model.terms(), lambda model: model(OTHER) + model.terms()],
    Deleted: BATCHES,
    Grown: BATCHES,
    HooksItself: BATCHES,
    SharedBuffer: BATCHES,
    Registered: [lambda model: model(IDS) + sum(b.term for b in model.blocks), lambda model: model(OTHER)],
    "hooks of the closure": [lambda model: _with_hooks(model, IDS), lambda model: _with_hooks(model, OTHER)],
    "settings of the process": [lambda model: _without_fused_attention(model, IDS), lambda model: model(OTHER)],
}


@pytest.mark.parametrize("build", LOSSES, ids=lambda build: getattr(build, "__name__", build))
@pytest.mark.parametrize(("num_batches", "max_lanes"), [(2, None), (2, 1), (2, 3)])
def test_what_a_lane_sets_on_a_module_is_its_own(build, num_batches, max_lanes, tmp_path):
    before = switches()
    model = Blocks if isinstance(build, str) else build
    run_both(model, LOSSES[build][:num_batches], tmp_path, max_lanes=max_lanes)
    assert switches() == before


def test_handles_of_hooks_outlive_lanes_that_add_hooks():
    model, calls = offloaded(Blocks()), []
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: calls.append(None))
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: _with_hooks(model, IDS))
    handle.remove()
    seen = len(calls)
    opt.step(lambda: _with_hooks(model, IDS))
    assert len(calls) == seen > 0
    distzo2.runtime_of(model).close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.blocks.modules())


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


def _in_a_cache_that_the_first_lane_fills():
    model = WeightNormed()

    def closure():
        with nn.utils.parametrize.cached():
            return model(IDS)

    return model, closure, None


class WeightNormed(Blocks):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.weight_norm(block[0])


class _KeepsInItsClass(nn.Sequential):
    seen: typing.ClassVar[list[torch.Tensor]] = []

    def forward(self, x):
        y = super().forward(x)
        self.seen.append(y.square().mean())
        return y


def _in_a_class():
    model = Blocks()
    for block in model.blocks:
        block.__class__ = _KeepsInItsClass

    def closure():
        _KeepsInItsClass.seen.clear()
        return model(IDS) + sum(_KeepsInItsClass.seen)

    return model, closure, "_KeepsInItsClass.seen"


def _in_the_object_whose_method_is_the_closure():
    class Trainer:
        def __init__(self) -> None:
            self.terms = {}
            self.model = Hooked(lambda i, output: self.terms.update({i: output.square().mean()}))

        def loss(self):
            return self.model(IDS) + sum(self.terms.values())

    trainer = Trainer()
    return trainer.model, trainer.loss, "Trainer.terms of the closure"


CASES = [
    _in_a_dict, _in_a_global, _in_a_list_that_grows, _in_an_object, _in_a_dict_of_the_module, _in_a_tensor,
    _around_setattr, _in_a_cache_that_the_first_lane_fills, _in_a_class, _in_the_object_whose_method_is_the_closure,
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "where"),
    [*((case, "step") for case in CASES), (_in_a_dict, "check")],
    ids=lambda value: getattr(value, "__name__", value).strip("_"),
)
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


def test_functions_that_a_closure_is_given_are_compared_too():
    kept = {}
    model = offloaded(Hooked(kept.__setitem__))
    opt = distzo2.ZOSGD(model, lr=1e-2)

    def with_terms(ids):
        return model(ids) + sum(v.square().mean() for v in kept.values())

    def closure_of(function):
        return lambda: function(IDS)

    opt.step(closure_of(model.forward))
    with pytest.raises(distzo2.DistZO2Error, match="lanes see each other"):
        opt.step(closure_of(with_terms))
