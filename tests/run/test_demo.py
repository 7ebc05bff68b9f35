"""The demo's data and its base model, in a small form."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from pathlib import Path

import pytest

from distzo2.demo.demo import MARKER, SETTINGS, run_demo
from distzo2.demo.demo_base import SUFFIX, Recipe, prepare
from distzo2.demo.demo_data import (
    LABELS,
    LIBRARIES,
    MAX_PER_FILE,
    Docstring,
    collect,
    docstrings_of,
    mask,
    roots,
    split,
)
from distzo2.errors import UsageError
from distzo2.tasks.lines import read_lines
from distzo2.tasks.tokenize import load_tokenizer

LONG = "A docstring that is long enough to be taken, since it has more than eighty characters in it."


def test_docstrings_of_a_source() -> None:
    source = f'"""{LONG}"""\nclass A:\n    """short"""\n    def f(self):\n        """B {LONG}"""\n'
    assert list(docstrings_of(source.encode())) == [LONG, f"B {LONG}"]
    assert list(docstrings_of(b"def f(:\n")) == []
    assert list(docstrings_of(b"\x00")) == []


def test_names_are_masked() -> None:
    assert mask("PyTorch and torch.nn,\n  numpy (np) or a NetworkX graph") == "it and it.nn, it (it) or a it graph"
    assert "torch" not in mask("torchvision") and mask("a transformer") == "a it"


def test_files_are_dealt_whole() -> None:
    docstrings = [Docstring("sympy", f"{i // 3}.py", str(i)) for i in range(60)]
    parts = split(docstrings, num_train=10, num_held_out=7)
    assert (len(parts.train), len(parts.held_out)) == (10, 7)
    files = [{d.file for d in part} for part in (parts.pretrain, parts.train, parts.held_out)]
    assert not (files[0] & files[1] or files[0] & files[2] or files[1] & files[2])
    assert parts == split(docstrings, num_train=10, num_held_out=7)
    assert split([Docstring("torch", "a", "x")], 10, 7).pretrain


def test_collecting_is_deterministic() -> None:
    first = collect("networkx", roots()["networkx"], 30)
    assert first == collect("networkx", roots()["networkx"], 30)
    assert 30 <= len(first) < 30 + MAX_PER_FILE and len({d.text for d in first}) == len(first)
    assert not any("test" in Path(d.file).parts for d in first)


SMALL = Recipe(
    docstrings=40, num_train=10, num_held_out=6, vocabulary=400, hidden=16, layers=5, steps=2, batch_size=4,
    backprop_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_small_base(cache: Path) -> None:
    said: list[str] = []
    base = prepare(cache, SMALL, said.append, quiet=True)
    lines = read_lines(base.train)
    assert {line.kind for line in lines} == {"choices"} and len(lines) == 40 and len(read_lines(base.held_out)) == 24
    assert {line.record["label"] for line in lines} == set(range(len(LABELS)))
    assert all(line.record["prompt"].endswith(SUFFIX) for line in lines)
    tokenizer = load_tokenizer(base.model)
    for word in LABELS.values():
        assert len(tokenizer(word)["input_ids"]) == 1
    assert len({tokenizer.convert_tokens_to_ids(f"<{library}>") for library in LIBRARIES}) == len(LIBRARIES)
    facts = base.facts
    assert math.isfinite(facts["backprop"]["loss"]) and 0 <= facts["backprop"]["accuracy"] <= 1
    assert facts["parameters"] > 0 and json.dumps(facts)

    again = prepare(cache, SMALL, said.append, quiet=True)
    assert again == base and "earlier run" in said[-1]
    assert [p.name for p in cache.iterdir()] == [base.directory.name]


def test_the_demo_replaces_nothing_but_a_demo(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(UsageError, match="is not an earlier demo's"):
        run_demo(Namespace(out=str(out), cache=None), print)
    assert (out / "mine").exists() and not (out / MARKER).exists()


def test_the_whole_demo_in_small(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    options = Namespace(out=str(tmp_path / "out"), cache=str(cache), device="cpu", seed=0, quiet=True)
    said: list[str] = []
    for _ in range(2):  # the second replaces the first
        assert run_demo(options, said.append, SMALL, {**SETTINGS, "steps": 3, "probes": 2}) == 0
    text = said[-1]
    for part in ("before", "after", "backprop", "hidden behind compute", "bit for bit", "What it is not"):
        assert part in text, text
    assert (tmp_path / "out" / "report.png").is_file() and (tmp_path / "out" / MARKER).is_file()
