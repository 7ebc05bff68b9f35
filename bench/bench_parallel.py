"""Tokens/s of two single-threaded ranks against one single-threaded rank, sharing a step by perturbation or by data.

    python bench/bench_parallel.py --model opt-125m --batch 16 --tokens 128 --micro-batches 2

One rank, PertP on two and DDP on two run the same lanes in turn, several times: the processes are started once, and the
ones that are not measured wait. Printed: the median of each, and the bytes that a step exchanges. A step of OPT-125M at
16 x 128 tokens is 1.3 TFLOP: half a minute on a core of 45 GFLOP/s, so that a round takes a minute.

Beside them, in the same rounds, two processes multiply matrices that stay in their caches, each as often as one does
alone: what the machine's two cores give to two ranks at best.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bench_common import machine

from distzo2.models.shapes import SHAPES, shape_config

TINY = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
SIDE = 512  # of the yardstick's matrices: 3 MiB in fp32
CONTENDERS: dict[str, tuple[int, int] | None] = {"one rank": None, "PertP, 2 ranks": (2, 1), "DDP, 2 ranks": (1, 2)}


def serve(pipe: Connection, rank: int, port: int, args: argparse.Namespace) -> None:
    """A rank: on request, runs the yardstick, or a step on a mesh of a new model with the same weights."""
    import copy

    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    import distzo2
    import distzo2.parallel

    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the parent's
    config = shape_config("opt-125m" if args.model == "tiny" else args.model)
    for name, value in TINY.items() if args.model == "tiny" else ():
        setattr(config, name, value)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).to(getattr(torch, args.dtype)).eval()
    ids = torch.randint(4, 50000, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0))

    def loss(model: torch.nn.Module, part: torch.Tensor) -> torch.Tensor:
        return model(input_ids=part, labels=part, use_cache=False).loss.float()

    store = dist.PrefixStore("bench", dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    while (order := pipe.recv()) is not None:
        if order == "yardstick":
            pipe.send((multiply(args.yardstick), {}, None))
            continue
        if order != "alone":
            distzo2.parallel.init(*order, slice=args.slice == "on")
        model = distzo2.offload(copy.deepcopy(base), weights=args.weights, directory=args.directory)
        opt = distzo2.ZOSGD(model, lr=1e-7, eps=1e-3, num_probes=args.probes)
        parts = ids.chunk(args.micro_batches)
        for _ in range(3):  # threads, and the first touch of buffers, which units take in turn
            opt.step([lambda model=model, part=part: loss(model, part[:1, :8]) for part in parts])
        stats = {} if order == "alone" else distzo2.parallel.stats()
        runtime = distzo2.runtime_of(model)
        runtime.reset_stats()
        start = time.perf_counter()
        opt.step([lambda model=model, part=part: loss(model, part) for part in parts], tokens=ids.numel())
        seconds = time.perf_counter() - start
        now = {} if order == "alone" else distzo2.parallel.stats()
        figures = {name: now[name] - stats[name] for name in now}
        for name in ("compute_s", "noise_s", "exposed_wait_s", "gather_wait_s"):
            if name in runtime.stats():
                figures[name] = round(runtime.stats()[name], 3)
        losses = opt.last.losses
        opt.close()
        runtime.close()
        distzo2.parallel.shutdown()
        pipe.send((seconds, figures, losses))


def multiply(count: int) -> float:
    """Times matrix products whose operands stay in the caches, in seconds."""
    a, b, result = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE), torch.empty(SIDE, SIDE)
    torch.mm(a, b, out=result)
    start = time.perf_counter()
    for _ in range(count):
        torch.mm(a, b, out=result)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=[*SHAPES, "tiny"], default="opt-125m", help="published shape, random weights"
    )
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a sequence")
    parser.add_argument(
        "--micro-batches", type=int, default=2, help="parts of the batch; each is a lane a perturbation"
    )
    parser.add_argument("--probes", type=int, default=1, help="perturbations a step")
    parser.add_argument("--weights", default="host", help="where the weights live: host, disk, device")
    parser.add_argument("--directory", default="/tmp/distzo2-bench", help="of block files, with --weights disk")
    parser.add_argument("--slice", choices=["on", "off"], default="off", help="slices of the streamed weights")
    parser.add_argument("--yardstick", type=int, default=500, help="products of the yardstick")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repetitions; the median is printed")
    parser.add_argument("--json", type=Path, help="append the result to this file, one line of JSON")
    args = parser.parse_args()
    import torch.distributed as dist

    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, rank, store.port, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    def run(order: Any, ranks: int) -> tuple[float, dict[str, Any], Any]:
        """Seconds of the slowest rank, what rank 0 exchanged, the losses."""
        for pipe in pipes[:ranks]:
            pipe.send(order)
        results = [pipe.recv() for pipe in pipes[:ranks]]
        return max(r[0] for r in results), results[0][1], results[0][2]

    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    yardstick: dict[int, list[float]] = {1: [], 2: []}
    figures: dict[str, dict[str, Any]] = {}
    losses: dict[str, Any] = {}
    begun = time.perf_counter()
    for number in range(args.repeats):
        for ranks, times in yardstick.items():
            times.append(run("yardstick", ranks)[0])
        for name, shape in list(CONTENDERS.items())[:: 1 if number % 2 else -1]:
            elapsed, figures[name], losses[name] = run(shape or "alone", 1 if shape is None else 2)
            seconds[name].append(elapsed)
            print(
                f"{time.perf_counter() - begun:5.0f} s  round {number + 1} of {args.repeats}: {name} {elapsed:.2f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        if any(losses[name] != losses["one rank"] for name in CONTENDERS):
            raise SystemExit(f"the losses differ: {losses}")
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(timeout=10.0)

    rows = []
    best = 2 * statistics.median(one / two for one, two in zip(yardstick[1], yardstick[2], strict=True))
    print(f"two processes that only multiply do {best:.3f}x the work of one")
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = args.batch * args.tokens / median
        speedup = statistics.median(one / time for one, time in zip(seconds["one rank"], times, strict=True))
        row = {"what": name, "seconds": median, "all_seconds": times, "tokens_per_second": rate, "speedup": speedup}
        rows.append(row | figures[name])
        print(f"{name:16s} {median:8.3f} s  {rate:9.1f} tokens/s  {speedup:.3f}x  {figures[name] or ''}")
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        result = {
            "bench": "parallel",
            "options": options,
            "rows": rows,
            "yardstick": {"speedup": best, "seconds": yardstick},
        }
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(result | {"command": " ".join(sys.argv), "machine": machine()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
