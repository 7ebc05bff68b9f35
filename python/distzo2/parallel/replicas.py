"""The proof that replicas are equal: a 64-bit checksum of every unit's up-to-date weights, compared across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from distzo2.errors import DistZO2Error

if TYPE_CHECKING:
    from distzo2.parallel.exchange import Exchange
    from distzo2.weights.access import WeightAccess

PIECE = 1 << 20  # words that are worked on at once
_ODD = 0x9E3779B97F4A7C15 - 2**64  # of the golden ratio, as a signed number
_MASK = 2**64 - 1


class ReplicasDifferError(DistZO2Error):
    """Weights that must be bit-identical on all ranks are not; raised on all of them."""


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """64 bits of the tensors' bytes, as a signed number: of a tensor's 8-byte words w_i the sum of w_i·m_i modulo 2^64,
    m_i odd and depending on the place, so that a change of one word always shows. The same on every device."""
    result = 0
    for tensor in tensors:
        data = tensor.reshape(-1).view(torch.uint8)
        num_words = data.numel() // 8
        total = int.from_bytes(bytes(data[8 * num_words :].tolist()), "little") * 3 + data.numel()
        words = data[: 8 * num_words].view(torch.int64)
        for first in range(0, num_words, PIECE):
            piece = words[first : first + PIECE]
            places = torch.arange(first, first + piece.numel(), device=piece.device)
            total += int((piece * (places.mul_(_ODD).bitwise_or_(1))).sum())
        result = (result * _ODD + total) & _MASK
    return result - 2**64 if result >= 2**63 else result


def compare_replicas(access: WeightAccess, exchange: Exchange, step: int) -> None:
    """Reads every unit once, with every update made so far, and compares it across ranks.

    Raises:
        ReplicasDifferError: on all ranks; names the first unit that differs and which ranks agree with each other.
    """
    sums = torch.zeros(len(access.weights.units), dtype=torch.int64)
    with exchange.together(f"comparing replicas at step {step}"):
        for unit, views in access.visit():
            sums[unit.index] = checksum(views)
    all_sums = exchange.gather(sums)
    for unit, row in zip(access.weights.units, all_sums.T.tolist(), strict=True):
        if len(set(row)) > 1:
            groups: dict[int, list[int]] = {}
            for rank, value in enumerate(row):
                groups.setdefault(value & _MASK, []).append(rank)
            parts = "; ".join(
                f"rank{'s' if len(r) > 1 else ''} {', '.join(map(str, r))}: {v:016x}" for v, r in groups.items()
            )
            raise ReplicasDifferError(f"after {step} steps the ranks differ, first in unit {unit.name!r} ({parts})")
