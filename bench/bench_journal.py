"""What the journal costs a step of 100 ms that streams its weights from disk.

    python bench/bench_journal.py --directory /the/disk/of/the/runs

Two runs of ZOSGD on equal models, each a few small blocks in a block file, whose forward takes so long that a step
takes --step-ms: either it waits, as for a device that computes, or it is fixed work of one thread. One run has a
journal; each line is synced, and a block is written back only when its step's line is. Steps of the two take turns, and
just before each that is timed the same run makes one with next to no forward: the line of that step is written and
synced beside the timed one, as in a run. In every other row an fsync takes --fsync-ms more.

`exposed_of_step` is the mean difference over rounds (the far tenths on each side cut), and `error` its standard error,
both as shares of a step. `append` is the time of the call on the thread that trains, and `cpu` the processor time of
the journal's thread: no more than that can the two take from the forward where they share a core. Work of a thread is
less steady than a wait on a machine that others use too, so the errors of those rows may be above what is to be shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_common import write_results
from torch import nn

import distzo2

NUM_BLOCKS = 8
WIDTH = 64
CUT = 0.1  # of the rounds, on each side


class Computes:
    """Fixed work of one thread that leaves the interpreter to others; `repeats` is its amount."""

    def __init__(self) -> None:
        self.a = torch.randn(192, 192)
        self.repeats = 0

    def __call__(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self.a, self.a)


class Waits:
    """A wait of `repeats` times 10 us."""

    def __init__(self) -> None:
        self.repeats = 0

    def __call__(self) -> None:
        if self.repeats:
            time.sleep(1e-5 * self.repeats)


FORWARDS = {"waits": Waits, "computes": Computes}


class Block(nn.Module):
    def __init__(self, work: Computes | Waits) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.work = work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.work()
        return x + self.linear(x)


class Model(nn.Module):
    def __init__(self, work: Computes | Waits) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(work) for _ in range(NUM_BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Run:
    """An optimizer with or without a journal. `appends`: seconds of each call in a timed step; `num_lines`: since
    `start_cpu`."""

    def __init__(self, directory: Path, forward: str, journal: bool) -> None:
        directory.mkdir()
        self.work, self.appends, self.num_lines = FORWARDS[forward](), [], 0
        torch.manual_seed(0)
        self.model = distzo2.offload(Model(self.work), weights="disk", directory=directory)
        self.x = torch.randn(4, WIDTH)
        path = directory / "journal.jsonl" if journal else None
        self.optimizer = distzo2.ZOSGD(self.model, lr=1e-7, journal=path)
        self.journal = self.optimizer.journal
        if self.journal is not None:
            self._append, self.journal.append = self.journal.append, self._timed_append
            thread = self.journal._writer._thread
            self._clock = time.pthread_getcpuclockid(thread.ident)
            self.start_cpu()

    def start_cpu(self) -> None:
        self.appends, self.num_lines, self._cpu_begun = [], 0, time.clock_gettime(self._clock)

    def cpu_of_line(self) -> float:
        return (time.clock_gettime(self._clock) - self._cpu_begun) / self.num_lines

    def _timed_append(self, entry: distzo2.record.journal.StepEntry) -> None:
        start = time.perf_counter()
        self._append(entry)
        if self.work.repeats:
            self.appends.append(time.perf_counter() - start)
        self.num_lines += 1

    def step(self, repeats: int) -> None:
        self.work.repeats = repeats
        self.optimizer.step(lambda: self.model(self.x))

    def timed_step(self, repeats: int) -> float:
        self.step(0)
        start = time.perf_counter()
        self.step(repeats)
        seconds = time.perf_counter() - start
        if self.journal is not None:
            self.journal.sync()  # what is left of it is not the next run's
        return seconds

    def close(self) -> None:
        self.optimizer.close()
        distzo2.runtime_of(self.model).close()


def calibrated(run: Run, seconds: float) -> int:
    """Repeats of the work in each block that make a step take so long."""
    repeats = 20
    for _ in range(4):
        taken = statistics.median(run.timed_step(repeats) for _ in range(3))
        repeats = max(1, round(repeats * seconds / taken))
    return repeats


def trimmed(values: list[float]) -> tuple[float, float]:
    """The mean without the CUT on each side, and its standard error."""
    values = sorted(values)
    cut = int(CUT * len(values))
    kept = values[cut : len(values) - cut]
    # Tukey and McLaughlin: the error is that of the winsorized sample.
    winsorized = [kept[0]] * cut + kept + [kept[-1]] * cut
    error = statistics.stdev(winsorized) / ((1 - 2 * CUT) * math.sqrt(len(values)))
    return statistics.mean(kept), error


def measure(directory: Path, forward: str, step_seconds: float, rounds: int, slower: float) -> dict:
    """A row: `slower` seconds are added to each fsync of a journal."""
    real_fsync, fsyncs = os.fsync, []

    def timed_fsync(descriptor: int) -> None:
        start = time.perf_counter()
        time.sleep(slower) if slower else None
        real_fsync(descriptor)
        fsyncs.append(time.perf_counter() - start)

    runs = {
        "alone": Run(directory / "alone", forward, journal=False),
        "journal": Run(directory / "journal", forward, journal=True),
    }
    repeats = calibrated(runs["alone"], step_seconds)
    journaled = runs["journal"]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    os.fsync = timed_fsync
    try:
        for run in runs.values():
            run.timed_step(repeats)
        journaled.start_cpu()
        for number in range(rounds):
            for name in runs if number % 2 else reversed(runs):
                seconds[name].append(runs[name].timed_step(repeats))
        cpu = journaled.cpu_of_line()
    finally:
        os.fsync = real_fsync
    for run in runs.values():
        run.close()
    step = statistics.median(seconds["alone"])
    exposed, error = trimmed([b - a for a, b in zip(seconds["alone"], seconds["journal"], strict=True)])
    return {
        "forward": forward,
        "rounds": rounds,
        "step_s": step,
        "fsync_s": statistics.median(fsyncs),
        "append_of_step": statistics.median(journaled.appends) / step,
        "cpu_of_step": cpu / step,
        "exposed_of_step": exposed / step,
        "error": error / step,
        "median_s": {name: statistics.median(values) for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--fsync-ms", type=float, default=6.0, help="that an fsync takes longer in the second row")
    parser.add_argument("--rounds", type=int, default=150, help="timed steps of each run, with forwards that wait")
    parser.add_argument("--compute-rounds", type=int, default=25, help="the same with forwards that compute")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    rounds_of = {"waits": args.rounds, "computes": args.compute_rounds}
    for (forward, rounds), slower in itertools.product(rounds_of.items(), (0.0, args.fsync_ms / 1e3)):
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            row = measure(Path(directory), forward, args.step_ms / 1e3, rounds, slower)
        rows.append(row)
        print(json.dumps(row))
        print(
            f"{forward}: a step of {1e3 * row['step_s']:.1f} ms, an fsync of {1e3 * row['fsync_s']:.1f} ms. "
            f"Exposed: {100 * row['exposed_of_step']:+.2f}% (± {100 * row['error']:.2f}), "
            f"append: {100 * row['append_of_step']:.2f}%, CPU of the journal's thread: {100 * row['cpu_of_step']:.2f}%"
        )
    if args.json:
        write_results(args.json, "journal", rows)


if __name__ == "__main__":
    main()
