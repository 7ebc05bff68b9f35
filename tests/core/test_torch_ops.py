"""The ops as torch sees them: schemas, fake kernels, opcheck, compile, autograd."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_op_cases import CPU, EMIT, IN_PLACE, PLACE, WORDS, in_place, materialize_arguments, ops

import distzo2_core
from distzo2_core.types import encode_program

pytestmark = pytest.mark.skipif(not distzo2_core.build_info()["native"], reason="distzo2_core._C is not built")


def public(name: str, w: torch.Tensor) -> torch.Tensor:
    """The public function of an in-place op."""
    if name == "noise_":
        return distzo2_core.normal(w.numel(), **PLACE, out=w, backend="native")
    return getattr(distzo2_core, name)(w, *IN_PLACE[name][:2], **PLACE, backend="native")


# Schemas, fake kernels, tracing.

MUTATED = {
    "normal": set(), "rademacher": set(), "embedding": set(), "noise_": {"out"},
    "perturb_": {"w"}, "restore_": {"w"}, "update_": {"w"}, "materialize": {"weights", "outs"},
}  # fmt: skip


def test_schemas_say_what_mutates() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("distzo2::")}
    assert registered == {f"distzo2::{name}" for name in MUTATED}
    for name, mutated in MUTATED.items():
        schema = getattr(ops, name).default._schema
        assert {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write} == mutated, name
        assert all(value.alias_info is None for value in schema.returns), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    """Every op but `embedding`, which has a file of its own."""
    for numel in (100, 0):
        for op in (ops.normal, ops.rademacher):
            torch.library.opcheck(op, (numel, *WORDS, dtype, CPU))
        for family, name in ((0, "perturb_"), (1, "update_"), (0, "noise_"), (1, "noise_")):
            torch.library.opcheck(getattr(ops, name), (torch.ones(numel, dtype=dtype), *IN_PLACE[name], *WORDS, family))
    torch.library.opcheck(ops.restore_, (torch.ones(5, 20, dtype=dtype), 0.1, *WORDS, 0))
    for write_back in (True, False):
        arguments = materialize_arguments(dtype) | {"write_back": write_back}
        torch.library.opcheck(ops.materialize, tuple(arguments.values()))


def test_fake_kernels() -> None:
    with FakeTensorMode():
        for name in ("normal", "rademacher"):
            out = getattr(ops, name)(5, *WORDS, torch.bfloat16, torch.device("meta"))
            assert out.shape == (5,) and out.dtype == torch.bfloat16 and out.device.type == "meta"
        for name in IN_PLACE:
            assert in_place(name, torch.empty(4)) is None
    on_meta = {
        name: [out.to("meta") for out in value] if name == "outs" else value
        for name, value in materialize_arguments().items()
    }
    on_meta["weights"] = on_meta["weights"].to("meta")
    assert ops.materialize(*on_meta.values()) is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile(backend: str, requires_grad: bool) -> None:
    """One graph of every op gives the bits of eager calls, in its results and in what it changes."""
    tables = materialize_arguments()

    def step(w: torch.Tensor, half: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        distzo2_core.perturb_(w, 1e-3, **PLACE)
        plus = w * 2
        distzo2_core.restore_(w, 1e-3, **PLACE, family="rademacher")
        distzo2_core.update_(half, 1e-2, 0.7, weight_decay=0.1, **PLACE)
        ops.materialize(*(tables | {"weights": weights, "outs": [out, out + 1]}).values())
        noise = [distzo2_core.normal(6, **PLACE), distzo2_core.rademacher(6, **PLACE, dtype=torch.float16)]
        noise.append(distzo2_core.rademacher(6, **PLACE, out=plus - w))
        table = torch.ones(3, 4)
        return [plus, w + half, distzo2_core.embedding(table, torch.tensor([2, 0]), 0.1, **PLACE), *noise]

    def inputs() -> list[torch.Tensor]:
        w, half = torch.linspace(-1, 1, 6).requires_grad_(requires_grad), torch.linspace(-1, 1, 6).bfloat16()
        return [w, half, tables["weights"].clone(), torch.zeros(32, dtype=torch.uint8)]

    torch._dynamo.reset()  # graphs are kept by their code, which all parameters of this test share
    eager, traced = inputs(), inputs()
    expected = step(*eager)
    got = torch.compile(step, fullgraph=True, backend=backend)(*traced)
    for one, other in zip([*got, *traced], [*expected, *eager], strict=True):
        assert one.requires_grad == other.requires_grad
        assert_same_bits(one.detach(), other.detach())


def test_compile_does_not_bake_numbers_in() -> None:
    def step(w: torch.Tensor, number: int) -> torch.Tensor:
        return distzo2_core.perturb_(w, 1e-3, seed=number, step=number, param=number, offset=number)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for number in (1, 2, 3, 2**31 + 5):
        assert_same_bits(compiled(torch.ones(9), number), step(torch.ones(9), number))


# Autograd: in-place ops act as under torch.no_grad, and the version counter says that they were there.


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_ops_raise_the_version(name: str, raw: bool) -> None:
    w, other = torch.ones(6), torch.ones(6, requires_grad=True)
    loss = (w * other).sum()  # saves w
    version = w._version
    if raw:
        in_place(name, w)
    else:
        public(name, w)
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_materialize_raises_the_versions() -> None:
    """Of the buffers that it changes: of the weights only if there are updates to write back."""
    for changes, weights_change in (({}, True), ({"write_back": False}, False)):
        arguments = materialize_arguments() | changes
        buffers = [arguments["weights"], *arguments["outs"]]
        before = [buffer._version for buffer in buffers]
        ops.materialize(*arguments.values())
        raised = [buffer._version > old for buffer, old in zip(buffers, before, strict=True)]
        assert raised == [weights_change, True, True]
    arguments = materialize_arguments() | encode_program([], [EMIT] * 2, 1)._asdict()
    ops.materialize(*arguments.values())
    assert arguments["weights"]._version == 0


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_leaf_that_requires_grad(name: str, raw: bool) -> None:
    """It is changed, as by an optimizer, and stays a leaf; gradients are those at the changed weights."""
    w = torch.ones(6, requires_grad=True)
    if raw:
        in_place(name, w)
    else:
        assert public(name, w) is w
    assert w.is_leaf and w.requires_grad and w.grad_fn is None
    assert not torch.equal(w, torch.ones(6))
    (w**2).sum().backward()
    assert torch.equal(w.grad, 2 * w.detach())


def test_what_follows_from_a_leaf() -> None:
    """The noise is a constant: the gradient passes through as if nothing had been added."""
    w = torch.ones(6, requires_grad=True)
    y = w * 3
    distzo2_core.perturb_(y, 0.5, **PLACE)
    assert not torch.equal(y, w * 3)
    y.sum().backward()
    assert torch.equal(w.grad, torch.full((6,), 3.0))


def test_inference_tensors() -> None:
    """As with torch's own in-place ops: changed in inference mode alone."""
    with torch.inference_mode():
        w = distzo2_core.perturb_(torch.ones(6), 0.1, **PLACE)
        before, weights = w.clone(), materialize_arguments()
        ops.materialize(*weights.values())
    for name in IN_PLACE:
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            in_place(name, w)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        ops.materialize(*weights.values())
    with torch.inference_mode():
        assert torch.equal(w, before)
