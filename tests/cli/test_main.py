"""The command line: runs end well, and continue when interrupted; bad input ends in one line."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import kill_cases
import pytest
from cli_runs import STEPS, assert_same_bits, finetune, one_line, record, resume
from tiny_text import choice_lines, write_jsonl

from distzo2.cli.main import main
from distzo2.record.journal import read_journal
from distzo2.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("own_directory")


def test_a_run_and_what_comes_of_it(files, capsys) -> None:
    options = [f"--eval={files.eval}", "--eval-every=2", "--micro-batches=2", "--schedule=linear"]
    assert finetune(files, *options, "--weights=disk", "--trace", "--trace-steps=1") == 0
    lines = read_metrics("out/metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 2, 4]
    assert [line["lr"] for line in lines if line["kind"] == "step"] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    step = next(line for line in lines if line["kind"] == "step")
    assert step["tokens"] > 0 and step["peak"] > 0 and step["bytes_up"] > 0 and len(step["coefs"]) == 1
    done = record()
    assert done["status"] == "finished" and done["checkpoint_step"] == 4 and done["best_step"] in (0, 2, 4)
    assert not list(Path("out").glob("*.dzo2")) and Path("out/trace.json").is_file()

    Path("file").write_text("")
    assert main(["replay", "out", "--out=file", "--quiet"]) == 1
    assert "file: expected a directory" in capsys.readouterr().err
    assert main(["eval", "--model=out/checkpoint", f"--eval={files.eval}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["examples"] == 6 and figures["objective"] == "choices"
    # The same weights and lanes, but other micro-batches a pass.
    assert figures["loss"] == pytest.approx([line for line in lines if line["kind"] == "eval"][-1]["loss"], rel=1e-6)
    assert main(["report", "out"]) == 0
    assert Path("out/report.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["generate", "--model=out/checkpoint", "--prompt=the cat", "--max-new-tokens=3"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["generate", "--model=out/checkpoint", "--prompt=the cat", "--max-new-tokens=99"]) == 1
    assert "64 positions" in one_line(capsys)


def test_a_run_continues(files, capsys) -> None:
    options = [f"--eval={files.eval}", "--eval-every=3", "--estimator=fzoo", "--noise=rademacher", "--probes=2"]
    assert finetune(files, *options, "--steps=6", "--out=whole") == 0
    assert finetune(files, *options, "--steps=4", "--out=out") == 0
    # As a run that was killed: a torn line in the journal, metrics that are behind or ahead, a leftover block file.
    with open("out/journal.jsonl", "ab") as file:
        file.write(b'{"step": 4, "gro')
    metrics = Path("out/metrics.jsonl").read_text().splitlines()
    kept = [*metrics[:2], *metrics[3:5], metrics[-2].replace('"step": 3', '"step": 9'), '{"ki']
    Path("out/metrics.jsonl").write_text("\n".join(kept))
    capsys.readouterr()
    assert resume("--steps=6") == 0
    text = capsys.readouterr().out
    assert "resume: steps 4 -> 6" in text and "resumed out at step 4 of 6" in text and "torn" in text
    assert_same_bits("whole/checkpoint", "out/checkpoint")
    ours, theirs = (
        [(m["kind"], m["step"], m["loss"]) for m in read_metrics(f"{name}/metrics.jsonl")] for name in ("out", "whole")
    )
    assert ours == theirs

    assert resume("--seed=1") == 2
    assert "--seed was 0 and is 1" in one_line(capsys)
    other = write_jsonl(Path("other.jsonl"), choice_lines(21))
    assert resume(f"--train={other}") == 2
    assert "the training file is not the one" in one_line(capsys)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_at_any_time(files, tmp_path: Path, signum: int, status: int) -> None:
    """SIGKILL: tests/faults."""
    options = ["--steps=1000000", "--weights=disk", "--lr=1e-4"]
    command = ["finetune", f"--model={files.model}", f"--train={files.train}", "--out=out", *STEPS, *options]
    journal = Path("out/journal.jsonl")

    def has_begun() -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") > 3

    ended = kill_cases.run(tmp_path, command, 0.0, has_begun, signum=signum)
    assert ended.status == status, ended.text
    assert "steps are in the journal; continue with distzo2 finetune --resume --out out" in ended.text
    assert ended.text.count("\n") == 1 and "Traceback" not in ended.text
    made = len(read_journal(journal).entries)
    assert made >= 3

    total = f"--steps={made + 2}"
    assert resume(total) == 0
    assert finetune(files, *options, total, "--out=whole") == 0
    assert_same_bits("whole/checkpoint", "out/checkpoint")
    entries, expected = (read_journal(f"{name}/journal.jsonl").entries for name in ("out", "whole"))
    assert [(e.update, e.losses) for e in entries] == [(e.update, e.losses) for e in expected]


def test_interrupted_before_the_first_step(files, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("distzo2.tasks.held_out.evaluate_examples", interrupted)
    assert finetune(files, f"--eval={files.eval}") == 130
    assert "interrupted before the first step" in one_line(capsys)
    assert not Path("out").exists()


def test_streams_that_are_not_as_usual(files, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input that is no text, and an output whose encoding lacks most characters."""
    command = ["generate", f"--model={files.model}", "--max-new-tokens=5"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cat \xff"), encoding="utf-8"))
    assert main(command) == 1
    assert one_line(capsys).startswith("distzo2: error: 'utf-8' codec can't decode byte")

    def generated(encoding: str) -> bytes:
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            assert main([*command, "--prompt=the cat"]) == 0
        return out.buffer.getvalue()

    usual = generated("utf-8")
    assert not usual.isascii()
    assert generated("ascii") == usual.decode().encode("ascii", "backslashreplace")
