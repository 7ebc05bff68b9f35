"""The loss of a finetune's step is the mean over all that it learns from, whatever --micro-batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import finetune, record
from tiny_text import choice_lines, uneven_lines, write_jsonl

from distzo2.record.journal import read_journal
from distzo2.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("own_directory")


def entries_of(run: str) -> list:
    return read_journal(f"{run}/journal.jsonl").entries


@pytest.mark.parametrize("options", [[], ["--estimator=fzoo", "--probes=2", "--lr=1e-4"]], ids=["spsa", "fzoo"])
def test_micro_batches_do_not_change_the_loss(files: SimpleNamespace, options: list[str]) -> None:
    train = write_jsonl(Path("uneven.jsonl"), uneven_lines(20))
    for parts in (1, 2, 4):
        assert finetune(files, f"--train={train}", f"--micro-batches={parts}", f"--out=out{parts}", *options) == 0
    whole, *others = ([e.mean_loss for e in entries_of(f"out{parts}")] for parts in (1, 2, 4))
    for losses in others:
        assert losses == pytest.approx(whole, rel=1e-5)
    for parts in (1, 2, 4):
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
        assert finetune(files, *data) == 0
    assert [entry.counts for entry in entries_of("choices")] == [[[2.0, 2.0]]] * 4
    entries = entries_of("error")
    assert all(0 <= loss <= 1 for entry in entries for row in entry.losses for loss in row)
    assert any(len(set(row)) > 1 for entry in entries for row in entry.counts)


def test_the_header_holds_the_hash_of_the_examples(files: SimpleNamespace) -> None:
    assert finetune(files) == 0
    header = read_journal("out/journal.jsonl").header
    assert header["data_hash"] == record()["examples_sha256"] and header["journal"] == 3
