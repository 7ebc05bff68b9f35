"""distzo2_core/_C.pyi says what the compiled extension is."""

from __future__ import annotations

import difflib

import pytest
import stubs
from kernel_cases import needs_native


@needs_native
def test_the_stubs_are_current() -> None:
    pytest.importorskip("pybind11_stubgen")
    difference = list(difflib.unified_diff(stubs.STUBS.read_text().splitlines(), stubs.make_stubs().splitlines()))
    assert not difference, "\n".join(["run make stubs:", *difference])
