"""The demo's task learned by each estimator with the same number of forwards, and its rate chosen by a short sweep.

    python examples/demo/base.py --out demo-run/base
    python bench/bench_estimators.py --base demo-run/base

A row of ROWS is a setting of `distzo2 finetune`, with the rates that it may take; the first is the default for a real
model, where it is in reach. Its rate is chosen with the first seed and SWEEP forwards of each rate, by the loss of
every 12th line of train.jsonl, which these runs do not train on. Then each seed trains at the best one; rates fall
linearly. The JSON is written after each run: cut it at any time, and start it again for what is left.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_common import RESULTS, machine

import distzo2
from distzo2.estimators.registry import make_estimator
from distzo2.estimators.schedules import factor_of
from distzo2.run.launch import finetune_options
from distzo2.tasks.batches import DataOrder
from distzo2.tasks.examples import load_examples
from distzo2.tasks.objectives import Objective
from distzo2.tasks.tokenize import load_tokenizer

FORWARDS, SWEEP, LOOKS = 1800, 360, 6  # of a batch: in a run, in a run that chooses a rate; evaluations after the first
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """A setting, with the rates that it may take, and other options of finetune."""

    name: str
    estimator: str
    probes: int
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


ONE_SIZE = (2e-3, 5e-3, 1e-2)  # steps that do not grow with the losses
ROWS = (
    Row("spsa", "spsa", 4, (2e-4, 1e-3, 2e-3)),  # 5e-3 is best after 45 steps, and diverges later
    Row("fzoo", "fzoo", 8, ONE_SIZE),
    Row("es", "es", 4, ONE_SIZE),
    Row("es, ranks", "es", 4, (5e-3, 1e-2, 3e-2), {"es_shape": "ranks"}),
    Row("es, group of 4", "es", 4, ONE_SIZE, {"es_shape": "group", "micro_batches": 4}),
    Row("es, one-sided", "es", 8, ONE_SIZE, {"es_one_sided": True}),
    Row("1.5spsa", "1.5spsa", 4, (1e-4, 1e-3, 5e-3)),
    Row("meazo", "meazo", 4, ONE_SIZE),
    Row("spsa-sign", "spsa-sign", 4, ONE_SIZE),
)


def train(row: Row, base: Path, rate: float, seed: int, forwards: int, *, sweep: bool) -> dict[str, Any]:
    """One run, and the held-out loss and accuracy after some of its forwards; for a sweep, of the lines left out."""
    o = finetune_options(
        {"model": str(base), "train": "-", "out": "-", "steps": 1, "estimator": row.estimator, "probes": row.probes,
         "seed": seed, "lr": rate, **row.options}
    )  # fmt: skip
    tokenizer = load_tokenizer(str(base / "model"))
    lines, held_out = (load_examples(base / f"{name}.jsonl", tokenizer) for name in ("train", "held_out"))
    if sweep:
        lines, held_out = [line for i, line in enumerate(lines) if i % 12], lines[::12]
    model = distzo2.from_pretrained(base / "model", device="cpu", weights="device")
    objective = Objective(model, "choices", pad_id=tokenizer.pad_token_id)
    objective.rule = "sum"
    opt = distzo2.ZOSGD(
        model, lr=o.lr, eps=o.eps, num_probes=o.probes, noise=o.noise, seed=seed,
        estimator=make_estimator(o.estimator, **o.estimator_options),
    )  # fmt: skip
    steps, order = forwards // len(opt.settings.evaluations), DataOrder(len(lines), o.batch_size, seed)
    factor, part, start = factor_of("linear", steps), o.batch_size // o.micro_batches, time.perf_counter()
    looks = [round(look * steps / LOOKS) for look in (LOOKS,) if sweep] or [
        round(i * steps / LOOKS) for i in range(LOOKS + 1)
    ]
    evals, error = [], None
    for step in range(steps + 1):
        if step in looks:
            evals.append({"forwards": step * len(opt.settings.evaluations), **score(objective, held_out)})
        if step == steps:
            break
        opt.param_groups[0]["lr"] = o.lr * factor(step)
        examples = [lines[i] for i in order.batch(step)]
        batches = [objective.batch(examples[i : i + part]) for i in range(0, len(examples), part)]
        try:
            opt.step([objective.closure(batch) for batch in batches])
        except distzo2.DistZO2Error as diverged:
            error = str(diverged)
            evals.append({"forwards": step * len(opt.settings.evaluations), **score(objective, held_out)})
            break
    return {
        "row": row.name, "seed": seed, "lr": o.lr, "eps": o.eps, "noise": o.noise, "probes": o.probes, "sweep": sweep,
        "steps": steps, "seconds": time.perf_counter() - start, "evals": evals, "error": error,
    }  # fmt: skip


def score(objective: Objective, examples: list[Any]) -> dict[str, float]:
    """Loss and accuracy of examples, all in one pass."""
    groups = [examples[i : i + 100] for i in range(0, len(examples), 100)]
    closures = [objective.evaluation(objective.batch(group)) for group in groups]
    loss, count, hits, answers = sum(distzo2.evaluate(objective.model, closures)).tolist()
    return {"loss": loss / count, "accuracy": hits / answers}


class Bench:
    """The runs so far, in a JSON file."""

    def __init__(self, path: Path, base: Path) -> None:
        self.path, self.base = path, base
        self.runs = json.loads(path.read_text())["rows"] if path.exists() else []

    def run(self, row: Row, rate: float, seed: int, sweep: bool) -> dict[str, Any]:
        """The run as it was made, or makes it."""
        for run in self.runs:
            if (run["row"], run["seed"], run["sweep"], run["lr"]) == (row.name, seed, sweep, rate):
                return run
        made = train(row, self.base, rate, seed, SWEEP if sweep else FORWARDS, sweep=sweep)
        self.runs.append(made)
        self.path.write_text(json.dumps({"bench": "estimators", "machine": machine(), "rows": self.runs}) + "\n")
        last = made["evals"][-1]
        what = "sweep" if sweep else "run"
        print(
            f"{row.name}: {what} of seed {seed}, lr {made['lr']:g}: loss {last['loss']:.3f}, accuracy "
            f"{last['accuracy']:.1%}, {made['seconds']:.0f} s {made['error'] or ''}", flush=True,
        )  # fmt: skip
        return made

    def best_rate(self, row: Row) -> float:
        found = {rate: self.run(row, rate, SEEDS[0], True)["evals"][-1]["loss"] for rate in row.rates}
        return min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)

    def of(self, row: Row) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["row"] == row.name and not run["sweep"]]

    def table(self) -> list[str]:
        """In Markdown."""
        text = ["| estimator | probes | rate, ε | seeds | before, 600, 1200, 1800 forwards |", "|" + " --- |" * 5]
        for row in ROWS:
            if not (runs := self.of(row)):
                continue
            last = [run["evals"][-1]["accuracy"] for run in runs]
            means = [
                statistics.mean(run["evals"][min(i, len(run["evals"]) - 1)]["accuracy"] for run in runs)
                for i in (0, 2, 4, 6)
            ]
            spread = f" ({min(last):.1%} to {max(last):.1%})" if len(runs) > 1 else ""
            run = runs[0]
            text.append(
                f"| {row.name} | {run['probes']} {run['noise']} | {run['lr']:g}, {run['eps']:g} | {len(runs)} | "
                f"{', '.join(f'{mean:.1%}' for mean in means)}{spread} |"
            )
        return text

    def draw(self, target: Path) -> None:
        """Mean held-out accuracy against forwards, with the range over seeds."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for index, row in enumerate(row for row in ROWS if self.of(row)):
            by_forwards: dict[int, list[float]] = {}
            for run in self.of(row):
                for look in run["evals"]:
                    by_forwards.setdefault(look["forwards"], []).append(100 * look["accuracy"])
            style = {"color": f"C{index % 10}", "marker": ".", "linestyle": "--" if index >= 10 else "-"}
            axes.plot(list(by_forwards), [statistics.mean(v) for v in by_forwards.values()], label=row.name, **style)
            bounds = [min(v) for v in by_forwards.values()], [max(v) for v in by_forwards.values()]
            axes.fill_between(list(by_forwards), *bounds, color=style["color"], alpha=0.1, linewidth=0)
        axes.set(xlabel="forwards of a batch of 16", ylabel="held-out accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(target, dpi=110)


def main() -> None:
    """Parse the options, run what is left, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="directory that examples/demo/base.py made")
    parser.add_argument("--out", type=Path, default=RESULTS / "estimators.json", help="JSON of all runs")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parents[1] / "docs/estimators.png")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds train; 0: choose rates")
    parser.add_argument("--only", help="names of rows, with semicolons (default: all)")
    options = parser.parse_args()
    names = [row.name for row in ROWS] if options.only is None else options.only.split(";")
    if unknown := set(names) - {row.name for row in ROWS}:
        parser.error(f"--only {', '.join(sorted(unknown))}: none of {'; '.join(row.name for row in ROWS)}")
    bench = Bench(options.out, options.base)
    rates = {row.name: bench.best_rate(row) for row in ROWS if row.name in names}
    for seed in SEEDS[: options.seeds]:  # all rows of a seed before the next
        for row in ROWS:
            if row.name in names:
                bench.run(row, rates[row.name], seed, False)
    print("\n".join(bench.table()))
    bench.draw(options.picture)
    print(f"wrote {bench.path} and {options.picture}")


if __name__ == "__main__":
    main()
