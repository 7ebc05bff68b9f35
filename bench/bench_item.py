"""How long `.item()` of a small tensor waits while blocks are written back, and how long a step's read of its losses.

    python bench/bench_item.py --json /tmp/item.json

A number on the device is read by `.item()` with nothing under way, while the copy engine writes blocks back, and while
torch copies as many bytes to memory pinned by torch on a stream of its own; each after the downloads are queued. A step
reads its losses by a kernel that stores them into pinned memory. On a CPU nothing is under way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from bench_common import synchronize, write_results
from bench_copy import MIB, stream_handle

import distzo2_core
from distzo2.optim.step_lanes import _read

NUM_BLOCKS = 4


def measure(device: str, mib: int, rounds: int) -> list[dict]:
    """Rows: seconds of `.item()`, and of the downloads from their start to their end."""
    cuda, nbytes = device.startswith("cuda"), mib * MIB
    place = "cuda:0" if cuda else "cpu"
    pool = distzo2_core.HostPool([nbytes] * NUM_BLOCKS, place, pin=cuda)
    slots = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(NUM_BLOCKS)]
    engine = distzo2_core.CopyEngine(place, pool, [slot.data_ptr() for slot in slots], nbytes)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
    stream, number = torch.cuda.Stream() if cuda else None, torch.ones(1, device=device)

    def download() -> None:
        for block in range(NUM_BLOCKS):
            engine.acquire(block, stream_handle(device))
            engine.release(block, stream_handle(device), dirty=True, version=0)

    def raw() -> None:
        if stream is not None:
            with torch.cuda.stream(stream):
                for slot in slots:
                    target.copy_(slot, non_blocking=True)

    for block in range(NUM_BLOCKS):  # present, so that nothing is uploaded below
        engine.acquire(block, stream_handle(device))
        engine.release(block, stream_handle(device), dirty=False, version=0)
    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "nothing": (lambda: None, lambda: None),
        "the engine's downloads": (download, engine.flush),
        "torch's downloads": (raw, lambda: synchronize(device)),
    }
    reads = {".item()": lambda: (number * 2).item(), "losses": lambda: _read([(number * 2).double()[0]])}
    rows = []
    for (name, (begin, finish)), (how, read) in product(ways.items(), reads.items()):
        items, spans = [], []
        for _ in range(rounds + 1):
            synchronize(device)
            start = time.perf_counter()
            begin()
            queued = time.perf_counter()
            read()
            items.append(time.perf_counter() - queued)
            finish()
            spans.append(time.perf_counter() - start)
        row = {"read": how, "beside": name, "item_s": statistics.median(items[1:]), "max_s": max(items[1:])}
        row |= {"downloads_s": statistics.median(spans[1:]), "num_bytes": nbytes * NUM_BLOCKS}
        print(f"{how} beside {name}: {row['item_s'] * 1e6:.0f} us (at most {row['max_s'] * 1e6:.0f}), "
              f"all {row['downloads_s'] * 1e3:.2f} ms", flush=True)  # fmt: skip
        rows.append(row)
    engine.close()
    pool.close()
    return rows


def main() -> None:
    """Parse the options, run, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mib", type=int, default=256, help=f"bytes of each of {NUM_BLOCKS} blocks, in MiB")
    parser.add_argument("--rounds", type=int, default=9, help="the median is reported")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    write_results(options.json, "item", measure(options.device, options.mib, options.rounds))


if __name__ == "__main__":
    main()
