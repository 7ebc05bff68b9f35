"""Bit-equality of tensors and of models."""

from __future__ import annotations

import torch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def assert_same(streamed, expected) -> None:
    losses, state = streamed
    expected_losses, expected_state = expected
    assert losses == expected_losses
    assert state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        assert same_bits(state[name], value), name
