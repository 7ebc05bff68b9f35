"""Where weights live: errors of the disk come as they are, slower ways are reported, and no file is left behind."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import fake_streams
import kill_cases
import pytest
import torch
from block_models import IDS, Blocks, offloaded

import distzo2
from distzo2.weights.store import MemoryStore, StoredCopy, StreamingStore, streaming_store
from distzo2.weights.units import Unit

SCRIPT = """
import resource, signal, torch, distzo2
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
try:
    distzo2.offload(model, weights="disk", directory="blocks")
except distzo2.DistZO2Error as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_reported_by_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    ended = kill_cases.run(tmp_path, SCRIPT)
    assert ended.status == 0 and "block file" in ended.text and "File too large" in ended.text, ended.text
    assert not list((tmp_path / "blocks").iterdir())


@pytest.mark.parametrize("fallbacks", [{}, {"direct_fallback": "no flag"}])
def test_slower_ways_are_reported(fallbacks, tmp_path: Path, monkeypatch, caplog) -> None:
    stats = StreamingStore.stats
    monkeypatch.setattr(StreamingStore, "stats", lambda self: stats(self) | {"direct_fallback": ""} | fallbacks)
    unit = Unit(0, "unit", [], [], resident=False)
    copies = [StoredCopy(unit, 0, 8192, block=i) for i in range(3)]
    with caplog.at_level(logging.WARNING, logger="distzo2"):
        streaming_store(copies, torch.device("cpu"), directory=tmp_path, slots=2).close()
    assert [r.message.split(": ")[1] for r in caplog.records] == list(fallbacks.values())


def test_no_block_file_is_left_behind(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    distzo2.ZOSGD(model, lr=1e-2).step(lambda: model(IDS))
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_read_on_another_stream_are_not_changed_before(monkeypatch):
    """Slots of the engine by a reader of that stream; memory on a GPU by an event that the next use waits for."""
    cuda, reader = fake_streams.install(monkeypatch), fake_streams.Stream()
    copy, released = StoredCopy.whole(Unit(0, "unit", [], [], resident=False)), []
    store = MemoryStore([copy], torch.device("cpu"))
    store._buffers[copy] = SimpleNamespace(device=torch.device("cuda:1"))
    store.acquire(copy)
    read = reader.work()
    store.release(copy, True, reader)
    assert not cuda.compute.is_behind(read)
    store.acquire(copy)
    assert cuda.compute.is_behind(read)

    ring = StreamingStore.__new__(StreamingStore)
    ring._device, ring.engine = torch.device("cuda:1"), SimpleNamespace(release=lambda *args: released.append(args))
    for stream in (reader, None):
        ring.release(copy, True, stream)
    assert released == [(-1, stream.cuda_stream, True, 0) for stream in (reader, cuda.compute)]
