"""What a background snapshot takes of the steps that it spans.

One model takes steps in turns: those of a snapshot, from its beginning until it is whole, and as many without one. The
first turn's time over the second's, less 1, is the exposed cost; the goal is at most 5%. All steps count, not the
median one, since a few of them bear the cost. Weights in host memory, or in a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import write_results
from torch import nn

import distzo2
from distzo2.record.snapshot import Snapshots


class Blocks(nn.Module):
    """Layers of a transformer's matrices, without its attention: what matters is bytes and matrix products."""

    def __init__(self, width: int, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width, dtype=dtype), nn.ReLU(), nn.Linear(4 * width, width, dtype=dtype))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 2, dtype=dtype)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x).float().square().mean()


def turn(opt: distzo2.ZOSGD, closure: Callable[[], torch.Tensor], num_steps: int | None) -> tuple[int, float]:
    """So many steps; None: until the snapshot that was begun is whole. (steps, seconds)"""
    writer, count, start = opt._snapshots, 0, time.perf_counter()
    while writer._making is not None if num_steps is None else count < num_steps:
        opt.step(closure)
        count += 1
    return count, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--weights", choices=("host", "disk"), default="host")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--pace", type=float, default=0.03)
    parser.add_argument("--directory", help="where the files are made (default: a temporary directory)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of results that the row is added to")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        model = Blocks(options.width, options.layers, torch.float32)
        num_bytes = sum(p.numel() * 4 for p in model.parameters())
        model = distzo2.offload(model, weights=options.weights, directory=Path(root) / "blocks")
        snapshots = Snapshots(Path(root) / "snapshots", every=2**30, pace=options.pace, log=print)
        opt = distzo2.ZOSGD(model, lr=1e-6, journal=Path(root) / "journal", snapshots=snapshots)
        x = torch.randn(options.tokens, options.width)
        turn(opt, lambda: model(x), 5)
        turns = []
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            opt._snapshots._begin(opt.step_count)
            num_steps, seconds = turn(opt, lambda: model(x), None)
            turns.append((num_steps, seconds, turn(opt, lambda: model(x), num_steps)[1]))
        figures = opt._snapshots.figures
        opt.close()
        distzo2.runtime_of(model).close()
    row = {
        "weights": options.weights,
        "model_bytes": num_bytes,
        "pace": options.pace,
        "snapshots": figures.num_made,
        "steps_each": statistics.median(n for n, _, _ in turns),
        "step_seconds": sum(b for *_, b in turns) / sum(n for n, _, _ in turns),
        "copy_seconds_each": figures.copy_seconds / figures.num_made,
        "write_cpu_seconds_each": figures.write_seconds / figures.num_made,
        "exposed": statistics.median(a / b for _, a, b in turns) - 1,
        "exposed_of_all": sum(a for _, a, _ in turns) / sum(b for *_, b in turns) - 1,
        "turns": [[n, round(a, 3), round(b, 3)] for n, a, b in turns],
    }
    print(json.dumps(row))
    if options.json:
        rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
        write_results(options.json, "snapshot", [*rows, row])


if __name__ == "__main__":
    main()
