"""What `distzo2 plan` predicts for this machine, beside what a step takes: four configurations.

    python bench/bench_plan.py --json bench/results/plan-amd-epyc.json

A configuration's rates are measured right before its steps and right after them (the machine may be shared, and what it
does changes within minutes); the plan is made of the means of both. The steps' median is told. Links, disk and gather
are measured once, or come from --measure, a file that `distzo2 measure` wrote.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from bench_step import loss_closure, machine
from random_checkpoint import write_random_checkpoint

import distzo2
from distzo2.cli import build_parser
from distzo2.measure import measure, measure_rates
from distzo2.measure_compute import measure_noise
from distzo2.measure_timing import Effort
from distzo2.plan import Planner
from distzo2.plan_machine import machine_from
from distzo2.plan_mesh import Mesh

CONFIGURATIONS = {
    "host": "--model opt-125m --dtype float32 --batch 4 --tokens 128 --weights host",
    "disk": "--model opt-125m --dtype float32 --batch 4 --tokens 128 --weights disk",
    "long": "--model opt-125m --dtype float32 --batch 1 --tokens 512 --weights host",
    "fzoo": "--model opt-125m --dtype float32 --batch 2 --tokens 128 --estimator fzoo --probes 4 --noise rademacher",
    "probes": "--model opt-125m --dtype float32 --batch 4 --tokens 64 --micro-batches 2 --probes 2 --weights disk",
    "bf16": "--model opt-125m --dtype bfloat16 --batch 1 --tokens 128 --weights disk",
}


def request_of(text: str) -> Namespace:
    """The options of `distzo2 plan`."""
    return build_parser()[0].parse_args(["plan", *text.split()])


def rates(effort: Effort) -> dict[str, Any]:
    """What may have changed since: all that computes."""
    return {"noise": measure_noise(torch.device("cpu"), effort), **measure_rates(effort)}


def mean_of(first: Any, second: Any) -> Any:
    """The numbers of two results of one shape, averaged; what is no float is the first's."""
    if isinstance(first, float):
        return (first + second) / 2
    if isinstance(first, dict):
        return {k: mean_of(v, second[k]) for k, v in first.items()}
    if isinstance(first, list):
        return [mean_of(a, b) for a, b in zip(first, second, strict=True)]
    return first


def matched(first: list[dict], second: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows that both have: what is too slow for the one may have been measured by the other."""

    def key(row: dict) -> tuple:
        return tuple((k, str(v)) for k, v in row.items() if k not in ("seconds", "elements_per_s"))

    known = {key(row): row for row in second}
    both = [row for row in first if key(row) in known]
    return both, [known[key(row)] for row in both]


def time_steps(request: Namespace, directory: Path, repeats: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each step in the steady state, and the runtime's figures of them."""
    dtype = getattr(torch, request.dtype)
    checkpoint = directory / f"{request.model}-{request.dtype}"
    write_random_checkpoint(checkpoint, request.model, dtype)
    with tempfile.TemporaryDirectory(dir=directory) as weights:
        model = distzo2.from_pretrained(
            checkpoint, weights=request.weights, dtype=dtype, directory=weights if request.weights == "disk" else None
        )
        opt = distzo2.ZOSGD(
            model, lr=1e-7, eps=1e-3, num_probes=request.probes, estimator=request.estimator, noise=request.noise,
            max_coef=None,
        )  # fmt: skip
        parts = request.micro_batches or 1
        closures = [
            loss_closure(model, torch.randint(4, 50000, (request.batch // parts, request.tokens))) for _ in range(parts)
        ]
        for _ in range(2):  # the first allocates and has no update to apply
            opt.step(closures)
        runtime = distzo2.runtime_of(model)
        runtime.reset_stats()
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            opt.step(closures)
            samples.append(time.perf_counter() - start)
        stats = runtime.stats()
        runtime.close()
    return samples, stats


def run(name: str, text: str, base: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One configuration: rates, steps, rates; the plan beside the steps."""
    request, effort = request_of(text), Effort()
    before = rates(effort)
    samples, stats = time_steps(request, Path(options.directory), options.repeats)
    after = rates(effort)
    result = copy.deepcopy(base)
    for key in before:
        result[key] = mean_of(*matched(before[key], after[key]))
    plan = Planner(request, machine_from(result)).predict(Mesh())
    measured = statistics.median(samples)
    played = plan.played
    row = {
        "name": name,
        "options": text,
        "predicted_s": plan.step_s,
        "measured_s": measured,
        "samples_s": samples,
        "ratio": plan.step_s / measured,
        "predicted": {
            "compute_s": played.busy_s["compute"] - played.noise_s,
            "noise_s": played.noise_s,
            "wait_s": played.wait_s,
        },
        "measured": {
            "compute_s": stats["compute_s"] / options.repeats,
            "noise_s": stats["noise_s"] / options.repeats,
            "wait_s": stats["exposed_wait_s"] / options.repeats,
        },
        "predicted_bytes": [plan.rank_bytes.residents, plan.rank_bytes.slots, plan.rank_bytes.scratch],
        "measured_bytes": [stats["resident_bytes"], stats["slot_bytes"], stats["scratch_bytes"]],
    }
    drift = statistics.median(
        b["seconds"] / a["seconds"] for a, b in zip(*matched(before["forward"], after["forward"]), strict=True)
    )
    row["drift"] = drift
    parts = "  ".join(f"{k[:-2]} {row['predicted'][k]:.3f}/{row['measured'][k]:.3f}" for k in row["predicted"])
    print(
        f"{name:8s} predicted {plan.step_s:7.3f} s  measured {measured:7.3f} s ({min(samples):.3f} to "
        f"{max(samples):.3f})  ratio {row['ratio']:.3f}  {parts}  rates after/before {drift:.2f}",
        flush=True,
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="host,disk,long,fzoo", help=f"of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--repeats", type=int, default=7, help="steps that are timed; their median is told")
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
        result = {"bench": "plan", "machine": machine(), "command": " ".join(sys.argv), "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
