"""What the ranks of test_sliced_store run: functions of (rank, world_size, ...) whose results can be pickled."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import parallel_cases as cases
import torch
from parallel_cases import batch, closures_of, optimizer, state_of, tower
from parallel_ranks import mesh_of
from torch import nn

import distzo2
import distzo2.parallel
from distzo2.parallel import node as slice_choice
from distzo2.parallel.sliced_store import SlicedStore


def sliced_tower(rank: int, directory: Path, weights: str = "disk", **options: Any) -> nn.Module:
    return tower(weights, directory / f"rank{rank}", **options)


def train_with(rank: int, world_size: int, shape: tuple[int, int], directory: Path, what: str) -> Any:
    """As `cases.train`, with something about slices that must not change a bit."""
    options: dict[str, Any] = {"weights": "disk", "slices": True, "steps": 5}
    shares = slice_choice._shares
    if what == "unequal slices":
        slice_choice._shares = lambda mesh, *_: [1.0 + r for r in range(mesh.node.size)]
    if what == "write_every":
        cases.tower = lambda *args, **kwargs: tower(*args, **kwargs, write_every=3)
    if what == "memory_budget":  # room for two of the five blocks beside what streaming needs
        cases.tower = lambda *args, **kwargs: tower(*args, **kwargs, memory_budget=36_000)
    if what == "waves":
        options["max_lanes"] = 1
    try:
        return cases.train(rank, world_size, shape, directory, **options)
    finally:
        cases.tower, slice_choice._shares = tower, shares


def frozen(rank: int, world_size: int, shape: tuple[int, int] | None, directory: Path) -> Any:
    """Some parameters of each block are frozen."""
    if shape is not None:
        mesh_of(*shape, slice=True)
    model = cases.Tower()
    for i, block in enumerate(model.blocks):
        block[0].bias.requires_grad_(i % 2 == 0)
    model.blocks[3].requires_grad_(False)
    distzo2.offload(model, weights="disk", directory=directory / f"rank{rank}", train=True)
    opt = optimizer(model)
    for step in range(4):
        opt.step(closures_of(model, step, 2))
    return [opt.last.losses, state_of(model)]


# ---- ranks that want different things ---------------------------------------------------------------------------


def odd_ranks(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """Between steps each rank does what it likes: rank 0 evaluates and saves, forwards are of unequal number."""
    mesh_of(1, world_size, slice=True)
    model = sliced_tower(rank, directory)
    opt = optimizer(model)
    seen: list[float] = []
    for step in range(4):
        opt.step(closures_of(model, step, 5))
        if rank == 0:
            seen += [float(v) for v in distzo2.evaluate(model.eval(), [lambda m=m: model(batch(m)) for m in range(3)])]
        for i in range(3 * rank):
            with torch.no_grad():
                seen.append(float(model.eval()(batch(i % 3))))
        model.train()
    if rank == world_size - 1:
        distzo2.save_pretrained(model, directory / "saved")
    state = state_of(model) if rank == 1 else {}
    opt.step(closures_of(model, 4, 5))
    return {"losses": opt.last.losses, "seen": seen, "state": state}


def forwards(directory: Path) -> list[list[float]]:
    """Losses of three batches after each step of `odd_ranks`, of one rank."""
    model = tower("device", directory)
    opt = optimizer(model)
    seen = []
    for step in range(4):
        opt.step(closures_of(model, step, 5))
        with torch.no_grad():
            seen.append([float(model.eval()(batch(m))) for m in range(3)])
        model.train()
    return seen


def no_lanes(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None) -> Any:
    """Rank 0 has no closures of its own."""
    if shape is not None:
        mesh_of(*shape, slice=True)
    model = sliced_tower(rank, directory)
    opt = optimizer(model)
    for step in range(3):
        closures = closures_of(model, step, 3)
        if shape is None:
            opt.step(closures)
        else:
            opt.step(closures[world_size * (rank - 1) :][: 3 if rank == 1 else 0], sharded=True)
    return [opt.last.losses, state_of(model)]


def replaced(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None, how: str) -> Any:
    """The weights are replaced between two steps, on every rank alike."""
    if shape is not None:
        mesh_of(*shape, slice=True)
    model = sliced_tower(rank, directory)
    opt = optimizer(model)
    opt.step(closures_of(model, 0, 2))
    if how == "load_state_dict":
        model.load_state_dict(cases.Tower(seed=9).state_dict())
    else:
        with distzo2.edit(model), torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
    for step in (1, 2):
        opt.step(closures_of(model, step, 2))
    return [opt.last.losses, state_of(model)]


# ---- errors ---------------------------------------------------------------------------------------------------------


def broken_slice(rank: int, world_size: int, directory: Path) -> None:
    """A bit of rank 1's block file flips after step 1."""
    mesh_of(1, world_size, slice=True)
    model = sliced_tower(rank, directory)
    opt = optimizer(model)
    for step in range(3):
        if step == 2 and rank == 1:
            _flip_bits()
        opt.step(closures_of(model, step, world_size))


