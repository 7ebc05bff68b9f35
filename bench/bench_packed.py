"""A step over a packed base beside one over 16 bits: an adapter on a model of OPT's published shape, from a disk.

    python bench/bench_packed.py --work /fast/opt --model opt-1.3b --tokens 512

Each way of storing is a model of its own, and steps alternate. `decode share` is what decoding (and, of 16 bits, noise
alone) takes of a step; `exposed` what a step waits for the disk; `predicted` the bytes that its streamed blocks hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_common import RESULTS, machine
from random_checkpoint import write_random_checkpoint

import distzo2

STORES = (None, "affine8", "affine4", "table4")


def main() -> None:
    """Parse the options, run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the checkpoint and of block files")
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--weights", default="disk", choices=("disk", "host"))
    parser.add_argument("--out", type=Path, default=RESULTS / "packed.json")
    options = parser.parse_args()
    checkpoint = options.work / options.model
    write_random_checkpoint(checkpoint, options.model, torch.bfloat16)
    ids = torch.randint(4, 50000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    runs = {store or "bfloat16": made(store, checkpoint, options) for store in STORES}
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for step in range(options.steps + 2):
        for name, (model, opt) in runs.items():
            runtime = distzo2.runtime_of(model)
            runtime.reset_stats()
            start = time.perf_counter()
            opt.step(lambda model=model: model(input_ids=ids, labels=ids).loss)
            seconds, stats = time.perf_counter() - start, runtime.stats()
            if step >= 2:  # the first runs lanes alone too
                kept = ("bytes_up", "bytes_down", "noise_s", "exposed_wait_s", "compute_s")
                figures[name].append({"seconds": seconds} | {key: stats[key] for key in kept})
    rows = []
    for name, steps in figures.items():
        row = {"stored": name} | {key: statistics.median(s[key] for s in steps) for key in steps[0]}
        row["decode_share"] = statistics.median(s["noise_s"] / s["seconds"] for s in steps)
        row["predicted_bytes"] = distzo2.runtime_of(runs[name][0]).stats()["streamed_bytes"]
        rows.append(row)
        print(f"{name:<9} {row['seconds']:.3f} s a step, {row['bytes_up'] / 1e9:.3f} GB up (predicted "
              f"{row['predicted_bytes'] / 1e9:.3f}), {row['bytes_down'] / 1e9:.3f} down, exposed "
              f"{row['exposed_wait_s']:.3f} s, decode share {row['decode_share']:.2%}")  # fmt: skip
    settings = {"model": options.model, "tokens": options.tokens, "weights": options.weights, "steps": options.steps}
    options.out.write_text(json.dumps({"bench": "packed", "machine": machine(), **settings, "rows": rows}) + "\n")
    print(f"wrote {options.out}")


def made(store: str | None, checkpoint: Path, options: argparse.Namespace) -> Any:
    """A model with LoRA on q and v, and its optimizer."""
    from peft import LoraConfig

    start = options.work / f"adapter-{store}"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = distzo2.from_pretrained(
        checkpoint, weights=options.weights, directory=options.work, store=store, prepare=distzo2.adapter(lora, start)
    )
    return model, distzo2.ZOSGD(model, lr=1e-4, eps=1e-2, noise="rademacher")


if __name__ == "__main__":
    main()
