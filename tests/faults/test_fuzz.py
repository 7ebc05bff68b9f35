"""Fuzzing the readers of journals and checkpoints: a few seconds of it here, `make fuzz` for as long as one likes.

DISTZO2_FUZZ_SECONDS is how long each test takes; without it, each tries a fixed number of examples.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import fuzz_targets as targets
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from journal_cases import json_values, make_entry
from safetensors.torch import save_file

SECONDS = float(os.environ.get("DISTZO2_FUZZ_SECONDS", "0"))
EXAMPLES = 150
pytestmark = pytest.mark.timeout(300 + 2 * SECONDS)


def fuzz(strategy: st.SearchStrategy, check: Callable, examples: int = EXAMPLES) -> None:
    """Tries examples of the strategy until the time is up, each round with another seed."""
    deadline = time.monotonic() + SECONDS
    total = 0
    for number in itertools.count():

        @seed(number)
        @settings(
            max_examples=examples if not SECONDS else 2000,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
        )
        @given(strategy)
        def round_of_examples(example) -> None:
            nonlocal total
            if not SECONDS or time.monotonic() < deadline:
                total += 1
                check(example)

        round_of_examples()
        if time.monotonic() >= deadline:
            print(f"fuzz: {total} examples")
            return


def test_damaged_journals(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    data = targets.journal_bytes(path, 3)
    fuzz(targets.damage(data), lambda damaged: targets.check_damaged_journal(path, damaged))


def test_forged_journals(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    fuzz(targets.forged_journals(), lambda data: targets.check_forged_journal(path, data))


def test_lines_of_anything() -> None:
    good = make_entry(0).to_line()
    fuzz(st.binary(max_size=200) | targets.damage(good) | targets.damage(good[:-19]), targets.check_line)


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    data = targets.good_safetensors(path)
    fuzz(targets.damage(data), lambda damaged: targets.check_safetensors(path, damaged))


def test_forged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    strategy = st.tuples(targets.safetensors_headers(), st.sampled_from([0, 0, 0, 1, -1]))
    fuzz(strategy, lambda made: targets.check_safetensors(path, targets.forged_safetensors(*made)))


def test_pickle_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    streams = st.sampled_from(targets.good_streams()).flatmap(targets.damage)
    fuzz(streams, lambda stream: targets.check_stream(path, stream))
    assert not Path("it-ran").exists()


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, path)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        targets.check_archive(path)

    fuzz(targets.damage(path.read_bytes()), check)


def test_indices(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path.parent / "x.safetensors")
    good = b'{"metadata":{"total_size":8},"weight_map":{"w":"x.safetensors"}}'
    contents = targets.damage(good) | st.dictionaries(st.text(max_size=3) | st.just("weight_map"), json_values).map(
        lambda record: repr(record).replace("'", '"').encode()
    )
    fuzz(contents, lambda content: targets.check_index(tmp_path, content))
