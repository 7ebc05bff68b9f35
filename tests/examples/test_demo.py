"""The demo's data, and the whole demo in a small form."""

from __future__ import annotations

from pathlib import Path

import demo
import pytest
from base import SUFFIX, Recipe
from docstrings import LABELS, LIBRARIES, MAX_PER_FILE, Docstring, collect, docstrings_of, mask, roots, split

from distzo2.cli.main import main
from distzo2.tasks.lines import read_lines
from distzo2.tasks.tokenize import load_tokenizer

LONG = "A docstring that is long enough to be taken, since it has more than eighty characters in it."
SMALL = Recipe(
    docstrings=40, num_train=10, num_held_out=6, vocabulary=400, hidden=16, layers=5, steps=2, batch_size=4,
    backprop_steps=1,
)  # fmt: skip


def test_docstrings_of_a_source() -> None:
    source = f'"""{LONG}"""\nclass A:\n    """short"""\n    def f(self):\n        """B {LONG}"""\n'
    assert list(docstrings_of(source.encode())) == [LONG, f"B {LONG}"]
    assert list(docstrings_of(b"def f(:\n")) == [] == list(docstrings_of(b"\x00"))
    assert mask("PyTorch and torch.nn,\n  numpy (np) or a NetworkX graph") == "it and it.nn, it (it) or a it graph"


def test_files_are_dealt_whole() -> None:
    docstrings = [Docstring("sympy", f"{i // 3}.py", str(i)) for i in range(60)]
    parts = split(docstrings, num_train=10, num_held_out=7)
    assert (len(parts.train), len(parts.held_out)) == (10, 7)
    files = [{d.file for d in part} for part in (parts.pretrain, parts.train, parts.held_out)]
    assert not (files[0] & files[1] or files[0] & files[2] or files[1] & files[2])


def test_collecting_is_deterministic() -> None:
    first = collect("networkx", roots()["networkx"], 30)
    assert first == collect("networkx", roots()["networkx"], 30)
    assert 30 <= len(first) < 30 + MAX_PER_FILE and len({d.text for d in first}) == len(first)


def test_the_whole_demo_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "distzo2", lambda *arguments: main([*map(str, arguments)]))
    assert demo.run_demo(tmp_path, 3, SMALL)
    made = (tmp_path / "base/model/model.safetensors").stat()
    assert demo.run_demo(tmp_path, 2, SMALL)  # replaces the run, not the base model
    assert (tmp_path / "base/model/model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    text = capfd.readouterr().out
    for part in ("before", "after", "backprop", "hidden behind compute", "bit for bit", "What it is not", "2 steps of"):
        assert part in text, text
    assert (tmp_path / "run/report.png").is_file()

    lines = read_lines(tmp_path / "base/train.jsonl")
    assert {line.kind for line in lines} == {"choices"} and len(lines) == 40
    assert all(line.record["prompt"].endswith(SUFFIX) for line in lines)
    tokenizer = load_tokenizer(tmp_path / "base/model")
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in LABELS.values())
    assert len({tokenizer.convert_tokens_to_ids(f"<{library}>") for library in LIBRARIES}) == len(LIBRARIES)
