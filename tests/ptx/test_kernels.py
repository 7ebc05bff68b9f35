"""The compiled CUDA and Triton kernels, executed from their PTX: the bits of the native CPU kernels."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import (
    CODES,
    DTYPES,
    LOW_RANK,
    anchored_visit,
    assert_same_bits,
    check_low_rank,
    low_rank_visit,
    needs_native,
    random_visit,
)
from packed_cases import FORMATS, check_decode
from ptx.cases import SHAPES, backend_of, check_lookup, check_ops, check_visit, in_workspace, pairs_of, simple_visit
from ptx.cuda_kernels import CudaKernels
from ptx.machine import Module, Program
from ptx.triton_kernels import DECODED, GAINED, TritonKernels

import distzo2_core

pytestmark = [needs_native, pytest.mark.timeout(900)]  # the first one compiles all kernels

SHIFTS = ((0,), (0, 0, 4), (8, 24, 40), (4, 12, 16))  # of weights and outs: alike modulo 16, and not


@pytest.fixture(params=["nvcc", "triton"])
def kernels(request: pytest.FixtureRequest) -> CudaKernels | TritonKernels:
    return request.getfixturevalue(request.param)


def check_random_visits(
    kernels: CudaKernels | TritonKernels,
    seeds: range,
    max_numel: int = 300,
    workspace: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> int:
    """Visits of any program, at any alignment; with codes, some float32 is nonnegative. Returns the bits compared."""
    num_bits = 0
    with backend_of(kernels) as backend:
        for seed in seeds:
            kernels.shifts = SHIFTS[seed % len(SHIFTS)]
            nonnegative = dtypes != DTYPES
            visit = random_visit(np.random.default_rng(seed), dtypes, max_numel, pairs_of(kernels), nonnegative)
            num_bits += check_visit(in_workspace(visit) if workspace else visit, backend)
            if seed % 3 == 0 and isinstance(kernels, CudaKernels):  # of Triton see `triton_kernels.variants`
                visit = low_rank_visit(np.random.default_rng(seed), visit)
                num_bits += check_visit(in_workspace(visit) if workspace else visit, backend)
            elif seed % 3 == 1 and isinstance(kernels, CudaKernels):
                visit = anchored_visit(np.random.default_rng(seed), visit)
                num_bits += check_visit(in_workspace(visit) if workspace else visit, backend)
    return num_bits


def check_simple_visits(
    kernels: CudaKernels | TritonKernels,
    seeds: range,
    workspace: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> int:
    """Visits of each shape and family, of all dtypes, emitted in these and in others, half of them of whole octets.
    With codes, float32 is nonnegative. Returns the bits compared."""
    num_bits = 0
    with backend_of(kernels) as backend:
        for seed, (index, shape), family, pairs in itertools.product(
            seeds, enumerate(SHAPES), (0, 1), ((), pairs_of(kernels))
        ):
            rng, whole = np.random.default_rng([seed, index, family]), seed % 2 == 1
            numels = (
                [int(numel) * 8 for numel in rng.integers(1, 150, 9)] if whole else rng.integers(1, 400, 9).tolist()
            )
            kernels.shifts = (0,) if whole else SHIFTS[(seed // 2 + index) % len(SHIFTS)]
            if dtypes != DTYPES and not pairs:
                continue
            visit = simple_visit(rng, shape, family, dtypes, numels, whole, pairs=pairs, nonnegative=dtypes != DTYPES)
            num_bits += check_visit(in_workspace(visit) if workspace else visit, backend)
    return num_bits


def check_crowded_visits(kernels: CudaKernels, seeds: range, workspace: bool = False) -> None:
    """Visits of an update and both signs to 40 segments of all formats, half of whose weights are special, so that each
    place of an octet meets each case of each rounding. Octets are whole for two seeds of four."""
    with backend_of(kernels) as backend:
        for seed, family in itertools.product(seeds, (0, 1)):
            rng, whole = np.random.default_rng([seed, family, 1]), seed % 4 > 1
            numels = (rng.integers(1, 60, 40) * (8 if whole else 1)).tolist()
            kernels.shifts = (0,) if whole else SHIFTS[seed % len(SHIFTS)]
            more = {"pairs": pairs_of(kernels), "nonnegative": seed % 2 == 0, "special": 0.5}
            visit = simple_visit(rng, (1, 2), family, (*CODES, *DTYPES), numels, whole, **more)
            check_visit(in_workspace(visit) if workspace else visit, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_and_in_place(kernels: CudaKernels | TritonKernels, dtype: torch.dtype) -> None:
    with backend_of(kernels) as backend:
        for seed, numel in enumerate((1, 7, 8, 129, 1030, 2048, 5000)):
            check_ops(np.random.default_rng(seed), backend, dtype, numel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lookup(kernels: CudaKernels | TritonKernels, dtype: torch.dtype) -> None:
    with backend_of(kernels) as backend:
        for seed, cols in enumerate((1, 7, 64, 1030)):
            check_lookup(np.random.default_rng(seed), backend, dtype, cols)
            if isinstance(kernels, CudaKernels):
                check_lookup(np.random.default_rng(seed), backend, dtype, cols, families=LOW_RANK)
        for cols in (8, 2104):
            check_lookup(np.random.default_rng(cols), backend, dtype, cols, whole=True)
        for out_dtype in [out for stored, out in pairs_of(kernels) if stored == dtype]:
            for cols in (7, 8, 64, 300, 2104):
                families = ("normal", "rademacher")
                check_lookup(np.random.default_rng(cols), backend, dtype, cols, cols % 8 == 0, out_dtype, families)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_exist_are_nan(kernels: CudaKernels | TritonKernels, dtype: torch.dtype) -> None:
    table, ids = torch.ones(3, 20, dtype=dtype), torch.tensor([2, 3, -1, 2**40])
    if isinstance(kernels, CudaKernels):
        rows = kernels.embedding(table, ids, 1.0, 5, 1, 2, 3, 0, 0, dtype)
    else:  # triton_ops refuses such ids where it can read them, as here
        rows, ints = torch.empty(4, 20, dtype=dtype), torch.tensor([5, 0, 1, 2, 3, 0, 3, 20])
        tensors = (table, ids, rows, ints, torch.ones(1))
        code = DTYPES.index(dtype)
        constants = {"FAMILY": 0, "CODE": code, "OUT_CODE": code, "TILE": 1024, "enable_fp_fusion": False}
        kernels.launch("embedding_kernel", (4, 2), tensors, constants)
    assert rows[0].isfinite().all() and rows[1:].isnan().all()


def test_low_rank(nvcc: CudaKernels) -> None:
    with backend_of(nvcc) as backend:
        check_low_rank(backend, numels=(700,))


@pytest.mark.parametrize("family", LOW_RANK)
def test_low_rank_by_triton(triton: TritonKernels, family: str) -> None:
    """Noise from the middle of a row on, rows of a table, and an update with both signs."""
    place, code = {"step": 2**32 - 1, "param": 9, "probe": 2**20 - 1}, LOW_RANK.index(family)
    with backend_of(triton) as backend:
        for shape in ((70, 33), (2, 9, 128)):
            more = {"seed": 2**64 - 3, "offset": 17, "numel": 1500, "family": family, "dtype": torch.bfloat16}
            each = [distzo2_core.low_rank(shape, **place, **more, backend=b) for b in (backend, "native")]
            assert_same_bits(*each, (family, shape))
        for seed in range(3):  # some scales are 0
            check_lookup(np.random.default_rng(seed), backend, torch.bfloat16, 300, families=(family,))
        rng = np.random.default_rng(code)
        visit = simple_visit(rng, (1, 2), 0, (torch.bfloat16,), (8 * rng.integers(1, 50, 12)).tolist(), whole=True)
        check_visit(low_rank_visit(rng, visit, (family, family)), backend)


def test_visits_of_simple_programs(kernels: CudaKernels | TritonKernels) -> None:
    check_simple_visits(kernels, range(10))


def test_visits_of_any_program(kernels: CudaKernels | TritonKernels) -> None:
    check_random_visits(kernels, range(120))


def test_visits_of_codes(kernels: CudaKernels | TritonKernels) -> None:
    """Beside segments of all dtypes."""
    if isinstance(kernels, CudaKernels):
        check_crowded_visits(kernels, range(4))
    else:  # one kernel for each program
        check_simple_visits(kernels, range(4), dtypes=(*CODES, *DTYPES))
    check_random_visits(kernels, range(200, 224), dtypes=(*CODES, *DTYPES))
    check_random_visits(kernels, range(240, 250), max_numel=2500, dtypes=CODES)


@pytest.mark.parametrize("name", FORMATS)
def test_decoding(nvcc: CudaKernels, name: str) -> None:
    with backend_of(nvcc) as backend:
        for seed, shifts in enumerate(((0,), (4, 2), (8, 1))):  # of what is written, and of the packed bytes
            nvcc.shifts = shifts
            check_decode(np.random.default_rng(seed), backend, [name], max_rows=3)


@pytest.mark.parametrize("name", DECODED)
def test_decoding_by_triton(triton: TritonKernels, name: str) -> None:
    with backend_of(triton) as backend:
        dtypes, gained = (DTYPES[DECODED[name]],), float(name in GAINED)
        check_decode(np.random.default_rng(0), backend, [name], max_rows=2, dtypes=dtypes, gained=gained)


def test_a_device_without_memory_pools(compiled: tuple[Path, dict[int, str]]) -> None:
    """Tables in parameters need none, and others a wait before their workspace is freed."""
    nvcc = CudaKernels(compiled[0], Module(compiled[1][90]), device=2)
    for workspace in (False, True):
        check_random_visits(nvcc, range(2), workspace=workspace)
    assert {"Inline" in name for name in nvcc.launches if "visit_kernel" in name} == {True, False}


def test_normals_of_a_small_tensor_are_many_blocks(nvcc: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of 132 multiprocessors, 2^20 normals were 64 blocks of 8 octets a thread."""
    grids = []
    monkeypatch.setattr(Program, "run", lambda self, grid, *rest, **more: grids.append(grid) or 0)
    with backend_of(nvcc) as backend:
        distzo2_core.normal(2**20, seed=1, step=2, param=3, backend=backend)
    assert grids == [(512, 1, 1)]


