"""Tokens/s of lanes that generate in one pass, beside one lane: what perturbations gain by sharing each upload.

    python bench/bench_generate.py --work /fast/opt
    python bench/bench_generate.py --work /tmp/opt --quick

A member is one perturbation of the weights, and writes behind all prompts. The weights are random, in bf16, on a disk
and resident; one member and all of them alternate, and the first one's tokens must be the same in both.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_common import RESULTS, machine
from random_checkpoint import write_random_checkpoint
from torch import nn

import distzo2
from distzo2.streaming.isolation import RandomStream
from distzo2.streaming.lanes import Lane
from distzo2.weights.updates import Emission
from distzo2_core import FAMILIES, Term

KEPT = ("bytes_up", "noise_s", "exposed_wait_s", "compute_s")


def main() -> None:
    """Parse the options, run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the checkpoint and of block files")
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--layers", type=int, default=4, help="in the place of the model's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, default=8, help="in pairs of both signs")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--noise", default="rademacher", choices=sorted(FAMILIES))
    parser.add_argument("--quick", action="store_true", help="a small model and few tokens: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate.json")
    options = parser.parse_args()
    if options.quick:
        options.model, options.layers, options.members, options.prompts, options.tokens = "opt-125m", 2, 2, 2, 2
    checkpoint = options.work / f"{options.model}-{options.layers}"
    write_random_checkpoint(checkpoint, options.model, torch.bfloat16, options.layers)
    rows = [row for weights in ("disk", "device") for row in measured(weights, checkpoint, options)]
    for one, all_of_them in zip(rows[::2], rows[1::2], strict=True):
        all_of_them["gain"] = all_of_them["tokens_per_s"] / one["tokens_per_s"]
    for row in rows:
        gain = f", {row['gain']:.2f} times" if "gain" in row else ""
        print(f"{row['weights']:<7}{row['members']} x {options.prompts}: {row['tokens_per_s']:.2f} tokens/s{gain}; of "
              f"{row['seconds']:.1f} s noise {row['noise_s']:.1f}, waiting {row['exposed_wait_s']:.1f}; "
              f"{row['bytes_up'] / 1e9:.2f} GB up")  # fmt: skip
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "out")}
    options.out.write_text(json.dumps({"bench": "generate", "machine": machine(), **settings, "rows": rows}) + "\n")
    print(f"wrote {options.out}")


def measured(weights: str, checkpoint: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for one member, and one for all."""
    model = distzo2.from_pretrained(checkpoint, weights=weights, device=options.device, directory=options.work)
    model.generation_config.eos_token_id = None  # every text gets all of its tokens
    optimizer = distzo2.ZOSGD(model, lr=0.0, eps=1e-3, noise=options.noise)
    ids = torch.randint(4, 50000, (options.prompts, 16), generator=torch.Generator().manual_seed(0)).tolist()
    samples: dict[int, list[dict[str, Any]]] = {1: [], options.members: []}
    first_of: list[Any] = []
    run(model, optimizer, ids, options.members, 2, options)  # new code runs some lanes alone
    for _ in range(options.rounds):
        for members, found in samples.items():
            figures, texts = run(model, optimizer, ids, members, options.tokens, options)
            found.append(figures)
            first_of.append(texts[0])
    if any(texts != first_of[0] for texts in first_of):
        raise AssertionError("a member alone and the same one in company wrote different tokens")
    rows = []
    for members, found in samples.items():
        row = {key: statistics.median(each[key] for each in found) for key in found[0]}
        made = members * options.prompts * options.tokens
        rows.append({"weights": weights, "members": members, **row, "tokens_per_s": made / row["seconds"]})
    distzo2.runtime_of(model).close()
    return rows


def run(
    model: nn.Module, optimizer: Any, ids: Sequence[Any], members: int, tokens: int, options: argparse.Namespace
) -> tuple[dict[str, float], list[Any]]:
    """Seconds and counters of one generation, and what each member wrote."""
    runtime, settings = distzo2.runtime_of(model), optimizer.settings
    closure = functools.partial(written, model, ids, tokens)
    lanes = []
    for member in range(members):
        term = Term(FAMILIES[options.noise], 0, member // 2, 0, settings.eps * (-1) ** member)
        lanes.append(Lane(Emission((term,)), 0, closure, RandomStream.seeded(runtime.device, 0, 0, 0)))
    runtime.reset_stats()
    start = time.perf_counter()
    runtime.run(lanes)
    seconds, stats = time.perf_counter() - start, runtime.stats()
    return {"seconds": seconds} | {key: stats.get(key, 0) for key in KEPT}, [lane.result for lane in lanes]


def written(model: nn.Module, ids: Sequence[Any], tokens: int) -> list[list[int]]:
    made = distzo2.generate_batch(model, ids, max_new_tokens=tokens, batch_size=len(ids), pad_id=1)
    return [each.tokens for each in made]


if __name__ == "__main__":
    main()
