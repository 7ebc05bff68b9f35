"""`distzo2 measure`: what this machine's links, disk, cores and GPUs do, in one JSON file and one table.

The file is what a plan of a run is made from. Units are in the names; rates are medians of interleaved repetitions.

    format       "distzo2-measure/2"
    versions     of distzo2, torch, python; "quick": the figures are rough
    machine      cpu, cores, threads, simd, memory and memlock (bytes; null: no limit), gpus: name, memory, PCIe link
    copies       a row a device: "up", "down", "both", each {engine_bytes_per_s, raw_bytes_per_s}; "both" counts the
                 bytes of both directions together; "cpu" is memory to memory
    disk         directory, file system, direct; "read", "write", "both" as above; fsync_s, of one appended line
    noise        rows: device, backend, what (normal, rademacher, perturb_bfloat16), threads, elements_per_s
    matmul       rows: device, dtype, size (of square matrices), threads, flop_per_s
    forward      rows: device, what (product, attention, stream, softmax), dtype, size, threads, seconds
    visits       rows: device, backend, what (visit, update, pair, single), family, dtype, threads, elements_per_s
    steps        rows: device, dtype, rows, tokens, threads, compute_s, noise_s: of a small model, see measure_step
    host         rows: device; visit_s, lane_s, materialize_s, op_s, step_s: the host's time, see measure_forward
    gather       backend, ranks, block_bytes, bytes_per_s (of the whole block, at the slowest rank); null: not measured
    findings     rows: code, text: what is below what it should be
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import distzo2
from distzo2.errors import DistZO2Error, UsageError
from distzo2.planning.machines import (
    Finding,
    Link,
    check_engine,
    check_file_system,
    check_governor,
    check_kernels,
    check_link,
    check_memlock,
    check_node,
    check_threads,
    cpu_model,
    file_system,
    simd_level,
)
from distzo2.planning.measure_compute import measure_matmul, measure_noise
from distzo2.planning.measure_forward import measure_forward, measure_host, measure_visits
from distzo2.planning.measure_gather import measure_gather
from distzo2.planning.measure_step import measure_step
from distzo2.planning.measure_timing import Effort
from distzo2.planning.transfers import DIRECTIONS, MIB, link_under_load, measure_copies, measure_disk
from distzo2.text import gib
from distzo2_core import build_info, require_extension

FORMAT = "distzo2-measure/2"
DISK_NAMES = {"read": "read", "write": "write", "both": "both at once"}


def default_path() -> Path:
    """Where measurements are kept unless told otherwise: the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distzo2" / "measure.json"


def measure(
    directory: str | os.PathLike, quick: bool = False, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measures everything (see the module for the result).

    Args:
        directory: one on the disk to measure.
        quick: a few seconds, and rough figures.
        log: is told what is measured now.

    Raises:
        UsageError: the directory is not there or not writable.
        DistZO2Error: memory or disk space is short. BackendError: the extension was not built.
    """
    budget = require_extension("distzo2 measure").memory_budget()
    effort, start = Effort(quick), time.perf_counter()
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    cpus = os.sched_getaffinity(0)
    findings: list[Finding] = []
    result: dict[str, Any] = {
        "format": FORMAT,
        "versions": {"distzo2": distzo2.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "quick": quick,
        "machine": _machine(budget),
    }

    log("disk")  # first, since its directory may be wrong
    result["disk"] = {**measure_disk(directory, effort), "file_system": (kind := file_system(directory))}
    findings += check_file_system(directory, kind)
    if not result["disk"]["direct"]:
        findings.append(Finding("no_direct_io", f"{directory}: the file system refuses O_DIRECT: reads fill its cache"))
    for name, text in DISK_NAMES.items():
        findings += _check(f"disk, {text}", result["disk"][name], quick)

    result["copies"] = []
    for device in gpus or [torch.device("cpu")]:
        log(f"copies, {device}")
        row = measure_copies(device, effort)
        result["copies"].append(row)
        for direction in DIRECTIONS:
            findings += _check(f"{device} {direction}", row[direction], quick)
    for device in gpus:
        gpu = _gpu(device)
        result["machine"]["gpus"].append(gpu)
        if gpu["pci_address"]:
            link = link_under_load(device, gpu["pci_address"])
            gpu |= _link_fields(link)
            findings += check_link(str(device), link) + check_node(str(device), link, cpus)

    log("noise and matrix products")
    devices = [torch.device("cpu"), *gpus]
    result["noise"] = [row for device in devices for row in measure_noise(device, effort)]
    result["matmul"] = [row for device in devices for row in measure_matmul(device, effort)]
    result |= measure_rates(effort, gpus, log)

    log("gather")
    result["gather"], found = _gather(len(gpus), effort)
    findings += found

    level = result["machine"]["simd"]
    findings += check_kernels(True, level)
    if gpus:
        findings += check_memlock(budget["memlock_bytes"], budget["allowed_bytes"] or 0)
        if not build_info()["cuda"]:
            findings.append(Finding("no_cuda_kernels", "the CUDA kernels were not compiled: GPUs use Triton's"))
    findings += check_governor() + check_threads(torch.get_num_threads(), cpus, os.cpu_count() or 1)
    result["findings"] = [finding.to_json() for finding in findings]
    result["seconds"] = time.perf_counter() - start
    return result


def measure_rates(
    effort: Effort, gpus: Sequence[torch.device] = (), log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """What a forward, a visit and the hand-over of lanes take on the CPU and on each GPU."""
    effort = Effort(effort.quick, brief=True)
    devices = [torch.device("cpu"), *gpus]
    log("forward")
    forward = [row for device in devices for row in measure_forward(device, effort)]
    log("visits and lanes")
    visits = [row for device in devices for row in measure_visits(device, effort)]
    host = [measure_host(device, effort) for device in devices]
    log("steps")
    steps = [row for device in devices for row in measure_step(device, effort)]
    return {"forward": forward, "visits": visits, "host": host, "steps": steps}


def _check(what: str, rates: dict[str, float], quick: bool) -> list[Finding]:
    """Rough figures, of blocks too small for an engine, are not judged."""
    return [] if quick else check_engine(what, rates["engine_bytes_per_s"], rates["raw_bytes_per_s"])


def _gather(num_gpus: int, effort: Effort) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Between all GPUs, or between two processes where there is none; one GPU has nobody to share with."""
    if num_gpus == 1:
        return None, []
    backend, num_ranks = ("nccl", num_gpus) if num_gpus else ("gloo", 2)
    block_bytes = effort.pick(1, 256 if num_gpus else 64) * MIB
    try:
        return measure_gather(backend, num_ranks, block_bytes, effort.pick(2, 10)), []
    except DistZO2Error as error:
        return None, [Finding("gather", str(error))]


def _machine(budget: dict[str, Any]) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "allowed_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "simd": simd_level(build_info().get("simd", ()), os.environ),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "allowed_bytes": budget["allowed_bytes"],
        "memlock_bytes": budget["memlock_bytes"],
        "gpus": [],
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "pci_address": _pci_address(device, properties),
    }


