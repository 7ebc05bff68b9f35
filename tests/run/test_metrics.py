"""Metrics: which evaluations count."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_runs import finetune, record, resume
from tiny_text import choice_lines, write_jsonl

from distzo2.record.line import encode_line
from distzo2.run.metrics import MAX_LINE_BYTES, read_metrics

pytestmark = pytest.mark.usefixtures("own_directory")


OPTIONS = ["--eval-every=2", "--score=loss", "--save=best", "--steps=4"]


CHANGES = [
    lambda line: line.replace(b'"loss":1', b'"loss":0'),
    lambda line: encode_line({"kind": "eval", "step": 2, "loss": 0.0}, MAX_LINE_BYTES),
    lambda line: b'{"kind":"eval","step":2,"loss":0.0,"accuracy":1.0,"examples":6,"tokens":6,"data":null}\n',
    lambda line: b"[" * 100_000 + b"\n",
]


def test_a_damaged_evaluation_is_reported_and_does_not_count(files, capsys) -> None:
    assert finetune(files, f"--eval={files.eval}", *OPTIONS, "--out=whole") == 0
    lines = Path("whole/metrics.jsonl").read_bytes().splitlines(True)
    assert b'"eval","step":2' in lines[3]
    for number, change in enumerate(CHANGES):
        out = str(shutil.copytree("whole", f"out{number}"))
        Path(out, "metrics.jsonl").write_bytes(b"".join([*lines[:3], changed := change(lines[3]), *lines[4:]]))
        assert changed != lines[3]
        capsys.readouterr()
        assert resume("--steps=6", out=out) == 0
        assert "metrics.jsonl: line 4 is left out: " in capsys.readouterr().out
        evals = [line["step"] for line in read_metrics(f"{out}/metrics.jsonl") if line["kind"] == "eval"]
        assert evals == [0, 4, 6] and record(out)["best_step"] != 2


def test_evaluations_on_other_examples_do_not_count(files, capsys, tmp_path) -> None:
    assert finetune(files, f"--eval={files.eval}", *OPTIONS) == 0
    other = write_jsonl(tmp_path / "other.jsonl", choice_lines(9))
    capsys.readouterr()
    assert resume("--steps=6", f"--eval={other}") == 0
    assert "evaluations on other examples, of steps 0, 2, 4, do not count" in capsys.readouterr().out
    assert record()["best_step"] == record()["checkpoint_step"] in (4, 6)
    evals = [(line["step"], line["examples"]) for line in read_metrics("out/metrics.jsonl") if line["kind"] == "eval"]
    assert [n for _, n in evals[:3]] == [6, 6, 6] and evals[-1] == (6, 9)