def test_tables_in_a_workspace(nvcc: CudaKernels) -> None:
    """Tables too long for the parameters of a launch: many groups, or many segments."""
    check_simple_visits(nvcc, range(8), workspace=True)
    check_random_visits(nvcc, range(40), workspace=True)
    check_crowded_visits(nvcc, range(4), workspace=True)
    check_random_visits(nvcc, range(200, 224), workspace=True, dtypes=(*CODES, *DTYPES))
    visit = simple_visit(np.random.default_rng(0), (1, 2), 0, DTYPES, [9, 16, 3] * 40)
    with backend_of(nvcc) as backend:
        check_visit(visit, backend)
    assert {"WorkspaceTables" in name for name in nvcc.launches if "visit_kernel" in name} == {True}


def test_threads_of_many_octets(compiled: tuple[Path, dict[int, str]]) -> None:
    """On a device of one multiprocessor, a thread of a large visit loops over octets."""
    nvcc = CudaKernels(compiled[0], Module(compiled[1][90]), device=1)
    rng = np.random.default_rng(0)
    with backend_of(nvcc) as backend:
        check_visit(simple_visit(rng, (1, 2), 0, DTYPES, [40_003, 70_000, 31_000]), backend)
        check_ops(rng, backend, torch.bfloat16, 70_000)


