"""A model that computes in another dtype than what is stored is a model all the same."""

from __future__ import annotations

import pytest
import torch
from block_models import IDS, Blocks, offloaded
from same_bits import assert_same_tensors
from torch import nn

import distzo2
from distzo2.weights.units import collect_params, main_dtype


def stepped(directory, compute, *, build=lambda: Blocks().bfloat16(), steps=2, **options):
    model = offloaded(build(), directory, compute_dtype=compute, **options)
    opt = distzo2.ZOSGD(model, lr=1e-1, seed=3)
    for _ in range(steps):
        opt.step(lambda: model(IDS))
    return model, opt


@pytest.mark.parametrize("on_disk", [False, True])
def test_forwards_read_copies_of_what_is_stored(on_disk, tmp_path):
    model, _ = stepped(tmp_path if on_disk else None, torch.float32)
    state = model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {model.blocks[0][0].weight.dtype}
    plain = Blocks()
    plain.load_state_dict({name: value.float() for name, value in state.items()})
    with torch.no_grad():
        expected = plain(IDS)
        assert [model(IDS).item() for _ in range(2)] == [expected.item()] * 2
    assert distzo2.evaluate(model, [lambda: model(IDS)] * 3) == [expected] * 3
    with distzo2.edit(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model.head.weight.mul_(2)
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"] * 2)
    model.load_state_dict(state)
    assert_same_tensors(model.state_dict(), state)


def test_the_dtype_may_change_between_passes(tmp_path):
    """Updates do not depend on it, but through the losses."""
    model, opt = stepped(tmp_path, None)
    runtime, before = distzo2.runtime_of(model), model.state_dict()
    for dtype in (torch.float32, torch.float16, None):
        runtime.compute_in(dtype)
        assert_same_tensors(model.state_dict(), before)
    opt.step(lambda: model(IDS))
    expected, _ = stepped(None, None, steps=3)
    assert_same_tensors(model.state_dict(), expected.state_dict())
    runtime.compute_in(torch.float32)
    with distzo2.edit(model):
        model.head.weight.requires_grad_(False)  # hands it over anew
    assert distzo2.runtime_of(model).compute_dtype == torch.float32


def test_what_is_not_of_16_bits_stays(tmp_path):
    def build():
        model = Blocks().bfloat16()
        model.head.float()
        model.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
        model.register_buffer("angles", torch.ones(1))
        model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        model.forward = lambda ids: nn.functional.cross_entropy(
            model.head(model.blocks[0](model.embedding(ids)).float() * model.scale).flatten(0, 1), ids.flatten()
        )
        return model

    model, _ = stepped(tmp_path, torch.float16, build=build)
    assert model.head.weight.dtype == torch.float32 and model.blocks[0][0].weight.dtype == torch.float16
    assert model.scale.dtype == torch.float16
    distzo2.runtime_of(model).compute_in(torch.float32)
    assert model.scale.dtype == model.angles.dtype == torch.float32 and model.steps.dtype == torch.int64
    for _ in range(2):
        state = model.state_dict()
        assert (state["scale"].dtype, state["angles"].dtype) == (torch.bfloat16, torch.float32)
        with distzo2.edit(model):
            model.embedding.requires_grad_(False)  # hands it over anew
        assert model.scale.dtype == torch.float32


def test_a_model_that_insists_on_its_dtype_is_named():
    class Insists(nn.Linear):
        def forward(self, x):
            return super().forward(x.bfloat16()).float()

    model = nn.Sequential(Insists(4, 4), nn.Linear(4, 4).float()).bfloat16()
    model[1].float()
    distzo2.offload(model, compute_dtype=torch.float32)
    opt = distzo2.ZOSGD(model, lr=1e-3)
    with pytest.raises(RuntimeError) as error:
        opt.step(lambda: model(torch.ones(1, 4)).mean())
    assert any("in 0, which computes in torch.float32" in note for note in error.value.__notes__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float32"])
def test_a_dtype_that_is_none_of_three(dtype):
    with pytest.raises(distzo2.DistZO2Error, match="compute_dtype"):
        distzo2.offload(Blocks(), compute_dtype=dtype)


def test_a_resumed_run_computes_as_it_did(tmp_path):
    def run(compute, **options):
        model = offloaded(Blocks().bfloat16(), compute_dtype=compute)
        return model, distzo2.ZOSGD(model, lr=1e-1, journal=tmp_path / "journal.jsonl", **options)

    def step_twice(model, opt):
        for _ in range(2):
            opt.step(lambda: model(IDS))
        opt.close()

    step_twice(*run(torch.float32))
    with pytest.raises(distzo2.DistZO2Error, match="compute_dtype is 'float32' in the journal and None in this"):
        run(None, resume=True)
    model, opt = run(torch.float32, resume=True)
    step_twice(model, opt)
    expected, _ = stepped(None, torch.float32, steps=0)
    other = distzo2.ZOSGD(expected, lr=1e-1)
    for _ in range(4):
        other.step(lambda: expected(IDS))
    assert_same_tensors(model.state_dict(), expected.state_dict())


def test_what_most_of_a_model_is_stored_in():
    """Of all bytes, not of the parameter that comes last."""
    model = nn.ModuleList([nn.Linear(64, 64).bfloat16(), nn.Linear(2, 2).bfloat16(), nn.Linear(8, 8)])
    params = collect_params(model)
    assert main_dtype(params) == torch.bfloat16
    model[0].requires_grad_(False)  # a base that is frozen computes all the same
    assert main_dtype(collect_params(model)) == torch.bfloat16
    model[0].weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int32), requires_grad=False)
    assert main_dtype(collect_params(model)) == torch.float32
