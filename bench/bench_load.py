"""Loading a checkpoint into the pool or the block file, beside the disk's own rate on the same files.

    python bench/bench_load.py --checkpoint /big/disk/opt-1.3b    # a random one is made where there is none

Turns, interleaved, each with the files' pages dropped from the cache: `load` is what `from_pretrained` does once the
pool is there; `one read` fills the same pool with one read at a time; `fio` reads the files with O_DIRECT, 4 MiB, four
at a time; `threads` are plain preads of as many threads as `load` has into memory on huge pages, which nobody copies.
A last turn loads from the page cache. Memory is the process's peak (VmHWM) less what it was before the pool was made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from bench_common import write_results
from random_checkpoint import write_random_checkpoint

import distzo2
from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.reading import CHUNK_BYTES, NUM_THREADS
from distzo2.models.pretrained import fill, open_checkpoint
from distzo2.models.shapes import SHAPES
from distzo2.run.metrics import peak_bytes, resident_bytes
from distzo2_core import aligned_buffer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def drop_cache(files: list[Path]) -> None:
    """Takes the files' pages out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fio_seconds(files: list[Path], num_bytes: int) -> float:
    """By fio's own clock, as if it had read `num_bytes` (the files have headers besides)."""
    names = ":".join(str(path) for path in files)
    command = ["fio", "--name=bench", f"--filename={names}", "--rw=read", f"--bs={CHUNK_BYTES}", "--iodepth=4"]
    command += ["--ioengine=libaio", "--direct=1", "--invalidate=0", "--file_service_type=sequential"]
    command += ["--allow_file_create=0", "--output-format=json"]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        raise SystemExit(f"error: fio: {(out.stderr or out.stdout).strip()}")
    job = json.loads(out.stdout[out.stdout.index("{") :])["jobs"][0]["read"]
    if job["io_bytes"] < 0.95 * num_bytes:
        raise SystemExit(f"error: fio read {job['io_bytes']} bytes, {num_bytes} were expected")
    return num_bytes / job["bw_bytes"]


def raw_threads(files: list[Path]) -> None:
    """Every chunk of every file, once."""
    blocks = [aligned_buffer(CHUNK_BYTES).numpy() for _ in range(NUM_THREADS)]
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files]
    chunks = [(d, at) for d in descriptors for at in range(0, os.fstat(d).st_size, CHUNK_BYTES)]

    def read(thread: int) -> None:
        for descriptor, at in chunks[thread::NUM_THREADS]:
            os.preadv(descriptor, [blocks[thread]], at)

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(read, range(NUM_THREADS)))
    for descriptor in descriptors:
        os.close(descriptor)


def one_read_at_a_time(model: torch.nn.Module, checkpoint_map: CheckpointMap) -> None:
    runtime = distzo2.runtime_of(model)
    for unit in runtime.units:
        with runtime.access.writing(unit) as views:
            for name, view in views.items():
                checkpoint_map.read(name, view)


def bench(checkpoint: Path, weights: str, directory: Path, rounds: int) -> dict:
    """One row, in this process."""
    files = sorted(checkpoint.glob("*.safetensors"))
    model, checkpoint_map = open_checkpoint(checkpoint)
    before = resident_bytes()
    start = time.perf_counter()
    distzo2.offload(model, weights=weights, directory=directory)
    pool_seconds = time.perf_counter() - start
    runtime = distzo2.runtime_of(model)
    num_bytes = sum(unit.num_bytes for unit in runtime.units)
    in_memory = sum(runtime.stats()[key] for key in ("resident_bytes", "slot_bytes"))
    in_memory += num_bytes - runtime.stats()["resident_bytes"] if weights == "host" else 0
    in_memory -= runtime.stats()["slot_bytes"]  # not touched yet
    contenders: dict[str, Callable[[], float | None]] = {
        "load": lambda: fill(model, checkpoint_map),
        "threads": lambda: raw_threads(files),
        "one read": lambda: one_read_at_a_time(model, checkpoint_map),
    }
    if shutil.which("fio"):
        contenders["fio"] = lambda: fio_seconds(files, num_bytes)
    else:
        print("fio is not installed: there is no figure of it")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peak = 0
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            drop_cache(files)
            start = time.perf_counter()
            told = contenders[name]()
            seconds[name].append(told if told is not None else time.perf_counter() - start)
            if name == "load" and number == 0:
                peak = peak_bytes()
    for path in files:  # into the page cache
        path.read_bytes()
    cached_map = open_checkpoint(checkpoint)[1]  # a file is asked only once whether the page cache holds it
    start = time.perf_counter()
    fill(model, cached_map)
    seconds["load, cached"] = [time.perf_counter() - start]
    cached_map.close()
    rates = {name: num_bytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
    checkpoint_map.close()
    runtime.close()
    row = {
        "checkpoint": checkpoint.name,
        "weights": weights,
        "num_bytes": num_bytes,
        "pool_seconds": pool_seconds,
        "seconds": seconds,
        "gb_per_s": rates,
        "load_over_fio": rates["load"] / rates["fio"] if "fio" in rates else None,
        "load_over_threads": rates["load"] / rates["threads"],
        "peak_bytes_over_before": peak - before,
        "weights_in_memory_bytes": in_memory,
        "extra_bytes": peak - before - in_memory,
    }
    figures = "  ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
    print(
        f"{weights:5} {num_bytes / 1e9:.2f} GB: {figures} GB/s; peak {(peak - before) / 1e9:.3f} GB with "
        f"{in_memory / 1e9:.3f} GB of weights in memory; pool made in {pool_seconds:.1f} s",
        flush=True,
    )
    return row


def main() -> None:
    """Parse the options, run, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, help="safetensors checkpoint; made there if it is not (default: temporary)"
    )
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b", help="of a checkpoint that is made")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of a checkpoint that is made")
    parser.add_argument("--weights", default="host,disk", help="where the weights go, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median is reported")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # this process measures one row, into this file
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="bench-load-", dir=options.checkpoint and options.checkpoint.parent
    ) as place:
        directory = Path(place)
        checkpoint = options.checkpoint or directory / options.shape
        if options.row:
            row = bench(checkpoint, options.weights, directory, options.rounds)
            options.row.write_text(json.dumps(row))
            return
        write_random_checkpoint(checkpoint, options.shape, DTYPES[options.dtype])
        rows = []
        for weights in options.weights.split(","):  # each in a process of its own, whose peak is its own
            out = directory / "row.json"
            command = [sys.executable, __file__, f"--checkpoint={checkpoint}", f"--weights={weights}", f"--row={out}"]
            subprocess.run([*command, f"--rounds={options.rounds}"], check=True)
            rows.append(json.loads(out.read_text()))
        write_results(options.json, "load", rows)


if __name__ == "__main__":
    main()
