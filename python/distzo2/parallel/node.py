"""What the ranks of a node share: the memory of their machine, and streamed blocks, in slices or not.

Slices are taken as asked, or by what is measured here; the decision and its figures are printed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from distzo2.errors import UsageError
from distzo2.parallel.exchange import hash64
from distzo2.parallel.group import Mesh, Ranks
from distzo2.parallel.heartbeat import machine_name
from distzo2.parallel.slice_rounds import SliceExchange
from distzo2.parallel.sliced_store import cut
from distzo2.text import gib
from distzo2.weights.residency import MemoryShare, available_memory, free_disk_bytes
from distzo2.weights.store import StoredCopy, streaming_store
from distzo2.weights.units import Unit

SAMPLE_BYTES = 32 << 20  # of a block, at most
SAMPLE_BLOCKS = 4
ROUNDS = 3
_SPARE = 0.1  # of the memory that is available
_NO_LIMIT = (1 << 63) - 1  # bytes, where a machine has none


def memory_share(ranks: Ranks | None) -> MemoryShare:
    """Reads what memory this machine has. `ranks` that have met all call it, and take none before it returns.

    The least reading of a machine's ranks counts. A rank that read for itself would miss what the others had already
    taken, and divide the rest once more; or would not see what they are about to take.
    """
    mine = MemoryShare.of_one_rank()
    if ranks is None or ranks.world_size == 1:
        return mine
    what = "sharing the memory of a machine"
    machines = [row[0] for row in ranks.exchange.agree(what, numbers=[hash64(machine_name())])]
    limits = [_NO_LIMIT if limit is None else limit for limit in (mine.cgroup_bytes, mine.available_bytes)]
    readings = ranks.exchange.agree(what, numbers=limits)
    here = [row for machine, row in zip(machines, readings, strict=True) if machine == machines[ranks.rank]]
    least = [min(column) for column in zip(*here, strict=True)]
    return MemoryShare(len(here), *(None if limit == _NO_LIMIT else limit for limit in least))


# ---- slices -------------------------------------------------------------------------------------------------------


class Slicing(NamedTuple):
    """How a node keeps streamed blocks: its ranks, the share of every block that each of them keeps, and the number of
    the store."""

    node: SliceExchange
    shares: list[float]
    number: int


def choose_slices(
    mesh: Mesh | None,
    units: Sequence[Unit],
    device: torch.device,
    weights: str,
    directory: str | os.PathLike | None,
) -> Slicing | None:
    """Decides whether streamed units are kept in slices; None if not. All ranks call it and get the same answer.

    Where the mesh does not say, slices are taken if there is no room for a copy on every rank, or if bringing a slice
    and gathering the block is faster than bringing the whole block on every rank at once, as measured here. GPUs whose
    links differ get slices in proportion to their rates.

    Raises:
        UsageError: slices were asked for, of weights that do not stream.
        RanksDisagreeError: the ranks hand over different models.
    """
    if mesh is None or mesh.node is None:
        return None
    failure = None
    if weights == "device" and mesh.slice:
        failure = UsageError("slices are of weights in host memory or on disk; these were asked to be on the device")
    fields = {
        "weights": weights,
        "device": device.type,
        "the units": [(u.name, u.num_bytes, u.resident) for u in units],
    }
    mesh.exchange.agree("handing over a model", fields, error=failure)
    streamed = [u for u in units if not u.resident]
    node, total = mesh.node, sum(u.num_bytes for u in streamed)
    if not streamed or weights == "device" or (node.most_ranks == 1 and not mesh.slice):
        return None
    node.connect()
    sample = min(max(u.num_bytes for u in streamed), SAMPLE_BYTES)
    chosen, why = True, "as asked"
    if mesh.slice is None:
        chosen, why = _decide(mesh, total, sample, device, weights, directory)
        why += "; slice= or --slice sets it"
    shares = _shares(mesh, sample, device, directory) if chosen else []
    if mesh.rank == 0:
        kept = f"; {gib(int(total * shares[node.index] / sum(shares)))} of blocks a rank" if chosen else ""
        mesh.log(f"slices: {'on' if chosen else 'off'} ({why}{kept})")
    return Slicing(node, shares, node.new_store()) if chosen else None


def _decide(
    mesh: Mesh, total: int, sample: int, device: torch.device, weights: str, directory: str | os.PathLike | None
) -> tuple[bool, str]:
    """Whether to take slices, and why. `total` bytes stream; `sample` bytes of a block are measured."""
    node = mesh.node
    with mesh.together("looking for room"):
        free = available_memory() if weights == "host" else free_disk_bytes(directory)
    room = _of_all(mesh, [node.size * total, free * (1 - _SPARE)])
    for needed, free in room.tolist():
        if needed > free:
            where = "memory" if weights == "host" else "disk"
            return True, f"a copy for each rank, {gib(needed)}, does not fit into the {gib(free)} of {where} to be had"
    if weights == "host" and device.type == "cpu":
        return False, "weights in memory are used where they are"
    bounds = cut(sample, [1.0] * node.size)
    seconds = [
        _bring_seconds(mesh, sample, device, directory),
        _bring_seconds(mesh, bounds[1], device, directory),
        _gather_seconds(mesh, bounds, device),
    ]
    whole, part, gather = _of_all(mesh, seconds).max(dim=0).values.tolist()
    figures = f"slices come in {1e3 * part:.1f} ms and are gathered in {1e3 * gather:.1f} ms"
    return part + gather < whole, f"of {sample / 2**20:.1f} MiB {figures}, the whole comes in {1e3 * whole:.1f} ms"


def _shares(mesh: Mesh, sample: int, device: torch.device, directory: str | os.PathLike | None) -> list[float]:
    """Of each rank of this node: in proportion to the rates of their links, all in use; equal ones on a CPU."""
    if device.type == "cpu":
        return [1.0] * mesh.node.size
    seconds = _of_all(mesh, [_bring_seconds(mesh, sample // mesh.node.most_ranks, device, directory)])[:, 0]
    return shares_of([float(seconds[rank]) for rank in mesh.node.ranks])


def shares_of(seconds: Sequence[float]) -> list[float]:
    """The shares of ranks that take `seconds` for the same bytes; equal unless one is a quarter slower than another."""
    if max(seconds) < 1.25 * min(seconds):
        return [1.0] * len(seconds)
    return [min(seconds) / s for s in seconds]


def _of_all(mesh: Mesh, values: Sequence[float]) -> torch.Tensor:
    """float64 [ranks, values]"""
    return mesh.exchange.gather(torch.tensor(values, dtype=torch.float64))


def _bring_seconds(mesh: Mesh, num_bytes: int, device: torch.device, directory: str | os.PathLike | None) -> float:
    unit = Unit(0, "a sample", [], [], resident=False)
    samples = [StoredCopy(unit, 0, num_bytes, block=i) for i in range(SAMPLE_BLOCKS)]
    times = []
    with mesh.together("measuring transfers"):
        store = streaming_store(samples, device, directory=directory, slots=3)
        for sample in samples if directory is not None else ():
            with store.open(sample, write=True, keep=False) as buffer:
                buffer.fill_(1)  # a file's holes are read faster
    try:
        for _ in range(ROUNDS):
            mesh.exchange.agree("measuring transfers")
            with mesh.together("measuring transfers"):
                start = time.perf_counter()
                for i, sample in enumerate(samples):
                    store.acquire(sample)
                    store.release(sample, False)
                    store.expect(samples[i + 1 :], 0)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append((time.perf_counter() - start) / SAMPLE_BLOCKS)
            for sample in samples:
                store.engine.drop(sample.block)
    finally:
        store.close()
    return statistics.median(times)


def _gather_seconds(mesh: Mesh, bounds: Sequence[int], device: torch.device) -> float:
    whole = torch.ones(bounds[-1], dtype=torch.uint8, device=device)
    times = []
    for _ in range(ROUNDS):
        mesh.exchange.agree("measuring gathers")
        start = time.perf_counter()
        works = mesh.node.gather([whole[a:b] for a, b in pairwise(bounds)])
        for work in works:
            mesh.node.wait(work)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