def test_sm_80_is_the_same_code(compiled: tuple[Path, dict[int, str]]) -> None:
    """Where it is not, it is executed too."""
    library, ptx = compiled
    nvcc = CudaKernels(library, Module(ptx[80]))
    same = re.sub(r"\.target sm_80", ".target sm_90", ptx[80]) == ptx[90]
    assert check_random_visits(nvcc, range(2 if same else 40)) > 0
    if not same:
        check_simple_visits(nvcc, range(4))
        for dtype in DTYPES:
            with backend_of(nvcc) as backend:
                check_ops(np.random.default_rng(0), backend, dtype, 1030)
                check_lookup(np.random.default_rng(0), backend, dtype, 1030)


@pytest.mark.parametrize("ulps", [-2, -1, 1, 2])
def test_normals_do_not_depend_on_the_table_of_rsqrt(nvcc: CudaKernels, ulps: int) -> None:
    """The root that follows rsqrt.approx is right for nearly any approximation of it."""
    with backend_of(nvcc) as backend:
        nvcc.rsqrt_ulps = ulps
        got = distzo2_core.normal(20_000, seed=1, step=2, param=3, backend=backend)
    expected = distzo2_core.normal(20_000, seed=1, step=2, param=3, backend="native")
    assert (got != expected).sum() <= 2


def test_nearly_every_instruction_was_executed(kernels: CudaKernels | TritonKernels) -> None:
    """By the tests above. What is left are values that noise does not have, codes whose value is NaN beside others of
    an octet whose scale they share, and rare values at one place of an octet."""
    # The decoding kernels of CUDA read a field of any kind at any place, and formats have few of these.
    executed = {name: counts for name, counts in kernels.executed().items() if "decode_kernelIL" not in name}
    if not all(here for here, _ in executed.values()):
        pytest.skip("not all tests of this file ran before")
    assert sum(here for here, _ in executed.values()) > 0.97 * sum(whole for _, whole in executed.values()), executed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvcc", "triton"])
def test_thousands_of_visits(request: pytest.FixtureRequest, name: str) -> None:
    kernels = request.getfixturevalue(name)
    num_bits = check_random_visits(kernels, range(1000, 2000), max_numel=1500)
    num_bits += check_simple_visits(kernels, range(100, 150))
    print(f"{name}: {sum(kernels.launches.values())} launches of {len(kernels.launches)} kernels, {num_bits} bits")
