"""What fits where: a rank's share of its machine's memory, and which blocks stay on the compute device."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distzo2.errors import DistZO2Error
from distzo2.text import gib
from distzo2.weights.scratch import least_bytes
from distzo2.weights.store import slot_bytes_of
from distzo2.weights.units import Unit
from distzo2_core import memory_budget

DEFAULT_SLOTS = 3
AUTO_SHARE = 0.7  # of what is free; the rest is for the lanes' hidden states, workspaces and logits
_NO_LIMIT = (1 << 63) - 1

MemoryBudget = int | Literal["auto"] | None


@dataclass(frozen=True)
class MemoryShare:
    """How many ranks are on this machine, and the bytes they may take together; None means no limit.

    `host_memory` is what the user lets them take, in place of what is available; None: nothing was said.
    """

    num_ranks: int
    cgroup_bytes: int | None
    available_bytes: int | None
    host_memory: int | None = None

    @classmethod
    def of_one_rank(cls, host_memory: MemoryBudget = None) -> MemoryShare:
        """Reads what the machine and the control groups of this process leave it now."""
        budget, asked = memory_budget(), None if host_memory == "auto" else host_memory
        return cls(1, budget["cgroup_bytes"], budget["available_bytes"], asked)

    @property
    def num_bytes(self) -> int:
        """One rank's whole share."""
        most = self.available_bytes if self.host_memory is None else self.host_memory
        limits = [limit for limit in (self.cgroup_bytes, most) if limit is not None]
        return min(limits, default=_NO_LIMIT) // self.num_ranks

    def pool_options(self) -> dict[str, Any]:
        """Arguments for this rank's `HostPool`, beside those of the other ranks."""
        return vars(self).copy()


def available_memory(host_memory: MemoryBudget = None) -> int:
    """Returns the bytes of memory that this process may still take, as asked or by what is available."""
    return MemoryShare.of_one_rank(host_memory).num_bytes


def free_disk_bytes(directory: str | os.PathLike) -> int:
    """Returns the bytes that are free on the disk of `directory`, which need not exist."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def slots_of_use(units: Sequence[Unit], slots: int) -> int:
    """Returns how many slots are made for all units of a model: by default, two where all that streams is decoded. It
    leaves its slot before it is computed with, so that two keep a link busy."""
    is_packed = all(unit.packed is not None for unit in units if not unit.resident)
    return 2 if slots == DEFAULT_SLOTS and is_packed else slots


def blocks_to_stream(
    units: Sequence[Unit], device: torch.device, budget: MemoryBudget, slots: int, free_bytes: Callable[[], int]
) -> list[Unit]:
    """Returns the blocks that stream. The others stay on the device: as many as the budget allows, spread so that
    transfers interleave with compute.

    Args:
        units: all units of the model, in the order of their use.
        device: where it computes, and where the blocks that do not stream live.
        budget: bytes on the device for weights: residents, scratch for their perturbed copies, the ring's slots and
            blocks; "auto": 70% of what `free_bytes` returns; None: all blocks stream.
        slots: of the ring, while anything streams.

    Raises:
        DistZO2Error: the budget is less than what streaming itself needs; the message gives each part.
    """
    blocks = [u for u in units if not u.resident]
    if budget is None or not blocks:
        return blocks
    if budget == "auto":
        budget = int(AUTO_SHARE * free_bytes())
    residents = sum(u.stored_bytes for u in units if u.resident)
    scratch = least_bytes([u for u in units if u.trainable or u.converts])
    if residents + scratch + sum(u.stored_bytes for u in blocks) <= budget:  # no ring is needed
        return []
    ring = slots * slot_bytes_of(u.stored_bytes for u in blocks)
    least = residents + scratch + ring
    if least > budget:
        raise DistZO2Error(
            f"memory_budget of {gib(budget)}: streaming needs at least {gib(least)} on {device} (resident units "
            f"{gib(residents)}, perturbed copies {gib(scratch)}, {slots} slots {gib(ring)})"
        )
    num_staying = min((budget - least) // max(u.stored_bytes for u in blocks), len(blocks) - 1)
    staying = {(2 * j + 1) * len(blocks) // (2 * num_staying) for j in range(num_staying)}
    return [unit for i, unit in enumerate(blocks) if i not in staying]
