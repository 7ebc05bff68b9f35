"""The public functions under torch.compile, autograd and meta tensors; the raw ops are in test_torch_ops.py."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, needs_interpreter, needs_native, needs_triton
from torch_op_cases import PLACE, segment

import distzo2_core
from distzo2_core import Emit, GroupScalars, SegmentTable, Term, Update

IN_PLACE = {distzo2_core.perturb_: (0.1,), distzo2_core.restore_: (0.1,), distzo2_core.update_: (0.1, 0.2)}
TABLE = SegmentTable([segment()])


def materialize(weights: torch.Tensor, out: torch.Tensor, c: float, step: int, **arguments: object) -> None:
    """An update with rate and coefficient c, and a perturbation of c."""
    update = Update(step, (GroupScalars(c, 0.0),), (Term(0, step, 0, 0, c),))
    emit = Emit((Term(0, step + 1, 0, 0, c),), (1.0,))
    arguments = {"write_back": True, **arguments}
    distzo2_core.materialize(weights, TABLE, seed=1, updates=[update], emits=[emit], outs=[out], **arguments)


def buffers() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linspace(-1, 1, 8).view(torch.uint8).clone(), torch.zeros(32, dtype=torch.uint8)


@needs_native
def test_compile_still_checks() -> None:
    """All but what tracing cannot see: the addresses."""
    compiled = torch.compile(materialize, fullgraph=True, backend="eager")
    weights, _ = buffers()
    with pytest.raises(Exception, match=r"outs\[0\] has 31 bytes, 32 are needed"):
        compiled(weights, torch.zeros(31, dtype=torch.uint8), 0.1, 1)
    for value in (float("nan"), float("inf"), -1e39):
        with pytest.raises(Exception, match="must be finite in float32"):
            torch.compile(distzo2_core.perturb_, fullgraph=True, backend="eager")(torch.ones(4), value, **PLACE)


# Autograd.


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, in Triton's interpreter, of infinities
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=[needs_triton, needs_interpreter])])
def test_what_changes_has_its_version_raised(backend: str) -> None:
    """So that a backward pass that has saved it is refused, whatever changed it."""
    for function, scalars in IN_PLACE.items():
        w, other = torch.ones(6), torch.ones(6, requires_grad=True)
        loss = (w * other).sum()  # saves w
        function(w, *scalars, **PLACE, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    noise = torch.zeros(6)
    distzo2_core.normal(6, **PLACE, out=noise, backend=backend)
    assert noise._version > 0
    for write_back in (False, True):
        weights, out = buffers()
        materialize(weights, out, 0.1, 1, write_back=write_back, backend=backend)
        assert (weights._version > 0, out._version > 0) == (write_back, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_leaf_that_requires_grad(backend: str) -> None:
    """It is changed as by an optimizer, and gradients are those at the changed weights."""
    for function, scalars in IN_PLACE.items():
        w = torch.ones(6, requires_grad=True)
        assert function(w, *scalars, **PLACE, backend=backend) is w
        assert w.is_leaf and w.requires_grad and not torch.equal(w, torch.ones(6))
        (w**2).sum().backward()
        assert torch.equal(w.grad, 2 * w.detach())


# Tensors of the meta device.


@needs_native
def test_meta_tensors() -> None:
    weights, out = buffers()
    with pytest.raises(distzo2_core.BackendError, match="'native' cannot run: it has no kernels for meta"):
        materialize(weights.to("meta"), out.to("meta"), 0.1, 1, backend="native")
    with pytest.raises(ValueError, match=r"outs\[0\] must be on cpu as weights is, got meta"):
        materialize(weights, out.to("meta"), 0.1, 1, backend="native")


@needs_native
def test_raw_materialize_refuses_a_mixture_with_meta() -> None:
    """Torch dispatches it to the fake kernel, which would do nothing."""
    rows = torch.tensor([[0, 8, 0, 0, 0, 0, 2, 4]])
    weights, out = buffers()
    program = distzo2_core.types.encode_program([], [Emit((Term(0, 0, 0, 0, 1.0),), (1.0,))], 1)
    for buffer, table, target, message in (
        (weights, rows, out.to("meta"), "outs must be on cpu as weights are, got meta"),
        (weights.to("meta"), rows, out, "outs must be on meta as weights are, got cpu"),
        (weights, rows.to("meta"), out, "tables must be CPU tensors, got one on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.distzo2.materialize(buffer, table, 1, *program, [target], True)
