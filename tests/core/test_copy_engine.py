"""CopyEngine from Python: contents, the gate, errors, lifetimes.

Orders, delays and faults inside the engine are the C++ tests' subject (tests/cpp/runtime). With a GPU the engine is
tested on it as well, on torch's own streams.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ring import SIZES, SLOT_BYTES, Ring, pattern

from distzo2_core import BlockFile, CopyEngine, cuda_available

DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() and cuda_available()[0] else [])]


@pytest.fixture(params=["host", "disk"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_engine_commits_versions_to_a_durable_file(tmp_path: Path) -> None:
    ring = Ring("disk", tmp_path, durable=True)
    for version in (1, 2, 3):
        for block in range(len(SIZES)):
            ring.change(block, version, gate=version)
            ring.engine.set_durable(version)
    ring.change(2, 4, gate=4)  # its journal line never becomes durable
    ring.engine.close()
    ring.file.close()
    ring.file = BlockFile(ring.file.path, SIZES, create=False)
    for block in range(len(SIZES)):
        assert ring.file.version(block) == 3
        assert torch.equal(ring.stored(block), pattern(block, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_tails_of_blocks_in_memory_are_not_stored(device: str, tmp_path: Path) -> None:
    ring = Ring("host", tmp_path, device)
    tails = [70_000, 96, 31_072, 0, 9]
    for wrong in (tails[:4], [*tails[:4], 99_999 + 1]):
        with pytest.raises(ValueError, match="expected a tail for each block, and none longer than its block"):
            ring.engine.set_tails(wrong)
    ring.engine.set_tails(tails)
    for block in range(len(SIZES)):
        ring.change(block, 1)
    ring.engine.flush()
    for block, tail in enumerate(tails):
        end = SIZES[block] - tail
        assert torch.equal(ring.stored(block)[:end], pattern(block, 1)[:end])
        assert torch.equal(ring.stored(block)[end:], pattern(block, 0)[end:])
    assert ring.engine.stats()["bytes_down"] == sum(SIZES) - sum(tails)


@pytest.mark.parametrize("device", DEVICES)
def test_passes_over_all_blocks_keep_every_change(kind: str, device: str, tmp_path: Path) -> None:
    ring = Ring(kind, tmp_path, device)
    num_blocks, num_steps = len(SIZES), 20
    for step in range(num_steps):
        for block in range(num_blocks):
            ring.engine.prefetch((block + 1) % num_blocks)
            view = ring.acquire(block)
            assert torch.equal(view.cpu(), pattern(block, step)), (step, block)
            view.copy_(pattern(block, step + 1))
            ring.release(block, dirty=True)
    ring.engine.flush()
    for block in range(num_blocks):
        assert torch.equal(ring.stored(block), pattern(block, num_steps))
    stats = ring.engine.stats()
    assert stats["acquires"] == stats["downloads"] == num_steps * num_blocks
    assert stats["bytes_down"] == num_steps * sum(SIZES)
    assert 0 < stats["uploads"] <= num_steps * num_blocks + num_blocks
    ring.engine.reset_stats()
    assert ring.engine.stats()["bytes_up"] == 0
    ring.engine.close()


@pytest.mark.parametrize("device", DEVICES)
def test_clean_blocks_stay_present_and_are_not_written(kind: str, device: str, tmp_path: Path) -> None:
    ring = Ring(kind, tmp_path, device)
    for _ in range(3):
        for block in (0, 2):
            assert torch.equal(ring.acquire(block).cpu(), pattern(block, 0))
            ring.release(block)
    assert ring.engine.present() == [0, 2]
    stats = ring.engine.stats()
    assert stats["uploads"] == 2 and stats["downloads"] == 0 and stats["hits"] == 4
    ring.engine.drop(0)
    assert ring.engine.present() == [2]
    # What is written to the source beside the engine shows after a drop.
    new = pattern(0, 9)
    if ring.file is not None:
        ring.file.write(0, new.data_ptr(), SIZES[0])
    else:
        ring.pool.tensor(0).copy_(new)
    assert torch.equal(ring.acquire(0).cpu(), new)
    ring.release(0)


def test_gate_opens_from_another_thread(tmp_path: Path) -> None:
    ring = Ring("disk", tmp_path, num_slots=2)
    engine = ring.engine
    ring.change(0, 1, gate=1)
    ring.change(1, 1, gate=2)
    time.sleep(0.02)
    assert torch.equal(ring.stored(0), pattern(0, 0)) and engine.stats()["downloads"] == 0

    def journal() -> None:
        for version in (1, 2):
            time.sleep(0.2)
            engine.set_durable(version)

    thread = threading.Thread(target=journal)
    thread.start()
    # Both slots wait for the journal: acquire and flush wait with them, and let other threads run.
    assert torch.equal(ring.acquire(2), pattern(2, 0))
    ring.release(2)
    assert torch.equal(ring.stored(0), pattern(0, 1))
    engine.flush()
    thread.join()
    assert torch.equal(ring.stored(1), pattern(1, 1))


def test_misuse_is_refused_and_leaves_the_engine_usable(kind: str, tmp_path: Path) -> None:
    ring = Ring(kind, tmp_path, num_slots=2)
    with pytest.raises(IndexError, match="no block 5"):
        ring.engine.acquire(5)
    with pytest.raises(RuntimeError, match="not acquired"):
        ring.engine.release(0)
    ring.acquire(0), ring.acquire(1)
    assert not ring.engine.prefetch(2)
    with pytest.raises(RuntimeError, match="all 2 slots are"):
        ring.engine.acquire(2)
    with pytest.raises(RuntimeError, match="is acquired"):
        ring.engine.drop(0)
    ring.release(0)
    assert torch.equal(ring.acquire(2), pattern(2, 0))
    source = ring.file if ring.file is not None else ring.pool
    with pytest.raises(ValueError, match="at least 2 slots"):
        CopyEngine("cpu", source, [ring.slots[0].data_ptr()], SLOT_BYTES)
    with pytest.raises(ValueError, match="block 0 has 70000 bytes, and a slot 4096"):
        CopyEngine("cpu", source, [s.data_ptr() for s in ring.slots], 4096).acquire(0)
    with pytest.raises(TypeError):
        CopyEngine("cpu", None, [s.data_ptr() for s in ring.slots], SLOT_BYTES)


def test_trace_is_on_pythons_clock(kind: str, tmp_path: Path) -> None:
    ring = Ring(kind, tmp_path)
    ring.engine.trace(True)
    begin = time.monotonic_ns()
    for block in (0, 2):
        ring.change(block, 1)
    ring.engine.flush()
    events = ring.engine.events()
    assert sorted(e[0] for e in events) == ["download"] * 2 + ["upload"] * 2 + ["wait"] * 2
    for what, block, slot, num_bytes, start, end in events:
        assert begin <= start <= end <= time.monotonic_ns(), what
        assert num_bytes == SIZES[block] and 0 <= slot < 3
    ring.engine.trace(False)
    assert ring.engine.events() == []


def test_engine_outlives_what_it_reads_from(kind: str, tmp_path: Path) -> None:
    ring = Ring(kind, tmp_path)
    ring.change(1, 1)
    ring.pool.close()
    if ring.file is not None:
        ring.file.close(unlink=True)
    ring.pool = ring.file = None
    gc.collect()
    assert torch.equal(ring.acquire(2), pattern(2, 0))


def test_interpreter_exit_writes_what_is_queued(tmp_path: Path) -> None:
    """An engine that nobody closed: the process ends at once, and the last download is on disk."""
    script = (
        "import torch\n"
        "from distzo2_core import BlockFile, CopyEngine, aligned_buffer\n"
        f"file = BlockFile({str(tmp_path / 'blocks')!r}, {SIZES}, durable=True)\n"
        f"slots = [aligned_buffer({SLOT_BYTES}) for _ in range(2)]\n"
        f"engine = CopyEngine('cpu', file, [s.data_ptr() for s in slots], {SLOT_BYTES})\n"
        f"slots[engine.acquire(2)][:{SIZES[2]}] = 77\n"
        "engine.release(2, 0, True)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    file = BlockFile(str(tmp_path / "blocks"), SIZES, create=False)
    out = torch.empty(SIZES[2], dtype=torch.uint8)
    file.read(2, out.data_ptr(), SIZES[2])
    assert (out == 77).all()
