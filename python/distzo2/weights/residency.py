"""Which blocks stay on the compute device, given a budget for weights there; the others stream."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from distzo2.errors import DistZO2Error
from distzo2.parallel.memory_share import MemoryShare
from distzo2.text import gib
from distzo2.weights.scratch import BUFFERS
from distzo2.weights.store import slot_bytes_of
from distzo2.weights.units import Unit
from distzo2_core import memory_budget

AUTO_SHARE = 0.7  # of what is free; the rest is for the lanes' hidden states, workspaces and logits

MemoryBudget = int | Literal["auto"] | None


def keep_blocks(
    units: Sequence[Unit],
    device: torch.device,
    budget: MemoryBudget,
    slots: int,
    free_bytes: Callable[[], int] | None = None,
) -> None:
    """Marks as `kept` as many streamed units as the budget allows, spread so that transfers interleave with compute.

    Args:
        units: all units of the model, in the order of their use.
        device: where it computes, and where kept units live.
        budget: bytes on the device for weights: residents, scratch for their perturbed copies, the ring's slots and
            kept blocks; "auto": 70% of what is free there now (on a CPU, of this rank's share of it); None: nothing
            is kept.
        slots: of the ring, while anything streams.
        free_bytes: what "auto" is a part of; None: `free_memory` of the device.

    Raises:
        DistZO2Error: the budget is less than what streaming itself needs; the message gives each part.
    """
    streamed = [u for u in units if not u.resident]
    if budget is None or not streamed:
        return
    if budget == "auto":
        budget = int(AUTO_SHARE * (free_memory(device, None) if free_bytes is None else free_bytes()))
    residents = sum(u.num_bytes for u in units if u.resident)
    scratch = BUFFERS * sum(_largest_of_classes(units))
    ring = slots * slot_bytes_of(streamed)
    everything = residents + scratch + sum(u.num_bytes for u in streamed)
    if everything <= budget:  # no ring is needed
        num_kept = len(streamed)
    else:
        least = residents + scratch + ring
        if least > budget:
            raise DistZO2Error(
                f"memory_budget of {gib(budget)}: streaming needs at least {gib(least)} on {device} (resident units "
                f"{gib(residents)}, perturbed copies {gib(scratch)}, {slots} slots {gib(ring)})"
            )
        largest = max(u.num_bytes for u in streamed)
        num_kept = min((budget - least) // largest, len(streamed) - 1)
    for j in range(num_kept):
        streamed[(2 * j + 1) * len(streamed) // (2 * num_kept)].kept = True


def _largest_of_classes(units: Sequence[Unit]) -> list[int]:
    """Bytes of a perturbed copy of the streamed units, and of each resident one: what scratch holds at most."""
    trainable = [u for u in units if u.trainable]
    streamed = [u.num_bytes for u in trainable if not u.resident]
    return [max(streamed, default=0), *(u.num_bytes for u in trainable if u.resident)]


def available_memory() -> int:
    """Bytes of memory that this process may still take: the least of the machine's and its control groups'."""
    budget = memory_budget()
    return min(budget[name] for name in ("cgroup_bytes", "available_bytes") if budget[name] is not None)


def free_disk_bytes(directory: str | os.PathLike) -> int:
    """Returns the bytes that are free on the disk of `directory`, which need not exist."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def free_memory(device: torch.device, share: MemoryShare | None) -> int:
    """Bytes that are free on the device; on a CPU, in this rank's share of its machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() if share is None else share.num_bytes
