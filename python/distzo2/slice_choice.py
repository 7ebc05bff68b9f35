"""Whether the ranks of a node keep streamed blocks in slices: as asked, or by what is measured, which is printed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from distzo2.errors import UsageError
from distzo2.preflight import available_memory, gib
from distzo2.sliced_store import cut
from distzo2.store import StreamingStore
from distzo2.units import Unit

if TYPE_CHECKING:
    from distzo2.parallel import Mesh
    from distzo2.slice_exchange import SliceExchange

SAMPLE_BYTES = 32 << 20  # of a block, at most
SAMPLE_BLOCKS = 4
ROUNDS = 3
_SPARE = 0.1  # of the memory that is available


@dataclass(eq=False)
class _Sample:
    """As much of a unit as a store asks for."""

    index: int
    num_bytes: int
    version: int = 0
    block: int = -1


def choose_node(
    mesh: Mesh | None,
    units: Sequence[Unit],
    device: torch.device,
    weights: str,
    directory: str | os.PathLike | None,
) -> SliceExchange | None:
    """The ranks that share the streamed units in slices, or None; the same on all ranks, which all call it.

    Where the mesh does not say, slices are taken if bringing one and gathering the block is faster than bringing the
    whole block on every rank at once, both measured here, or if memory does not hold every rank's own copy.

    Raises:
        UsageError: slices were asked for, of weights that do not stream.
    """
    if mesh is None or mesh.node is None or mesh.slice is False:
        return None
    if weights == "device":
        if mesh.slice:
            raise UsageError("slices are of weights in host memory or on disk; these were asked to be on the device")
        return None
    streamed = [u for u in units if not u.resident]
    if mesh.slice or not streamed:
        return mesh.node if streamed else None
    chosen, why = _decide(mesh, streamed, device, weights, directory)
    if mesh.rank == 0:
        mesh.log(f"slices: {'on' if chosen else 'off'} ({why}; slice= or --slice sets it)")
    return mesh.node if chosen else None


def _decide(
    mesh: Mesh, streamed: Sequence[Unit], device: torch.device, weights: str, directory: str | os.PathLike | None
) -> tuple[bool, str]:
    node, total = mesh.node, sum(u.num_bytes for u in streamed)
    if weights == "host":
        free = _least(mesh, available_memory()) * (1 - _SPARE)
        if node.size * total > free:
            return True, f"{node.size} copies of {gib(total)} do not fit into the {gib(free)} of memory to be had"
        if device.type == "cpu":
            return False, "weights in memory are used where they are"
    sample = min(max(u.num_bytes for u in streamed), SAMPLE_BYTES)
    whole, part, gather = _measure(mesh, sample, device, directory)
    figures = (
        f"of {sample / 2**20:.1f} MiB a slice comes in {1e3 * part:.1f} ms and is gathered in {1e3 * gather:.1f} ms"
    )
    return part + gather < whole, f"{figures}, the whole comes in {1e3 * whole:.1f} ms"


def _least(mesh: Mesh, value: int) -> int:
    return int(mesh.exchange.gather(torch.tensor([value])).min())


def _measure(
    mesh: Mesh, num_bytes: int, device: torch.device, directory: str | os.PathLike | None
) -> tuple[float, float, float]:
    """Seconds in which every rank at once brings a whole block, and a slice of it, and in which slices are gathered:
    medians, each of the slowest rank."""
    bounds = cut(num_bytes, [1.0] * mesh.node.size)
    seconds = [
        _bring_seconds(mesh, num_bytes, device, directory),
        _bring_seconds(mesh, bounds[1], device, directory),
        _gather_seconds(mesh, bounds, device),
    ]
    slowest = mesh.exchange.gather(torch.tensor(seconds, dtype=torch.float64)).max(dim=0).values
    return tuple(slowest.tolist())


def _bring_seconds(mesh: Mesh, num_bytes: int, device: torch.device, directory: str | os.PathLike | None) -> float:
    samples: list[Any] = [_Sample(i, num_bytes) for i in range(SAMPLE_BLOCKS)]
    times = []
    with mesh.together("measuring transfers"):
        store = StreamingStore(samples, device, directory=directory, slots=3)
        for sample in samples if directory is not None else ():
            with store.open(sample, write=True, keep=False) as buffer:
                buffer.fill_(1)  # a file's holes are read faster
    try:
        for _ in range(ROUNDS):
            mesh.exchange.agree("measuring transfers")
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
