"""Which modules become units, and of what kind."""

from __future__ import annotations

import pytest
from zoo import LANGUAGE

import distzo2


@pytest.mark.parametrize("case", LANGUAGE[:3], ids=lambda c: c.name)
def test_units_are_the_blocks_and_tied_weights_stay(case, tmp_path):
    model = distzo2.offload(case.build(), weights="disk", directory=tmp_path)
    runtime = distzo2.runtime_of(model)
    streamed = [u for u in runtime.units if not u.resident]
    assert len(streamed) == 3
    assert sorted(p.index for u in runtime.units for p in u.params) == list(range(len(runtime.params)))
    embedding = next(u for u in runtime.units if any("embed_tokens" in p.name for p in u.params))
    assert embedding.resident
    assert len(embedding.windows) == (2 if case.name == "opt-tied" else 1)
