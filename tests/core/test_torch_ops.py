"""The ops as torch sees them: schemas, fake kernels, opcheck, compile, autograd; and what they refuse.

They refuse what would be read or written out of bounds. The public functions check the rest (test_ops.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import DTYPES, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_op_cases import EMIT, IN_PLACE, PLACE, WORDS, in_place, materialize_arguments, ops, segment

import distzo2_core
from distzo2_core import Emit, GroupScalars, SegmentTable, Term, Update
from distzo2_core.types import encode_program

pytestmark = pytest.mark.skipif(not distzo2_core.build_info()["native"], reason="distzo2_core._C is not built")


# Schemas, fake kernels, tracing.

MUTATED = {
    "checksum": set(), "embedding": set(), "noise_": {"out"}, "perturb_": {"w"}, "update_": {"w"},
    "materialize": {"weights", "outs"}, "decode": {"out"},
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
        for family, name in ((0, "perturb_"), (1, "update_"), (0, "noise_"), (1, "noise_")):
            torch.library.opcheck(getattr(ops, name), (torch.ones(numel, dtype=dtype), *IN_PLACE[name], *WORDS, family))
    torch.library.opcheck(ops.perturb_, (torch.ones(5, 20, dtype=dtype), 0.1, *WORDS, 0))
    for write_back in (True, False):
        arguments = materialize_arguments(dtype) | {"write_back": write_back}
        torch.library.opcheck(ops.materialize, tuple(arguments.values()))


def test_fake_kernels() -> None:
    with FakeTensorMode():
        for name in IN_PLACE:
            assert in_place(name, torch.empty(4)) is None
    on_meta = {
        name: [out.to("meta") for out in value] if name == "outs" else value
        for name, value in materialize_arguments().items()
    }
    on_meta["weights"] = on_meta["weights"].to("meta")
    assert ops.materialize(*on_meta.values()) is None


@pytest.mark.parametrize(("backend", "requires_grad"), [("eager", False), ("aot_eager", False), ("aot_eager", True)])
def test_compile(backend: str, requires_grad: bool) -> None:
    """One graph of every op has the bits of eager calls, in its results and in what it changes, for numbers that change
    from call to call, as rates and coefficients do."""
    table = SegmentTable([segment()])

    def step(
        w: torch.Tensor, half: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, c: float, number: int
    ) -> list[torch.Tensor]:
        place = dict.fromkeys(("seed", "step", "param", "offset"), number)
        distzo2_core.perturb_(w, c, **place)
        plus = w * 2
        distzo2_core.restore_(w, c, **place, family="rademacher")
        distzo2_core.update_(half, c, 0.7 * c, weight_decay=0.1, **place)
        update = Update(number, (GroupScalars(c, 0.0),), (Term(0, number, 0, 0, c),))
        emit = Emit((Term(0, 1, 0, 0, c),), (1.0,))
        distzo2_core.materialize(weights, table, seed=1, updates=[update], emits=[emit], outs=[out], write_back=True)
        noise = [distzo2_core.normal(6, **place), distzo2_core.rademacher(6, **place, dtype=torch.float16)]
        noise.append(distzo2_core.rademacher(6, **place, out=plus - w))
        return [plus, w + half, distzo2_core.embedding(torch.ones(3, 4), torch.tensor([2, 0]), c, **place), *noise]

    def inputs() -> list[torch.Tensor]:
        w, half = torch.linspace(-1, 1, 6).requires_grad_(requires_grad), torch.linspace(-1, 1, 6).bfloat16()
        return [w, half, torch.linspace(-1, 1, 8).view(torch.uint8).clone(), torch.zeros(32, dtype=torch.uint8)]

    torch._dynamo.reset()  # graphs are kept by their code, which all parameters of this test share
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for c, number in ((0.1, 1), (0.2, 1), (-0.3, 2), (0.0, 3), (0.4, 2**31 + 5)):
        eager, traced = inputs(), inputs()
        expected, got = step(*eager, c, number), compiled(*traced, c, number)
        for one, other in zip([*got, *traced], [*expected, *eager], strict=True):
            assert one.requires_grad == other.requires_grad
            assert_same_bits(one.detach(), other.detach())


def test_materialize_without_updates_leaves_the_weights_version() -> None:
    arguments = materialize_arguments() | encode_program([], [EMIT] * 2, 1)._asdict()
    ops.materialize(*arguments.values())
    assert [buffer._version > 0 for buffer in (arguments["weights"], *arguments["outs"])] == [False, True, True]


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


# What would be out of bounds.


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_ops_refuse(name: str) -> None:
    wrong: list[tuple[torch.Tensor, str]] = [
        (torch.ones(4, 4).T, "expected a contiguous tensor"),
        (torch.ones(1).expand(8), r"expected a contiguous tensor, got shape \[8\] with strides \[0\]"),
        (torch.ones(8, dtype=torch.float64), "must be float32, bfloat16 or float16, got Double"),
        (torch.eye(8).to_sparse(), "'SparseCPU' backend"),
    ]
    for w, message in wrong:
        before = w.clone()
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            in_place(name, w)
        assert torch.equal(w.to_dense(), before.to_dense())


def row(**changes: int) -> torch.Tensor:
    fields = dict(byte_offset=0, numel=8, dtype=0, param=0, element_offset=0, group=0, rows=2, cols=4, out_offset=0)
    return torch.tensor([list((fields | dict(out_dtype=0, scale_offset=0, scale_group=0) | changes).values())])


def one_row(table: torch.Tensor, column: int, value: float) -> torch.Tensor:
    changed = table.clone()
    changed[0, ..., column] = value
    return changed


# Of each table, what is changed and the error; the rest is as in materialize_arguments.
TABLES: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("segments", lambda t: row(numel=9), "9 elements of 4 bytes at byte 0 of 32"),
    ("segments", lambda t: row(dtype=6), "dtype code 6"),
    ("segments", lambda t: row(group=1), "group 1 of 1"),
    ("segments", lambda t: row(scale_offset=4), "start of segment 0: 8 elements of 4 bytes at byte 4 of 32"),
    ("segments", lambda t: row(out_offset=4), "out of segment 0: 8 elements of 4 bytes at byte 4 of 32"),
    ("segments", lambda t: row(out_dtype=3), "out of segment 0: dtype code 3"),
    ("segments", lambda t: t[:, :7].contiguous(), r"segments must have shape \[1, 12\], got \[1, 7\]"),
    ("segments", lambda t: t[0], r"segments must have shape \[12, 12\], got \[12\]"),
    ("segments", lambda t: torch.tensor(1), r"segments must have shape \[0, 12\]"),
    ("segments", lambda t: t.int(), "segments must be Long, got Int"),
    ("segments", lambda t: torch.zeros(12, 1, dtype=torch.int64).T.expand(2, 12), "segments must be contiguous"),
    ("terms", lambda t: t[:-1], r"coefs must have shape \[2\], got \[3\]"),
    ("terms", lambda t: t.double(), "terms must be Long"),
    ("coefs", lambda t: t[:-1], r"coefs must have shape \[3\], got \[2\]"),
    ("coefs", lambda t: t.half(), "coefs must be Float, got Half"),
    ("updates", lambda t: one_row(t, 1, -1), "update 0: terms -1"),
    ("updates", lambda t: t[:-1], r"update_groups must have shape \[0, 1, 4\], got \[1, 1, 4\]"),
    ("update_groups", lambda t: t[:-1], r"update_groups must have shape \[1, 1, 4\], got \[0, 1, 4\]"),
    ("update_groups", lambda t: t[:, :, :3].contiguous(), r"must have shape \[1, 1, 4\], got \[1, 1, 3\]"),
    ("update_groups", lambda t: t[:, :0], "must have shape"),
    ("emits", lambda t: one_row(t, 0, -1), "emit 0: terms -1"),
    ("emits", lambda t: t[:-1], "emit_scales must have shape"),
    ("emit_scales", lambda t: t[:-1], r"emit_scales must have shape \[2, 1\], got \[1, 1\]"),
    ("emit_scales", lambda t: t.repeat(1, 2), r"emit_scales must have shape \[2, 1\], got \[2, 2\]"),
]


@pytest.mark.parametrize("table", ["segments", "terms", "coefs", "updates", "update_groups", "emits", "emit_scales"])
def test_raw_materialize_refuses_tables(table: str) -> None:
    cases = [(change, message) for name, change, message in TABLES if name == table]
    assert cases
    for change, message in cases:
        arguments = materialize_arguments()
        arguments[table] = change(arguments[table])
        check_refused(arguments, message)


def check_refused(arguments: dict[str, object], message: str) -> None:
    buffers = [arguments["weights"], *arguments["outs"]]
    before = [buffer.clone() for buffer in buffers]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        ops.materialize(*arguments.values())
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer, old)


def test_raw_materialize_refuses_buffers() -> None:
    arguments = materialize_arguments()
    first = arguments["outs"][0]
    memory = torch.zeros(256, dtype=torch.uint8)
    for outs, message in (
        ([first], "2 emits, 1 outs"),
        ([first, memory[:31]], r"outs\[1\] must have 32 bytes as outs\[0\] has, got 31"),
        ([first, memory[:64:2]], r"outs\[1\] must be a contiguous vector"),
        ([first, memory[:1].expand(32)], r"outs\[1\] must be a contiguous vector, got shape \[32\] with strides \[0\]"),
        ([first, memory[:32].view(4, 8)], r"outs\[1\] must be a contiguous vector"),
        ([first, memory[:32].view(torch.int8)], r"outs\[1\] must be uint8, got Char"),
    ):
        check_refused(arguments | {"outs": outs}, message)
    for wrong, message in (
        (memory[:1].expand(32), "weights must be a contiguous vector"),
        (memory[:32].view(torch.int8), "weights must be uint8"),
    ):
        check_refused(arguments | {"weights": wrong, "outs": [memory[:32], memory[64:96]]}, message)
