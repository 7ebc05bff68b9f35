"""HostPool from Python; its C++ tests are in tests/cpp/runtime."""

from __future__ import annotations

import gc

import pytest
import torch

from distzo2_core import HostPool, aligned_buffer, cuda_available, memory_budget


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
    with pytest.raises(
        RuntimeError, match=r"only 4096 bytes may be taken \(host_memory= or --host-memory: 4096 bytes, "
    ):
        HostPool([8192], host_memory=4096)
    HostPool([8192], available_bytes=1000, host_memory=8192).close()
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
