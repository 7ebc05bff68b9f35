"""How much of L+ - L- is signal on a real model: compute dtypes, sizes of perturbations and of batches.

    python bench/bench_signal.py --data reviews/ --model smollm2/

Runs `distzo2 signal` for each size of the batch, writes the JSON after each, prints the table, and draws it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import RESULTS, machine

COLOURS = {"float32": "#4477aa", "bfloat16": "#ee6677", "float16": "#228833"}
STYLES = {1: ":", 4: "--", 16: "-"}


def measure(options: argparse.Namespace, batch_size: int) -> list[dict[str, Any]]:
    """The rows of one size of the batch."""
    command = [
        sys.executable, "-m", "distzo2", "signal", f"--model={options.model}",
        f"--train={options.data / 'train.jsonl'}", f"--batch-size={batch_size}", f"--probes={options.probes}",
        f"--eps={options.eps}", "--noise=rademacher", f"--max-lanes={options.max_lanes}", "--json",
    ]  # fmt: skip
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return [{"examples": batch_size, "probes": options.probes} | row for row in found]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """In Markdown: a line for each eps and size of the batch, correlation and relative error of each 16-bit dtype."""
    lines = ["| eps, examples (probes) | difference | bfloat16: correlation, error, floor | float16 | curvature |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for key in dict.fromkeys((row["eps"], row["examples"]) for row in rows):
        some = {row["dtype"]: row for row in rows if (row["eps"], row["examples"]) == key}
        halves = [
            f"{some[d]['correlation']:.2f}, {some[d]['relative_error']:.2f}, {some[d]['floor']:.1e}"
            if d in some
            else "-"
            for d in ("bfloat16", "float16")
        ]
        full = some["float32"]
        lines.append(
            f"| {key[0]:g}, {key[1]} ({full['probes']}) | {full['difference']:.1e} | {' | '.join(halves)} | "
            f"{full['curvature']:.2f} |"
        )
    return lines


def compare_float64(options: argparse.Namespace, rows: list[dict[str, Any]], examples: int) -> list[dict[str, Any]]:
    """How far the reference itself, float32, is from a plain loop in float64 without this library's runtime: weights
    w + eps z, activations and the loss in float64, by the same probes on the same batch."""
    import torch
    from transformers import AutoModelForCausalLM

    from distzo2.tasks.batches import DataOrder
    from distzo2.tasks.examples import load_examples
    from distzo2.tasks.kinds import model_kind
    from distzo2.tasks.objectives import Objective
    from distzo2.tasks.tokenize import load_tokenizer
    from distzo2_core import rademacher

    kind, tokenizer = model_kind(options.model), load_tokenizer(options.model)
    lines = load_examples(options.data / "train.jsonl", tokenizer, kind=kind, limit=kind.limit(None))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float64).eval()
    objective = Objective(model, "choices", pad_id=kind.padding(tokenizer), device=torch.device("cpu"))
    batch = DataOrder(len(lines), examples, 0).batch(0)
    closure = objective.closure(objective.batch([lines[i] for i in batch]))
    clean = [p.data.clone() for p in model.parameters()]

    @torch.no_grad()
    def loss(probe: int, scale: float) -> float:
        for i, (p, w) in enumerate(zip(model.parameters(), clean, strict=True)):
            z = rademacher(w.numel(), seed=0, step=0, param=i, probe=probe)
            torch.add(w, z.view(w.shape), alpha=scale, out=p.data)
        return float(closure())

    found = []
    for row in rows:
        if (row["examples"], row["dtype"]) == (examples, "float32") and row["eps"] <= 1e-3:
            eps = float(np.float32(row["eps"]))
            exact = np.array([loss(k, eps) - loss(k, -eps) for k in range(options.float64)])
            float32 = np.array(row["differences"])[: options.float64]
            error = np.linalg.norm(float32 - exact) / np.linalg.norm(exact)
            correlation = exact @ float32 / np.linalg.norm(exact) / np.linalg.norm(float32)
            found.append({"eps": row["eps"], "examples": examples, "probes": options.float64})
            found[-1] |= {"correlation": correlation, "relative_error": error, "differences": exact.tolist()}
            print(f"float32 against float64 at {row['eps']:g}: correlation {correlation:.8f}, error {error:.1e}")
    return found


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Correlation by eps, and the differences of single probes in bfloat16 over those in float32."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, 3)
    for dtype in ("bfloat16", "float16"):
        for size in dict.fromkeys(row["examples"] for row in rows):
            some = [row for row in rows if (row["dtype"], row["examples"]) == (dtype, size)]
            first.plot(
                [row["eps"] for row in some], [row["correlation"] for row in some], marker=".", color=COLOURS[dtype],
                linestyle=STYLES.get(size, "-."), label=f"{dtype}, {size} example{'s' * (size > 1)}",
            )  # fmt: skip
    first.axhline(0.95, color="black", linewidth=0.7)
    first.set(xscale="log", xlabel="eps", ylabel="correlation with float32", title="Signal of L+ - L-")
    first.legend(frameon=False, fontsize=7)
    size = max(row["examples"] for row in rows if row["probes"] == max(row["probes"] for row in rows))
    for axes, eps in zip(others, (1e-3, 1e-4), strict=True):
        some = {
            row["dtype"]: np.array(row["differences"]) for row in rows if (row["eps"], row["examples"]) == (eps, size)
        }
        if not some:
            continue
        bound = np.abs(some["float32"]).max()
        axes.plot([-bound, bound], [-bound, bound], color="black", linewidth=0.7)
        for dtype in ("bfloat16", "float16"):
            if dtype in some:
                axes.plot(some["float32"], some[dtype], ".", color=COLOURS[dtype], label=dtype)
        axes.set(
            xlabel="L+ - L- in float32",
            ylabel="the same in 16 bits",
            title=f"eps {eps:g}, {size} example{'s' * (size > 1)}",
        )
        axes.legend(frameon=False, fontsize=8)
    for axes in (first, *others):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110)


def main() -> None:
    """Parse the options, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of train.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint of bench/smollm2.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "signal.json", help="JSON; the PNG lies beside it")
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--examples", type=int, nargs="*", default=[1, 4, 16], help="none: draw what there is")
    parser.add_argument("--eps", default="1e-2,1e-3,1e-4")
    parser.add_argument("--max-lanes", type=int, default=16)
    parser.add_argument("--float64", type=int, metavar="PROBES", help="hold the reference against float64 instead")
    options = parser.parse_args()
    if options.float64:
        content = json.loads(options.out.read_text())
        content["float64"] = compare_float64(options, content["rows"], max(r["examples"] for r in content["rows"]))
        options.out.write_text(json.dumps(content) + "\n")
        return
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = before.get("rows", [])
    for batch_size in options.examples:
        rows = [row for row in rows if row["examples"] != batch_size] + measure(options, batch_size)
        rows.sort(key=lambda row: row["examples"])
        options.out.write_text(json.dumps(before | {"bench": "signal", "machine": machine(), "rows": rows}) + "\n")
    print("\n".join(table(rows)))
    draw(rows, options.out.with_suffix(".png"))
    print(f"wrote {options.out} and {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
