"""A step's line: what is written is read to the bit, and all else is refused with a reason."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_cases import bits, json_values, make_entry, step_entries

from distzo2.record.entry import StepEntry
from distzo2.record.line import MAX_STEP_BYTES, JournalError, encode_line, seal_line
from distzo2_core.types import GroupScalars, Term


@given(step_entries())
@settings(deadline=None, max_examples=200)
def test_line_round_trip(entry: StepEntry) -> None:
    line = entry.to_line()
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and line.isascii()
    again = StepEntry.from_line(line)
    assert bits(again) == bits(entry)
    assert again.to_line() == line


@given(st.sampled_from(sorted(json.loads(make_entry(0).to_line()))), json_values)
@settings(deadline=None, max_examples=300)
def test_arbitrary_json_is_refused_or_kept(key: str, value: Any) -> None:
    line = reencoded(**{key: value})
    try:
        entry = StepEntry.from_line(line)
    except JournalError as error:
        assert "\n" not in str(error)
    else:
        assert entry.to_line() == line


def reencoded(**changes: Any) -> bytes:
    record = json.loads(make_entry(3).to_line())
    del record["crc"]
    return encode_line(record | changes, MAX_STEP_BYTES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"terms": [[2, 0, 0, 0, "0x0.0p+0"]]}, "unknown family 2"),
        ({"terms": [[0, 0, 0, 1, "0x0.0p+0"]]}, "unknown sub 1"),
        ({"terms": [[0, 0, 1 << 20, 0, "0x0.0p+0"]]}, "probe"),
        ({"terms": [[0, 0, 0, 0, "nan"]]}, "finite"),
        ({"terms": [[0, 0, 0, 0, 0.5]]}, "in hex"),
        ({"terms": [[0, 0, 0, 0, (0.1).hex()]]}, "float32"),
        ({"eps": "inf"}, "finite"),
        ({"eps": "0x1p+0"}, "spelled"),
        ({"eps": "0x1p+99999"}, "in hex"),
        ({"groups": []}, "at least one group"),
        ({"groups": [["0x0.0p+0"]]}, "a list of 4"),
        ({"groups": [["0x0.0p+0"] * 5]}, "an anchor is 0, and must be left out"),
        ({"groups": [["0x0.0p+0"] * 6]}, "a list of 4"),
        ({"skipped": "loss is nan"}, "lr must be 0"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"momentum": 1}, "unknown ['momentum']"),
        ({"counts": [["0x1.0000000000000p+0"]]}, "all 1"),
        ({"counts": []}, "same lengths"),
        ({"counts": [["0x1.8000000000000p+1", "0x1.8000000000000p+1"]]}, "same lengths"),
        ({"counts": [["0x1.8000000000000p+1"]] * 3}, "same lengths"),
        ({"counts": [["0x1.8000000000000p+1"], ["0x1.8000000000000p+1"]]}, "must be given once"),
        ({"counts": [["0x1.8000000000000p+1"], [3]]}, "in hex"),
        ({"counts": [["-0x1.0000000000000p+0"], ["0x1.0000000000000p+0"]]}, "at least 0"),
        ({"counts": [["inf"], ["0x1.0000000000000p+0"]]}, "finite"),
        ({"counts": [["0x0.0p+0"], ["0x1.0000000000000p+0"]]}, "all 0"),
        ({"counts": None}, "counts of a step is None"),
        ({"unused": []}, "left out"),
        ({"unused": [[2, 1]]}, "unused"),
        ({"unused": [[0, 1], [2, 3]]}, "unused"),
        ({"unused": [[4, 5], [0, 1]]}, "unused"),
        ({"unused": [[-1, 1]]}, "unused"),
        ({"unused": [[0, True]]}, "unused"),
        ({"unused": [[0]]}, "a list of 2"),
        ({"unused": [[0, 1]], "counts": [["0x0.0p+0"], ["0x1.8000000000000p+1"]]}, "in this order"),
        ({"extra": {"deep": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]}}, "nested deeper"),
    ],
)
def test_line_refused_with_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(JournalError) as caught:
        StepEntry.from_line(reencoded(**changes))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_hostile_lines_are_refused() -> None:
    good = make_entry(0).to_line()[:-19]
    for body in (
        b'{"step":' + b"[" * 100_000 + b"]" * 100_000,
        good + b',"step":0',
        good[:-2] + b'{"a":NaN}',
        good[:-2] + b'{"a":1e999}',
        b"[1",
        b'{"step":' + b"9" * 5000,
        good.replace(b'"tokens":64', b'"tokens":' + b"9" * 4000),
    ):
        with pytest.raises(JournalError):
            StepEntry.from_line(seal_line(body))
    for body in (  # they say the same as the good one
        b" " + good,
        good.replace(b'"tokens":64', b'"tokens": 64'),
        good.replace(b'"step":0,', b"") + b',"step":0',
        good.replace(b'"step"', b'"st\\u0065p"'),
    ):
        with pytest.raises(JournalError, match="not spelled as"):
            StepEntry.from_line(seal_line(body))
    assert StepEntry.from_line(seal_line(good)).to_line() == seal_line(good)
    with pytest.raises(JournalError, match="longer than"):
        StepEntry.from_line(b"x" * (MAX_STEP_BYTES + 1))


def test_values_that_a_line_cannot_hold_are_refused() -> None:
    update = make_entry(0).update
    for reason, changes in (
        ("float32", {"update": update._replace(groups=(GroupScalars(1e-3, 0.0),))}),
        ("finite", {"update": update._replace(terms=(Term(0, 0, 0, 0, math.nan),))}),
        ("1e\\+39", {"eps": 1e39}),
        ("update of step 1", {"update": update._replace(step=1)}),
        ("JSON", {"extra": {"x": math.nan}}),
        ("keys", {"extra": {1: 2}}),
        ("at most", {"extra": {"x": "y" * MAX_STEP_BYTES}}),
    ):
        with pytest.raises(JournalError, match=reason):
            make_entry(0, **changes).to_line()
