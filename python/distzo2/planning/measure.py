"""`distzo2 measure`: what this machine's links, disk, cores and GPUs do, in one JSON file and one table.

A plan of a run is made from the file, whose keys `docs/measure.md` lists. Units are in the names; rates are medians.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import distzo2_core as core
from distzo2.checkpoint.packed_param import VALUE_DTYPES
from distzo2.errors import DistZO2Error
from distzo2.formats.packing import packed_as
from distzo2.planning.findings import (
    Finding,
    check_file_system,
    check_governor,
    check_link,
    check_memlock,
    check_node,
    check_threads,
    file_system,
    read_link,
)
from distzo2.planning.machines import MEASURED, default_path
from distzo2.planning.transfers import (
    DIRECTIONS,
    MIB,
    QUICK,
    Effort,
    measure_copies,
    measure_disk,
    measure_gather,
    seconds_of,
)
from distzo2.run.preflight import check_output
from distzo2.text import gib
from distzo2.version import __version__
from distzo2_core.types import dense_family

DECODED = {"nibbles": "affine4", "int8": "affine8", "int16": "affine16"}  # of the kinds of codes, what is measured


def measure(
    directory: str | os.PathLike, quick: bool = False, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measures everything; returns the content of the JSON file.

    Args:
        directory: one on the disk to measure.
        quick: takes a few seconds, and gives rough figures.
        log: called with what is measured next.

    Raises:
        UsageError: the directory is missing or not writable.
        DistZO2Error: memory or disk space is short. BackendError: the extension was not built.
    """
    budget = core.require_extension("distzo2 measure").memory_budget()
    effort, start = QUICK if quick else Effort(), time.perf_counter()
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    cpus = os.sched_getaffinity(0)
    machine, findings = _machine(budget), []
    result: dict[str, Any] = {
        "format": MEASURED,
        "versions": {"distzo2": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "quick": quick,
        "machine": machine,
    }

    log("disk")  # first, since its directory may be wrong
    kind = file_system(directory)
    disk = result["disk"] = {**measure_disk(directory, effort), "file_system": kind}
    findings += check_file_system(directory, kind)
    if not disk["direct"]:
        findings.append(Finding("no_direct_io", f"{directory}: the file system refuses O_DIRECT: reads fill its cache"))

    log("copies")
    result["copies"] = [measure_copies(device, effort) for device in gpus or [torch.device("cpu")]]
    for device in gpus:
        gpu = _gpu(device)
        machine["gpus"].append(gpu)
        where = f"{device} ({gpu['pci_address']})"
        findings += [*check_link(where, gpu), *check_node(where, gpu["numa_node"], cpus)]

    log("noise and matrix products")
    devices = [torch.device("cpu"), *gpus]
    result["noise"] = [row for device in devices for row in measure_noise(device, effort)]
    result["matmul"] = [row for device in devices for row in measure_matmul(device, effort)]
    result["memory"] = [measure_memory(device, effort) for device in devices]
    result["decode"] = [row for device in devices for row in measure_decode(device, effort)]

    log("gather")
    result["gather"] = None
    if len(gpus) != 1:  # one GPU has nobody to share with
        backend, ranks = ("nccl", len(gpus)) if gpus else ("gloo", 2)
        block_bytes = effort.pick(1, 256 if gpus else 64) * MIB
        try:
            result["gather"] = measure_gather(backend, ranks, block_bytes, effort.pick(2, 10))
        except DistZO2Error as error:
            findings.append(Finding("gather", str(error)))

    if machine["simd"] == "portable":
        findings.append(Finding("noise_portable", "the noise kernels run without vector instructions"))
    if gpus:
        findings += check_memlock(budget["memlock_bytes"], budget["allowed_bytes"] or 0)
        if any(row["backend"] == "triton" for row in result["noise"]):
            findings.append(Finding("no_cuda_kernels", "the CUDA kernels are not compiled or do not run: Triton's do"))
    findings += [*check_governor(), *check_threads(torch.get_num_threads(), cpus, os.cpu_count() or 1)]
    result["findings"] = [finding._asdict() for finding in findings]
    result["seconds"] = time.perf_counter() - start
    return result


def _machine(budget: Mapping[str, Any]) -> dict[str, Any]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    best = torch.backends.cpu.get_cpu_capability().lower()
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "allowed_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "simd": os.environ.get("DISTZO2_SIMD") or (best if best in core.build_info()["simd"] else "portable"),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "allowed_bytes": budget["allowed_bytes"],
        "memlock_bytes": budget["memlock_bytes"],
        "gpus": [],
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    """What a GPU is, and its link while it is in use: an idle one is slowed down to save power."""
    about = torch.cuda.get_device_properties(device)
    address = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
    names = {"device": str(device), "name": about.name, "memory_bytes": about.total_memory, "pci_address": address}
    host = torch.empty(64 * MIB, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=device)
    for _ in range(40):
        there.copy_(host, non_blocking=True)
    time.sleep(0.02)
    link = read_link(address)
    torch.cuda.synchronize(device)
    return names | link


# ---- rates of a device --------------------------------------------------------------------------------------------


def measure_noise(device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Noise of each family in elements/s, made again and again in memory that the caches hold."""
    numel = effort.pick(1 << 16, 1 << (20 if device.type == "cpu" else 26))
    backend, rows = core.resolve_backend(None, device), []
    for family in core.FAMILIES:
        kind = functools.partial(core.low_rank, (numel >> 8, 1 << 8), family=family)
        if family == dense_family(family):
            kind = functools.partial(getattr(core, family), numel)
        make = functools.partial(kind, seed=1, step=2, param=3, device=device, backend=backend)
        rate = numel / seconds_of(make, effort, device)
        rows.append({"device": str(device), "backend": backend, "family": family, "elements_per_s": rate})
    return rows


@torch.no_grad()
def measure_matmul(device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Square products x·Wᵀ as a linear layer makes them, in flop/s."""
    size = effort.pick(256, 1024 if device.type == "cpu" else 8192)
    rows = []
    for name in ("float32", "bfloat16"):  # random: bits that do not change take less power, which buys clock
        x, w = (torch.randn(size, size, dtype=getattr(torch, name), device=device) for _ in range(2))
        rate = 2 * size**3 / seconds_of(functools.partial(F.linear, x, w), effort, device)
        rows.append({"device": str(device), "dtype": name, "size": size, "flop_per_s": rate})
    return rows


def measure_memory(device: torch.device, effort: Effort) -> dict[str, Any]:
    """Bytes/s that an operation reads and writes, with operands that the caches do not hold."""
    num_bytes = effort.pick(2, 32 if device.type == "cpu" else 512) * MIB
    x = torch.randn(num_bytes // 4, device=device)
    add = functools.partial(torch.add, x, 1.0, out=torch.empty_like(x))
    return {"device": str(device), "bytes_per_s": 2 * num_bytes / seconds_of(add, effort, device)}


def measure_decode(device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Packed weights/s that are decoded, by the kind of codes, with operands that the caches do not hold."""
    shape, rows = (effort.pick(64, 4096 if device.type == "cpu" else 32768), 4096), []
    backend = core.resolve_backend(None, device)
    for codes, store in DECODED.items():
        packed = packed_as(shape, store)
        stored = torch.randint(256, (packed.num_bytes,), dtype=torch.uint8, device=device)
        for place in filter(None, (packed.layout.scale, packed.layout.min)):
            stored[place.offset :][: shape[0] * place.row_stride].view(VALUE_DTYPES[place.kind]).fill_(0.02)
        for dtype in (torch.float32, torch.bfloat16):
            table = core.PackedTable([core.PackedSegment(packed.layout, 0, dtype)])
            out = torch.empty(table.out_bytes, dtype=torch.uint8, device=device)
            rate = math.prod(shape) / seconds_of(functools.partial(core.decode, stored, table, out), effort, device)
            kind = {"codes": codes, "dtype": str(dtype).removeprefix("torch.")}
            rows.append({"device": str(device), "backend": backend, **kind, "weights_per_s": rate})
    return rows


# ---- what is written ----------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    machine, disk, gather = result["machine"], result["disk"], result["gather"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    lines = [
        f"{machine['cpu']}, {machine['allowed_cores']} cores, {machine['threads']} threads, "
        f"{machine['simd']}, {gib(machine['memory_bytes'])}; {gpus}",
        "",
        f"{'GB/s':<34}{'up, read':>12}{'down, write':>12}{'both':>12}",
    ]
    how = "" if disk["direct"] else ", no O_DIRECT"
    rates = [(f"{row['device']} copies", row) for row in result["copies"]]
    for name, row in [*rates, (f"disk ({disk['file_system'] or 'unknown'}{how})", disk)]:
        lines.append(f"{name:<34}" + "".join(f"{row[f'{d}_bytes_per_s'] / 1e9:>12.2f}" for d in DIRECTIONS))
    for name, rows, key, scale, unit in (
        ("gather, {ranks} ranks ({backend})", filter(None, [gather]), "bytes_per_s", 1e-9, ".2f"),
        ("{device} memory, read and written", result["memory"], "bytes_per_s", 1e-9, ".2f"),
        ("disk, until a line is durable", [disk], "fsync_s", 1e3, ".2f ms"),
        ("{device} {family} ({backend})", result["noise"], "elements_per_s", 1e-9, ".3f G elements/s"),
        ("{device} {codes} to {dtype} ({backend})", result["decode"], "weights_per_s", 1e-9, ".3f G weights/s decoded"),
        ("{device} {dtype} products, {size}", result["matmul"], "flop_per_s", 1e-12, ".3f TFLOP/s"),
    ):
        digits, _, word = unit.partition(" ")
        lines += [""] if key == "fsync_s" else []
        lines += [f"{name.format_map(row):<34}{scale * row[key]:>12{digits}} {word}".rstrip() for row in rows]
    if result["findings"]:
        lines += ["", "below what it should be:"] + [f"  {finding['text']}" for finding in result["findings"]]
    return lines


def run_measure(options: Any, log: Callable[[str], None]) -> int:
    """The command: measures, prints the table, saves the file. `options` has `directory`, `json` and `quick`."""
    check_output(json=options.json)
    path = Path(options.json) if options.json else default_path()
    result = measure(options.directory, options.quick, lambda what: _progress(f"measuring: {what}"))
    _progress("")
    log("\n".join(table(result)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    log(f"\nwrote {path} in {result['seconds']:.0f} s")
    return 0


def _progress(text: str) -> None:
    """Shows what is measured now, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
