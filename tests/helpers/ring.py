"""Patterned blocks in a pool or a file, slots, and a copy engine between them."""

from __future__ import annotations

from pathlib import Path

import torch

from distzo2_core import BlockFile, CopyEngine, HostPool, aligned_buffer

SIZES = [70_000, 4096, 131_072, 1, 99_999]
SLOT_BYTES = 131_072


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
        staging = HostPool([SLOT_BYTES] * 4, device) if kind == "disk" and device != "cpu" else None
        self.engine = CopyEngine(device, source, [s.data_ptr() for s in self.slots], SLOT_BYTES, staging)

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
