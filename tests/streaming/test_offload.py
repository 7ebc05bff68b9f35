"""Handing a model over, and what may be done to it afterwards."""

from __future__ import annotations

import pytest
import torch
from block_models import IDS, Blocks, offloaded
from same_bits import assert_same_tensors
from torch import nn

import distzo2


def test_eval_is_the_default():
    model = Blocks(dropout=0.5)
    assert model.training
    assert not offloaded(model).training


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_an_edit_that_fails_or_runs_the_model_changes_nothing(weights, tmp_path):
    model = distzo2.offload(Blocks(), weights=weights, directory=tmp_path)
    before = model.state_dict()
    with pytest.raises(distzo2.DistZO2Error, match="middle of a pass"), distzo2.edit(model):
        model(IDS)
    with pytest.raises(distzo2.DistZO2Error, match=r"head\.weight is torch\.float64"), distzo2.edit(model):
        model.head.weight.data = model.head.weight.data.double()
    with pytest.raises(KeyError), distzo2.edit(model), torch.no_grad():
        model.head.weight.zero_()
        raise KeyError
    assert_same_tensors(model.state_dict(), before)
    assert torch.isfinite(model(IDS))


def test_a_parameter_added_after_the_hand_over_is_named():
    model = offloaded(Blocks())
    model.head.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(distzo2.DistZO2Error, match="parameter bias of a Linear was added"):
        model.state_dict()


@pytest.mark.parametrize(
    ("option", "wrong", "expected"),
    [("write_every", value, "an integer of at least 1 was expected") for value in (0, -3, 2.0, True, None)]
    + [("memory_budget", value, "expected a positive number of bytes") for value in (0, -1, 1.5, True, "all")],
)
def test_numbers_out_of_range_are_refused(option, wrong, expected):
    with pytest.raises(distzo2.DistZO2Error, match=f"{option}=.*: {expected}"):
        distzo2.offload(nn.Linear(2, 2), **{option: wrong})
