"""The compiled CUDA kernels as a backend: the host code of csrc/kernels/cuda runs over a fake CUDA runtime, and what it
launches runs from its PTX. CPU tensors stand for device tensors: they are copied into the memory of the machine, at an
address of the same residue, and back."""

from __future__ import annotations

import collections
import ctypes
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distzo2_core.types import DTYPE_CODES

from .machine import Module
from .memory import GAP, READ, WRITE, Memory
from .parser import PtxError

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ("materialize", "decode")  # files of csrc/kernels/cuda
SOURCES = (
    *(f"csrc/kernels/cuda/{name}.cu" for name in KERNELS),
    "csrc/kernels/check_tables.cpp",
    "tests/helpers/ptx/fake_cudart.cpp",
)
ARCHS = (80, 90)
LIBRARY = "kernels.so"
BASE = 0x7F32_1000_0000  # of device memory: addresses need more than 32 bits
ALIGNMENT = 64  # of what torch allocates: an address keeps its residue
STREAM = 0x51


def find_nvcc() -> str | None:
    """The compiler that the build uses: of CUDACXX, the path, a toolkit, or `make cuda`."""
    installed = ["/usr/local/cuda/bin/nvcc", str(ROOT / "build/nvcc/nvidia/cu13/bin/nvcc")]
    found = (shutil.which(name) for name in (os.environ.get("CUDACXX"), "nvcc", *installed) if name)
    return next(filter(None, found), None)


def build_flags() -> list[str]:
    """nvcc's flags as the build has them."""
    text = (ROOT / "cmake" / "Distzo2Cuda.cmake").read_text()
    flags = re.search(r"COMPILE_LANGUAGE:CUDA>:(.*?),-fmacro-prefix-map", text).group(1).split(";")
    return [*flags, re.search(r'CMAKE_CUDA_FLAGS_RELEASE "(.*)"', text).group(1)]


def compile_kernels(folder: Path) -> None:
    """Compile the host library and the PTX of all kernels for each architecture into `folder`."""
    targets = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
    command = [
        find_nvcc(),
        "-shared",
        "-cudart=none",
        "-Xcompiler=-fPIC",
        *build_flags(),
        *targets,
        f"-I{ROOT / 'csrc'}",
        "-t2",
    ]
    command += ["--keep", f"--keep-dir={folder}", "-o", str(folder / LIBRARY)]
    subprocess.run([*command, *(str(ROOT / source) for source in SOURCES)], check=True, cwd=folder)


