"""What the ranks of test_group run: functions of (rank, world_size, ...) whose results can be pickled."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from block_models import Blocks
from parallel_ranks import LIMIT, mesh_of
from torch import nn

import distzo2
import distzo2.parallel
from distzo2.parallel import node
from distzo2.weights import residency

MESHES = {
    "pert=2": ((2, 1), {}),
    "data=2": ((1, 2), {}),
    "data=2 of 3 micro-batches": ((1, 2), {"micro_batches": 3}),
    "pert=2,data=2": ((2, 2), {}),
    "pert=4 with two probes": ((4, 1), {"num_probes": 2}),
    "pert=2 with two probes of meazo": ((2, 1), {"num_probes": 2, "estimator": "meazo"}),
    "data=4": ((1, 4), {"micro_batches": 5}),
    "pert=2 of fzoo": ((2, 1), {"num_probes": 4, "estimator": "fzoo", "noise": "rademacher", "lr": 1e-4}),
}


def assert_same_weights(state: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(state[name], value), name


def assert_same_run(result: Any, expected: Any) -> None:
    """Both as `train` returns them."""
    assert result[0] == expected[0]
    assert_same_weights(result[1], expected[1])


class Tower(Blocks):
    """Blocks with dropout, so that a lane's random stream is in the bits."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 5) -> None:
        super().__init__(0.1, width=24, num_blocks=5, seed=seed)
        self.to(dtype)

    def generate(self, ids: torch.Tensor) -> torch.Tensor:
        """Makes one to four passes: how many depends on the perturbation, too."""
        total = self(ids)
        for _ in range(int(total.view(torch.int32)) % 4):
            total = total + self(ids)
        return total


def batch(index: int) -> torch.Tensor:
    return torch.randint(0, 32, (2 + index % 3, 7), generator=torch.Generator().manual_seed(index))


def closures_of(model: nn.Module, step: int, micro_batches: int) -> list[Any]:
    return [lambda m=m: model(batch(100 * step + m)) for m in range(micro_batches)]


def written_by(model: nn.Module, step: int, micro_batches: int) -> list[Any]:
    return [lambda m=m: model.generate(batch(100 * step + m)) for m in range(micro_batches)]


