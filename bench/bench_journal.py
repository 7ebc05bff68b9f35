"""What the journal costs a step: the time of `append`, and what its thread takes from the compute beside it.

    python bench/bench_journal.py --directory /the/disk/of/the/runs

A step is a matrix product on all of torch's threads, repeated until it takes --step-ms. Turns, interleaved: steps
alone, the same once more, steps that each append an entry, and the same with chained hashes. The journal is on the disk
of --directory, each line synced. `fsync` is what a step would wait for if it waited.
Where wall time is too unsteady to tell (see "again"), the CPU time of an entry, in both threads, bounds what it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import tempfile
import time
from pathlib import Path

import torch
from bench_common import write_results

from distzo2.journal import Journal, StepEntry, make_header, table_row
from distzo2_core import GroupScalars, Term, Update


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def make_entry(step: int, num_probes: int) -> StepEntry:
    terms = tuple(Term(0, step, k, 0, f32(0.1 + k)) for k in range(num_probes))
    losses = [[2.5 + k / 7] for k in range(2 * num_probes)]
    return StepEntry(step, Update(step, (GroupScalars(f32(1e-6), 0.0),), terms), f32(1e-3), losses, tokens=512)


def make_journal(path: Path, chain: bool) -> Journal:
    table = [table_row(i, f"layer.{i}.weight", (64, 64), "bfloat16", (64, 1), True, 0, "normal") for i in range(200)]
    header = make_header(seed=0, base={"name": "", "files": {}}, table=table, groups=[{}], chain=chain)
    return Journal.create(path, header)


STEPS_A_TURN = 2


class Steps:
    """Work of a fixed amount, about `seconds` of it when nothing else runs."""

    def __init__(self, seconds: float) -> None:
        self.a = torch.randn(1024, 1024)
        self.repeats = 1
        for _ in range(2):  # the first is a warm-up
            start = time.perf_counter()
            for _ in range(10):
                self.a @ self.a
            once = (time.perf_counter() - start) / 10
        self.repeats = max(1, round(seconds / once))

    def __call__(self) -> None:
        for _ in range(self.repeats):
            self.a @ self.a


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=48, help="turns of each")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    work = Steps(args.step_ms / 1e3)
    seconds: dict[str, list[float]] = {"alone": [], "again": [], "journal": [], "chained": []}
    names = list(seconds)
    appends: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        journals = {name: make_journal(Path(directory) / name, name == "chained") for name in ("journal", "chained")}
        for number in range(args.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                journal = journals.get(name)
                start = time.perf_counter()
                for _ in range(STEPS_A_TURN):
                    work()
                    if journal is not None:
                        before = time.perf_counter()
                        journal.append(make_entry(journal.next_step, args.probes))
                        appends.append(time.perf_counter() - before)
                seconds[name].append((time.perf_counter() - start) / STEPS_A_TURN)
                if journal is not None:
                    journal.sync()  # what is left of it is not the next turn's
        fsyncs = []
        with open(Path(directory) / "fsync", "wb") as file:
            for _ in range(20):
                file.write(bytes(300))
                file.flush()
                start = time.perf_counter()
                os.fsync(file.fileno())
                fsyncs.append(time.perf_counter() - start)
        cpu = {}
        for name, journal in journals.items():
            start = time.process_time()
            for _ in range(200):
                journal.append(make_entry(journal.next_step, args.probes))
                journal.sync()
            cpu[name] = (time.process_time() - start) / 200
            journal.close()
    step = statistics.median(seconds["alone"])
    row = {
        "probes": args.probes,
        "step_s": step,
        "append_s": statistics.median(appends),
        "append_of_step": statistics.median(appends) / step,
        "fsync_s": statistics.median(fsyncs),
        "cpu_s": cpu,
        "cpu_of_step": {name: value / (args.step_ms / 1e3) for name, value in cpu.items()},
        # What else runs on a machine only ever adds: the best turns are compared. "again" shows what that leaves.
        "least_s": {name: min(values) for name, values in seconds.items()},
        "exposed_of_step": {name: min(seconds[name]) / min(seconds["alone"]) - 1 for name in names[1:]},
        "median_difference_of_step": {
            name: statistics.median(b - a for a, b in zip(seconds["alone"], seconds[name], strict=True)) / step
            for name in names[1:]
        },
    }
    print(json.dumps(row))
    shares = ", ".join(f"{name} {100 * share:+.2f}%" for name, share in row["exposed_of_step"].items())
    busy = ", ".join(f"{name} {100 * share:.2f}%" for name, share in row["cpu_of_step"].items())
    print(
        f"a step of {1e3 * step:.0f} ms, best turns: {shares}; append {1e6 * row['append_s']:.0f} us "
        f"({100 * row['append_of_step']:.2f}%), an fsync {1e3 * row['fsync_s']:.1f} ms; "
        f"CPU time of both threads, of a step of {args.step_ms:.0f} ms: {busy}"
    )
    if args.json:
        write_results(args.json, "journal", [row])


if __name__ == "__main__":
    main()
