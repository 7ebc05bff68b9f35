"""What only a GPU shows, beside the kernels' bits (test_kernels.py): streams and the copy engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distzo2_core

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_kernels_run_on_the_current_stream(backend: str) -> None:
    """A launch goes behind the work that the current stream has: run before it, the zeroing would wipe it out."""
    if backend == "native" and not distzo2_core.build_info()["cuda"]:
        pytest.skip("distzo2_core._C was built without CUDA kernels")
    numel = 2**20
    place = {"seed": 1, "step": 0, "param": 0, "backend": backend}
    expected = distzo2_core.perturb_(torch.zeros(numel, device="cuda"), 1.0, **place)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        weights = torch.ones(numel, device="cuda")
        torch.cuda._sleep(50_000_000)
        weights.zero_()
        distzo2_core.perturb_(weights, 1.0, **place)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("source", ["host", "disk"])
def test_copy_engine_brings_blocks_there_and_back(source: str, tmp_path: Path) -> None:
    """Each block is uploaded, raised by one on the device and downloaded, through slots that begin poisoned."""
    sizes = [1 << 20, (1 << 20) + 4096, 12345, 1 << 20, 3 << 19, 64]
    content = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    staging = distzo2_core.HostPool([max(sizes)] * 4, "cuda:0")
    if source == "host":
        store = distzo2_core.HostPool(sizes, "cuda:0", pin=True)
        assert store.stats()["bytes_pinned"] >= sum(sizes)
        for block, value in enumerate(content):
            store.tensor(block).copy_(value)
    else:
        store = distzo2_core.BlockFile(str(tmp_path / "blocks"), sizes)
        for block, value in enumerate(content):
            store.write(block, value.data_ptr(), sizes[block])
    slots = [torch.full((max(sizes),), 0xA5, dtype=torch.uint8, device="cuda") for _ in range(3)]
    torch.cuda.synchronize()
    engine = distzo2_core.CopyEngine(
        "cuda:0", store, [slot.data_ptr() for slot in slots], max(sizes), None if source == "host" else staging
    )
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(2):
        for block, size in enumerate(sizes):
            slot = slots[engine.acquire(block, stream)]
            slot[:size].add_(1)
            engine.release(block, stream, dirty=True, version=0)
    engine.flush()
    back = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for block, value in enumerate(back):
        if source == "host":
            value.copy_(store.tensor(block))
        else:
            store.read(block, value.data_ptr(), sizes[block])
    engine.close()
    store.close()
    staging.close()
    for block, value in enumerate(back):
        assert torch.equal(value, content[block] + 2), block
