"""What the benches share: a description of the machine, interleaved timing, and the JSON file of results."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import distzo2_core

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU, cores, GPU, driver and software of this process."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    info: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "build": distzo2_core.build_info(),
        "commit": _commit(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["gpu_capability"] = list(torch.cuda.get_device_capability())
        info["cuda"] = torch.version.cuda
    return info


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def synchronize(device: str) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]], device: str, rounds: int, min_seconds: float = 0.02
) -> dict[str, dict[str, float]]:
    """Seconds a call of each contender, measured in turn so that all see the same state of the machine.

    Each round times one batch of calls per contender, long enough for min_seconds; on CUDA it is timed by events.

    Returns:
        For each name the "median" over the rounds, and their "min" and "max".
    """
    calls: dict[str, int] = {}
    for name, call in contenders.items():
        call()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        once = time.perf_counter() - start
        calls[name] = max(1, min(1000, round(min_seconds / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(_batch_seconds(call, calls[name], device) / calls[name])
    return {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times)}
        for name, times in samples.items()
    }


def _batch_seconds(call: Callable[[], object], num_calls: int, device: str) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def write_results(path: Path | None, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write {"bench", "machine", "rows"} to `path`, by default bench/results/NAME-<GPU or CPU>.json."""
    info = machine()
    if path is None:
        slug = re.sub(r"[^a-z0-9]+", "-", (info["gpu"] or info["cpu"] or "cpu").lower()).strip("-")
        path = RESULTS / f"{name}-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": name, "machine": info, "rows": rows}) + "\n")
    print(f"wrote {path}")
    return path
