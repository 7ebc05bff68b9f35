"""The kernels, compiled once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx import cuda_kernels, triton_kernels
from ptx.cuda_kernels import CudaKernels
from ptx.machine import Module
from ptx.triton_kernels import TritonKernels


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """The host library, and PTX by architecture."""
    if cuda_kernels.find_nvcc() is None:
        pytest.skip("no nvcc: `make cuda` gets one")
    return cuda_kernels.compile_kernels(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def nvcc(compiled: tuple[Path, dict[int, str]]) -> CudaKernels:
    library, ptx = compiled
    return CudaKernels(library, Module(ptx[90]))


@pytest.fixture(scope="session")
def compiled_triton(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str | int]]:
    pytest.importorskip("triton", reason="no triton for this platform")
    return triton_kernels.compile_kernels(tmp_path_factory.mktemp("triton"))


@pytest.fixture
def triton(compiled_triton: dict[str, dict[str, str | int]]) -> TritonKernels:
    return TritonKernels(compiled_triton)
