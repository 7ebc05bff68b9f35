"""Fake kernels of the torch ops `distzo2::*`: what they return for shapes alone, for tracing and `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _nothing(*args: Any) -> None:
    """Of an op that changes its first argument."""


def _embedding(
    weight: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    seed: int,
    step: int,
    param: int,
    probe: int,
    offset: int,
    family: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1], dtype=out_dtype or weight.dtype)


def _materialize(
    weights: torch.Tensor,
    segments: torch.Tensor,
    seed: int,
    terms: torch.Tensor,
    coefs: torch.Tensor,
    updates: torch.Tensor,
    update_groups: torch.Tensor,
    emits: torch.Tensor,
    emit_scales: torch.Tensor,
    outs: Sequence[torch.Tensor],
    write_back: bool,
) -> None:
    # Torch comes here for real tensors too when one of them is on the meta device.
    for out in outs:
        if out.device != weights.device:
            raise ValueError(f"outs must be on {weights.device} as weights are, got {out.device}")
    for table in (segments, terms, coefs, updates, update_groups, emits, emit_scales):
        if table.device.type not in ("cpu", weights.device.type):
            raise ValueError(f"tables must be CPU tensors, got one on {table.device}")
    return None


def _decode(stored: Tensor, matrices: Tensor, levels: Tensor, out: Tensor, gains: Tensor | None = None) -> None:
    for name, buffer in (("out", out), ("gains", gains)):
        if buffer is not None and buffer.device != stored.device:  # as above
            raise ValueError(f"{name} must be on {stored.device} as stored is, got {buffer.device}")


def register() -> None:
    """Registers the fake kernels; called once, after the extension has defined the ops."""
    for name in ("noise_", "perturb_", "update_"):
        torch.library.register_fake(f"distzo2::{name}", _nothing)
    torch.library.register_fake("distzo2::embedding", _embedding)
    torch.library.register_fake("distzo2::materialize", _materialize)
    torch.library.register_fake("distzo2::decode", _decode)
