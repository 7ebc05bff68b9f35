"""A rank's share of its machine's memory: one reading for the ranks that are on the machine, divided among them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distzo2.parallel import group as parallel
from distzo2_core import memory_budget

_LIMITS = ("cgroup_bytes", "available_bytes")
_NO_LIMIT = (1 << 63) - 1


@dataclass(frozen=True)
class MemoryShare:
    """What the ranks of this machine may take together, and how many they are. None: no limit."""

    num_ranks: int
    cgroup_bytes: int | None
    available_bytes: int | None

    @property
    def num_bytes(self) -> int:
        """One rank's share, with nothing to spare."""
        limits = [limit for limit in (self.cgroup_bytes, self.available_bytes) if limit is not None]
        return min(limits, default=_NO_LIMIT) // self.num_ranks

    def pool_options(self) -> dict[str, Any]:
        """For a `HostPool` of this rank, beside which the others make theirs."""
        return {"num_ranks": self.num_ranks, **{name: getattr(self, name) for name in _LIMITS}}


def memory_share() -> MemoryShare:
    """Reads what this machine has. Ranks that have met (`distzo2.parallel.init`) all call it, and take nothing before
    it returns: the least reading of a machine's ranks counts. One that read for itself would find what the others had
    already taken gone, and divide the rest once more; or would not see what they are about to take.
    """
    budget = memory_budget()
    ranks = parallel.joined()
    if ranks is None or ranks.world_size == 1:
        return MemoryShare(1, *(budget[name] for name in _LIMITS))
    from distzo2.parallel.exchange import hash64

    what = "sharing the memory of a machine"
    machines = [numbers[0] for numbers in ranks.exchange.agree(what, numbers=(hash64(_machine()),))]
    mine = [_NO_LIMIT if budget[name] is None else budget[name] for name in _LIMITS]
    readings = ranks.exchange.agree(what, numbers=mine)
    here = [numbers for machine, numbers in zip(machines, readings, strict=True) if machine == machines[ranks.rank]]
    least = [min(limits) for limits in zip(*here, strict=True)]
    return MemoryShare(len(here), *(None if limit == _NO_LIMIT else limit for limit in least))


def _machine() -> str:
    """The kernel's name for this boot of the machine: containers on it share its memory, whatever they are called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{platform.node()} {os.environ.get('GROUP_RANK', '')}"