def _flip_bits() -> None:
    """One bit of every page of the block file, whose name is gone."""
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if ".dzo2 (deleted)" not in os.path.realpath(path):
            continue
        with open(path, "r+b", buffering=0) as file:
            for offset in range(0, os.fstat(file.fileno()).st_size, 512):
                byte = os.pread(file.fileno(), 1, offset)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), offset)
        return
    raise AssertionError("no block file")


def killed(rank: int, world_size: int, directory: Path, signum: int, limit: float) -> None:
    """Rank 1 is stopped while it serves slices to the others."""
    mesh_of(1, world_size, limit=limit, slice=True)
    model = sliced_tower(rank, directory)
    opt = optimizer(model)
    for step in range(3):
        if step == 2 and rank == 1:
            _stop_at_third_gather(distzo2.runtime_of(model).weights.ring, signum)
        opt.step(closures_of(model, step, world_size))


def _stop_at_third_gather(store: SlicedStore, signum: int) -> None:
    begin, begun = store.begin, []

    def begin_or_stop(*args: Any) -> None:
        begun.append(args)
        if len(begun) == 3:
            os.kill(os.getpid(), signum)
        begin(*args)

    store._node.register(store._number, begin_or_stop)


def other_weights(rank: int, world_size: int, directory: Path) -> None:
    """Rank 1 hands over a model with other weights in one block."""
    mesh_of(1, 2, slice=True)
    model = cases.Tower()
    if rank == 1:
        with torch.no_grad():
            model.blocks[2][0].weight[3, 3] += 1e-6
    distzo2.offload(model, weights="disk", directory=directory / f"rank{rank}")


# ---- figures --------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Blocks of a mebibyte."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(512, 512) for _ in range(6))
        self.head = nn.Linear(512, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).square().mean()


def kept(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """What a rank keeps of a model in host memory."""
    mesh_of(1, world_size, slice=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = distzo2.offload(Wide(), weights="host")
    optimizer(model).step([lambda: model(torch.ones(2, 512))] * world_size)
    runtime = distzo2.runtime_of(model)
    return {**runtime.stats(), "slices": runtime.weights.ring.source.stats()}


def chosen(rank: int, world_size: int, directory: Path, weights: str, free: int | None) -> list[str]:
    """What is said of slices where nothing was asked; `free`: memory or disk that there seems to be."""
    lines: list[str] = []
    mesh_of(1, world_size, log=lines.append)
    with ExitStack() as stack:
        if free is not None:
            stack.enter_context(mock.patch.object(slice_choice, "free_disk_bytes", lambda directory: free))
            stack.enter_context(mock.patch.object(slice_choice, "available_memory", lambda: free))
        model = sliced_tower(rank, directory, weights)
        optimizer(model).step(closures_of(model, 0, world_size))
    lines.append(str(isinstance(distzo2.runtime_of(model).weights.ring, SlicedStore)))
    return lines


def load(rank: int, world_size: int, directory: Path, checkpoint: Path, dtype: str | None) -> tuple[int, int, Any]:
    """Bytes read of a checkpoint's files, bytes that the rank keeps, and the weights."""
    from distzo2.checkpoint import reading as parallel_read

    mesh_of(1, world_size, slice=True)
    read = [0]
    start = parallel_read.ParallelReader.start

    def counted(self: Any, ranges: Any) -> Any:
        ranges = list(ranges)
        read[0] += sum(r.num_bytes for r in ranges)
        return start(self, ranges)

    parallel_read.ParallelReader.start = counted
    try:
        model = distzo2.from_pretrained(checkpoint, weights="host", dtype=dtype)
    finally:
        parallel_read.ParallelReader.start = start
    runtime = distzo2.runtime_of(model)
    kept = sum(len(c.elements_of(p)) * p.dtype.itemsize for c in runtime.weights.copies for p in c.unit.params)
    return read[0], kept, {name: value.float().numpy() for name, value in model.state_dict().items()}


def train_with_nccl(directory: Path, port: int, weights: str) -> Any:
    """One rank on a GPU, as torchrun would start it: its gathers go through NCCL."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mesh = distzo2.parallel.init(1, 1, slice=True, device="cuda")
    assert mesh.node.backend == "nccl"
    cases.mesh_of = lambda *shape, **options: mesh
    result = cases.train(0, 1, (1, 1), directory, weights=weights, slices=True, device="cuda:0")
    assert distzo2.parallel.stats()["slice_gathers"] > 0
    distzo2.parallel.shutdown()
    return result
