"""What a run's weight file takes of its steps.

    copies    weights in host memory: steps while a round of copies is made, beside as many steps without one
    durable   weights on disk: steps whose blocks live in the durable file, beside steps over a scratch file

Both are ratios of steps made in turns, less 1; the goal is at most 5%. All steps of a turn count, not the median one,
since a few of them bear the cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import write_results
from torch import nn

import distzo2


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


def make(root: Path, options: argparse.Namespace, weights: str, kept: bool) -> tuple[distzo2.ZOSGD, Callable]:
    """An optimizer with a journal, and its closure."""
    torch.manual_seed(0)
    root.mkdir()
    file = distzo2.WeightFile(root / "weights.dzo2", root / "journal", every=2**30, pace=options.pace, log=print)
    model = distzo2.offload(
        Blocks(options.width, options.layers, torch.float32),
        weights=weights,
        directory=root,
        weight_file=file if kept else None,
    )
    x = torch.randn(options.tokens, options.width)
    opt = distzo2.ZOSGD(model, lr=1e-6, journal=root / "journal")
    for _ in range(5):
        opt.step(lambda: model(x))
    return opt, lambda: model(x)


def timed(opt: distzo2.ZOSGD, closure: Callable, more: Callable[[int], bool]) -> tuple[int, float]:
    """Makes steps while `more` says so; returns how many, and their seconds."""
    count, start = 0, time.perf_counter()
    while more(count):
        opt.step(closure)
        count += 1
    return count, time.perf_counter() - start


def copies(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    opt, closure = make(root / "kept", options, "host", True)
    copier = opt._runtime.kept._copier
    turns, end = [], time.monotonic() + options.seconds
    while time.monotonic() < end:
        copier.begin_round()
        steps, seconds = timed(opt, closure, lambda _: copier.in_round)
        turns.append((steps, seconds, timed(opt, closure, lambda n, most=steps: n < most)[1]))
    opt.close()
    return {"rounds": len(turns), "steps_a_round": statistics.median(n for n, *_ in turns), **exposed(turns)}


def durable(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    arms = [make(root / name, options, "disk", name == "kept") for name in ("kept", "scratch")]
    turns, end = [], time.monotonic() + options.seconds
    while time.monotonic() < end:
        kept, scratch = (timed(opt, closure, lambda n: n < options.steps)[1] for opt, closure in arms)
        turns.append((options.steps, kept, scratch))
    stats = arms[0][0]._runtime.stats()
    for opt, _ in arms:
        opt.close()
    return {"turns": len(turns), "syncs": stats["syncs"], **exposed(turns)}


def exposed(turns: list[tuple[int, float, float]]) -> dict[str, Any]:
    return {
        "step_seconds": sum(b for *_, b in turns) / sum(n for n, *_ in turns),
        "exposed": statistics.median(a / b for _, a, b in turns) - 1,
        "exposed_of_all": sum(a for _, a, _ in turns) / sum(b for *_, b in turns) - 1,
        "ratios": [round(a / b, 3) for _, a, b in turns],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("copies", "durable"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="in a turn of `durable`")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--pace", type=float, default=0.03)
    parser.add_argument("--directory", help="where the files are made (default: a temporary directory)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of results that the row is added to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        figures = (copies if options.what == "copies" else durable)(Path(root), options)
    row = {"what": options.what, "width": options.width, "layers": options.layers, "pace": options.pace, **figures}
    print(json.dumps(row))
    if options.json:
        rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
        write_results(options.json, "weight_file", [*rows, row])


if __name__ == "__main__":
    main()
