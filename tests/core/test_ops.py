"""The public functions: their arguments and errors. What torch sees of them: test_torch_functions.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernel_cases import BACKENDS, needs_interpreter, needs_triton
from torch_op_cases import segment, update

import distzo2_core
from distzo2_core import BackendError, Emit, GroupScalars, Segment, SegmentTable, Term, Update

PLACE = {"seed": 1, "step": 2, "param": 3}
IN_PLACE = {distzo2_core.perturb_: (1.0,), distzo2_core.restore_: (1.0,), distzo2_core.update_: (1.0, 1.0)}


# Noise and in-place ops: what they refuse.

OUT_OF_RANGE = [
    ({"seed": -1}, "seed must be between 0 and 18446744073709551615, got -1"),
    ({"seed": 2**64}, "seed must be between"),
    ({"step": -1}, "step must be between 0 and 4294967295"),
    ({"step": 2**32}, "step must be between"),
    ({"param": 2**32}, "param must be between"),
    ({"probe": 2**20}, "probe must be between 0 and 1048575"),
    ({"offset": -1}, "offset must be between"),
    ({"offset": 2**38 - 3}, "offset must be between 0 and 274877906940"),
]


@pytest.mark.parametrize(("changes", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range(changes: dict[str, int], message: str) -> None:
    place = PLACE | changes
    with pytest.raises(ValueError, match=message):
        distzo2_core.normal(4, **place, backend="reference")
    w = torch.ones(4)
    for call in (distzo2_core.perturb_, distzo2_core.restore_):
        with pytest.raises(ValueError, match=message):
            call(w, 1.0, **place, backend="reference")
    with pytest.raises(ValueError, match=message):
        distzo2_core.update_(w, 1.0, 1.0, **place, backend="reference")
    assert torch.equal(w, torch.ones(4))


@pytest.mark.parametrize("value", [1.0, "1", None, True])
def test_numbers_of_the_wrong_type(value: object) -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        distzo2_core.rademacher(4, **(PLACE | {"seed": value}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", IN_PLACE)
def test_wrong_tensors_in_place(function: Callable[..., torch.Tensor], backend: str) -> None:
    for w, error, message in (
        (torch.ones(4, dtype=torch.float64), TypeError, r"w must be of torch\.float32, .*, got torch\.float64"),
        (torch.ones(4, dtype=torch.int32), TypeError, r"w must be of torch\.float32, .*, got torch\.int32"),
        (torch.ones(4, 4).T, ValueError, r"w must be contiguous, got shape \(4, 4\) with strides \(1, 4\)"),
        (torch.ones(8)[::2], ValueError, r"w must be contiguous, got shape \(4,\) with strides \(2,\)"),
        (torch.ones(1).expand(4), ValueError, r"w must be contiguous, got shape \(4,\) with strides \(0,\)"),
        (torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last), ValueError, "w must be contiguous"),
        (torch.eye(4).to_sparse(), ValueError, "w must be contiguous"),
        (torch.ones(4, device="meta"), BackendError, f"'{backend}' cannot run: it .* meta"),
    ):
        before = w.clone()
        with pytest.raises(error, match=message):
            function(w, *IN_PLACE[function], **PLACE, backend=backend)
        assert w.is_meta or torch.equal(w.to_dense(), before.to_dense())
    with pytest.raises(TypeError, match="w must be a tensor, got list"):
        function([1.0], *IN_PLACE[function], **PLACE, backend=backend)
    with pytest.raises(ValueError, match="must be finite in float32"):
        function(torch.ones(4), *(math.nan for _ in IN_PLACE[function]), **PLACE, backend=backend)
    with pytest.raises(ValueError, match="unknown family of noise 2"):
        function(torch.ones(4), *IN_PLACE[function], **PLACE, backend=backend, family=2)


def test_wrong_dtypes_devices_and_families() -> None:
    with pytest.raises(TypeError, match=r"dtype must be .*, got torch\.int32"):
        distzo2_core.normal(4, **PLACE, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"unknown family of noise 'uniform'; known: normal \(0\), rademacher \(1\)"):
        distzo2_core.perturb_(torch.ones(4), 1.0, **PLACE, family="uniform")


def test_buffers_for_noise_that_are_refused() -> None:
    out = torch.zeros(4)
    wrong = [
        (TypeError, "out must be a tensor, got list", [0.0] * 4, {}),
        (TypeError, r"out must be of torch\.float32, .*, got torch\.int32", out.int(), {}),
        (ValueError, r"out must be contiguous, got shape \(4,\)", torch.zeros(8)[::2], {}),
        (ValueError, r"out must have 4 elements, got shape \(5,\)", torch.zeros(5), {}),
        (TypeError, r"out must be of torch\.float16, got torch\.float32", out, {"dtype": torch.float16}),
        (ValueError, "out must be on meta, got cpu", out, {"device": "meta"}),
    ]
    for function in (distzo2_core.normal, distzo2_core.rademacher):
        for error, message, buffer, more in wrong:
            with pytest.raises(error, match=message):
                function(4, **PLACE, out=buffer, **more)
        assert not out.any()
        assert function(4, **PLACE, out=out, dtype=torch.float32, device="cpu") is out and out.all()
        out.zero_()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_is_nothing_done(backend: str) -> None:
    for function in (distzo2_core.normal, distzo2_core.rademacher):
        assert function(0, **PLACE, offset=2**38, dtype=torch.bfloat16, backend=backend).shape == (0,)
        out = torch.empty(0, 3)
        assert function(0, **PLACE, offset=2**38, out=out, backend=backend) is out
    for function, scalars in IN_PLACE.items():
        for w in (torch.empty(0), torch.empty(0, 3), torch.empty(3, 0).T):
            assert function(w, *scalars, **PLACE, backend=backend) is w
    table = SegmentTable([segment(numel=0)])
    buffer = torch.full((16,), 7, dtype=torch.uint8)
    out = torch.full((16,), 9, dtype=torch.uint8)
    emit = Emit((Term(0, 0, 0, 0, 1.0),), (1.0,))
    for segments in (table, SegmentTable([]), SegmentTable([segment(numel=0, byte_offset=16)])):
        arguments = {"updates": [update()], "emits": [emit], "outs": [out], "write_back": True, "backend": backend}
        distzo2_core.materialize(buffer, segments, seed=0, **arguments)
    distzo2_core.materialize(buffer, SegmentTable([segment(numel=4, cols=2)]), seed=0, backend=backend)
    assert (buffer == 7).all() and (out == 9).all()
    nothing = torch.empty(0, dtype=torch.uint8)
    distzo2_core.materialize(nothing, table, seed=0, emits=[emit], outs=[torch.empty_like(nothing)], backend=backend)


def test_any_shape_is_taken_in_row_major_order() -> None:
    flat, shaped = torch.zeros(24), torch.zeros(2, 3, 4)
    distzo2_core.perturb_(flat, 1.0, **PLACE, backend="reference")
    distzo2_core.perturb_(shaped, 1.0, **PLACE, backend="reference")
    assert torch.equal(shaped.reshape(-1), flat)
    parameter = torch.nn.Parameter(torch.zeros(24))
    distzo2_core.perturb_(parameter, 1.0, **PLACE, backend="reference")
    assert torch.equal(parameter.detach(), flat) and parameter.grad_fn is None
    scalar = torch.zeros(())
    assert torch.equal(distzo2_core.perturb_(scalar, 1.0, **PLACE, backend="reference"), flat[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", IN_PLACE)
def test_a_contiguous_view_is_changed_and_nothing_around_it(
    function: Callable[..., torch.Tensor], backend: str
) -> None:
    whole, alone = torch.ones(5, 7), torch.ones(2, 7)
    view = whole[1:3]
    assert function(view, *IN_PLACE[function], **PLACE, backend=backend) is view
    function(alone, *IN_PLACE[function], **PLACE, backend=backend)
    assert torch.equal(whole[1:3], alone) and not torch.equal(alone, torch.ones(2, 7))
    assert (whole[0] == 1).all() and (whole[3:] == 1).all()


def test_the_callers_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    distzo2_core.normal(100, **PLACE, backend="reference")
    distzo2_core.permutation(100, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_materialize_refuses_wrong_buffers(backend: str) -> None:
    table = SegmentTable([segment()])
    emit = Emit((Term(0, 0, 0, 0, 1.0),), (1.0,))
    buffer = torch.zeros(64, dtype=torch.uint8)

    def run(weights: object, outs: list[object]) -> None:
        emits = [emit] * len(outs)
        distzo2_core.materialize(weights, table, seed=0, emits=emits, outs=outs, backend=backend)

    other = torch.zeros(128, dtype=torch.uint8)
    for outs, error, message in (
        ([other[:31]], ValueError, r"outs\[0\] has 31 bytes, 32 are needed"),
        ([other[:32], other[64:100]], ValueError, r"outs\[1\] must have 32 bytes as outs\[0\] has, got 36"),
        ([other[:64].view(torch.int8)], TypeError, r"outs\[0\] must be a tensor of torch.uint8, got torch.int8"),
        ([other[::2]], ValueError, r"outs\[0\] must be a contiguous vector"),
        ([other[:1].expand(64)], ValueError, r"outs\[0\] must be a contiguous .* shape \(64,\), strides \(0,\)"),
        ([other[:64].view(8, 8)], ValueError, r"outs\[0\] must be a contiguous vector"),
        ([other[1:65]], ValueError, r"outs\[0\] must begin at an address that is a multiple of 4"),
        ([buffer], ValueError, r"weights and outs\[0\] overlap|outs\[0\] and weights overlap"),
        ([other[:64], other[32:96]], ValueError, r"outs\[0\] and outs\[1\] overlap in memory"),
        ([other[63:127], other[:64]], ValueError, r"outs\[0\] must begin at an address that is a multiple of 4"),
        ([other[60:124], other[:64]], ValueError, r"outs\[1\] and outs\[0\] overlap in memory"),
        ([other[:64], other[:64]], ValueError, r"outs\[0\] and outs\[1\] overlap in memory"),
        ([torch.zeros(64, dtype=torch.uint8, device="meta")], ValueError, r"outs\[0\] must be on cpu"),
    ):
        with pytest.raises(error, match=message):
            run(buffer, outs)
    assert not other.any() and not buffer.any()
    with pytest.raises(ValueError, match="weights has 31 bytes, 32 are needed"):
        run(buffer[:31], [])
    with pytest.raises(ValueError, match="weights must be a contiguous vector"):
        run(torch.zeros(1, dtype=torch.uint8).expand(64), [other[:64]])
    with pytest.raises(ValueError, match=r"outs\[0\] and weights overlap in memory"):
        run(other[32:96], [other[:64]])
    with pytest.raises(TypeError, match=r"weights must be a tensor of torch.uint8, got torch.float32"):
        run(torch.zeros(16), [])
    with pytest.raises(ValueError, match="one buffer in outs for each emit: 1 emits, 0 outs"):
        distzo2_core.materialize(buffer, table, seed=0, emits=[emit])
    with pytest.raises(TypeError, match="segments must be a SegmentTable, got list"):
        distzo2_core.materialize(buffer, [segment()], seed=0)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=[needs_triton, needs_interpreter])])
def test_the_default_device_does_not_matter(backend: str) -> None:
    """Tables are made where the ops read them."""

    def run() -> list[torch.Tensor]:
        w, out = weights.clone(), torch.empty(128, dtype=torch.uint8, device="cpu")
        table = SegmentTable([Segment(0, 32, torch.float32, 1, 0, 0, 4, 8)])
        updates, emits = (Update(1, (GroupScalars(0.1, 0.1),), (term,)),), (Emit((term,), (1.0,)),)
        distzo2_core.materialize(
            w.view(-1).view(torch.uint8), table, seed=1, updates=updates, emits=emits, outs=[out], write_back=True,
            backend=backend,
        )  # fmt: skip
        distzo2_core.perturb_(w, 0.1, **place)
        distzo2_core.update_(w, 0.1, 1.0, **place)
        return [w, out, distzo2_core.normal(9, **place), distzo2_core.embedding(w, ids, 0.1, **place)]

    term, place = Term(0, 2, 3, 0, 0.5), {**PLACE, "backend": backend}
    weights, ids = torch.arange(32.0).view(4, 8), torch.tensor([1, 3])
    expected = run()
    with torch.device("meta"):
        assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))
