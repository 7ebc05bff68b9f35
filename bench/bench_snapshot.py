"""What a background snapshot takes of the steps that it spans.

Two models of the same shape take steps in turn in one process; one of them makes snapshots, at the default pace. Steps
within a snapshot, from the one after which it is begun to the one after which it is whole, are compared with the other
model's steps at the same time. At most 5% more is the goal. Weights in host memory, or in a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import distzo2
from distzo2.snapshot import Snapshots


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


def make(options: argparse.Namespace, directory: Path, every: int) -> tuple[nn.Module, distzo2.ZOSGD]:
    directory.mkdir()
    torch.manual_seed(0)
    model = Blocks(options.width, options.layers, torch.float32)
    model = distzo2.offload(model, weights=options.weights, directory=directory / "blocks")
    snapshots = Snapshots(directory / "snapshots", every=every, pace=options.pace, log=print)
    return model, distzo2.ZOSGD(model, lr=1e-6, journal=directory / "journal", snapshots=snapshots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--weights", choices=("host", "disk"), default="host")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--pace", type=float, default=0.03)
    parser.add_argument("--directory", help="where the files are made (default: a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        model, opt = make(options, Path(root) / "with", every=4)
        other, plain = make(options, Path(root) / "without", every=0)
        x = torch.randn(options.tokens, options.width)
        for _ in range(3):
            opt.step(lambda: model(x))
            plain.step(lambda: other(x))
        writer, pairs, spans = opt._snapshots, [], []
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            in_snapshot = writer._making is not None
            taken = {}
            order = ((opt, model, "with"), (plain, other, "without"))
            for optimizer, m, name in order if len(pairs) % 2 else reversed(order):
                start = time.perf_counter()
                optimizer.step(lambda m=m: m(x))
                taken[name] = time.perf_counter() - start
            if in_snapshot:
                pairs.append((taken["with"], taken["without"]))
            elif pairs and len(pairs) != sum(spans):
                spans.append(len(pairs) - sum(spans))
        figures = writer.figures
        opt.close()
        plain.close()
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        json.dumps(
            {
                "weights": options.weights,
                "model_bytes": sum(p.numel() * 4 for p in other.parameters()),
                "pace": options.pace,
                "step_seconds": statistics.median(b for _, b in pairs),
                "steps_in_snapshots": len(pairs),
                "snapshots": figures.num_made,
                "steps_each": figures.num_steps / max(1, figures.num_made),
                "copy_seconds_each": figures.copy_seconds / max(1, figures.num_made),
                "write_cpu_seconds_each": figures.write_seconds / max(1, figures.num_made),
                "exposed_by_median": ratio - 1,
                "exposed_by_sum": sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1,
            }
        )
    )


if __name__ == "__main__":
    main()
