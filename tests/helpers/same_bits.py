"""Bit-equality of tensors and of models."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def assert_same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(found[name], value), name


def assert_same(streamed, expected) -> None:
    losses, state = streamed
    expected_losses, expected_state = expected
    assert losses == expected_losses
    assert_same_tensors(state, expected_state)
