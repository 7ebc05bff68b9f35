"""The loss of a finetune's step is the mean over all that it learns from, whatever --micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import finetune, record, resume
from tiny_text import choice_lines, uneven_lines, write_jsonl

from distzo2.record.header import with_older_rules
from distzo2.record.journal import read_journal
from distzo2.record.line import encode_line
from distzo2.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("own_directory")


def entries_of(run: str) -> list:
    return read_journal(f"{run}/journal.jsonl").entries


def test_micro_batches_do_not_change_the_loss(files: SimpleNamespace) -> None:
    train = write_jsonl(Path("uneven.jsonl"), uneven_lines(20))
    for parts in (1, 4):
        assert finetune(files, f"--train={train}", f"--micro-batches={parts}", f"--out=out{parts}") == 0
    whole, cut = ([e.mean_loss for e in entries_of(f"out{parts}")] for parts in (1, 4))
    assert cut == pytest.approx(whole, rel=1e-5)
    for parts in (1, 4):
        for entry, line in zip(entries_of(f"out{parts}"), read_metrics(f"out{parts}/metrics.jsonl"), strict=True):
            assert [len(row) for row in entry.counts] == [parts]
            assert sum(entry.counts[0]) == sum(entries_of("out1")[entry.step].counts[0])
            assert line["loss"] == pytest.approx(entry.mean_loss, rel=1e-14)
    # Means of means are other losses.
    first = entries_of("out4")[0]
    assert abs(np.mean(first.losses) - first.mean_loss) > 1e-4


def test_examples_with_choices_count_one_each(files: SimpleNamespace) -> None:
    for name, lines in (("choices", choice_lines(20)), ("error", uneven_lines(20))):
        train = write_jsonl(Path(f"{name}.jsonl"), lines)
        data = [f"--train={train}", f"--objective={name}", "--micro-batches=2", "--eps=1e-1", f"--out={name}"]
        assert finetune(files, *data, "--save=none", "--no-check") == 0
    assert [entry.counts for entry in entries_of("choices")] == [[[2.0, 2.0]]] * 4
    entries = entries_of("error")
    assert all(0 <= loss <= 1 for entry in entries for row in entry.losses for loss in row)
    assert any(len(set(row)) > 1 for entry in entries for row in entry.counts)


def test_the_header_holds_the_hash_of_the_examples(files: SimpleNamespace) -> None:
    assert finetune(files) == 0
    header = read_journal("out/journal.jsonl").header
    assert header["data_hash"] == record()["examples_sha256"] and header["journal"] == 3


def test_a_run_under_the_mean_of_means_continues_under_it(files: SimpleNamespace) -> None:
    """Its closures return means: its steps have the bits that one of today's means has."""
    train = write_jsonl(Path("uneven.jsonl"), uneven_lines(20))
    assert finetune(files, f"--train={train}", "--micro-batches=2", "--steps=1") == 0
    lines = Path("out/journal.jsonl").read_bytes().splitlines(True)
    step = json.loads(lines[1])
    counts = step.pop("counts")
    del step["crc"]
    header = with_older_rules(read_journal("out/journal.jsonl").header)
    Path("out/journal.jsonl").write_bytes(encode_line(header, 1 << 20) + encode_line(step, 1 << 20))
    assert resume("--steps=3") == 0
    contents = read_journal("out/journal.jsonl")
    assert contents.header["journal"] == 2 and len(set(counts[0])) == 2
    for entry in contents.entries[1:]:
        plus, minus = (np.float64(row[0] + row[1]) / 2 for row in entry.losses)
        assert entry.counts is None
        assert [term.c for term in entry.update.terms] == [float(np.float32((plus - minus) / (2 * entry.eps)))]
        assert all(float(np.float32(loss)) == loss for row in entry.losses for loss in row)  # a float32 mean each