def read_kernels(folder: Path) -> tuple[Path, dict[int, str]]:
    """The host library, and the PTX of all kernels for each architecture, from where they were compiled."""
    texts = {arch: [(folder / f"{name}.compute_{arch}.ptx").read_text() for name in KERNELS] for arch in ARCHS}
    return folder / LIBRARY, {arch: "\n".join(each) for arch, each in texts.items()}


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct of types.h from its fields in order, each a name and the letter of its type."""
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_float, "b": ctypes.c_bool}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kinds[kind]) for field, kind in pairs]})


MATERIALIZE = structure(
    "Materialize",
    "weights:p num_bytes:i out_bytes:i segments:p num_segments:i seed:u terms:p coefs:p num_terms:i updates:p "
    "update_groups:p num_updates:i num_groups:i emits:p emit_scales:p num_emits:i outs:p write_back:b",
)
IN_PLACE = structure("InPlace", "data:p dtype:i numel:i seed:u family:i step:i param:i probe:i offset:i rows:i cols:i")
LOOKUP = structure(
    "Lookup",
    "table:p out:p ids:p num_ids:i num_rows:i cols:i dtype:i scale:f seed:u family:i step:i param:i probe:i offset:i "
    "out_dtype:i",
)
DECODE = structure(
    "Decode", "stored:p num_bytes:i out:p out_bytes:i matrices:p levels:p num_matrices:i gains:p gain_bytes:i"
)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class DeviceMemory:
    """Copies of tensors in the machine's memory; a tensor that is given twice is there once.

    Args:
        tensors: each with its rights.
        shifts: bytes that the addresses move by, in turn, against the residue that the tensor has on the host.
        extra: bytes that workspaces may take.
    """

    def __init__(self, tensors: list[tuple[torch.Tensor, int]], shifts: Sequence[int] = (0,), extra: int = 0) -> None:
        self.memory = Memory(BASE, extra + sum(tensor.nbytes + 3 * GAP for tensor, _ in tensors))
        self.addresses: dict[tuple[int, int], int] = {}
        self.written: list[torch.Tensor] = []
        for tensor, rights in sorted(tensors, key=lambda pair: -pair[1]):  # what is also written comes first
            key = (tensor.data_ptr(), tensor.nbytes)
            if key not in self.addresses and tensor.nbytes:
                data = bytes_of(tensor)
                shift = 0 if tensor.dtype == torch.int64 else shifts[len(self.addresses) % len(shifts)]  # tables stay
                residue = tensor.data_ptr() % ALIGNMENT + shift
                self.addresses[key] = self.memory.place(data, rights, residue)
                if rights & WRITE:
                    self.written.append(tensor)
        if any(begin + num > following for (begin, num), (following, _) in itertools.pairwise(sorted(self.addresses))):
            raise PtxError("tensors that overlap and are not the same bytes")

    def address(self, tensor: torch.Tensor) -> int:
        return self.addresses.get((tensor.data_ptr(), tensor.nbytes), 0)

    def copy_back(self) -> None:
        for tensor in self.written:
            bytes_of(tensor)[:] = self.memory.read(self.address(tensor), tensor.nbytes)


class CudaKernels:
    """The raw ops of `torch.ops.distzo2` on CPU tensors, by the CUDA kernels' PTX.

    Attributes:
        module: the kernels; another one may be put in its place.
        shifts: as of `DeviceMemory`.
        launches: how often each kernel was launched.
        instructions: instructions of all threads since it was set to 0.
    """

    def __init__(self, library: Path, module: Module, device: int = 0) -> None:
        self.module, self.device, self.rsqrt_ulps = module, device, 0
        self.shifts: Sequence[int] = (0,)
        self.launches: collections.Counter[str] = collections.Counter()
        self.instructions = 0
        self._library = ctypes.CDLL(str(library))
        for name in ("materialize", "generate", "lookup", "perturb", "update", "decode"):
            getattr(self._library, f"run_{name}").restype = ctypes.c_char_p
        self._device_memory: DeviceMemory | None = None
        self._workspaces: dict[int, int] = {}
        self._error: BaseException | None = None
        self._callbacks = (  # kept: C has only their addresses
            ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p),
                             ctypes.c_uint64)(self._launch),
            ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(self._allocate),
            ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)(self._release),
        )  # fmt: skip

    def executed(self) -> dict[str, tuple[int, int]]:
        """Of each kernel the instructions that were executed in this process, and all."""
        return {name: self.module[name].coverage() for name in self.module.texts}

    # Called by the host code, through C: what goes wrong is raised when it has returned.

    @contextmanager
    def _kept(self, stream: int | None) -> Iterator[None]:
        try:
            if stream != STREAM:
                raise PtxError(f"stream {stream}, and the caller's is {STREAM}")
            yield
        except BaseException as error:
            self._error = self._error or error

    def _launch(self, name: bytes, sizes: Any, arguments: Any, stream: int) -> None:
        with self._kept(stream):
            if self._error is None:
                program = self.module[name.decode()]
                params = [size for size, _ in program.kernel.params.values()]
                data = [ctypes.string_at(arguments[i], size) for i, size in enumerate(params)]
                grid, block = tuple(sizes[0:3]), tuple(sizes[3:6])
                memory = self._device_memory.memory
                self.instructions += program.run(grid, block, data, memory, rsqrt_ulps=self.rsqrt_ulps)
                self.launches[name.decode()] += 1

    def _allocate(self, num_bytes: int, stream: int) -> int:
        address = 0
        with self._kept(stream):
            address = self._device_memory.memory.place(num_bytes, READ | WRITE)
            self._workspaces[address] = num_bytes
        return address

    def _release(self, address: int, stream: int) -> None:
        with self._kept(stream):
            self._device_memory.memory.release(address, self._workspaces.pop(address))

    def _call(
        self, name: str, tensors: list[tuple[torch.Tensor, int]], make: Callable[..., Any], *scalars: float
    ) -> None:
        """An entry of the host code on these tensors, the request being made of their addresses."""
        self._device_memory, self._error = DeviceMemory(tensors, self.shifts, extra=1 << 18), None
        self._library.set_callbacks((ctypes.c_void_p * 3)(*(ctypes.cast(c, ctypes.c_void_p) for c in self._callbacks)))
        request = make(self._device_memory.address)
        values = [ctypes.c_float(scalar) for scalar in scalars]
        failure = getattr(self._library, f"run_{name}")(
            ctypes.byref(request), *values, self.device, ctypes.c_void_p(STREAM)
        )
        if self._error is not None:
            raise self._error
        if failure is not None or self._workspaces:
            raise PtxError(failure.decode() if failure else f"workspaces are not freed: {self._workspaces}")
        self._device_memory.copy_back()

    # The ops.

    def materialize(
        self,
        weights: torch.Tensor,
        segments: torch.Tensor,
        seed: int,
        terms: torch.Tensor,
        coefs: torch.Tensor,
        updates: torch.Tensor,
        update_groups: torch.Tensor,
        emits: torch.Tensor,
        emit_scales: torch.Tensor,
        outs: list[torch.Tensor],
        write_back: bool,
    ) -> None:
        def make(address: Callable[[torch.Tensor], int]) -> ctypes.Structure:
            self._outs = (ctypes.c_void_p * max(1, len(outs)))(*(address(out) for out in outs))
            tables = [segments, len(segments), seed % 2**64, terms, coefs, len(terms), updates, update_groups]
            tables += [len(updates), update_groups.shape[1] if len(updates) else emit_scales.shape[1]]
            tables += [emits, emit_scales, len(emits)]
            values = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in tables]
            sizes = weights.nbytes, outs[0].nbytes if outs else 0
            return MATERIALIZE(address(weights), *sizes, *values, ctypes.addressof(self._outs), write_back)

        rights = READ | WRITE if write_back and len(updates) else READ
        self._call("materialize", [(weights, rights), *((out, READ | WRITE) for out in outs)], make)

    def _place(self, w: torch.Tensor, place: tuple[int, ...]) -> Callable[..., ctypes.Structure]:
        seed, step, param, probe, offset, family, *matrix = place
        fields = (DTYPE_CODES[w.dtype], w.numel(), seed % 2**64, family, step, param, probe, offset, *matrix)
        return lambda address: IN_PLACE(address(w), *fields)

    def noise_(self, out: torch.Tensor, *place: int) -> None:
        self._call("generate", [(out, WRITE)], self._place(out, place))

    def perturb_(self, w: torch.Tensor, scale: float, *place: int) -> None:
        self._call("perturb", [(w, READ | WRITE)], self._place(w, place), scale)

    def update_(self, w: torch.Tensor, lr: float, coef: float, weight_decay: float, *place: int) -> None:
        self._call("update", [(w, READ | WRITE)], self._place(w, place), lr, coef, weight_decay)

    def embedding(self, weight: torch.Tensor, ids: torch.Tensor, scale: float, *place: Any) -> torch.Tensor:
        seed, step, param, probe, offset, family, out_dtype = place
        (rows, cols), ids = weight.shape, ids.contiguous()
        out = torch.empty(*ids.shape, cols, dtype=out_dtype)
        shape = (ids.numel(), rows, cols, DTYPE_CODES[weight.dtype])
        noise = (scale, seed % 2**64, family, step, param, probe, offset, DTYPE_CODES[out_dtype])

        def make(address: Callable[[torch.Tensor], int]) -> ctypes.Structure:
            return LOOKUP(address(weight), address(out), address(ids), *shape, *noise)

        self._call("lookup", [(weight, READ), (ids, READ), (out, WRITE)], make)
        return out

    def decode(
        self,
        stored: torch.Tensor,
        matrices: torch.Tensor,
        levels: torch.Tensor,
        out: torch.Tensor,
        gains: torch.Tensor | None = None,
    ) -> None:
        gains = torch.empty(0, dtype=torch.uint8) if gains is None else gains

        def make(address: Callable[[torch.Tensor], int]) -> ctypes.Structure:
            buffers = address(stored), stored.nbytes, address(out), out.nbytes
            tables = matrices.data_ptr(), levels.data_ptr(), len(matrices)
            return DECODE(*buffers, *tables, address(gains), gains.nbytes)

        self._call("decode", [(stored, READ), (out, READ | WRITE), (gains, READ)], make)
