"""Instructions that the kernels execute, against the record: slower code is a failing test."""

from __future__ import annotations

import json

import pytest
from kernel_cases import needs_native
from ptx import counts

pytestmark = [needs_native, pytest.mark.timeout(900)]  # the first one compiles all kernels

TOLERANCE = 0.01


@pytest.mark.parametrize("name", ["nvcc", "triton"])
def test_as_many_instructions_as_on_record(request: pytest.FixtureRequest, name: str) -> None:
    """More are a regression. Fewer are a new record, or a path that is not what it was: `python -m ptx.counts`."""
    kernels = request.getfixturevalue(name)
    record, compiler = json.loads(counts.RECORD.read_text()), counts.compiler(kernels)
    if compiler not in record:
        pytest.skip(f"the record is of {', '.join(record)}, not of {compiler}")
    got, expected = counts.count(kernels), record[compiler]
    assert got.keys() == expected.keys()
    wrong = [
        f"{each}: {got[each]} instructions an element, on record {expected[each]}"
        for each in got
        if abs(got[each] / expected[each] - 1) > TOLERANCE
    ]
    assert not wrong, "\n".join(wrong)


def test_a_wasted_instruction_is_counted(nvcc) -> None:
    """Every product of Philox made twice."""
    record = json.loads(counts.RECORD.read_text())
    for name, text in nvcc.module.texts.items():
        lines = [line * (1 + ("mul.wide.u32" in line)) for line in text.splitlines(keepends=True)]
        nvcc.module.texts[name] = "".join(lines)
    got, expected = counts.count(nvcc), record[counts.compiler(nvcc)]
    assert min(got[each] / expected[each] for each in got if "normal" in each) > 1 + TOLERANCE
