"""The kernels, compiled once a session, for all of its workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ptx import cuda_kernels, triton_kernels
from ptx.cuda_kernels import CudaKernels
from ptx.machine import Module
from ptx.triton_kernels import TritonKernels


def compiled_into(factory: pytest.TempPathFactory, name: str, compile_kernels: Callable[[Path], None]) -> Path:
    """The folder that `compile_kernels` has filled, in this worker or in another one of the session."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            compile_kernels(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """The host library, and PTX by architecture."""
    if cuda_kernels.find_nvcc() is None:
        pytest.skip("no nvcc: `make cuda` gets one")
    return cuda_kernels.read_kernels(compiled_into(tmp_path_factory, "cuda", cuda_kernels.compile_kernels))


@pytest.fixture
def nvcc(compiled: tuple[Path, dict[int, str]]) -> CudaKernels:
    library, ptx = compiled
    return CudaKernels(library, Module(ptx[90]))


@pytest.fixture(scope="session")
def compiled_triton(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str | int]]:
    pytest.importorskip("triton", reason="no triton for this platform")
    return triton_kernels.read_kernels(compiled_into(tmp_path_factory, "triton", triton_kernels.compile_kernels))


@pytest.fixture
def triton(compiled_triton: dict[str, dict[str, str | int]]) -> TritonKernels:
    return TritonKernels(compiled_triton)
