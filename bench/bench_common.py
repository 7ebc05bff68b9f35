"""What the benches share: a description of the machine, interleaved timing, and the JSON file of results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

import distzo2_core

RESULTS = Path(__file__).parent / "results"

HASHES = 2**17  # some 70 ms on one core: far longer than idle threads of OpenMP spin

Key = TypeVar("Key", bound=Hashable)
_hashers = ThreadPoolExecutor()


def machine() -> dict[str, Any]:
    """CPU, caches, cores, GPU, its clock and software of this process."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    info: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "cache": _largest_cache(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "build": distzo2_core.build_info(),
        "simd": os.environ.get("DISTZO2_SIMD", "the best there is"),
        "commit": _commit(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["gpu_capability"] = list(torch.cuda.get_device_capability())
        info["gpu_multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
        info["gpu_max_clock_mhz"] = _max_clock_mhz()
        info["cuda"] = torch.version.cuda
    return info


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _largest_cache() -> str | None:
    """The size of the first core's last cache, as Linux writes it ("32768K")."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else None


def _max_clock_mhz() -> float | None:
    """The highest clock of the first GPU's multiprocessors; None where neither torch nor the driver's tool tells it."""
    rate = getattr(torch.cuda.get_device_properties(0), "clock_rate", None)  # kHz
    if rate:
        return rate / 1e3
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def synchronize(device: str) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def hash_in_registers() -> None:
    """HASHES iterations of SHA-256 on a block of its own, dealt to as many threads as torch has.

    No memory is touched: what this gains by threads is what the machine's cores can gain.
    """
    threads = torch.get_num_threads()
    share = lambda _: hashlib.pbkdf2_hmac("sha256", b"", b"", HASHES // threads)  # noqa: E731
    others = [_hashers.submit(share, thread) for thread in range(1, threads)]
    share(0)
    for other in others:
        other.result()


def interleaved_seconds(
    contenders: Mapping[Key, Callable[[], object]],
    device: str,
    rounds: int,
    min_seconds: float = 0.02,
    prepare: Callable[[Key], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, dict[str, float]]:
    """Seconds a call of each contender, measured in turn so that all see the same state of the machine.

    Each round times one batch of calls per contender, long enough for min_seconds; on CUDA it is timed by events.
    `prepare` is called before each batch, untimed, with the contender's key. `clock` is of wall time, or of a thread's
    own, which leaves out what other work on the machine takes.

    Returns:
        For each key the "median" over the rounds, and their "min" and "max".
    """
    calls: dict[Key, int] = {}
    for key, call in contenders.items():
        if prepare is not None:
            prepare(key)
        call()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        once = time.perf_counter() - start
        calls[key] = max(1, min(1000, round(min_seconds / max(once, 1e-7))))
    samples: dict[Key, list[float]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, call in contenders.items():
            if prepare is not None:
                prepare(key)
            samples[key].append(_batch_seconds(call, calls[key], device, clock) / calls[key])
    return {
        key: {"median": statistics.median(times), "min": min(times), "max": max(times)}
        for key, times in samples.items()
    }


def _batch_seconds(call: Callable[[], object], num_calls: int, device: str, clock: Callable[[], float]) -> float:
    if not device.startswith("cuda"):
        start = clock()
        for _ in range(num_calls):
            call()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def write_results(path: Path | None, name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write {"bench", "machine", "rows", **more} to `path`, by default bench/results/NAME-<GPU or CPU>.json."""
    info = machine()
    if path is None:
        slug = re.sub(r"[^a-z0-9]+", "-", (info["gpu"] or info["cpu"] or "cpu").lower()).strip("-")
        path = RESULTS / f"{name}-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": name, "machine": info, "rows": rows, **more}) + "\n")
    print(f"wrote {path}")
    return path
