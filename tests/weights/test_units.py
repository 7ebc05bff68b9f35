"""Which modules become units, and of what kind."""

from __future__ import annotations

import pytest
import torch
from zoo import LANGUAGE

import distzo2


@pytest.mark.parametrize("case", LANGUAGE[:3], ids=lambda c: c.name)
def test_units_are_the_blocks_and_tied_weights_stay(case, tmp_path):
    model = distzo2.offload(case.build(), weights="disk", directory=tmp_path)
    runtime = distzo2.runtime_of(model)
    streamed = [u for u in runtime.units if not u.resident]
    assert len(streamed) == 3
    assert sorted(p.index for u in runtime.units for p in u.params) == list(range(len(runtime.params)))
    embedding = next(u for u in runtime.units if any("embed_tokens" in p.name for p in u.params))
    assert embedding.resident
    assert len(embedding.windows) == (2 if case.name == "opt-tied" else 1)


def test_what_has_low_rank_noise():
    """Matrices, and those of experts; not what is convolved with, and no vectors."""
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(6, 4), "conv": torch.nn.Conv1d(4, 4, 3)})
    model.register_parameter("experts", torch.nn.Parameter(torch.zeros(3, 5, 7)))
    distzo2.offload(model, weights="device")
    params = {p.name: p for p in distzo2.runtime_of(model).params}
    assert {name: (p.matrix_shape, p.noise("sign-r4")) for name, p in params.items()} == {
        "experts": ((5, 7, 3), "sign-r4"),
        "linear.weight": ((4, 6, 1), "sign-r4"),
        "linear.bias": ((4, 0, 1), "rademacher"),
        "conv.weight": ((48, 0, 1), "rademacher"),
        "conv.bias": ((4, 0, 1), "rademacher"),
    }


class Wrapper(torch.Tensor):
    """A tensor that is made of others, as those of torchao are."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: float):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes: torch.Tensor, scale: float):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_weights_that_wrap_other_tensors_are_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    weight = Wrapper(torch.zeros(8, 8, dtype=torch.int8), 0.5)
    model[1].weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(distzo2.DistZO2Error, match=r"parameter 1.weight is a .*test_units.Wrapper, .* plain tensor"):
        distzo2.offload(model)
