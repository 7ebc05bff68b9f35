"""What the ranks of test_slice_rounds run: ranks that differ, fail, leave or want different things, with slices."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from parallel_cases import Tower, batch, closures_of, optimizer, state_of, tower
from parallel_ranks import mesh_of
from torch import nn

import distzo2
import distzo2.parallel
from distzo2.checkpoint import reading as parallel_read


@contextmanager
def nodes(*numbers: int) -> Iterator[int]:
    """The ranks are on nodes of these numbers, as torchrun says it."""
    rank = torch.distributed.get_rank()
    os.environ["GROUP_RANK"] = str(numbers[rank])
    try:
        yield rank
    finally:
        del os.environ["GROUP_RANK"]


def loss_of(model: nn.Module, index: int = 0) -> float:
    with torch.no_grad():
        return float(model.eval()(batch(index)))


# ---- replacing weights ------------------------------------------------------------------------------------------


def forward_and_load(rank: int, world_size: int, directory: Path, how: str) -> tuple[list[float], list[float]]:
    """Rank 1 is still in forwards, whole or in part, when rank 0 replaces the weights. Losses before and after."""
    mesh_of(1, 2, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    before, after = [], []
    if rank == 1:
        before = [loss_of(model) for _ in range(3)]
        with torch.no_grad():
            model.blocks[0](torch.zeros(2, 24))  # what follows it is expected
    if how == "load_state_dict":
        model.load_state_dict(Tower(seed=9).state_dict())
    else:
        with distzo2.edit(model), torch.no_grad():
            for name, value in Tower(seed=9).named_parameters():
                model.get_parameter(name).copy_(value)
    distzo2.parallel.current().barrier()
    after = [loss_of(model) for _ in range(2)]
    opt = optimizer(model)
    opt.step(closures_of(model, 0, 2))
    return before, after


def edit_fails(rank: int, world_size: int, directory: Path) -> tuple[str, bool]:
    """What `edit` ends with where its body raises on rank 1; whether the weights are as they were."""
    mesh_of(1, 2, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    told = ""
    try:
        with distzo2.edit(model), torch.no_grad():
            model.blocks[1][0].weight.zero_()
            if rank == 1:
                raise ValueError("not like this")
    except (ValueError, distzo2.DistZO2Error) as error:
        told = f"{type(error).__name__}: {error}"
    return told, loss_of(model) == loss_of(Tower().eval())


def load_other_weights(rank: int, world_size: int, directory: Path) -> None:
    mesh_of(1, 2, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    state = Tower().state_dict()
    state["blocks.2.0.weight"][1, 1] += rank
    model.load_state_dict(state)


# ---- handing over and loading -----------------------------------------------------------------------------------


def hand_over(rank: int, world_size: int, directory: Path, what: str) -> None:
    """Something is wrong with rank 1 while all hand over their model."""
    mesh = mesh_of(1, 2, slice=None if what == "alone" else True)
    place = directory / f"rank{rank}"
    with mesh.together("loading"):
        if what == "directory" and rank == 1:
            place.write_text("a file")
        if what == "alone" and rank == 0:
            return
        tower("disk", place, **({"memory_budget": (36_000, 80_000)[rank]} if what == "memory_budget" else {}))


def load(rank: int, world_size: int, directory: Path, what: str) -> None:
    """Rank 1 cannot read the checkpoint, or reads another one."""
    mesh = mesh_of(1, 2, slice=True)
    finish, calls = parallel_read.ParallelReader.finish, []

    def failing(self: Any, futures: Any) -> None:
        calls.append(futures)
        if what == "EIO" and rank == 1 and len(calls) == 2:
            raise OSError(5, "Input/output error")
        finish(self, futures)

    parallel_read.ParallelReader.finish = failing
    try:
        with mesh.together("loading"):
            distzo2.from_pretrained(directory / f"checkpoint{rank}", weights="host")
    finally:
        parallel_read.ParallelReader.finish = finish


# ---- coming and going -------------------------------------------------------------------------------------------


def two_models(rank: int, world_size: int, directory: Path) -> Any:
    """Rank 0 closes one model and goes on with the other; rank 1 only goes on."""
    mesh_of(1, 2, slice=True)
    first, second = (tower("disk", directory / f"{name}{rank}") for name in "ab")
    opt = optimizer(second)
    opt.step(closures_of(second, 0, 2))
    if rank == 0:
        distzo2.runtime_of(first).close()
        loss_of(second)
        second.train()
    opt.step(closures_of(second, 1, 2))
    return opt.last.losses, state_of(second)


def ends_first(rank: int, world_size: int, directory: Path, how: str) -> Any:
    """Rank 1's program ends while rank 0 still reads all weights; its model may be garbage by then."""
    mesh_of(1, world_size, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    opt = optimizer(model)
    opt.step(closures_of(model, 0, world_size))
    if rank == 1:
        del model, opt
        gc.collect()
        return None
    if rank == 2:
        distzo2.parallel.shutdown()
        return None
    time.sleep(0.3)
    result = state_of(model)
    if how == "step":
        opt.step(closures_of(model, 1, world_size))
    return result


def interrupted(rank: int, world_size: int, directory: Path) -> float:
    """Ctrl-C on rank 0, which waits for a rank that does not come. Seconds that it took."""
    mesh_of(1, 2, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    if rank == 1:
        time.sleep(12)
        return 0.0
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        loss_of(model)
    except KeyboardInterrupt:
        return time.monotonic() - start
    return 1e9


def on_nodes(rank: int, world_size: int, directory: Path, numbers: tuple[int, ...]) -> Any:
    """Slices within each node; rank 0's node, its traffic, and the run."""
    with nodes(*numbers):
        mesh = mesh_of(1, world_size, slice=True)
        model = tower("disk", directory / f"rank{rank}")
        opt = optimizer(model, verify_every=2)
        for step in range(4):
            opt.step(closures_of(model, step, 4))
        if rank == world_size - 1:
            loss_of(model)
        return mesh.node.ranks, distzo2.parallel.stats()["slice_gathers"], opt.last.losses, state_of(model)


class Slow(nn.Module):
    """Blocks whose compute takes its time, and nothing of the processor's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
            time.sleep(0.02)
        return x.square().mean()


def ahead(rank: int, world_size: int, directory: Path, evaluates: bool) -> tuple[int, int]:
    """How many of a step's gathers had begun before they were wanted, and how many there were: the most of a few steps,
    since on a busy machine some wait for the other rank."""
    mesh_of(1, world_size, slice=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = distzo2.offload(Slow(), weights="disk", directory=directory / f"rank{rank}")
    opt = optimizer(model, lr=1e-6)
    closures = [lambda: model(torch.ones(2, 64))] * world_size
    for _ in range(2):
        opt.step(closures)
    if rank == 0 and evaluates:
        distzo2.evaluate(model, closures[:1])
    counts = []
    for _ in range(5):
        distzo2.parallel.current().barrier()
        distzo2.runtime_of(model).reset_stats()
        distzo2.parallel.reset_stats()
        opt.step(closures)
        counts.append((distzo2.runtime_of(model).stats()["gathers_ahead"], distzo2.parallel.stats()["slice_gathers"]))
    return max(counts)
