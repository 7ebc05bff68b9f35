"""Normals of a device beside those of this CPU's native kernel: every bit of 2^30.

    python bench/check_normals.py                                             # a GPU's backends
    python bench/check_normals.py --device cpu --backends reference --log2 18

Both make the same chunk, the CPU with all its cores; the chunks are compared as integers on the device. A normal ends
in a square root that is exact only where the hardware's rsqrt behaves as on the GPUs seen so far; among 2^30 normals
some hundred meet the inputs where another would show.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from bench_common import synchronize, write_results

import distzo2_core

PLACE = {"seed": 2**63 + 5, "step": 11, "param": 7}
CHUNK = 2**26
SHOWN = 5  # differing elements


def compare(backend: str, family: str, total: int, device: str) -> dict:
    """A row: how many of the first `total` elements differ, and seconds of each side."""
    make = getattr(distzo2_core, family)
    chunk = min(CHUNK, total)
    here, there = torch.empty(chunk), torch.empty(chunk, device=device)
    differing, seconds = 0, {"device": 0.0, "cpu": 0.0}
    for offset in range(0, total, chunk):
        there.fill_(float("nan"))
        synchronize(device)
        start = time.perf_counter()
        make(chunk, **PLACE, offset=offset, out=there, backend=backend)
        synchronize(device)
        between = time.perf_counter()
        make(chunk, **PLACE, offset=offset, out=here, backend="native")
        seconds["cpu"] += time.perf_counter() - between
        seconds["device"] += between - start
        expected = here.to(device)
        wrong = (there.view(torch.int32) != expected.view(torch.int32)).nonzero()[:, 0]
        for at in wrong[: max(0, SHOWN - differing)].tolist():
            got, other = (
                f"{float(x[at]):.9g} ({int(x[at].view(torch.int32)) & 0xFFFFFFFF:#010x})" for x in (there, here)
            )
            print(f"  element {offset + at}: {got} on {device} by {backend}, {other} on the CPU")
        differing += wrong.numel()
    name = f"{family} of {backend} on {device}, 2^{total.bit_length() - 1}"
    print(f"{name}: {differing} differ; {seconds['device']:.2f} s, the CPU {seconds['cpu']:.2f} s", flush=True)
    return {
        "family": family,
        "backend": backend,
        "device": device,
        "numel": total,
        "differ": differing,
        "seconds": seconds,
    }


def main() -> None:
    """Parse the options, compare, write the JSON; status 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", help="of the device, comma-separated (default: native and triton)")
    parser.add_argument("--log2", type=int, default=30, help="2^N elements of each family")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    backends = options.backends or "native,triton"
    rows = [
        compare(backend, family, 2**options.log2, options.device)
        for backend in backends.split(",")
        for family in ("normal", "rademacher")
    ]
    write_results(options.json, "normals", rows)
    if any(row["differ"] for row in rows):
        raise SystemExit("error: bits differ")


if __name__ == "__main__":
    main()
