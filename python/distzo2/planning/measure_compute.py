"""Rates of noise (on each backend that runs here) and of matrix products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import distzo2_core as core
from distzo2.planning.measure_timing import Effort, interleaved_seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MAX_MATRIX = 8192
_PLACE: dict[str, int] = {"seed": 1, "step": 2, "param": 3}


def synchronizer(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def backends_of(device: torch.device) -> list[str]:
    """The backends that are worth measuring: Triton's interpreter is for tests, the reference for want of another."""
    found = []
    for name in ("native", "triton"):
        if name == "triton" and (device.type == "cpu" or importlib.util.find_spec("triton") is None):
            continue
        try:
            found.append(core.resolve_backend(name, device))
        except core.BackendError:
            continue
    return found or (["reference"] if device.type == "cpu" else [])


def measure_noise(device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Normals, signs, and the perturbation of bf16 weights by normals, in elements/s; on a CPU with one thread and all.

    Normals and signs are made again and again in memory that the caches hold; the weights are as large as a block's.
    """
    all_threads = torch.get_num_threads()
    counts = sorted({1, all_threads}) if device.type == "cpu" else [None]
    rows = []
    for backend in backends_of(device):
        slow = backend == "reference"
        small = 1 << (16 if slow or effort.quick else 20 if device.type == "cpu" else 26)
        large = 1 << (16 if slow else 20 if effort.quick else 24 if device.type == "cpu" else 28)
        weights = torch.full((large,), 0.02, dtype=torch.bfloat16, device=device)
        runs: dict[str, tuple[int, Callable[[], Any]]] = {
            "normal": (small, lambda b=backend, n=small: core.normal(n, device=device, backend=b, **_PLACE)),
            "rademacher": (small, lambda b=backend, n=small: core.rademacher(n, device=device, backend=b, **_PLACE)),
            "perturb_bfloat16": (large, lambda b=backend, w=weights: core.perturb_(w, 1e-3, backend=b, **_PLACE)),
        }
        contenders = {(what, count): call for what, (_, call) in runs.items() for count in counts}

        def prepare(key: tuple[str, int | None], contenders: dict = contenders) -> None:
            if key[1] is not None:
                torch.set_num_threads(key[1])
                contenders[key]()  # starts the threads

        try:
            seconds = interleaved_seconds(contenders, effort, prepare=prepare, synchronize=synchronizer(device))
        finally:
            torch.set_num_threads(all_threads)
        for (what, count), value in seconds.items():
            row = {"device": str(device), "backend": backend, "what": what, "threads": count}
            rows.append({**row, "elements_per_s": runs[what][0] / value})
    return rows


@torch.no_grad()
def measure_matmul(device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Square products x·Wᵀ as a linear layer makes them, in flop/s, as large as a turn of 50 ms allows."""
    synchronize = synchronizer(device)
    contenders, sizes = {}, {}
    for name, dtype in DTYPES.items():
        size, seconds = 128, 0.0
        while seconds < effort.batch_s / 4 and size < _MAX_MATRIX:
            size *= 2
            x = torch.full((size, size), 0.01, dtype=dtype, device=device)
            w = torch.full((size, size), 0.01, dtype=dtype, device=device)
            probe = Effort(quick=True)
            seconds = interleaved_seconds({"": lambda x=x, w=w: F.linear(x, w)}, probe, synchronize=synchronize)[""]
        sizes[name], contenders[name] = size, lambda x=x, w=w: F.linear(x, w)
    seconds = interleaved_seconds(contenders, effort, synchronize=synchronize)
    return [
        {
            "device": str(device),
            "dtype": name,
            "size": sizes[name],
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "flop_per_s": 2 * sizes[name] ** 3 / value,
        }
        for name, value in seconds.items()
    ]
