"""Triton kernels: bit-equal to the reference on a GPU, or in Triton's interpreter; and what they compile to."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernel_cases import (
    CODES,
    DTYPES,
    INTERPRETED,
    anchored_visit,
    check_in_place,
    check_low_rank,
    check_noise,
    check_visit,
    low_rank_visit,
    needs_triton,
    random_visit,
)

import distzo2_core

DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    needs_triton,
    *(() if INTERPRETED else (pytest.mark.cuda,)),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, in the interpreter, of infinities
]


def test_noise() -> None:
    check_noise("triton", DEVICE, numels=(1100,) if INTERPRETED else (1, 5, 1024, 100_000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    for numel in (1, 1100):
        check_in_place(rng, "triton", dtype, numel, DEVICE)


@pytest.mark.parametrize("seed", range(6 if INTERPRETED else 200))
def test_materialize(seed: int) -> None:
    for dtypes in (DTYPES, (*DTYPES, *CODES)):
        rng = np.random.default_rng(seed)
        visit = random_visit(rng, dtypes, max_numel=1500 if INTERPRETED else 5000, nonnegative=dtypes != DTYPES)
        check_visit(anchored_visit(rng, visit) if seed % 2 else visit, "triton", DEVICE)
        if dtypes == DTYPES or not INTERPRETED:
            check_visit(low_rank_visit(rng, visit), "triton", DEVICE)


def test_low_rank() -> None:
    check_low_rank("triton", DEVICE, numels=(1100,) if INTERPRETED else (1, 700, 2000))


def test_a_table_serves_many_visits() -> None:
    visit = random_visit(np.random.default_rng(77), DTYPES, max_numel=300)
    check_visit(visit, "triton", DEVICE)
    check_visit(visit._replace(seed=1), "triton", DEVICE)


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels run here")
def test_compiled_arithmetic_is_ieee(tmp_path) -> None:
    """The kernels compile without a GPU, in a process without the interpreter, to IEEE operations only."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def check_ptx() -> None:
    """PTX of sm_80 and sm_90: all rounds to nearest, nothing flushes subnormals, no approximation; and the refusals."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distzo2_core import triton_kernels

    for capability, code, out_code in ((80, 1, 1), (90, 0, 1)):  # tests/ptx executes all of sm_90
        constants = {"CODE": code, "OUT_CODE": out_code, "MOVED": code != out_code}
        constants |= {"WRITE_BACK": True, "NUM_EMITS": 2, "LOW_RANK": True, "ANCHORED": True, "TILE": 1024}
        signature = {"weights": "*i16" if code else "*i32"}
        signature |= dict.fromkeys(("out0", "out1"), "*i16" if out_code else "*i32")
        signature |= {"segments": "*i64", "ints": "*i64", "floats": "*fp32"} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(triton_kernels.materialize_kernel, signature=signature, constexprs=constants)
        target = GPUTarget("cuda", capability, 32)
        ptx = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
        names = set(re.findall(r"^\s*(?:@!?%\w+\s+)?((?:\w+\.)+f(?:16|32|64)(?:\.\w+)*)\s", ptx, flags=re.MULTILINE))
        conversions = {name for name in names if name.startswith("cvt.")}
        arithmetic = {name for name in names - conversions if name.split(".")[0] not in ("mov", "setp", "selp")}
        assert {"fma.rn.f32", "mul.rn.f32", "sqrt.rn.f32"} <= arithmetic, arithmetic
        rounding = {name for name in arithmetic if name not in ("neg.f32", "abs.f32")}
        assert rounding <= {"fma.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32", "sqrt.rn.f32"}, rounding
        assert conversions <= {"cvt.rn.f32.u32", "cvt.rn.f32.s32", "cvt.f32.f16", "cvt.rzi.s32.f32"}, conversions
        assert "ftz" not in ptx and "approx" not in ptx

    with pytest.raises(distzo2_core.BackendError, match="'triton' cannot run: it runs on cuda tensors"):
        distzo2_core.normal(4, seed=0, step=0, param=0, backend="triton")


if __name__ == "__main__":
    check_ptx()
