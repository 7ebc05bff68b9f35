"""The perturbed embedding lookup: the bits of looking up in the perturbed table, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    DTYPES,
    assert_same_bits,
    check_embedding,
    needs_interpreter,
    needs_native,
    needs_triton,
)

import distzo2_core

PLACE = {"seed": 2**64 - 1, "step": 3, "param": 5, "probe": 7}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), cols=st.integers(1, 1500))
def test_rows_of_the_perturbed_table(backend: str, seed: int, dtype: torch.dtype, cols: int) -> None:
    check_embedding(np.random.default_rng(seed), backend, dtype, cols)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_ids_on_many_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    table = torch.randn(300, 257).to(dtype)
    ids = torch.randint(0, 300, (7, 11, 13))
    got = distzo2_core.embedding(table, ids, 1e-2, **PLACE)
    distzo2_core.perturb_(table, 1e-2, **PLACE)
    assert_same_bits(got, torch.nn.functional.embedding(ids, table))


needs_cuda_kernels = pytest.mark.skipif(not distzo2_core.build_info()["cuda"], reason="built without CUDA kernels")


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, in Triton's interpreter, of infinities
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("native", "cuda", marks=[pytest.mark.cuda, needs_cuda_kernels]),
        pytest.param("triton", "cpu", marks=needs_interpreter),
        pytest.param("triton", "cuda", marks=[pytest.mark.cuda, needs_triton]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_backends(backend: str, device: str, dtype: torch.dtype) -> None:
    for cols in (1, 100, 1030) if device == "cpu" else (1, 7, 8, 100, 768, 1030, 4096):
        check_embedding(np.random.default_rng(cols), backend, dtype, cols, device)
    if device == "cuda":  # where no error can be raised, rows that do not exist are NaN
        table, ids = torch.ones(3, 4, dtype=dtype, device="cuda"), torch.tensor([2, 3, -1], device="cuda")
        rows = distzo2_core.embedding(table, ids, 1.0, **PLACE, backend=backend)
        assert rows[0].isfinite().all() and rows[1:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_of_a_table_has_the_bits_of_the_whole(backend: str) -> None:
    table = torch.randn(40, 24)
    ids = torch.arange(40)
    whole = distzo2_core.embedding(table, ids, 0.5, **PLACE, backend=backend)
    part = distzo2_core.embedding(table[15:], ids[:25], 0.5, **PLACE, offset=15 * 24, backend=backend)
    assert_same_bits(part, whole[15:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    assert distzo2_core.embedding(torch.ones(3, 4), none, 1.0, **PLACE, backend=backend).shape == (0, 2, 4)
    assert distzo2_core.embedding(torch.ones(0, 4), none, 1.0, **PLACE, backend=backend).shape == (0, 2, 4)
    narrow = distzo2_core.embedding(torch.ones(3, 0), torch.tensor([2]), 1.0, **PLACE, backend=backend)
    assert narrow.shape == (1, 0)
    one = distzo2_core.embedding(torch.ones(3, 4), torch.tensor(2), 1.0, **PLACE, backend=backend)
    assert one.shape == (4,)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=[needs_triton, needs_interpreter])])
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_an_id_that_is_no_row(backend: str, wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"ids\[1\] is {wrong}, and the table has 3 rows"):
        distzo2_core.embedding(torch.ones(3, 4), torch.tensor([0, wrong]), 1.0, **PLACE, backend=backend)


def test_what_is_refused() -> None:
    table, ids = torch.ones(3, 4), torch.tensor([1])
    wrong = [
        (TypeError, "weight must be a tensor, got list", [1.0], ids, {}),
        (TypeError, "weight must be of torch.float32, torch.bfloat16 or torch.float16", table.double(), ids, {}),
        (ValueError, "weight must be contiguous", torch.ones(4, 3).T, ids, {}),
        (ValueError, r"weight must have the shape \[rows, cols\], got \(12,\)", torch.ones(12), ids, {}),
        (TypeError, "ids must be a tensor of torch.int64, got torch.int32", table, ids.int(), {}),
        (TypeError, "ids must be a tensor of torch.int64, got list", table, [1], {}),
        (ValueError, "ids must be on cpu as weight is, got meta", table, ids.to("meta"), {}),
        (ValueError, "offset must be between", table, ids, {"offset": 2**38 - 11}),
        (ValueError, "scale must be finite", table, ids, {"scale": float("inf")}),
        (TypeError, "dtype must be .*, got torch.int8", table, ids, {"out_dtype": torch.int8}),
    ]
    for error, text, weight, rows, changes in wrong:
        arguments = {"scale": 1.0, **PLACE, **changes}
        with pytest.raises(error, match=text):
            distzo2_core.embedding(weight, rows, **arguments)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [torch.tensor(3), torch.empty(0, 2, dtype=torch.int64), torch.arange(6).view(2, 3).T])
def test_torch_op_of_every_shape_of_ids(dtype: torch.dtype, ids: torch.Tensor) -> None:
    weight = torch.randn(6, 9).to(dtype)
    for family in (0, 1):
        for out_dtype in (None, torch.float16):
            torch.library.opcheck(torch.ops.distzo2.embedding, (weight, ids, 0.1, -1, 3, 5, 7, 0, family, out_dtype))
    whole = distzo2_core.perturb_(weight.clone(), 0.1, **PLACE)
    assert_same_bits(distzo2_core.embedding(weight, ids, 0.1, **PLACE), torch.nn.functional.embedding(ids, whole))


@needs_native
def test_the_rows_are_constants_to_autograd() -> None:
    assert not distzo2_core.embedding(
        torch.randn(6, 8, requires_grad=True), torch.tensor([5]), 0.1, **PLACE
    ).requires_grad