def tower(weights: str, directory: Any, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A streamed tower, with dropout on."""
    return distzo2.offload(Tower(dtype), weights=weights, directory=directory, train=True, **options)


def optimizer(model: nn.Module, **options: Any) -> distzo2.ZOSGD:
    return distzo2.ZOSGD(model, **{"lr": 1e-2, "eps": 1e-3, "seed": 11, **options})


def joined(shape: tuple[int, int] | None, **options: Any) -> Any:
    """A mesh of `shape`; None: no mesh at all."""
    return None if shape is None else mesh_of(*shape, **options)


def started(
    rank: int, directory: Path, shape: Any, *, weights: str = "disk", slices: bool = False, limit=LIMIT, **options: Any
) -> tuple[nn.Module, distzo2.ZOSGD]:
    """A tower and its optimizer, on a mesh of `shape`; None: without one."""
    joined(shape, slice=slices, limit=limit)
    model = tower(weights, directory / f"rank{rank}")
    return model, optimizer(model, **options)


def state_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.view(torch.uint8).numpy() for name, value in model.state_dict().items()}


def train(
    rank: int,
    world_size: int,
    shape: tuple[int, int] | None,
    directory: Path,
    *,
    weights: str = "disk",
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    steps: int = 6,
    micro_batches: int = 2,
    journal: str | None = None,
    resume: bool = False,
    sharded: bool | str = False,
    slices: bool = False,
    pace: float = 0.0,
    device: str = "cpu",
    make: Callable[..., list[Any]] = closures_of,
    **options: Any,
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Losses and coefficients of each step, and the weights at the end. `shape` None: no mesh at all."""
    joined(shape, slice=slices)
    model = tower(weights, directory / f"rank{rank}", dtype, device=device, compute_dtype=compute)
    if journal is not None:
        options |= {"journal": directory / journal, "resume": resume}
    opt = optimizer(model, **options)
    history = []
    while opt.step_count < steps:
        closures = make(model, opt.step_count, micro_batches)
        if sharded:
            mesh = distzo2.parallel.current()
            place = (mesh.data_rank, mesh.shape.data) if sharded == "data" else (rank, world_size)
            closures = uneven_share(closures, *place)
        opt.step(closures, sharded=sharded, tokens=7 * micro_batches)
        history.append((opt.last.losses, opt.last.coefs, opt.last.skipped, opt.last.clipped, opt.last.memory))
        time.sleep(pace)
    state = state_of(model)
    opt.close()
    distzo2.runtime_of(model).close()
    return history, state


def half_used(
    rank: int,
    world_size: int,
    shape: tuple[int, int] | None,
    directory: Path,
    *,
    weights: str = "disk",
    slices: bool = False,
    sharded: bool = False,
    steps: int = 5,
    journal: str | None = None,
    known: bool = False,
    **options: Any,
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Steps that enter the second half of the blocks on even steps only, and the last block never; closures return
    sums and counts, or, where the step's count is `known`, sums. As `train`."""
    joined(shape, slice=slices)
    model = tower(weights, directory / f"rank{rank}", write_every=2)
    if journal is not None:
        options["journal"] = directory / journal
    opt = optimizer(model, weight_decay=0.1, verify_every=2, **options)
    history = []
    while opt.step_count < steps:
        model.depth = 2 if opt.step_count % 2 else 4
        batches = [batch(10 * opt.step_count + m) for m in range(2)]
        closures = [lambda b=b: model(b) * b.numel() if known else (model(b) * b.numel(), b.numel()) for b in batches]
        count = sum(b.numel() for b in batches) if known else None
        opt.step(uneven_share(closures, rank, world_size) if sharded else closures, sharded=sharded, count=count)
        assert known or [len(set(row)) for row in opt.last.counts] == [2, 2]
        history.append((opt.last.losses, opt.last.counts, opt.last.coefs, opt.last.unused))
    state = state_of(model)
    opt.close()
    distzo2.runtime_of(model).close()
    return history, state


def uneven_share(closures: list[Any], rank: int, world_size: int) -> list[Any]:
    """In rank order; the first rank has none, the last has the most."""
    bounds = [len(closures) * r * (r + 1) // (world_size * (world_size + 1)) for r in range(world_size + 1)]
    return closures[bounds[rank] : bounds[rank + 1]]


def pools_of_machines(
    rank: int, world_size: int, machines: list[str], readings: list[int], host_memory: int | None
) -> tuple[Any, list[str]]:
    """What each rank reads of its machine's memory, and whether blocks of 72 and 64 KiB x 4 fit its share."""
    mesh_of(1, world_size, slice=False)
    budget = {"cgroup_bytes": None, "available_bytes": readings[rank]}
    outcomes = []
    with (
        mock.patch.object(residency, "memory_budget", lambda: budget),
        mock.patch.object(node, "machine_name", lambda: machines[rank]),
    ):
        share = node.memory_share(distzo2.parallel.joined(), host_memory)
        for width in (72, 64):
            try:
                distzo2.runtime_of(distzo2.offload(nn.Linear(1024, width), host_memory=host_memory)).close()
                outcomes.append("fits")
            except distzo2.DistZO2Error as error:
                outcomes.append(str(error))
    return (share.num_ranks, share.cgroup_bytes, share.available_bytes, share.num_bytes), outcomes


# ---- ranks that do different things -----------------------------------------------------------------------------


def disagree(rank: int, world_size: int, shape: tuple[int, int], directory: Path, what: str) -> list[str]:
    """Rank 1 does something else in the second step. What each rank was told, then the losses of a step in unison."""
    model, opt = started(rank, directory, shape)
    opt.step(closures_of(model, 0, 4))
    told, other = "", what if rank == 1 else ""
    opt.param_groups[0]["lr"] = 0.5 if other == "lr" else 1e-2
    opt._progress.step += other == "step"
    try:
        if other == "kind":
            opt.verify_replicas()
        else:
            count = 4 + (other == "count") if what == "count" else None
            opt.step(closures_of(model, 1, 4 - (other == "closures")), tokens=5 + (other == "tokens"), count=count)
    except distzo2.DistZO2Error as error:
        told = f"{type(error).__name__}: {error}"
    opt.param_groups[0]["lr"], opt._progress.step = 1e-2, 1
    opt.step(closures_of(model, 1, 4))
    distzo2.runtime_of(model).close()
    return [told, str(opt.last.losses)]


def differ(rank: int, world_size: int, directory: Path, what: str) -> None:
    """Rank 1 makes another optimizer, has another model, or one bit of its weights changes after the third step."""
    mesh_of(1, 2)
    other = what if rank == 1 else ""
    model = Tower(seed=6 if other == "weights" else 5)
    model.head.requires_grad_(other != "frozen")
    runtime = distzo2.runtime_of(distzo2.offload(model, weights="host", train=True))
    options: dict[str, Any] = {"fsync_every": 4} if other == "journal options" else {}
    if what == "journal options":
        options["journal"] = directory / "journal.jsonl"
    opt = optimizer(model, seed=12 if other == "seed" else 11, verify_every=2, **options)
    for step in range(4):
        if step == 3 and rank == 1:
            unit = next(u for u in runtime.units if u.name == "blocks.3")
            with runtime.access.writing(unit, keep=True) as views:
                views["blocks.3.0.weight"].view(torch.int32)[2, 3] ^= 1
        opt.step(closures_of(model, step, 2))


class Boom(Exception):
    pass


def fail_once(rank: int, world_size: int, directory: Path, what: str, slices: bool) -> tuple[str, Any]:
    """Rank `world_size - 1` (rank 0 for what it alone does) fails in step 2, which is then made again."""
    model, opt = started(rank, directory, (2, world_size // 2), slices=slices, journal=directory / f"{what}.jsonl")
    told, fails = "", rank == (0 if what == "estimator" else world_size - 1)
    while opt.step_count < 6:
        closures = good = closures_of(model, opt.step_count, 2)
        if opt.step_count == 2 and fails and not told:
            if what == "estimator":
                opt.settings.estimator.coefficients = lambda *args: np.zeros(7)
            if what == "closure":
                closures = [lambda c=c: (c(), _raise(Boom("bang")))[0] for c in good]
            if what == "interrupt":
                closures = [lambda c=c: (os.kill(os.getpid(), signal.SIGINT), c())[1] for c in good]
            if what == "argument":
                closures = [1, 2]
        try:
            opt.step(closures, tokens=14)
        except (Boom, distzo2.DistZO2Error, KeyboardInterrupt) as error:
            told = f"{type(error).__name__}: {error}"
            opt.settings.estimator.__dict__.clear()
    state = state_of(model)
    opt.close()
    distzo2.runtime_of(model).close()
    return told, state


def _raise(error: BaseException) -> None:
    raise error


def threads_of_their_own(rank: int, world_size: int, directory: Path, threads: list[int], resume: bool) -> list[str]:
    """Each rank has `threads[rank]` threads. The warnings when a run is begun or resumed."""
    mesh_of(1, world_size)
    told: list[str] = []
    torch.set_num_threads(threads[rank])
    with mock.patch.object(logging.getLogger("distzo2"), "warning", lambda text, *args: told.append(text % args)):
        optimizer(tower("device", None), journal=directory / "journal.jsonl", resume=resume).close()
    torch.set_num_threads(1)
    return told


def differing_units(rank: int, world_size: int, directory: Path, slices: bool) -> list[str]:
    """In step 1 the lanes of rank 1 leave a block out. What the rank was told, and the losses of the next step."""
    model, opt = started(rank, directory, (1, 2), slices=slices)
    opt.step(closures_of(model, 0, 2))
    blocks, told = model.blocks, ""
    model.blocks = blocks[:2] + blocks[3:] if rank == 1 else blocks
    try:
        opt.step(closures_of(model, 1, 2))
    except distzo2.DistZO2Error as error:
        told = str(error)
    model.blocks = blocks
    opt.step(closures_of(model, 1, 2))
    return [told, str(opt.last.losses)]


def durable_versions(rank: int, world_size: int, directory: Path, weights: str, fsync_every: int) -> list[int]:
    """The versions up to which this rank could store weights, as it learned them."""
    mesh_of(1, 2)
    model = tower(weights, directory / f"rank{rank}")
    weights, versions = distzo2.runtime_of(model).weights, []
    set_durable = weights.set_durable
    weights.set_durable = lambda version: (versions.append(version), set_durable(version))[1]
    opt = optimizer(model, journal=directory / "journal.jsonl", fsync_every=fsync_every)
    for step in range(4):
        opt.step(closures_of(model, step, 2))
    opt.close()
    return versions


# ---- figures, samplers, replicas ------------------------------------------------------------------------------------


def traffic(
    rank: int, world_size: int, shape: tuple[int, int], directory: Path, steps: int, weights: str, slices: bool
) -> tuple[dict[str, int], list[int]]:
    """Collectives and bytes of some steps, and the bytes of this rank's slices."""
    model, opt = started(rank, directory, shape, weights=weights, slices=slices, num_probes=2)
    opt.step(closures_of(model, 0, 4))
    distzo2.parallel.reset_stats()
    for step in range(steps):
        opt.step(closures_of(model, 1 + step, 4))
    copies = distzo2.runtime_of(model).weights.copies
    return distzo2.parallel.stats(), [c.num_bytes for c in copies if c.block >= 0] if slices else []


def sampled(rank: int, world_size: int, directory: Path) -> list[int]:
    """A loop with a DistributedSampler: which examples were in a forward, in how many of them."""
    from torch.utils.data import DataLoader, DistributedSampler

    mesh = mesh_of(1, world_size)
    model = tower("device", None)
    opt = optimizer(model)
    examples = list(range(24))
    seen: list[int] = []

    def loss(indices: torch.Tensor) -> torch.Tensor:
        seen.extend(indices.tolist())
        return torch.stack([model(batch(int(i))) for i in indices])

    sampler = DistributedSampler(examples, num_replicas=mesh.shape.data, rank=mesh.data_rank, shuffle=True)
    for indices in DataLoader(examples, batch_size=3, sampler=sampler):
        opt.step(lambda indices=indices: loss(indices), sharded=True)
    return seen


# ---- ranks that die or hang -------------------------------------------------------------------------------------


def stop(rank: int, world_size: int, directory: Path, how: Any, limit: float, slices: bool) -> None:
    """In step 2 rank 1 leaves, raises, or sends itself a signal: in a forward or, with slices, while it serves the
    others."""
    model, opt = started(rank, directory, (1, world_size), slices=slices, limit=limit)
    for step in range(3):
        closures = closures_of(model, step, world_size)
        if step == 2 and rank == 1:
            if how == "shutdown":
                return
            if how == "raise":
                raise Boom("out of data")
            if slices:
                _kill_at_third_gather(distzo2.runtime_of(model).weights.ring, how)
            else:
                closures = [lambda c=c: (os.kill(os.getpid(), how), c())[1] for c in closures]
        opt.step(closures)


def _kill_at_third_gather(store: Any, signum: int) -> None:
    begun = itertools.count(1)

    def begin(*args: Any) -> None:
        if next(begun) == 3:
            os.kill(os.getpid(), signum)
        store.begin(*args)

    store._node.stores[store._number] = begin
