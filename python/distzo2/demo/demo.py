"""`distzo2 demo`: the main job, whole, on a small model and real data, on whatever device there is.

A base model is pre-trained by backpropagation (once), and then fine-tuned by the command that users run, with forward
passes only and its weights on disk. What the figures are and are not is said beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distzo2.demo.demo_base import DEFAULT_RECIPE, Base, Recipe, prepare
from distzo2.demo.demo_data import LABELS
from distzo2.errors import DistZO2Error, UsageError
from distzo2.planning.report import hidden_share, write_report
from distzo2.run.metrics import read_metrics
from distzo2.text import gib

MARKER = "demo.json"
# FZOO (one-sided, divided by the spread of the losses) with signs: 9 forward passes a step.
SETTINGS = {
    "steps": 200,
    "estimator": "fzoo",
    "noise": "rademacher",
    "probes": 8,
    "eps": 1e-3,
    "lr": 1e-2,
    "schedule": "linear",
    "batch-size": 16,
    "eval-every": 50,
    "eval-batch-size": 50,
    "trace": "",
}


def run_demo(
    options: Namespace,
    log: Callable[[str], None],
    recipe: Recipe = DEFAULT_RECIPE,
    settings: Mapping[str, Any] = SETTINGS,
) -> int:
    """Runs the demo; returns the exit status. `recipe` makes the base model and the data, `settings` are finetune's."""
    start = time.perf_counter()
    out = Path(options.out)
    _make_room(out)
    cache = (
        Path(options.cache)
        if options.cache
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "distzo2"
    )
    log("The demo: docstrings of 4 libraries are to be told apart, by forward passes only.")
    base = prepare(cache, recipe, log, options.quiet)

    arguments = {"model": base.model, "train": base.train, "eval": base.held_out, "out": out, "weights": "disk",
                 "device": _device(options.device), "seed": options.seed, **settings}  # fmt: skip
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    log("\ndistzo2 finetune " + " ".join(flags))
    _run([*flags, "--quiet"] if options.quiet else flags)
    (out / MARKER).write_text("a demo's directory: the next demo replaces it\n")
    same = _replays_to_the_same_bits(base, out)
    log(_summary(base, out, recipe, same, time.perf_counter() - start))
    return 0 if same else 1


def _make_room(out: Path) -> None:
    """Removes an earlier demo's directory, and nothing else."""
    if not out.exists():
        return
    if not (out / MARKER).is_file():
        if out.is_dir() and not any(out.iterdir()):
            return
        raise UsageError(f"{out}: exists and is not an earlier demo's: give another --out")
    shutil.rmtree(out)


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "distzo2", name]


def _run(flags: list[str]) -> None:
    """Runs finetune in a process of its own, so that its memory is its own."""
    process = subprocess.Popen([*_command("finetune"), *flags])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if status:
        raise DistZO2Error(f"distzo2 finetune ended with status {status}")


def _replays_to_the_same_bits(base: Base, out: Path) -> bool:
    """Whether base + journal give the checkpoint that the run saved, byte for byte."""
    from distzo2.checkpoint.replay import replay

    again = out / "replayed"
    replay(base.model, out / "journal.jsonl", again, progress=False)
    name = "model.safetensors"
    same = (again / name).read_bytes() == (out / "checkpoint" / name).read_bytes()
    shutil.rmtree(again)
    return same


def _summary(base: Base, out: Path, recipe: Recipe, same: bool, seconds: float) -> str:
    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    evals = {line["step"]: line for line in lines if line["kind"] == "eval"}
    record = json.loads((out / "run.json").read_text())
    before, after = evals[0], evals[len(steps)]
    facts, backprop = base.facts, base.facts["backprop"]
    passes = record["options"]["probes"] + 1
    picture = write_report(out)
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
        f"Picture: {picture}",
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
    totals = record["totals"]
    hidden = hidden_share(totals["transfer_s"], totals["exposed_wait_s"])
    share = "nothing was transferred" if hidden is None else f"{hidden:.0%} of their time was hidden behind compute"
    moved = (totals["bytes_up"] + totals["bytes_down"]) / len(steps)
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
