"""HostPool, BlockFile and CopyEngine from Python: contents, the gate, errors, lifetimes.

Orders, delays and faults inside the runtime are the C++ tests' subject (tests/cpp). With a GPU the engine is tested on
it as well, on torch's own streams.
"""

import gc
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from distzo2_core import BlockFile, CopyEngine, HostPool, aligned_buffer, cuda_available
from distzo2_core._C import memory_budget

SIZES = [70_000, 4096, 131_072, 1, 99_999]
SLOT_BYTES = 131_072
DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() and cuda_available()[0] else [])]


def pattern(block: int, version: int) -> torch.Tensor:
    """The bytes of a block at a version: uint8 [SIZES[block]]."""
    i = torch.arange(SIZES[block], dtype=torch.int64)
    return ((i * 131 + (i >> 8) * 17 + block * 29 + version * 101) % 251).to(torch.uint8)


class Ring:
    """A source at version 0, slots, and an engine between them."""

    def __init__(self, kind: str, path: Path, device: str = "cpu", num_slots: int = 3, durable: bool = False) -> None:
        self.device = torch.device(device)
        self.pool = HostPool(SIZES, device=device)
        for block in range(len(SIZES)):
            self.pool.tensor(block).copy_(pattern(block, 0))
        self.file = None
        if kind == "disk":
            self.file = BlockFile(str(path / "blocks"), SIZES, durable=durable)
            for block, num_bytes in enumerate(SIZES):
                self.file.write(block, self.pool.address(block), num_bytes)
        if device == "cpu":
            self.slots = [aligned_buffer(SLOT_BYTES) for _ in range(num_slots)]
        else:
            self.slots = [torch.empty(SLOT_BYTES, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        source = self.file if self.file is not None else self.pool
        self.engine = CopyEngine(device, source, [s.data_ptr() for s in self.slots], SLOT_BYTES)

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def acquire(self, block: int) -> torch.Tensor:
        return self.slots[self.engine.acquire(block, self.stream())][: SIZES[block]]

    def release(self, block: int, dirty: bool = False, version: int = 0) -> None:
        self.engine.release(block, self.stream(), dirty, version)

    def change(self, block: int, version: int, gate: int = 0) -> None:
        view = self.acquire(block)
        view.copy_(pattern(block, version))
        self.release(block, True, gate)

    def stored(self, block: int) -> torch.Tensor:
        if self.file is None:
            return self.pool.tensor(block).clone()
        host = torch.empty(SIZES[block], dtype=torch.uint8)
        self.file.read(block, host.data_ptr(), SIZES[block])
        return host


@pytest.fixture(params=["host", "disk"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_pool_gives_aligned_zeroed_views_that_outlive_it() -> None:
    pool = HostPool([5, 4097, 1 << 20])
    assert len(pool) == 3 and pool.nbytes(1) == 4097
    assert all(pool.address(i) % 4096 == 0 for i in range(3))
    views = [pool.tensor(i) for i in range(3)]
    assert [v.numel() for v in views] == [5, 4097, 1 << 20] and not any(v.any() for v in views)
    assert views[1].data_ptr() == pool.address(1)
    views[2].fill_(7)
    stats = pool.stats()
    assert stats["bytes_used"] == 5 + 4097 + (1 << 20) and stats["bytes_padded"] == 4096 + 8192 + (1 << 20)
    assert stats["bytes_pinned"] == 0 and stats["chunks"] == 1
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.address(0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.tensor(0)
    del pool
    gc.collect()
    assert (views[2] == 7).all()


def test_pool_refuses_what_does_not_fit_with_every_number() -> None:
    with pytest.raises(
        RuntimeError, match=r"needs \d+ bytes .*cgroup limit leaves: .*MemAvailable: \d+ bytes .*MEMLOCK"
    ):
        HostPool([1 << 50])
    budget = memory_budget()
    assert budget["allowed_bytes"] < budget["available_bytes"]
    for bad in ([], [-1], ["x"]):
        with pytest.raises((ValueError, TypeError)):
            HostPool(bad)
    with pytest.raises(IndexError, match="no block 2"):
        HostPool([1, 2]).address(2)


def test_missing_devices_are_said_by_name() -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu:0'"):
        HostPool([1], device="tpu:0")
    with pytest.raises(RuntimeError, match="cannot be pinned for the device 'cpu'"):
        HostPool([1], pin=True)
    found, reason = cuda_available()
    if not found:
        assert "driver" in reason or "device" in reason
        with pytest.raises(RuntimeError, match="CUDA"):
            HostPool([1], device="cuda:0")


def test_aligned_buffer() -> None:
    for num_bytes in (1, 4096, 3_000_001):
        buffer = aligned_buffer(num_bytes)
        assert buffer.dtype == torch.uint8 and buffer.numel() == num_bytes and buffer.data_ptr() % 4096 == 0
        assert not buffer.any()


def test_block_file_round_trips_any_range(tmp_path: Path) -> None:
    file = BlockFile(str(tmp_path / "blocks"), SIZES, durable=True)
    data = pattern(4, 3)
    file.write(4, data.data_ptr(), SIZES[4], version=3)
    patch = torch.full((5000,), 255, dtype=torch.uint8)
    file.write(4, patch.data_ptr(), 5000, offset=12_345)
    data[12_345:17_345] = 255
    out = torch.zeros(SIZES[4], dtype=torch.uint8)
    file.read(4, out.data_ptr(), 50_001, offset=7)
    assert torch.equal(out[:50_001], data[7:50_008])
    file.sync()
    stats = file.stats()
    assert stats["direct"] or stats["direct_fallback"]
    assert stats["bytes_used"] == sum(SIZES) and stats["bytes_padded"] % 4096 == 0
    assert stats["bytes_padded"] == os.path.getsize(file.path) == BlockFile.file_bytes(SIZES, durable=True)
    assert stats["bytes_written"] == 2 * SIZES[4] and stats["map_bytes_written"] > 0 and stats["syncs"] > 4
    file.close()
    with pytest.raises(RuntimeError, match="is closed"):
        file.stats()
    again = BlockFile(file.path, SIZES, create=False)
    assert [again.version(block) for block in range(5)] == [0, 0, 0, 0, 3]
    assert again.stats()["durable"] and again.verify() == sum(SIZES)
    again.read(4, out.data_ptr(), SIZES[4])
    assert torch.equal(out, data)
    again.close(unlink=True)
    assert not os.path.exists(file.path)


def test_scratch_files_cannot_be_opened_again(tmp_path: Path) -> None:
    with closing(BlockFile(str(tmp_path / "blocks"), SIZES)) as file:
        stats = file.stats()
        assert not stats["durable"] and stats["bytes_padded"] == BlockFile.file_bytes(SIZES)
        assert BlockFile.file_bytes(SIZES) < BlockFile.file_bytes(SIZES, durable=True)
    with pytest.raises(RuntimeError, match="blocks: is a scratch file"):
        BlockFile(file.path, SIZES, create=False)
    assert BlockFile.file_bytes([1 << 20] * 24) == 4096 + (24 + 3) * (1 << 20)  # three to spare


def test_damaged_bytes_are_named(tmp_path: Path) -> None:
    """In the file and under an engine: block, place and both checksums."""
    for durable in (False, True):
        ring = Ring("disk", tmp_path, durable=durable)
        content = Path(ring.file.path).read_bytes()
        place = content.index(bytes(pattern(2, 0)))
        with open(ring.file.path, "r+b") as raw:
            raw.seek(place + 100_000)
            raw.write(bytes([content[place + 100_000] ^ 4]))
        where = f"blocks: bytes 0 to 131072 of block 2, 131072 bytes at offset {place}"
        text = rf"{where}, are not what was written: checksum 0x\w+, expected 0x"
        with pytest.raises(RuntimeError, match=text):
            ring.file.verify()
        with pytest.raises(RuntimeError, match=text):
            ring.stored(2)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=text):
                ring.acquire(2)
        ring.engine.close()
        ring.file.close()


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


def test_both_ways_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for way in ("threads", "io_uring", ""):
        monkeypatch.setenv("DISTZO2_DISK_READS", way)
        try:
            ring = Ring("disk", tmp_path)
        except RuntimeError as error:
            assert way == "io_uring" and "which is not there" in str(error)  # a sandbox forbids it
            continue
        for block in range(len(SIZES)):
            assert torch.equal(ring.acquire(block), pattern(block, 0))
            ring.release(block)
        seen.append(ring.engine.stats()["reads_by"])
        assert ring.engine.stats()["reads_fallback"] == "" or way == ""
        ring.engine.close()
        ring.file.close()
    assert seen in (["threads", "io_uring", "io_uring"], ["threads", "threads"])
    monkeypatch.setenv("DISTZO2_DISK_READS", "tape")
    with pytest.raises(ValueError, match="expected io_uring or threads, got tape"):
        Ring("disk", tmp_path)


def test_block_file_errors_name_file_and_cause(tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    with pytest.raises(RuntimeError, match=r"blocks: needs \d+ bytes .* available: No space left"):
        BlockFile(str(path), [1 << 55])
    assert not path.exists()
    with pytest.raises(RuntimeError, match=r"no/dir/blocks: cannot be opened: No such file"):
        BlockFile(str(tmp_path / "no" / "dir" / "blocks"), [1])
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(RuntimeError, match="is no block file; it was left as it is"):
        BlockFile(str(notes), [1])
    assert notes.read_text() == "mine"
    with closing(BlockFile(str(path), SIZES, durable=True)) as file:
        os.truncate(path, 90_000)
        out = torch.empty(SIZES[2], dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=r"blocks: is truncated: wanted \d+ bytes at offset \d+, got"):
            file.read(2, out.data_ptr(), SIZES[2])
        with pytest.raises(RuntimeError, match="in use by another run"):
            BlockFile(str(path), SIZES)
        with pytest.raises(IndexError, match="no block 9"):
            file.read(9, out.data_ptr(), 1)
    with pytest.raises(RuntimeError, match="is truncated: 90000 bytes, expected"):
        BlockFile(str(path), SIZES, create=False)
    with open(path, "r+b") as raw:
        raw.seek(100)
        raw.write(b"x")
    with pytest.raises(RuntimeError, match="its header at offset 0 is damaged: checksum 0x"):
        BlockFile(str(path), SIZES, create=False)


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
    assert engine.stats()["wait_s"] > 0.02


def test_close_discards_what_the_journal_does_not_allow(tmp_path: Path) -> None:
    ring = Ring("disk", tmp_path)
    ring.change(0, 1)
    ring.change(1, 1, gate=1)
    ring.engine.close()
    assert torch.equal(ring.stored(0), pattern(0, 1))
    assert torch.equal(ring.stored(1), pattern(1, 0))
    with pytest.raises(RuntimeError, match="is closed"):
        ring.engine.acquire(0)


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
        CopyEngine("cpu", source, [s.data_ptr() for s in ring.slots], 4096)
    with pytest.raises(TypeError):
        CopyEngine("cpu", None, [s.data_ptr() for s in ring.slots], SLOT_BYTES)


def test_failed_read_is_raised_by_every_later_call(tmp_path: Path) -> None:
    ring = Ring("disk", tmp_path)
    os.truncate(tmp_path / "blocks", 90_000)
    ring.engine.prefetch(2)
    for call in (lambda: ring.engine.acquire(2), lambda: ring.engine.acquire(0), ring.engine.flush):
        with pytest.raises(RuntimeError, match=r"blocks: is truncated: wanted \d+ bytes at offset \d+, got"):
            call()
    ring.engine.close()


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
