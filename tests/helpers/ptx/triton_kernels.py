"""Triton's kernels compiled for sm_90 without a GPU, and launchers that run their PTX for `distzo2_core.triton_ops`.

python -m ptx.triton_kernels FOLDER     # compiles every variant that triton_ops launches, in a process of its own
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from kernel_cases import LOW_RANK
from packed_cases import FORMATS, make_case

from distzo2_core import FAMILIES, PackedSegment, PackedTable
from distzo2_core.packed import KINDS_OF
from distzo2_core.types import CODE_DTYPES

from .cuda_kernels import DeviceMemory
from .machine import Module, Program
from .memory import READ, WRITE
from .parser import PtxError

TILE = 1024  # as triton_ops has it
ARGUMENTS = {
    "materialize_kernel": ("weights", "out0", "out1", "segments", "ints", "floats"),
    "noise_kernel": ("out", "ints"),
    "embedding_kernel": ("table", "ids", "out", "ints", "floats"),
    "decode_kernel": ("stored", "out", "table", "levels", "gains"),
}
# Formats of packed_cases that are decoded, each to the dtype of this code: every kind of code and of field.
DECODED = {"q4_0": 1, "q5_k": 1, "q6_k": 2, "nvfp4, divided": 0, "e4m3, blocks": 1, "uint8": 0}
GAINED = ("q6_k", "nvfp4, divided", "uint8")  # of these, with gains
PROGRAMS = ((False, 1), (False, 2), (True, 0), (True, 1), (True, 2))  # write back, emits
PAIRS = ((0, 1), (1, 0), (2, 0))  # of a dtype's code and that of the emits, beside equal ones
STORED_PAIRS = ((3, 1), (4, 1), (5, 0), (5, 1))  # of codes and of nonnegative float32


def variants() -> list[tuple[str, dict[str, int]]]:
    """Every kernel with the constants that it is compiled for."""
    found = []
    same = tuple((code, code) for code in range(3))
    stored = [*itertools.product(same, (False, True)), *((pair, True) for pair in (*PAIRS, *STORED_PAIRS))]
    stored += [((code, code), False) for code in (3, 4, 5)]  # without emits
    for (codes, moved), (back, emits) in itertools.product(stored, PROGRAMS):
        if moved == (emits > 0) if max(codes) > 2 else emits or not moved:
            constants = {"CODE": codes[0], "OUT_CODE": codes[1], "MOVED": moved, "WRITE_BACK": back}
            more = {"NUM_EMITS": emits, "LOW_RANK": False, "ANCHORED": False, "TILE": TILE}
            found.append(("materialize_kernel", constants | more))
    # Of low rank some in bfloat16: Triton's interpreter runs all of them, and anchors (tests/core).
    same_place = {
        "CODE": 1,
        "OUT_CODE": 1,
        "MOVED": False,
        "NUM_EMITS": 2,
        "LOW_RANK": True,
        "TILE": TILE,
        "ANCHORED": False,
    }
    found += [("materialize_kernel", same_place | {"WRITE_BACK": back}) for back in (False, True)]
    for family in LOW_RANK:
        constants = {"FAMILY": FAMILIES[family], "CODE": 1, "TILE": TILE}
        found += [("noise_kernel", constants), ("embedding_kernel", constants | {"OUT_CODE": 1})]
    for family, (code, out_code) in itertools.product(range(2), (*same, *PAIRS)):
        constants = {"FAMILY": family, "CODE": code}
        found.append(("embedding_kernel", constants | {"OUT_CODE": out_code, "TILE": TILE}))
        if code == out_code:
            found.append(("noise_kernel", constants | {"TILE": TILE}))
    for name, code in DECODED.items():
        _, layout = make_case(np.random.default_rng(0), name, 2, FORMATS[name][1][0])
        layout = layout.with_gain() if name in GAINED else layout
        row = PackedTable([PackedSegment(layout, 0, CODE_DTYPES[code])]).tensor[0].tolist()
        constants = dict(zip((field.upper() for field in KINDS_OF), row[10::7], strict=True))
        found.append(
            ("decode_kernel", constants | {"DIVIDES": row[5], "LEVELS": row[7], "OUT_CODE": code, "TILE": TILE})
        )
    return found


def key_of(name: str, constants: dict[str, int]) -> str:
    return " ".join([name, *(f"{constant}={int(value)}" for constant, value in sorted(constants.items()))])


def compile_variant(name: str, constants: dict[str, int], aligned: bool) -> dict[str, str | int]:
    """PTX and bytes of shared memory. `aligned`: the pointers are multiples of 16, which Triton specializes for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distzo2_core import triton_kernels, triton_packed

    types = dict.fromkeys(("segments", "ints", "ids"), "*i64") | dict.fromkeys(("floats", "levels"), "*fp32")
    if name == "decode_kernel":
        types |= {"stored": "*u8", "gains": "*u8", "table": "*i64"}
    else:
        types |= dict.fromkeys(("weights", "table"), ("*i32", "*i16", "*i16", "*i8", "*i16", "*i32")[constants["CODE"]])
    emitted = "*i16" if constants.get("OUT_CODE", constants.get("CODE")) else "*i32"
    signature = {each: types.get(each, emitted) for each in ARGUMENTS[name]}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))} if aligned else {}
    source = ASTSource(
        getattr(triton_packed if name == "decode_kernel" else triton_kernels, name),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=attributes,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    return {"ptx": made.asm["ptx"], "shared": made.metadata.shared}


def compile_kernels(folder: Path) -> None:
    """Compile every variant into `folder`, in a process where Triton does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    subprocess.run([sys.executable, "-m", "ptx.triton_kernels", str(folder)], env=environment, check=True)


def read_kernels(folder: Path) -> dict[str, dict[str, str | int]]:
    """Every variant, from where they were compiled."""
    return json.loads((folder / "kernels.json").read_text())


class TritonKernels:
    """Stands for the kernels of `distzo2_core.triton_kernels`. Its attributes are those of `CudaKernels`."""

    def __init__(self, compiled: dict[str, dict[str, str | int]]) -> None:
        self.compiled = compiled
        self.launches: collections.Counter[str] = collections.Counter()
        self.instructions = 0
        self.shifts: Sequence[int] = (0,)

    def _program(self, key: str) -> Program:
        return Module(self.compiled[key]["ptx"])[key.split()[0]]

    def executed(self) -> dict[str, tuple[int, int]]:
        """Of each kernel the instructions that were executed in this process, and all."""
        return {key: self._program(key).coverage() for key in self.compiled}

    def launch(self, name: str, grid: tuple[int, ...], tensors: tuple[torch.Tensor, ...], constants: dict) -> None:
        """What `kernel[grid](*tensors, **constants)` does on a GPU."""
        if constants.pop("enable_fp_fusion") is not False:
            raise PtxError(f"{name} is launched with products and sums fused")
        key = key_of(name, constants)
        rights = dict.fromkeys(("out", "out0", "out1"), READ | WRITE)
        rights["weights"] = READ | WRITE if constants.get("WRITE_BACK") else READ
        named = zip(ARGUMENTS[name], tensors, strict=True)
        device = DeviceMemory([(tensor, rights.get(argument, READ)) for argument, tensor in named], self.shifts)
        program = self._program(key)
        scratch = (0,) * (len(program.kernel.params) - len(tensors))  # Triton's own, which these kernels do not use
        addresses = [device.address(tensor) for tensor in tensors]
        arguments = [address.to_bytes(8, "little") for address in (*addresses, *scratch)]
        shape = (*grid, 1, 1)[:3]
        threads = (program.kernel.max_threads, 1, 1)
        self.instructions += program.run(shape, threads, arguments, device.memory, self.compiled[key]["shared"])
        self.launches[key] += 1
        device.copy_back()

    def kernel(self, name: str) -> object:
        """An object that is launched as a kernel of Triton is."""
        kernels = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *tensors, **constants: kernels.launch(name, grid, tensors, constants)

        return Kernel()


if __name__ == "__main__":
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda *_, **__: b""  # ptxas is not needed
    found = {  # what is decoded, and where to, begins anywhere
        key_of(name, constants): compile_variant(name, constants, aligned=name != "decode_kernel")
        for name, constants in variants()
    }
    name, constants = variants()[0]
    same = compile_variant(name, constants, aligned=False) == found[key_of(name, constants)]
    assert same, "Triton has another kernel for pointers that are no multiples of 16: execute both"
    (Path(sys.argv[1]) / "kernels.json").write_text(json.dumps(found))
