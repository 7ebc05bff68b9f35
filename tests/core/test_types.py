"""Seeds, segment tables, updates and emits: their encoding, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch_op_cases import segment, update

from distzo2_core import FROZEN, Emit, GroupScalars, Segment, SegmentTable, Term, Update
from distzo2_core.types import check_seed, encode_program


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_travel_as_twos_complement(seed: int) -> None:
    assert check_seed(seed) % 2**64 == seed and -(2**63) <= check_seed(seed) < 2**63


# Segment tables.


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([segment(byte_offset=2)], "segment 0: byte_offset 2 is not aligned to torch.float32"),
        ([segment(byte_offset=-4)], "segment 0: byte_offset must be between"),
        ([segment(), segment(byte_offset=28)], "segments 0 and 1 overlap: one ends at byte 32, the other begins at 28"),
        ([segment(byte_offset=16), segment()], "segments 1 and 0 overlap"),
        ([segment(rows=1)], "segment 0: elements 0 to 8 do not lie in a parameter of 1 x 4 elements"),
        ([segment(element_offset=1)], "segment 0: elements 1 to 9 do not lie"),
        ([segment(element_offset=2**38)], "segment 0: element_offset must be between"),
        ([segment(param=2**32)], "segment 0: param must be between"),
        ([segment(group=-2)], "segment 0: group must be between -1 and"),
        ([segment(out_offset=2)], "segment 0: out_offset 2 is not aligned to torch.float32"),
        ([segment(out_offset=1, out_dtype=torch.float16)], "segment 0: out_offset 1 is not aligned to torch.float16"),
        (
            [segment(), segment(byte_offset=32, out_offset=16, out_dtype=torch.bfloat16)],
            "segments 0 and 1, as emitted, overlap: one ends at byte 32, the other begins at 16",
        ),
        ([segment(), segment(byte_offset=40)], "segment 1 ends at byte 72, beyond the buffer of 71 bytes"),
    ],
)
def test_segment_tables_refuse(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentTable(segments, num_bytes=71)


def test_segment_table_encoding() -> None:
    table = SegmentTable(
        [
            Segment(64, 6, torch.bfloat16, 5, 2, 1, 4, 2, out_dtype=torch.float32),
            Segment(0, 3, torch.float32, 2**32 - 1, 0, FROZEN, 1, 3, out_offset=88),
        ]
    )
    assert table.tensor.dtype == torch.int64
    assert table.tensor.tolist() == [
        [64, 6, 1, 5, 2, 1, 4, 2, 64, 0, 0, 0],
        [0, 3, 0, 2**32 - 1, 0, -1, 1, 3, 88, 0, 0, 0],
    ]
    assert (len(table), table.num_bytes, table.out_bytes, table.num_groups) == (2, 76, 100, 2)
    assert SegmentTable([segment(group=FROZEN)]).num_groups == 0
    with pytest.raises(TypeError, match=r"dtype must be .*, got torch\.int8"):
        SegmentTable([segment(out_dtype=torch.int8)])
    with pytest.raises(TypeError, match=r"dtype must be .*, got torch\.int32"):
        SegmentTable([segment(dtype=torch.int32)])
    empty = SegmentTable([])
    assert (len(empty), empty.num_bytes, empty.num_groups, empty.tensor.shape) == (0, 0, 0, (0, 12))


# Updates and emits.


def test_program_encoding() -> None:
    terms = (Term(0, 1, 2, 0, 0.1), Term(1, 2**32 - 1, 2**20 - 1, 0, -3.0))
    updates = [Update(7, (GroupScalars(0.5, 0.25), GroupScalars(1.0, 0.0, 2.0, 3.0, 4.0)), terms), update(8, (), 2)]
    program = encode_program(updates, [Emit(terms[:1], (1.0, 0.5))], 2)
    assert program.terms.tolist() == [[0, 1, 2, 0], [1, 2**32 - 1, 2**20 - 1, 0], [0, 1, 2, 0]]
    assert torch.equal(program.coefs, torch.tensor([0.1, -3.0, 0.1]))
    assert program.updates.tolist() == [[7, 0, 2], [8, 2, 0]]
    assert program.update_groups.shape == (2, 2, 4) and program.update_groups[0, 1].tolist() == [1.0, 0.0, 4.0, 3.0]
    assert program.emits.tolist() == [[2, 1]] and program.emit_scales.tolist() == [[1.0, 0.5]]
    empty = encode_program([], [], 3)
    assert [tuple(table.shape) for table in empty] == [(0, 4), (0,), (0, 3), (0, 3, 4), (0, 2), (0, 3)]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((Term(4, 0, 0, 0, 1.0),), "unknown family of noise 4"),
        ((Term(2, 0, 0, 0, 1.0),), "unknown family of noise 2"),
        ((Term(0, 0, 0, 1, 1.0),), "update 0, term 0: sub must be 0, got 1"),
        ((Term(0, 0, 0, 0, 1.0), Term(0, 2**32, 0, 0, 1.0)), "update 0, term 1: step must be between"),
        ((Term(0, 0, 2**20, 0, 1.0),), "update 0, term 0: probe must be between"),
        ((Term(0, 0, 0, 0, float("nan")),), "update 0, term 0: c must be finite"),
    ],
)
def test_programs_refuse(terms: tuple[Term, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_program([update(0, terms)], [], 1)


def test_programs_refuse_missing_groups() -> None:
    with pytest.raises(ValueError, match="scalars for 1 groups, the segments use 2"):
        encode_program([update()], [], 2)
    with pytest.raises(ValueError, match=r"different numbers of groups: \[1, 2\]"):
        encode_program([update()], [Emit((), (1.0, 1.0))], 1)
    with pytest.raises(ValueError, match="update 0, group 0: lr must be finite"):
        encode_program([Update(0, (GroupScalars(float("inf"), 0.0),), ())], [], 1)
    assert encode_program([update(num_groups=3)], [], 2).update_groups.shape == (1, 3, 4)
