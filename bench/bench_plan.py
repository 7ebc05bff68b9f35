"""What `distzo2 plan` predicts for this machine, beside what a step takes.

    python bench/bench_plan.py --json bench/results/plan-amd-epyc.json

In each of several rounds every rate of the roofline is measured once and one step is made, since what a shared machine
does changes within seconds. The plan is made of the rates' medians, and stands beside the steps' median. Links, disk
and gather are measured once, or come from --measure, a file that `distzo2 measure` wrote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_step import loss_closure, machine
from random_checkpoint import write_random_checkpoint

import distzo2
from distzo2.cli.main import parse
from distzo2.cli.options import PlanOptions
from distzo2.planning.machines import machine_from
from distzo2.planning.measure import measure, measure_matmul, measure_memory, measure_noise
from distzo2.planning.plan import Planner
from distzo2.planning.transfers import Effort

CONFIGURATIONS = {
    "host": "--model opt-125m --dtype float32 --batch 4 --tokens 128 --weights host",
    "disk": "--model opt-125m --dtype float32 --batch 4 --tokens 128 --weights disk",
    "long": "--model opt-125m --dtype float32 --batch 1 --tokens 512 --weights host",
    "fzoo": "--model opt-125m --dtype float32 --batch 2 --tokens 128 --estimator fzoo --probes 4 --noise rademacher",
    "probes": "--model opt-125m --dtype float32 --batch 4 --tokens 64 --micro-batches 2 --probes 2 --weights disk",
    "bf16": "--model opt-125m --dtype bfloat16 --batch 1 --tokens 128 --weights disk",
}


def request_of(text: str) -> PlanOptions:
    """The options of `distzo2 plan`."""
    return parse(["plan", *text.split()])[1]


ONCE = Effort(seconds=0.05)  # of a rate: rounds are the bench's own, with a step of the model in each


def one_round() -> dict[str, list[dict[str, Any]]]:
    """Rates as they are now."""
    cpu = torch.device("cpu")
    rates = {"noise": measure_noise(cpu, ONCE), "matmul": measure_matmul(cpu, ONCE)}
    return {**rates, "memory": [measure_memory(cpu, ONCE)]}


def median_rows(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a table, each figure the median over the rounds."""
    return [
        {k: statistics.median(row[k] for row in rows) if isinstance(v, float) else v for k, v in rows[0].items()}
        for rows in zip(*rounds, strict=True)
    ]


def run(name: str, text: str, base: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One configuration: in each round the rates and a step; the plan of the rates' medians beside the steps'."""
    request = request_of(text)
    directory, dtype = Path(options.directory), getattr(torch, request.dtype)
    checkpoint = directory / f"{request.model}-{request.dtype}"
    write_random_checkpoint(checkpoint, request.model, dtype)
    rounds, samples = [], []
    with tempfile.TemporaryDirectory(dir=directory) as weights:
        model = distzo2.from_pretrained(
            checkpoint, weights=request.weights, dtype=dtype, directory=weights if request.weights == "disk" else None
        )
        opt = distzo2.ZOSGD(
            model, lr=1e-9, eps=1e-3, num_probes=request.probes, estimator=request.estimator, noise=request.noise,
            max_coef=None,
        )  # fmt: skip
        parts = request.micro_batches or 1
        closures = [
            loss_closure(model, torch.randint(4, 50000, (request.batch // parts, request.tokens))) for _ in range(parts)
        ]
        runtime = distzo2.runtime_of(model)
        for _ in range(2):  # the first allocates and has no update to apply
            opt.step(closures)
        stats = []
        for _ in range(options.repeats):
            rounds.append(one_round())
            runtime.reset_stats()
            start = time.perf_counter()
            opt.step(closures)
            samples.append(time.perf_counter() - start)
            stats.append(runtime.stats())
        runtime.close()
    rates = {key: median_rows([r[key] for r in rounds]) for key in rounds[0]}
    plan = Planner(request, machine_from({**base, **rates})).predict()
    measured, played, memory = statistics.median(samples), plan.played, plan.row["rank_bytes"]
    row = {
        "name": name,
        "options": text,
        "predicted_s": played.step_s,
        "measured_s": measured,
        "ratio": played.step_s / measured,
        "samples_s": samples,
        "predicted": {
            "compute_s": played.busy_s["compute"] - played.noise_s,
            "noise_s": played.noise_s,
            "wait_s": played.wait_s,
        },
        "measured": {
            "compute_s": statistics.median(s["compute_s"] for s in stats),
            "noise_s": statistics.median(s["noise_s"] for s in stats),
            "wait_s": statistics.median(s["exposed_wait_s"] for s in stats),
        },
        "predicted_bytes": [memory[k] for k in ("residents", "slots", "scratch")],
        "measured_bytes": [stats[-1][k] for k in ("resident_bytes", "slot_bytes", "scratch_bytes")],
        "rates": rates,
    }
    pieces = "  ".join(f"{k[:-2]} {row['predicted'][k]:.3f}/{row['measured'][k]:.3f}" for k in row["predicted"])
    print(
        f"{name:8s} predicted {played.step_s:7.3f} s  measured {measured:7.3f} s ({min(samples):.3f} to "
        f"{max(samples):.3f})  ratio {row['ratio']:.3f}  {pieces}",
        flush=True,
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="host,disk,long,fzoo", help=f"of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--repeats", type=int, default=7, help="steps that are timed; their median is reported")
    kept = tempfile.gettempdir() + "/distzo2-bench"
    parser.add_argument("--directory", default=kept, help="where random models and block files are kept")
    parser.add_argument("--measure", help="a measurement to take links, disk and gather from")
    parser.add_argument("--json", help="write the results to this file; rows of other configurations in it are kept")
    options = parser.parse_args()
    Path(options.directory).mkdir(parents=True, exist_ok=True)
    base = json.loads(Path(options.measure).read_text()) if options.measure else measure(options.directory)
    rows = [run(name, CONFIGURATIONS[name], base, options) for name in options.only.split(",")]
    if options.json:
        path = Path(options.json)
        kept_rows = json.loads(path.read_text())["rows"] if path.exists() else []
        names = {row["name"] for row in rows}
        rows = [row for row in kept_rows if row["name"] not in names] + rows
        command = f"bench_plan.py --repeats {options.repeats}"
        result = {"bench": "plan", "machine": machine(), "command": command, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
