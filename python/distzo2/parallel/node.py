"""What the ranks of a node share: the memory of their machine, and streamed blocks, in slices or not.

Slices are taken as asked, or by what is measured here; the decision and its figures are printed.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist

from distzo2.errors import UsageError
from distzo2.parallel.exchange import Exchange, hash64
from distzo2.parallel.group import Mesh
from distzo2.parallel.heartbeat import machine_name
from distzo2.parallel.slice_rounds import SliceExchange
from distzo2.parallel.sliced_store import cut
from distzo2.text import gib
from distzo2.weights.residency import MemoryBudget, MemoryShare, available_memory, free_disk_bytes
from distzo2.weights.store import StoredCopy, streaming_store
from distzo2.weights.units import Unit

SAMPLE_BYTES = 32 << 20  # of a block, at most
SAMPLE_BLOCKS = 4
ROUNDS = 3
_SPARE = 0.1  # of the memory that is available
_NO_LIMIT = (1 << 63) - 1  # bytes, where a machine has none

Place = str | os.PathLike | None  # the directory of block files; None: weights are in memory


def memory_share(exchange: Exchange | None, host_memory: MemoryBudget = None) -> MemoryShare:
    """Reads what memory this machine has. Ranks that have met all call it, and take none before it returns.

    The least reading of a machine's ranks counts. A rank that read for itself would miss what the others had already
    taken, and divide the rest once more; or would not see what they are about to take.
    """
    mine = MemoryShare.of_one_rank(host_memory)
    if exchange is None or exchange.world_size == 1:
        return mine
    exchange.agree("sharing the memory of a machine")
    mine_of = (mine.cgroup_bytes, mine.available_bytes, mine.host_memory)
    limits = [_NO_LIMIT if limit is None else limit for limit in mine_of]
    rows = exchange.gather(torch.tensor([hash64(machine_name()), *limits])).tolist()
    here = [row for row in rows if row[0] == rows[exchange.rank][0]]
    least = [min(column) for column in zip(*here, strict=True)][1:]
    return MemoryShare(len(here), *(None if limit == _NO_LIMIT else limit for limit in least))


# ---- slices -------------------------------------------------------------------------------------------------------


class Slicing(NamedTuple):
    """How a node keeps streamed blocks: its ranks, the share of every block that each of them keeps, the number of the
    store, and what its gathers go through."""

    node: SliceExchange
    shares: list[float]
    number: int
    backend: str  # "gloo" or "nccl"


def choose_slices(
    mesh: Mesh | None,
    units: Sequence[Unit],
    device: torch.device,
    weights: str,
    directory: Place,
    host_memory: MemoryBudget = None,
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
    table = [(u.name, u.stored_bytes, u.resident) for u in units]
    fields = {"weights": weights, "device": device.type, "the units": table}
    gpus = [row[0] for row in mesh.exchange.agree("handing over a model", fields, [_gpu_number(device)], failure)]
    streamed = [u for u in units if not u.resident]
    node, total = mesh.node, sum(u.stored_bytes for u in streamed)
    if not streamed or weights == "device" or (node.most_ranks == 1 and not mesh.slice):
        return None
    backend = backend_of(device, [[gpus[rank] for rank in ranks] for ranks in node.nodes])
    sample = min(max(u.stored_bytes for u in streamed), SAMPLE_BYTES)
    bring = functools.partial(_bring_seconds, mesh, device, directory)
    chosen, why = True, "as asked"
    if mesh.slice is None:
        chosen, why = _decide(mesh, total, sample, bring, device, weights, directory, host_memory, backend)
        why += "; slice= or --slice sets it"
    shares = [1.0] * node.size
    if chosen and device.type != "cpu":  # of each rank of this node, by the rates of their links, all in use
        seconds = _of_all(mesh, [bring(sample // node.most_ranks)])[:, 0].tolist()
        shares = shares_of([seconds[rank] for rank in node.ranks])
    if mesh.rank == 0:
        kept = f"; {gib(int(total * shares[node.index] / sum(shares)))} of blocks a rank" if chosen else ""
        mesh.log(f"slices: {'on' if chosen else 'off'} ({why}{kept})")
    if not chosen:
        node.disconnect(backend)
        return None
    node.connect(backend)
    if backend == "nccl":  # it makes its communicator now, before the GPU's memory is divided
        _sample_gather(node, device, 1, backend)()
    return Slicing(node, shares, node.new_store(), backend)


def _gpu_number(device: torch.device) -> int:
    return hash64(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else 0


def backend_of(device: torch.device, gpus: Sequence[Sequence[int]]) -> str:
    """What gathers of a model on `device` go through: NCCL where each rank of a node has its own GPU, else gloo. `gpus`
    numbers those of the ranks of each node."""
    own = all(len(set(numbers)) == len(numbers) for numbers in gpus)
    return "nccl" if device.type == "cuda" and own and dist.is_nccl_available() else "gloo"


def _sample_gather(node: SliceExchange, device: torch.device, num_bytes: int, backend: str) -> Callable[[], None]:
    """Returns what gathers a block of at least that many bytes."""
    bounds = cut(num_bytes, [1.0] * node.size)
    block = torch.ones(bounds[-1], dtype=torch.uint8, device=device)

    def gather() -> None:
        for work in node.gather([block[a:b] for a, b in pairwise(bounds)], backend):
            node.wait(work, backend)

    return gather


def _decide(
    mesh: Mesh,
    total: int,
    sample: int,
    bring: Callable[[int], float],
    device: torch.device,
    weights: str,
    place: Place,
    host_memory: MemoryBudget,
    backend: str,
) -> tuple[bool, str]:
    """Whether to take slices, and why. `total` bytes stream; `sample` bytes of a block are measured."""
    node = mesh.node
    with mesh.together("looking for room"):
        free = available_memory(host_memory) if weights == "host" else free_disk_bytes(place)
        spare = 0 if weights == "host" and host_memory not in (None, "auto") else _SPARE
    for needed, room in _of_all(mesh, [node.size * total, free * (1 - spare)]).tolist():
        if needed > room:
            where = "memory" if weights == "host" else "disk"
            return True, f"a copy for each rank, {gib(needed)}, does not fit into the {gib(room)} of {where} to be had"
    if weights == "host" and device.type == "cpu":
        return False, "weights in memory are used where they are"
    node.connect(backend)
    gather = _sample_gather(node, device, sample, backend)
    part = cut(sample, [1.0] * node.size)[1]
    seconds = [bring(sample), bring(part), _seconds(mesh, device, "measuring gathers", gather)]
    whole, part, gathered = _of_all(mesh, seconds).max(dim=0).values.tolist()
    figures = f"slices come in {1e3 * part:.1f} ms and are gathered in {1e3 * gathered:.1f} ms"
    return part + gathered < whole, f"of {sample / 2**20:.1f} MiB {figures}, the whole comes in {1e3 * whole:.1f} ms"


def shares_of(seconds: Sequence[float]) -> list[float]:
    """The shares of ranks that take `seconds` for the same bytes; equal unless one is a quarter slower than another."""
    if max(seconds) < 1.25 * min(seconds):
        return [1.0] * len(seconds)
    return [min(seconds) / s for s in seconds]


def _of_all(mesh: Mesh, values: Sequence[float]) -> torch.Tensor:
    """float64 [ranks, values]"""
    return mesh.exchange.gather(torch.tensor(values, dtype=torch.float64))


def _seconds(mesh: Mesh, device: torch.device, what: str, work: Callable[[], None]) -> float:
    """The median of the seconds that `work()` takes while all ranks do it."""
    times = []
    for _ in range(ROUNDS):
        with mesh.together(what):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _bring_seconds(mesh: Mesh, device: torch.device, directory: Place, num_bytes: int) -> float:
    """Seconds in which `num_bytes` come to the device, on the average of a few blocks."""
    unit = Unit(0, "a sample", [], [], resident=False)
    samples = [StoredCopy(unit, 0, num_bytes, block=i) for i in range(SAMPLE_BLOCKS)]

    def bring() -> None:
        for sample in samples:
            store.engine.drop(sample.block)
        for i, sample in enumerate(samples):
            store.acquire(sample)
            store.release(sample, False)
            store.expect(samples[i + 1 :], 0)

    with ExitStack() as ends:
        with mesh.together("measuring transfers"):
            store = streaming_store(samples, device, directory=directory, slots=3)
            ends.callback(store.close)
            for sample in samples if directory is not None else ():
                with store.open(sample, write=True, keep=False) as buffer:
                    buffer.fill_(1)  # a file's holes are read faster
        return _seconds(mesh, device, "measuring transfers", bring) / SAMPLE_BLOCKS
