"""The main job, whole, on a small model and real data, on whatever device there is.

    python demo.py --out demo-run

`base.py` pre-trains a base model by backpropagation (once); then `distzo2 finetune` tunes it with forward passes only,
its weights on disk, and `distzo2 replay` rebuilds the result from the run's journal. What the figures show and do not
show is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import base
import torch
from docstrings import LABELS

from distzo2.planning.report import hidden_share
from distzo2.run.metrics import read_metrics
from distzo2.text import gib

# FZOO (one-sided, divided by the spread of the losses) with signs: 9 forward passes a step.
SETTINGS = (
    "--estimator=fzoo --noise=rademacher --probes=8 --eps=1e-3 --lr=1e-2 --schedule=linear --batch-size=16 "
    "--eval-every=50 --eval-batch-size=50 --weights=disk --trace"
)


def distzo2(*arguments: object) -> None:
    """Runs a command of distzo2 in its own process, as a user would."""
    command = ["distzo2", *map(str, arguments)]
    print("\n" + " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def run_demo(out: Path, steps: int, recipe: base.Recipe) -> bool:
    """Runs the demo in `out`, whose base model is kept and whose earlier run is replaced. Returns whether the journal
    gave the saved checkpoint again."""
    start = time.perf_counter()
    made, run, again = out / "base", out / "run", out / "replayed"
    print("The demo: docstrings of 4 libraries are to be told apart, by forward passes only.")
    if not (made / "facts.json").is_file():
        base.make(made, recipe)
    for directory in (run, again):
        shutil.rmtree(directory, ignore_errors=True)
    data = (f"--model={made / 'model'}", f"--train={made / 'train.jsonl'}", f"--eval={made / 'held_out.jsonl'}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distzo2("finetune", *data, f"--steps={steps}", *SETTINGS.split(), f"--device={device}", f"--out={run}")
    distzo2("report", run)
    distzo2("replay", run, f"--out={again}")
    name = "model.safetensors"
    same = (again / name).read_bytes() == (run / "checkpoint" / name).read_bytes()
    print(_summary(made, run, recipe, same, time.perf_counter() - start))
    return same


def _summary(made: Path, out: Path, recipe: base.Recipe, same: bool, seconds: float) -> str:
    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    evals = {line["step"]: line for line in lines if line["kind"] == "eval"}
    record = json.loads((out / "run.json").read_text())
    before, after = evals[0], evals[len(steps)]
    facts = json.loads((made / "facts.json").read_text())
    backprop, passes = facts["backprop"], record["options"]["probes"] + 1
    mean = {k: sum(s[k] for s in steps) / len(steps) for k in ("seconds", "compute_s", "noise_s", "exposed_wait_s")}
    rows = [
        ("chance", "", f"{1 / len(LABELS):.1%}", "one of four"),
        ("before", f"{before['loss']:.3f}", f"{before['accuracy']:.1%}", "the base model"),
        ("after", f"{after['loss']:.3f}", f"{after['accuracy']:.1%}", f"{len(steps)} steps of {passes} forward passes"),
        (
            "backprop",
            f"{backprop['loss']:.3f}",
            f"{backprop['accuracy']:.1%}",
            f"AdamW, {recipe.backprop_steps} steps, same base and lines",
        ),
    ]
    text = [
        "",
        f"Held out ({after['examples']} docstrings of files that no training saw):",
        f"  {'':10}{'loss':>8}{'accuracy':>11}",
        *(f"  {name:10}{loss:>8}{accuracy:>11}   {note}" for name, loss, accuracy, note in rows),
        "",
        _streaming(record, steps),
        f"Step: {mean['seconds'] * 1e3:.0f} ms = compute {mean['compute_s'] * 1e3:.0f} + noise and updates "
        f"{mean['noise_s'] * 1e3:.1f} + waiting for transfers {mean['exposed_wait_s'] * 1e3:.1f} + the rest.",
        f"Journal: {gib((out / 'journal.jsonl').stat().st_size)} for {len(steps)} steps; base + journal "
        + ("give the saved checkpoint bit for bit." if same else "DO NOT give the saved checkpoint."),
        f"Picture: {out / 'report.png'}",
        "",
        *_what_it_is(facts),
        f"All of it took {seconds:.0f} s.",
    ]
    return "\n".join(text)


def _what_it_is(facts: dict[str, Any]) -> list[str]:
    words = ", ".join(word.strip() for word in LABELS.values())
    size, seconds = facts["parameters"], facts["pretrain_seconds"]
    return [
        "What this is: real text, read from this machine's Python, and a model of",
        f"{size:,} parameters, pre-trained here for {seconds:.0f} s, partly to name a text's",
        f"library by a token of its own. Fine-tuning taught it to answer in words ({words}).",
        "What it is not: a result on a large model, or evidence that forward passes learn what",
        "a base knows nothing of. It is the path, and the code, that a large model takes.",
    ]


def _streaming(record: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    hidden = hidden_share(sum(s["transfer_s"] for s in steps), sum(s["exposed_wait_s"] for s in steps))
    share = "nothing was transferred" if hidden is None else f"{hidden:.0%} of their time was hidden behind compute"
    moved = sum(s["bytes_up"] + s["bytes_down"] for s in steps) / len(steps)
    device = [s["device_peak"] for s in steps if s.get("device_peak")]
    weights, held, process = (gib(record[k]) for k in ("model_bytes", "weights_in_memory", "peak_bytes"))
    return "\n".join(
        [
            f"Transfers: {gib(moved)} a step from and to {record['options']['weights']}; {share}.",
            f"Memory: the weights are {weights}; what held weights in memory, perturbed ones included, was {held};",
            f"the process took {process}, nearly all of it Python and torch"
            + (f"; the GPU's peak was {gib(max(device))}." if device else "."),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="directory of the base model and the run")
    sys.exit(0 if run_demo(parser.parse_args().out, 200, base.Recipe()) else 1)