def _pci_address(device: torch.device, properties: Any) -> str | None:
    """As /sys names it, such as 0000:01:00.0."""
    with suppress(AttributeError):  # a torch that does not tell
        domain, bus, slot = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
        return f"{domain:04x}:{bus:02x}:{slot:02x}.0"
    command = ["nvidia-smi", f"--id={device.index}", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:]}:{rest}" if rest else None


def _link_fields(link: Link) -> dict[str, Any]:
    return {
        "pcie_width": link.width,
        "pcie_width_max": link.width_max,
        "pcie_gt_per_s": link.speed,
        "pcie_gt_per_s_max": link.speed_max,
        "numa_node": link.numa_node,
    }


def save(result: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes the JSON file, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    machine = result["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    lines = [
        f"{machine['cpu'] or platform.machine()}, {machine['allowed_cores']} cores, {machine['threads']} threads, "
        f"{machine['simd']}, {gib(machine['memory_bytes'])}; {gpus}",
        "",
        f"{'GB/s':<34}{'engine':>9}{'raw':>9}{'ratio':>8}",
    ]
    disk = result["disk"]
    names = {"up": "upload", "down": "download", "both": "both at once"}
    rates = [(f"{row['device']} {names[d]}", row[d]) for row in result["copies"] for d in DIRECTIONS]
    how = "" if disk["direct"] else ", no O_DIRECT"
    rates += [(f"disk {text} ({disk['file_system'] or 'unknown'}{how})", disk[d]) for d, text in DISK_NAMES.items()]
    for name, rate in rates:
        engine, raw = rate["engine_bytes_per_s"], rate["raw_bytes_per_s"]
        lines.append(f"{name:<34}{engine / 1e9:>9.2f}{raw / 1e9:>9.2f}{engine / raw:>8.2f}")
    if result["gather"] is not None:
        gather = result["gather"]
        name = f"gather, {gather['ranks']} ranks ({gather['backend']})"
        lines.append(f"{name:<34}{gather['bytes_per_s'] / 1e9:>9.2f}")
    lines += [f"{'disk, until a line is durable':<34}{1e3 * disk['fsync_s']:>9.2f} ms", ""]
    lines.append(f"{'noise, G elements/s':<34}{'normals':>9}{'signs':>9}{'perturb bf16':>14}")
    groups: dict[str, dict[str, float]] = {}
    for row in result["noise"]:
        threads = (
            "" if row["threads"] is None else f", {row['threads']} threads" if row["threads"] > 1 else ", 1 thread"
        )
        groups.setdefault(f"{row['device']} {row['backend']}{threads}", {})[row["what"]] = row["elements_per_s"] / 1e9
    for name, values in groups.items():
        normal, signs, perturb = values["normal"], values["rademacher"], values["perturb_bfloat16"]
        lines.append(f"{name:<34}{normal:>9.3f}{signs:>9.3f}{perturb:>14.3f}")
    lines += ["", f"{'matrix products':<34}{'TFLOP/s':>9}{'size':>9}"]
    for row in result["matmul"]:
        lines.append(f"{row['device'] + ' ' + row['dtype']:<34}{row['flop_per_s'] / 1e12:>9.3f}{row['size']:>9}")
    if result["findings"]:
        lines += ["", "below what it should be:"] + [f"  {finding['text']}" for finding in result["findings"]]
    return lines


def run_measure(options: Namespace, log: Callable[[str], None]) -> int:
    """The command: measures, prints the table, saves the file."""
    path = Path(options.json) if options.json else default_path()
    if options.json and not path.absolute().parent.is_dir():
        raise UsageError(f"--json {options.json}: its directory is not there")
    width = shutil.get_terminal_size().columns
    result = measure(options.directory, options.quick, lambda line: _progress(f"measuring: {line}", width))
    _progress("", width)
    for line in table(result):
        log(line)
    if not options.json:
        path.parent.mkdir(parents=True, exist_ok=True)
    save(result, path)
    log(f"\nwrote {path} in {result['seconds']:.0f} s")
    return 0


def _progress(text: str, width: int) -> None:
    """What is measured now, on a line of a terminal that the next one takes the place of."""
    import sys

    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
