"""Instructions that the kernels execute for an element, counted over all threads of whole, aligned octets; of decoding,
for a weight of the formats that Triton is compiled for here.

PYTHONPATH=.:tests/helpers python -m ptx.counts writes bench/results/ptx_counts.json, after a change on purpose.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from kernel_cases import DTYPES
from packed_cases import FORMATS, decoded, make_case

import distzo2_core

from . import cuda_kernels, triton_kernels
from .cases import FAMILIES, SHAPES, backend_of, simple_visit
from .cuda_kernels import CudaKernels
from .machine import Module
from .triton_kernels import TritonKernels

RECORD = cuda_kernels.ROOT / "bench" / "results" / "ptx_counts.json"
NUMEL = 16384
NAMES = ("perturb", "perturb ±", "update", "visit")  # of the first SHAPES


def compiler(kernels: CudaKernels | TritonKernels) -> str:
    """The release that compiled the kernels: another one's counts are others."""
    if isinstance(kernels, TritonKernels):
        import triton

        return f"triton {triton.__version__}"
    text = subprocess.run([cuda_kernels.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', text).group(1)}"


def count(kernels: CudaKernels | TritonKernels) -> dict[str, float]:
    """Instructions an element, by op, family of noise and dtype."""
    counts = {}

    def note(name: str, numel: int = NUMEL) -> None:
        counts[name] = round(kernels.instructions / numel, 3)

    with backend_of(kernels) as backend:
        for dtype in DTYPES:
            for code, family in enumerate(FAMILIES):
                end = f"{family} {str(dtype).removeprefix('torch.')}"
                kernels.instructions = 0
                getattr(distzo2_core, family)(NUMEL, seed=1, step=2, param=3, dtype=dtype, backend=backend)
                note(f"noise {end}")
                kernels.instructions = 0
                table, ids = torch.ones(9, 1024, dtype=dtype), torch.arange(8)
                distzo2_core.embedding(table, ids, 0.1, seed=1, step=2, param=3, family=family, backend=backend)
                note(f"lookup {end}", 8 * 1024)
                for name, shape in zip(NAMES, SHAPES, strict=False):
                    kernels.instructions = 0
                    visit = simple_visit(
                        np.random.default_rng(1), shape, code, (dtype,), [NUMEL], whole=True, plain=True
                    )
                    visit.run(backend, write_back=True)
                    note(f"{name} {end}")
        for name, code in triton_kernels.DECODED.items():
            rows, cols, gained = 4, FORMATS[name][1][-1], name in triton_kernels.GAINED
            data, layout = make_case(np.random.default_rng(0), name, rows, cols, usual=True)
            kernels.instructions = 0
            layout = layout.with_gain() if gained else layout
            decoded(data, layout, DTYPES[code], backend, torch.ones(rows * cols) if gained else None)
            note(f"decode {name} {str(DTYPES[code]).removeprefix('torch.')}{' with gains' * gained}", rows * cols)
    return counts


def main() -> None:
    """Compile, count, write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuda_kernels.compile_kernels(folder)
        triton_kernels.compile_kernels(folder)
        library, ptx = cuda_kernels.read_kernels(folder)
        every = [CudaKernels(library, Module(ptx[90])), TritonKernels(triton_kernels.read_kernels(folder))]
        record = {compiler(kernels): count(kernels) for kernels in every}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
