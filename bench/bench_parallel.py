"""Tokens/s of two single-threaded ranks against one single-threaded rank, sharing a step by perturbation or by data.

    python bench/bench_parallel.py --model opt-125m --batch 16 --tokens 128 --micro-batches 2

One rank, PertP on two and DDP on two run the same lanes in turn, several times: the processes are started once, and the
ones that are not measured wait. The median of each is told, and the bytes that a step exchanges.
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

from distzo2.shapes import SHAPES, opt_config

TINY = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
CONTENDERS = {"one rank": None, "PertP, 2 ranks": (2, 1), "DDP, 2 ranks": (1, 2)}


def serve(pipe: Connection, rank: int, port: int, args: argparse.Namespace) -> None:
    """A rank: makes its model once, then steps on the mesh that it is told. Rank 0 has another model for steps alone,
    since replicas must stay equal."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    import distzo2
    import distzo2.parallel

    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the parent's
    config = opt_config("opt-125m" if args.model == "tiny" else args.model)
    for name, value in TINY.items() if args.model == "tiny" else ():
        setattr(config, name, value)
    models = []
    for _ in range(2 if rank == 0 else 1):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, args.dtype)).eval()
        models.append(distzo2.offload(model, weights=args.weights, directory=args.directory))
    ids = torch.randint(4, 50000, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0))

    def loss(model: torch.nn.Module, part: torch.Tensor) -> torch.Tensor:
        return model(input_ids=part, labels=part, use_cache=False).loss.float()

    store = dist.PrefixStore("bench", dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    while (shape := pipe.recv()) is not None:
        alone = shape == (1, 1)
        if not alone:
            distzo2.parallel.init(*shape)
        model = models[-1 if alone else 0]
        closures = [lambda model=model, part=part: loss(model, part) for part in ids.chunk(args.micro_batches)]
        opt = distzo2.ZOSGD(model, lr=1e-7, eps=1e-3, num_probes=args.probes)
        opt.step(closures)  # its threads and buffers are made here
        stats = {} if alone else distzo2.parallel.stats()
        start = time.perf_counter()
        opt.step(closures, tokens=args.batch * args.tokens)
        seconds = time.perf_counter() - start
        now = {} if alone else distzo2.parallel.stats()
        distzo2.parallel.shutdown()
        pipe.send((seconds, {name: now[name] - stats[name] for name in now}, opt.last.losses))


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
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions; the median is told")
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

    def step(shape: tuple[int, int] | None) -> tuple[float, dict[str, int], Any]:
        """Seconds of the slowest rank, what rank 0 exchanged, the losses."""
        used = pipes[:1] if shape is None else pipes
        for pipe in used:
            pipe.send(shape or (1, 1))
        results = [pipe.recv() for pipe in used]
        return max(r[0] for r in results), results[0][1], results[0][2]

    for shape in CONTENDERS.values():
        step(shape)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    exchanged: dict[str, dict[str, int]] = {}
    for _ in range(args.repeats):
        for name, shape in CONTENDERS.items():
            elapsed, exchanged[name], _losses = step(shape)
            seconds[name].append(elapsed)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(timeout=10.0)

    rows = []
    alone = statistics.median(seconds["one rank"])
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = args.batch * args.tokens / median
        row = {"what": name, "seconds": median, "min": min(times), "max": max(times), "tokens_per_second": rate}
        rows.append(row | {"speedup": alone / median, **exchanged[name]})
        print(f"{name:16s} {median:8.3f} s  {rate:9.1f} tokens/s  {alone / median:.3f}x  {exchanged[name] or ''}")
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        result = {"bench": "parallel", "options": options, "rows": rows}
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(result | {"command": " ".join(sys.argv), "machine": machine()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
