"""Normals a second on one core, for each instruction set that the CPU kernels have and this machine can run.

    python bench/bench_levels.py

The kernels choose their instruction set once in a process, so that each is measured in one of its own, forced by
DISTZO2_SIMD; torch.randn and NumPy's generator have one each. The processes measure in turn, one batch a round, while
the others wait. The buffer (1 MiB of float32) stays in the caches: this is the rate of the arithmetic.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import distzo2_core

NUMEL = 2**18
BATCH_SECONDS = 0.05
CHECKED = 4096
PLACE = {"seed": 2**63 + 5, "step": 11, "param": 7, "probe": 1}
BASELINES = ("torch.randn", "numpy")


def draw(what: str) -> Callable[[], object]:
    """A call that makes NUMEL normals; the kernels' first ones are compared with the reference, bit for bit."""
    if what == "torch.randn":
        return lambda: torch.randn(NUMEL)
    if what == "numpy":
        generator = np.random.default_rng(0)
        return lambda: generator.standard_normal(NUMEL, dtype=np.float32)
    got = distzo2_core.normal(NUMEL, backend="native", **PLACE)[:CHECKED]
    expected = distzo2_core.normal(CHECKED, backend="reference", **PLACE)
    if not torch.equal(got.view(torch.int32), expected.view(torch.int32)):
        raise AssertionError(f"normals of {what} differ from the reference's")
    return lambda: distzo2_core.normal(NUMEL, backend="native", **PLACE)


def serve(what: str) -> None:
    """In a process of its own: for each line that comes, time one batch and answer with the seconds of a call."""
    torch.set_num_threads(1)
    call = draw(what)
    call()
    start = time.perf_counter()
    call()
    num_calls = max(1, round(BATCH_SECONDS / (time.perf_counter() - start)))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        print((time.perf_counter() - start) / num_calls, flush=True)


def start_process(what: str) -> subprocess.Popen | None:
    """The process that measures `what`, ready; None where this processor has no such instructions."""
    environment = os.environ | ({} if what in BASELINES else {"DISTZO2_SIMD": what})
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", what],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() == "ready\n":
        return process
    error = process.communicate()[1].strip()
    if "DISTZO2_SIMD" not in error:  # refused for another reason than the processor
        raise RuntimeError(f"measuring {what} failed: {error}")
    return None


def normals_per_core(rounds: int) -> list[dict[str, Any]]:
    """A row for each instruction set and baseline: its name, seconds a call, 10^9 normals a second, ratio to torch."""
    processes = {what: start_process(what) for what in (*distzo2_core.build_info()["simd"], *BASELINES)}
    running = {what: process for what, process in processes.items() if process is not None}
    samples: dict[str, list[float]] = {what: [] for what in running}
    try:
        for _ in range(rounds):
            for what, process in running.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                samples[what].append(float(process.stdout.readline()))
    finally:
        for process in running.values():
            process.communicate()  # closes its input, which ends it
    torch_seconds = statistics.median(samples["torch.randn"])
    rows = []
    for what, times in samples.items():
        median = statistics.median(times)
        rows.append(
            {
                "what": what,
                "numel": NUMEL,
                "seconds": {"median": median, "min": min(times), "max": max(times)},
                "giga_normals_per_s": NUMEL / median / 1e9,
                "speedup_over_torch_randn": torch_seconds / median,
            }
        )
        print(
            f"one core  {what:12} {NUMEL / median / 1e9:6.3f} G normals/s {torch_seconds / median:6.2f}x torch.randn",
            flush=True,
        )
    for what in sorted(set(processes) - set(running)):
        print(f"one core  {what:12} not on this processor", flush=True)
    return rows


def main() -> None:
    """Parse the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; the median is reported")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    else:
        normals_per_core(options.rounds)


if __name__ == "__main__":
    main()
