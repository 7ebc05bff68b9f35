"""Steps, headers and journals that tests write."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from distzo2.record.entry import StepEntry
from distzo2.record.header import make_header, table_row
from distzo2.record.journal import Journal
from distzo2_core.types import GroupScalars, Term, Update

ROOT = Path(__file__).resolve().parents[2]

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def step_entries(draw: st.DrawFn) -> StepEntry:
    step = draw(st.integers(0, 2**32 - 1))
    skipped = draw(st.none() | st.text())
    lrs = float32s if skipped is None else st.sampled_from([0.0, -0.0])
    anchors = float32s.map(lambda anchor: anchor or 0.0)  # 0 is left out
    group = st.builds(GroupScalars, lrs, float32s, float32s, float32s, anchors)
    term = st.builds(
        Term, st.sampled_from([0, 1]), st.integers(0, 2**32 - 1), st.integers(0, 2**20 - 1), st.just(0), float32s
    )
    losses = draw(st.lists(st.lists(st.floats(), max_size=3), max_size=3))
    counts = [[draw(st.floats(0, 1e300)) for _ in row] for row in losses] if draw(st.booleans()) else None
    if counts and all(row == counts[0] for row in counts):
        counts = counts[:1]
    if not counts or not all(any(row) for row in counts) or all(n == 1 for row in counts for n in row):
        counts = None  # a line cannot hold it
    ends = sorted(draw(st.sets(st.integers(0, 99), max_size=6)))
    return StepEntry(
        step=step,
        update=Update(
            step, tuple(draw(st.lists(group, min_size=1, max_size=3))), tuple(draw(st.lists(term, max_size=4)))
        ),
        eps=draw(float32s),
        losses=losses,
        skipped=skipped,
        tokens=draw(st.integers(0, 2**63 - 1)),
        seconds=draw(st.floats(0, 1e9)),
        extra=draw(st.dictionaries(st.text(), json_values, max_size=3)),
        counts=counts,
        unused=[[3 * a, 3 * b + 1] for a, b in zip(ends[::2], ends[1::2], strict=False)],
    )


def make_entry(step: int, **changes: Any) -> StepEntry:
    coef = struct.unpack("<f", struct.pack("<f", 0.1 * (step + 1)))[0]
    fields: dict[str, Any] = {
        "step": step,
        "update": Update(step, (GroupScalars(2.0**-10, 0.0),), (Term(0, step, 0, 0, coef),)),
        "eps": 2.0**-10,
        "losses": [[1.5 + step], [1.25]],
        "tokens": 64,
        "seconds": 0.1,
    }
    return StepEntry(**(fields | changes))


def make_test_header(**changes: Any) -> dict[str, Any]:
    table = [
        table_row(0, "embed.weight", (8, 4), torch.bfloat16, (4, 1), False, None, "normal"),
        table_row(1, "layer.weight", (4, 4), torch.bfloat16, (4, 1), True, 0, "normal"),
    ]
    fields: dict[str, Any] = {
        "seed": 2**64 - 1,
        "base": {"name": "base", "files": {"model.safetensors": {"sha256": "0" * 64, "num_bytes": 12}}},
        "table": table,
        "groups": [{"name": "all", "lr": 0.001}],
        "options": {"eps": 1e-3},
    }
    return make_header(**(fields | changes))


def write_journal(path: Path, num_steps: int) -> Path:
    with Journal.create(path, make_test_header()) as journal:
        for step in range(num_steps):
            journal.append(make_entry(step))
    return path


def bits(entry: StepEntry) -> Any:
    """The entry as a value that compares by bits (nan equals nan, -0.0 is not 0.0)."""

    def walk(value: Any) -> Any:
        if isinstance(value, float):
            return "nan" if math.isnan(value) else struct.pack("<d", value)
        if isinstance(value, dict):
            return {key: walk(child) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(child) for child in value]
        return value

    return walk(list(vars(entry).values()))
