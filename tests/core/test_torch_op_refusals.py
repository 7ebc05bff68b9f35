"""What the raw ops refuse: nothing that is out of bounds, aliased or of the wrong kind is read or written, and what
they were given is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch_op_cases import CPU, IN_PLACE, WORDS, in_place, materialize_arguments, ops

import distzo2_core
from distzo2_core.types import encode_program

pytestmark = pytest.mark.skipif(not distzo2_core.build_info()["native"], reason="distzo2_core._C is not built")


def misaligned(dtype: torch.dtype, numel: int) -> torch.Tensor:
    memory = bytearray(numel * dtype.itemsize + 1)
    return torch.frombuffer(memory, dtype=dtype, offset=1)


@pytest.mark.parametrize("name", IN_PLACE)
def test_raw_in_place_ops_refuse(name: str) -> None:
    wrong: list[tuple[torch.Tensor, str]] = [
        (torch.ones(4, 4).T, "w must be contiguous"),
        (torch.ones(8)[::2], "w must be contiguous"),
        (torch.ones(1).expand(8), r"w must be contiguous, got shape \[8\] with strides \[0\]"),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), "w must be contiguous"),
        (torch.ones(8, dtype=torch.float64), "w must be float32, bfloat16 or float16, got Double"),
        (torch.ones(8, dtype=torch.int32), "w must be float32, bfloat16 or float16, got Int"),
        (torch.ones(8, dtype=torch.complex64), "w must be float32, bfloat16 or float16"),
        (misaligned(torch.float32, 8), "not aligned to its dtype"),
        (misaligned(torch.bfloat16, 8), "not aligned to its dtype"),
        (torch.eye(8).to_sparse(), "'SparseCPU' backend"),
    ]
    for w, message in wrong:
        before = w.clone()
        message = message.replace("w must", "out must") if name == "noise_" else message
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            in_place(name, w)
        assert torch.equal(w.to_dense(), before.to_dense())
    w = torch.ones(8)
    numbers = [
        ((-1, -1, 3, 4, 5), 0, "step must be in"),
        ((-1, 2**32, 3, 4, 5), 0, "step must be in"),
        ((-1, 2, -1, 4, 5), 0, "param must be in"),
        ((-1, 2, 2**32, 4, 5), 0, "param must be in"),
        ((-1, 2, 3, -1, 5), 0, "probe must be in"),
        ((-1, 2, 3, 2**20, 5), 0, "probe must be in"),
        ((-1, 2, 3, 4, -1), 0, r"offset \+ numel must be in"),
        ((-1, 2, 3, 4, 2**38 - 7), 0, r"offset \+ numel must be in"),
        ((-1, 2, 3, 4, 2**63 - 1), 0, r"offset \+ numel must be in"),
        (WORDS, 2, "unknown family of noise 2"),
        (WORDS, -1, "unknown family of noise -1"),
        (WORDS, 256, "unknown family of noise 256"),
    ]
    for words, family, message in numbers:
        with pytest.raises(ValueError, match=message):
            in_place(name, w, *words, family=family)
    for position in range(len(IN_PLACE[name])):
        for value in (math.nan, math.inf, -1e39):
            scalars = list(IN_PLACE[name])
            scalars[position] = value
            with pytest.raises(ValueError, match="must be finite in float32"):
                getattr(ops, name)(w, *scalars, *WORDS, 0)
    assert torch.equal(w, torch.ones(8)) and w._version == 0


@pytest.mark.parametrize("name", ["normal", "rademacher"])
def test_raw_noise_refuses(name: str) -> None:
    op = getattr(ops, name)
    for numel, words, message in (
        (-1, WORDS, "numel must be in"),
        (2**38 + 1, WORDS, "numel must be in"),
        (4, (-1, 2**32, 3, 4, 5), "step must be in"),
        (4, (-1, 2, -1, 4, 5), "param must be in"),
        (4, (-1, 2, 3, 2**20, 5), "probe must be in"),
        (4, (-1, 2, 3, 4, 2**38 - 3), r"offset \+ numel must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            op(numel, *words, torch.float32, CPU)
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16, got Long"):
        op(4, *WORDS, torch.int64, CPU)
    with pytest.raises(RuntimeError, match="native kernels for cpu and cuda, not for meta"):
        op(4, *WORDS, torch.float32, torch.device("meta"))


def row(**changes: int) -> torch.Tensor:
    fields = dict(byte_offset=0, numel=8, dtype=0, param=0, element_offset=0, group=0, rows=2, cols=4)
    return torch.tensor([list((fields | changes).values())])


def one_row(table: torch.Tensor, column: int, value: float) -> torch.Tensor:
    changed = table.clone()
    changed[0, ..., column] = value
    return changed


# Of each table, what is changed and the error; the rest is as in materialize_arguments.
TABLES: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("segments", lambda t: row(numel=9), "9 elements of 4 bytes at byte 0 of 32"),
    ("segments", lambda t: row(byte_offset=4), "8 elements of 4 bytes at byte 4 of 32"),
    ("segments", lambda t: row(byte_offset=-4), "at byte -4"),
    ("segments", lambda t: row(byte_offset=2**63 - 4), "8 elements of 4 bytes"),
    ("segments", lambda t: row(byte_offset=2, numel=4), "not aligned to its dtype"),
    ("segments", lambda t: row(numel=-1), "numel -1"),
    ("segments", lambda t: row(numel=2**62), "numel 4611686018427387904"),
    ("segments", lambda t: row(dtype=3), "dtype code 3"),
    ("segments", lambda t: row(dtype=-1), "dtype code -1"),
    ("segments", lambda t: row(param=-1), "param -1"),
    ("segments", lambda t: row(param=2**32), "param 4294967296"),
    ("segments", lambda t: row(element_offset=-1), "element_offset -1"),
    ("segments", lambda t: row(element_offset=2**38 - 7), "element_offset"),
    ("segments", lambda t: row(group=-1), "group -1 of 1"),
    ("segments", lambda t: row(group=1), "group 1 of 1"),
    ("segments", lambda t: torch.cat([row(numel=4), row(numel=4, byte_offset=12)]), "segments 0 and 1 overlap"),
    ("segments", lambda t: torch.cat([row(byte_offset=12, numel=4), row(numel=4)]), "segments 0 and 1 overlap"),
    ("segments", lambda t: torch.cat([row(), row(byte_offset=8, numel=1)]), "segments 0 and 1 overlap"),
    ("segments", lambda t: t[:, :7].contiguous(), r"segments must have shape \[1, 8\], got \[1, 7\]"),
    ("segments", lambda t: t[0], r"segments must have shape \[8, 8\], got \[8\]"),
    ("segments", lambda t: torch.tensor(1), r"segments must have shape \[0, 8\]"),
    ("segments", lambda t: t.int(), "segments must be Long, got Int"),
    ("segments", lambda t: torch.zeros(8, 1, dtype=torch.int64).T.expand(2, 8), "segments must be contiguous"),
    ("segments", lambda t: misaligned(torch.int64, 8).view(1, 8), "segments must be aligned"),
    ("terms", lambda t: one_row(t, 0, 2), "unknown family of noise 2"),
    ("terms", lambda t: one_row(t, 0, -1), "unknown family of noise -1"),
    ("terms", lambda t: one_row(t, 1, -1), "term 0: step -1"),
    ("terms", lambda t: one_row(t, 1, 2**32), "term 0: step"),
    ("terms", lambda t: one_row(t, 2, -1), "term 0: probe -1"),
    ("terms", lambda t: one_row(t, 2, 2**20), "term 0: probe"),
    ("terms", lambda t: one_row(t, 3, 1), "term 0: sub 1"),
    ("terms", lambda t: t[:-1], r"coefs must have shape \[2\], got \[3\]"),
    ("terms", lambda t: t.double(), "terms must be Long"),
    ("coefs", lambda t: t[:-1], r"coefs must have shape \[3\], got \[2\]"),
    ("coefs", lambda t: t.half(), "coefs must be Float, got Half"),
    ("coefs", lambda t: t * math.nan, "term 0: coefficient nan"),
    ("updates", lambda t: one_row(t, 0, -1), "update 0: step -1"),
    ("updates", lambda t: one_row(t, 0, 2**32), "update 0: step"),
    ("updates", lambda t: one_row(t, 1, -1), "update 0: terms -1"),
    ("updates", lambda t: one_row(t, 1, 2**63 - 1), "update 0: terms"),
    ("updates", lambda t: one_row(t, 2, 4), "update 0: terms"),
    ("updates", lambda t: one_row(t, 2, -1), "update 0: terms"),
    ("updates", lambda t: t[:-1], r"update_groups must have shape \[0, 1, 4\], got \[1, 1, 4\]"),
    ("update_groups", lambda t: t[:-1], r"update_groups must have shape \[1, 1, 4\], got \[0, 1, 4\]"),
    (
        "update_groups",
        lambda t: t[:, :, :3].contiguous(),
        r"update_groups must have shape \[1, 1, 4\], got \[1, 1, 3\]",
    ),
    ("update_groups", lambda t: t[:, :0], "must have shape"),
    ("update_groups", lambda t: one_row(t, 0, math.inf), "update 0, group 0: lr inf"),
    ("update_groups", lambda t: one_row(t, 1, math.nan), "weight_decay nan"),
    ("update_groups", lambda t: one_row(t, 3, -math.inf), "update_scale -inf"),
    ("emits", lambda t: one_row(t, 0, -1), "emit 0: terms -1"),
    ("emits", lambda t: one_row(t, 1, 3), "emit 0: terms"),
    ("emits", lambda t: one_row(t, 1, 2**62), "emit 0: terms"),
    ("emits", lambda t: t[:-1], "emit_scales must have shape"),
    ("emit_scales", lambda t: t[:-1], r"emit_scales must have shape \[2, 1\], got \[1, 1\]"),
    ("emit_scales", lambda t: t.repeat(1, 2), r"emit_scales must have shape \[2, 1\], got \[2, 2\]"),
    ("emit_scales", lambda t: t * math.inf, "emit 0, group 0: perturb_scale inf"),
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
    weights, first = arguments["weights"], arguments["outs"][0]
    memory = torch.zeros(256, dtype=torch.uint8)
    for outs, message in (
        ([first], "2 emits, 1 outs"),
        ([first, weights], r"outs\[1\] and weights overlap in memory"),
        ([first, first], r"outs\[1\] and outs\[0\] overlap in memory"),
        ([memory[:32], memory[31:63]], r"outs\[1\] and outs\[0\] overlap in memory"),
        ([memory[31:63], memory[:32]], r"outs\[1\] and outs\[0\] overlap in memory"),
        ([first, memory[:31]], r"outs\[1\] must have 32 bytes as weights have, got 31"),
        ([first, memory[:64:2]], r"outs\[1\] must be a contiguous vector"),
        ([first, memory[:1].expand(32)], r"outs\[1\] must be a contiguous vector, got shape \[32\] with strides \[0\]"),
        ([first, memory[:32].view(4, 8)], r"outs\[1\] must be a contiguous vector"),
        ([first, memory[:32].view(torch.int8)], r"outs\[1\] must be uint8, got Char"),
        ([first, memory[1:33]], "out 1 is not aligned as the weights are"),
    ):
        check_refused(arguments | {"outs": outs}, message)
    for wrong, message in (
        (memory[:1].expand(32), "weights must be a contiguous vector"),
        (memory[:32].view(torch.int8), "weights must be uint8"),
        (memory[97:129], "out 0 is not aligned as the weights are"),
        (memory[16:48], r"outs\[0\] and weights overlap in memory"),
    ):
        check_refused(arguments | {"weights": wrong, "outs": [memory[:32], memory[64:96]]}, message)
    # A table that the kernels would read while they write it.
    table = torch.zeros(32, dtype=torch.int64)
    table[:8] = arguments["segments"]
    segments, alias = table[:8].view(1, 8), table.view(torch.uint8)
    check_refused(arguments | {"segments": segments, "weights": alias[:32]}, "a table and weights overlap in memory")
    aliased = {"segments": segments, "outs": [first, alias[32:64]]}
    check_refused(arguments | aliased, "a table and one of outs overlap in memory")


def test_raw_ops_on_nothing() -> None:
    for name in IN_PLACE:
        for w in (torch.empty(0), torch.empty(3, 0), torch.empty(0, 4).T):
            in_place(name, w)
    for name in ("normal", "rademacher"):
        assert getattr(ops, name)(0, *WORDS, torch.float16, CPU).shape == (0,)
    arguments = materialize_arguments()
    before = arguments["weights"].clone()
    for nothing in (
        {"segments": torch.empty(0, 8, dtype=torch.int64)},
        {"segments": row(numel=0, byte_offset=32)},
        encode_program([], [], 1)._asdict() | {"outs": []},
    ):
        changed = arguments | nothing
        ops.materialize(*changed.values())
        assert torch.equal(changed["weights"], before) and not any(out.any() for out in changed["outs"])
    empty = torch.empty(0, dtype=torch.uint8)
    nothing = {"weights": empty, "segments": row(numel=0), "outs": [empty, torch.empty(0, dtype=torch.uint8)]}
    ops.materialize(*(arguments | nothing).values())
