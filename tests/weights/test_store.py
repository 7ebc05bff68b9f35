"""Where weights live: errors of the disk come as they are, what is slower is said, and nothing is left behind."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distzo2.weights.store import StreamingStore

SCRIPT = """
import resource, signal, sys, torch, distzo2
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
try:
    distzo2.offload(model, weights="disk", directory=sys.argv[1])
except distzo2.DistZO2Error as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_told_by_its_own_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "block file" in done.stdout and "File too large" in done.stdout, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fallbacks", [{}, {"direct_fallback": "no flag"}])
def test_what_is_slower_than_it_could_be_is_said(fallbacks, tmp_path: Path, monkeypatch, caplog) -> None:
    stats = StreamingStore.stats
    monkeypatch.setattr(StreamingStore, "stats", lambda self: stats(self) | {"direct_fallback": ""} | fallbacks)
    units = [SimpleNamespace(num_bytes=8192, index=i, block=-1) for i in range(3)]
    with caplog.at_level(logging.WARNING, logger="distzo2"):
        StreamingStore(units, torch.device("cpu"), directory=tmp_path, slots=2).close()
    assert [r.message.split(": ")[1] for r in caplog.records] == list(fallbacks.values())
