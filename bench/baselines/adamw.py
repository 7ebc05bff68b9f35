"""AdamW by backpropagation on the lines of `distzo2 finetune`, for comparison: same batches, same objective, float32.

    python bench/baselines/adamw.py --model DIR --train train.jsonl --eval held_out.jsonl --lr 3e-5 --out DIR

Writes DIR/metrics.jsonl with the lines that `finetune` writes: loss, seconds and peak memory of each step, and the
evaluations. The rate falls linearly, without warm-up or weight decay. A run that was cut begins anew.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from distzo2.run.metrics import peak_bytes
from distzo2.tasks.batches import DataOrder
from distzo2.tasks.examples import load_examples
from distzo2.tasks.kinds import model_kind
from distzo2.tasks.objectives import Objective
from distzo2.tasks.tokenize import load_tokenizer


def main() -> None:
    """Parse the options, train, write a line for each step and evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kind, tokenizer = model_kind(options.model), load_tokenizer(options.model)
    reading = {"kind": kind, "limit": kind.limit(None)}
    train, held_out = (load_examples(path, tokenizer, **reading) for path in (options.train, options.eval))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.eval()  # as finetune: no dropout
    objective = Objective(model, "choices", pad_id=kind.padding(tokenizer))
    order = DataOrder(len(train), options.batch_size, options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    with (options.out / "metrics.jsonl").open("w") as file:
        for step in range(options.steps + 1):
            if step % options.eval_every == 0 or step == options.steps:
                start = time.perf_counter()
                totals = torch.zeros(4, dtype=torch.float64)
                with torch.no_grad():
                    for first in range(0, len(held_out), options.batch_size):
                        some = held_out[first : first + options.batch_size]
                        totals += objective.evaluation(objective.batch(some))()
                loss_sum, count, hits, answers = totals.tolist()
                line = {"kind": "eval", "step": step, "loss": loss_sum / count, "accuracy": hits / answers}
                line |= {"examples": len(held_out), "seconds": time.perf_counter() - start}
                print(json.dumps(line), file=file, flush=True)
            if step == options.steps:
                break
            start = time.perf_counter()
            loss = objective.closure(objective.batch([train[i] for i in order.batch(step)]))()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            line = {"kind": "step", "step": step, "loss": loss.item(), "seconds": time.perf_counter() - start}
            print(json.dumps(line | {"peak": peak_bytes()}), file=file, flush=True)


if __name__ == "__main__":
    main()
