"""The snippets of docs/core.md run, one after another, as its reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kernel_cases import needs_native

GUIDE = Path(__file__).parents[2] / "docs" / "core.md"


@needs_native
def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    snippets = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(snippets) > 8
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(GUIDE), "exec"), names)
