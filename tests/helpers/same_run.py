"""Equality of a run that was disturbed with one that was not."""

from __future__ import annotations

import json
from pathlib import Path

from cli_runs import assert_same_bits

from distzo2.record.journal import read_journal
from distzo2.run.metrics import read_metrics


def assert_same_run(run: Path, expected: Path) -> None:
    ours, theirs = (
        [(e.update, repr(e.losses), e.tokens) for e in read_journal(path / "journal.jsonl").entries]
        for path in (run, expected)
    )
    assert ours == theirs
    assert_same_bits(run / "checkpoint", expected / "checkpoint")
    lines = [
        [(m["kind"], m["step"], m["loss"], m.get("accuracy")) for m in read_metrics(path / "metrics.jsonl")]
        for path in (run, expected)
    ]
    assert lines[0] == lines[1]
    records = [json.loads((path / "run.json").read_text()) for path in (run, expected)]
    for key in ("status", "steps_done", "best_step", "best", "checkpoint_step"):
        assert records[0].get(key) == records[1].get(key), key
    names = [{p.name for p in path.iterdir()} - {"trace.json"} for path in (run, expected)]
    assert names[0] == names[1]
    assert not [p for p in (run / "checkpoint").iterdir() if p.name.startswith(".")]
