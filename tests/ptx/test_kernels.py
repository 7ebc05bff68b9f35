"""The compiled CUDA and Triton kernels, executed from their PTX: the bits of the native CPU kernels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import DTYPES, needs_native, random_visit
from ptx.cases import SHAPES, backend_of, check_lookup, check_ops, check_visit, simple_visit
from ptx.cuda_kernels import CudaKernels
from ptx.machine import Module
from ptx.triton_kernels import TritonKernels

import distzo2_core

pytestmark = needs_native

SHIFTS = ((0,), (0, 0, 4), (8, 24, 40), (4, 12, 16))  # of weights and outs: alike modulo 16, and not


@pytest.fixture(params=["nvcc", "triton"])
def kernels(request: pytest.FixtureRequest) -> CudaKernels | TritonKernels:
    return request.getfixturevalue(request.param)


def check_random_visits(kernels: CudaKernels | TritonKernels, seeds: range, max_numel: int = 300) -> int:
    """Visits of any program, at any alignment. Returns the bits compared."""
    num_bits = 0
    with backend_of(kernels) as backend:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            kernels.shifts = SHIFTS[seed % len(SHIFTS)]
            num_bits += check_visit(random_visit(rng, DTYPES, max_numel), backend)
    return num_bits


def check_simple_visits(kernels: CudaKernels | TritonKernels, seed: int, numels: tuple[int, ...]) -> int:
    """A visit of each shape and family, of all dtypes. Returns the bits compared."""
    num_bits = 0
    with backend_of(kernels) as backend:
        for index, shape in enumerate(SHAPES):
            for family in (0, 1):
                rng = np.random.default_rng([seed, index, family])
                kernels.shifts = SHIFTS[(seed + index) % len(SHIFTS)]
                num_bits += check_visit(simple_visit(rng, shape, family, DTYPES, list(numels)), backend)
    return num_bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_and_in_place(kernels: CudaKernels | TritonKernels, dtype: torch.dtype) -> None:
    with backend_of(kernels) as backend:
        for seed, numel in enumerate((1, 7, 8, 129, 1030, 5000)):
            check_ops(np.random.default_rng(seed), backend, dtype, numel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lookup(kernels: CudaKernels | TritonKernels, dtype: torch.dtype) -> None:
    with backend_of(kernels) as backend:
        for seed, cols in enumerate((1, 7, 64, 1030, 2100)):
            check_lookup(np.random.default_rng(seed), backend, dtype, cols)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_exist_are_nan(kernels: CudaKernels | TritonKernels, dtype: torch.dtype) -> None:
    table, ids = torch.ones(3, 20, dtype=dtype), torch.tensor([2, 3, -1, 2**40])
    if isinstance(kernels, CudaKernels):
        rows = kernels.embedding(table, ids, 1.0, 5, 1, 2, 3, 0, 0)
    else:  # triton_ops refuses such ids where it can read them, as here
        rows, ints = torch.empty(4, 20, dtype=dtype), torch.tensor([5, 0, 1, 2, 3, 0, 3, 20])
        tensors = (table, ids, rows, ints, torch.ones(1))
        constants = {"FAMILY": 0, "CODE": DTYPES.index(dtype), "TILE": 1024, "enable_fp_fusion": False}
        kernels.launch("embedding_kernel", (4, 2), tensors, constants)
    assert rows[0].isfinite().all() and rows[1:].isnan().all()


def test_visits_of_simple_programs(kernels: CudaKernels | TritonKernels) -> None:
    for seed, numels in enumerate(((1, 8, 333), (70, 2100), (5, 16, 9, 2048))):
        check_simple_visits(kernels, seed, numels)


def test_visits_of_any_program(kernels: CudaKernels | TritonKernels) -> None:
    check_random_visits(kernels, range(120))


def test_tables_in_a_workspace(nvcc: CudaKernels) -> None:
    """Too many segments for the parameters of a launch."""
    check_simple_visits(nvcc, 5, (9, 16, 3) * 40)
    workspace = {name for name in nvcc.launches if "WorkspaceTables" in name}
    assert len(workspace) == 9 and nvcc.launches[next(name for name in nvcc.launches if "store_piece" in name)] > 9


def test_threads_of_many_octets(compiled: tuple[Path, dict[int, str]]) -> None:
    """On a device of one multiprocessor, a thread of a large visit loops over octets."""
    nvcc = CudaKernels(compiled[0], Module(compiled[1][90]), device=1)
    rng = np.random.default_rng(0)
    with backend_of(nvcc) as backend:
        check_visit(simple_visit(rng, (1, 2), 0, DTYPES, [40_003, 70_000, 31_000]), backend)


def test_sm_80_is_the_same_code(compiled: tuple[Path, dict[int, str]]) -> None:
    """Where it is not, it is executed too."""
    library, ptx = compiled
    nvcc = CudaKernels(library, Module(ptx[80]))
    same = re.sub(r"\.target sm_80", ".target sm_90", ptx[80]) == ptx[90]
    assert check_random_visits(nvcc, range(2 if same else 40)) > 0
    if not same:
        check_simple_visits(nvcc, 0, (1, 8, 333, 2100))
        for dtype in DTYPES:
            with backend_of(nvcc) as backend:
                check_ops(np.random.default_rng(0), backend, dtype, 1030)
                check_lookup(np.random.default_rng(0), backend, dtype, 1030)


def test_alignment_changes_no_triton_kernel(compiled_triton: dict[str, dict[str, str | int]]) -> None:
    """Triton compiles one more for pointers that are not multiples of 16: it is the same, and only one is executed."""
    assert compiled_triton["unaligned"] in [value for key, value in compiled_triton.items() if key != "unaligned"]


@pytest.mark.parametrize("ulps", [-2, -1, 1, 2])
def test_normals_do_not_depend_on_the_table_of_rsqrt(nvcc: CudaKernels, ulps: int) -> None:
    """The root that follows rsqrt.approx is right for nearly any approximation of it."""
    with backend_of(nvcc) as backend:
        nvcc.rsqrt_ulps = ulps
        got = distzo2_core.normal(20_000, seed=1, step=2, param=3, backend=backend)
    expected = distzo2_core.normal(20_000, seed=1, step=2, param=3, backend="native")
    assert (got != expected).sum() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvcc", "triton"])
def test_thousands_of_visits(request: pytest.FixtureRequest, name: str) -> None:
    kernels = request.getfixturevalue(name)
    num_bits = check_random_visits(kernels, range(1000, 2000), max_numel=1500)
    num_bits += sum(check_simple_visits(kernels, seed, (1 + seed, 2100 - seed, 8 * seed)) for seed in range(100, 130))
    print(f"{name}: {sum(kernels.launches.values())} launches of {len(kernels.launches)} kernels, {num_bits} bits")
