"""A 64-bit checksum of tensors, by which ranks compare their replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PIECE = 1 << 20  # words that are worked on at once
_ODD = 0x9E3779B97F4A7C15 - 2**64  # of the golden ratio, as a signed number
_MASK = 2**64 - 1


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
