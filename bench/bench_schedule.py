"""What scheduling costs the host: the calls of the copy engine for one visit, the whole of a visit, and a lane's unit.

    python bench/bench_schedule.py
    python bench/bench_schedule.py --blocks 96 --steps 200 --json bench/results/schedule.json

A model of blocks so small that neither computing nor moving them takes time is trained with its weights on disk. For
each visit the engine is asked to acquire a block, to release it changed, and to prefetch the next ones; what it waits
for is left out. `visit` is a step's time by block beside that of two bare forwards: hooks, hand-over of two lanes,
noise, and waiting included. Medians over all visits.

`lane_unit` is what a small model shows, whose every operation waits for the host: OPT with 24 layers of width 32, on
the device, one thread, SPSA. A step's time less two bare forwards and the noise, by lane and unit; and what a step
looks for in all modules: buffers, and configurations with a key-value cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from bench_common import write_results
from torch import nn

import distzo2
from distzo2.streaming.isolation import BufferGuard, no_kv_cache
from distzo2.weights.store import StreamingStore
from distzo2_core import walk_modules

WIDTH = 8
CALLS = ("acquire", "release", "prefetch")


class Model(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.mean()


def timed_calls() -> dict[str, list[int]]:
    """Nanoseconds of every call from now on."""
    samples: dict[str, list[int]] = {name: [] for name in CALLS}
    for name, values in samples.items():
        call = getattr(StreamingStore, name)

        def timed(*args, call=call, values=values):
            start = time.perf_counter_ns()
            try:
                return call(*args)
            finally:
                values.append(time.perf_counter_ns() - start)

        setattr(StreamingStore, name, timed)
    return samples


def small_opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=24, num_attention_heads=2, vocab_size=64,
                       max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    torch.manual_seed(0)
    return OPTForCausalLM(config).eval()


def lane_unit_row(num_steps: int) -> dict[str, float]:
    bare, model = small_opt(), distzo2.offload(small_opt(), weights="device")
    ids, guard = torch.randint(0, 64, (2, 16)), BufferGuard()
    opt, runtime = distzo2.ZOSGD(model, lr=1e-4, eps=1e-3), distzo2.runtime_of(model)
    forward = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    samples: dict[str, list[float]] = {"step": [], "bare": [], "noise": [], "modules": []}
    for _ in range(10 + num_steps):
        runtime.reset_stats()
        times = [time.perf_counter()]
        opt.step(forward)
        times.append(time.perf_counter())
        with torch.no_grad():
            bare(input_ids=ids, labels=ids), bare(input_ids=ids, labels=ids)
        times.append(time.perf_counter())
        slots, configs, training = walk_modules(model)
        with no_kv_cache(configs):
            guard.begin(slots, training)
        times.append(time.perf_counter())
        step, both, modules = (b - a for a, b in pairwise(times))
        for name, value in zip(samples, (step, both, runtime.stats()["noise_s"], modules), strict=True):
            samples[name].append(value)
    runtime.close()
    micros = {name: statistics.median(values[10:]) * 1e6 for name, values in samples.items()}
    num_visits = 2 * len(runtime.units)
    return {
        "units": len(runtime.units),
        "bare_us": micros["bare"] / num_visits,
        "noise_us": micros["noise"] / num_visits,
        "lane_unit_us": (micros["step"] - micros["bare"] - micros["noise"]) / num_visits,
        "modules_us": micros["modules"],
    }


def main() -> None:
    """Parse the options, run, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--directory", type=Path, help="of the block file (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bare, x = Model(options.blocks), torch.randn(2, WIDTH)
    samples = timed_calls()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        model = distzo2.offload(Model(options.blocks), weights="disk", directory=directory)
        opt = distzo2.ZOSGD(model, lr=1e-4, eps=1e-3)
        for _ in range(5):
            opt.step(lambda: model(x))
        for values in samples.values():
            values.clear()
        steps, forwards = [], []
        for _ in range(options.steps):
            start = time.perf_counter()
            opt.step(lambda: model(x))
            between = time.perf_counter()
            with torch.no_grad():
                bare(x), bare(x)
            steps.append(between - start)
            forwards.append(time.perf_counter() - between)
        distzo2.runtime_of(model).close()
    micros = {name: statistics.median(values) / 1e3 for name, values in samples.items()}
    num_prefetches = len(samples["prefetch"]) / len(samples["acquire"])
    engine = micros["acquire"] + micros["release"] + num_prefetches * micros["prefetch"]
    visit = (statistics.median(steps) - statistics.median(forwards)) / options.blocks * 1e6
    row = {"blocks": options.blocks, **{f"{k}_us": v for k, v in micros.items()}, "prefetches": num_prefetches}
    row |= {"engine_us": engine, "visit_us": visit}
    rows = [row, lane_unit_row(options.steps)]
    for row in rows:
        print("  ".join(f"{name} {value:.1f}" for name, value in row.items()))
    write_results(options.json, "schedule", rows)


if __name__ == "__main__":
    main()
