"""The checksum of tensors' bytes: one value on every backend, and another after any change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, DTYPES, needs_native

from distzo2_core import checksum

ODD = 0x9E3779B97F4A7C15


def by_hand(buffers: list[bytes]) -> int:
    """The definition, in Python's integers."""
    result = 0
    for data in buffers:
        end = len(data) // 8 * 8
        words = np.frombuffer(data[:end], dtype="<u8").tolist()
        total = sum(word * (i * ODD % 2**64 | 1) for i, word in enumerate(words))
        result = result * ODD + total + 3 * int.from_bytes(data[end:], "little") + len(data)
    result %= 2**64
    return result - 2**64 if result >= 2**63 else result


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(buffers=st.lists(st.binary(max_size=100), max_size=4), shift=st.integers(0, 9))
def test_definition(backend: str, buffers: list[bytes], shift: int) -> None:
    tensors = [torch.frombuffer(bytearray(shift) + data + b"x", dtype=torch.uint8)[shift:-1] for data in buffers]
    assert checksum(tensors, backend=backend) == by_hand(buffers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str) -> None:
    """The value is compared between ranks that may run other builds."""
    tensors = [torch.arange(100_003, dtype=torch.float32), torch.tensor([1.5, -2.5, 3.5], dtype=torch.bfloat16)]
    assert checksum(tensors, backend=backend) == by_hand([t.view(torch.uint8).numpy().tobytes() for t in tensors])
    assert checksum(tensors, backend=backend) == -2874826591388324926


@needs_native
def test_native_over_threads() -> None:
    torch.set_num_threads(2)
    data = torch.randint(0, 256, (10_000_019,), dtype=torch.uint8)
    assert checksum([data], backend="native") == checksum([data], backend="reference")


def test_a_change_of_one_word_shows() -> None:
    data = torch.zeros(1000, dtype=torch.int64)
    before = checksum([data])
    for place in range(1000):
        data[place] = 1 << place % 63
        assert checksum([data]) != before
        data[place] = 0


def test_shapes_dtypes_and_strides_do_not_matter_and_the_cut_does() -> None:
    matrix = torch.arange(12, dtype=torch.float32).view(3, 4)
    value = checksum([matrix])
    assert value == checksum([matrix.view(-1)]) == checksum([matrix.view(torch.int32)])
    assert value == checksum([matrix.T.contiguous().T])
    assert value != checksum([matrix.T]) and value != checksum([matrix[:1], matrix[1:]])
    assert checksum([]) == 0 and checksum([torch.empty(0)]) == 0
    assert checksum([matrix.requires_grad_()]) == value
    for dtype in DTYPES:
        assert checksum([torch.tensor(1.0, dtype=dtype)]) == by_hand(
            [torch.ones(1, dtype=dtype).view(torch.uint8).numpy().tobytes()]
        )


@pytest.mark.cuda
def test_cuda() -> None:
    tensors = [torch.randn(1001), torch.randn(77).half()]
    assert checksum([tensor.cuda() for tensor in tensors]) == checksum(tensors)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a tensor, got bytes"):
        checksum([torch.ones(1), b"1"])
    with pytest.raises(ValueError, match="backend must be one of"):
        checksum([torch.ones(1)], backend="fast")
