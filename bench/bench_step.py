"""What a ZO step costs beside the bare forwards that it is made of, in one process, interleaved.

    python bench/bench_step.py time --model opt-125m --dtype float32 --batch 4 --tokens 128
    python bench/bench_step.py time --model opt-1.3b --dtype bfloat16 --batch 1 --tokens 512 --modes host,disk
    python bench/bench_step.py time --lora 8 --modes host,disk
    python bench/bench_step.py memory --model opt-1.3b --dtype bfloat16 --batch 1 --tokens 512

`time` measures, in turn and several times: two bare forwards, the plain torch loop (perturbation in place by
torch.randn, as MeZO does it), and our step with the weights in each place. `memory` measures the peak resident memory
of a run with its weights on disk, beside the bound: residents + slots + scratch + what a bare one-layer forward takes
above its weights + 0.15 GB.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_checkpoint import write_random_checkpoint
from transformers import AutoModelForCausalLM

import distzo2
from distzo2.models.shapes import SHAPES, shape_config


def peak_resident_bytes(reset: bool = False) -> int:
    """VmHWM of this process; with `reset` it starts anew from what is resident now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    result = {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def loss_closure(model, ids):
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.float()


@torch.no_grad()
def plain_step(model, closure, eps: float, lr: float, seed: int) -> None:
    """The usual loop: the noise drawn four times, perturbation in place, restored by subtraction."""

    def add(scale: float) -> None:
        generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
        for p in model.parameters():
            z = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
            p.data.add_(z, alpha=scale)

    add(eps)
    plus = closure().item()
    add(-2 * eps)
    minus = closure().item()
    add(eps)
    add(-lr * (plus - minus) / (2 * eps))


def timed(function, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_steps(args: argparse.Namespace) -> dict:
    dtype, compute = getattr(torch, args.dtype), args.compute_dtype and getattr(torch, args.compute_dtype)
    ids = torch.randint(4, 50000, (args.batch, args.tokens), device=args.device)
    checkpoint = Path(args.checkpoints) / f"{args.model}-{args.dtype}"
    write_random_checkpoint(checkpoint, args.model, dtype)
    runs = {}
    if not args.skip_bare:
        bare = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=compute or dtype).eval().to(args.device)
        closure = loss_closure(bare, ids)

        @torch.no_grad()
        def two_forwards() -> None:
            closure()
            closure()

        runs["two bare forwards"] = two_forwards
        if not args.skip_plain:
            runs["plain loop"] = lambda: plain_step(bare, closure, 1e-3, 0.0, 0)
    streamed = {}
    for mode in args.modes.split(","):
        directory = tempfile.mkdtemp(dir=args.checkpoints) if mode == "disk" else None
        model = distzo2.from_pretrained(
            checkpoint, device=args.device, weights=mode, dtype=dtype, compute_dtype=compute, directory=directory
        )
        if args.lora:
            from peft import LoraConfig, inject_adapter_in_model

            with distzo2.edit(model):
                inject_adapter_in_model(LoraConfig(r=args.lora, target_modules=["q_proj", "v_proj"]), model)
        opt = distzo2.ZOSGD(model, lr=1e-7, eps=1e-3, noise=args.noise)
        runs[f"step, weights={mode}"] = functools.partial(opt.step, loss_closure(model, ids))
        streamed[f"step, weights={mode}"] = distzo2.runtime_of(model)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for function in runs.values():  # the first run of each allocates, and has no update to apply
        for _ in range(args.warmup):
            function()
    for runtime in streamed.values():
        runtime.reset_stats()
    for _ in range(args.repeats):
        for name, function in runs.items():
            seconds[name].append(timed(function, args.device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    reference = median.get("two bare forwards") or median[next(iter(median))]
    rows = []
    for name, values in seconds.items():
        rows.append({"name": name, "median_s": median[name], "min_s": min(values), "ratio": median[name] / reference})
        if name in streamed:
            stats = streamed[name].stats()
            counted = [k for k in stats if k.endswith("_s") or k in ("bytes_up", "bytes_down")]
            rows[-1]["per_step"] = {k: stats[k] / args.repeats for k in counted}
        print(f"{name:28s} {median[name]:8.3f} s   {rows[-1]['ratio']:.3f}x", *_parts(rows[-1]), flush=True)
    return {"bench": "step time", "rows": rows}


def _parts(row: dict) -> list[str]:
    parts = row.get("per_step", {})
    seconds = [f"{k[:-2]} {parts[k]:.3f} s" for k in ("compute_s", "noise_s", "exposed_wait_s") if k in parts]
    return seconds + [f"{k[6:]} {parts[k] / 1e6:.1f} MB" for k in ("bytes_up", "bytes_down") if k in parts]


def measure_memory(args: argparse.Namespace) -> dict:
    dtype = getattr(torch, args.dtype)
    ids = torch.randint(4, 50000, (args.batch, args.tokens))
    checkpoint = Path(args.checkpoints) / f"{args.model}-{args.dtype}"
    write_random_checkpoint(checkpoint, args.model, dtype)
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_config(shape_config(args.model, num_layers=1)).to(dtype).eval()
        bare_weights = sum(p.numel() * p.element_size() for p in bare.parameters())
        peak_resident_bytes(reset=True)
        loss_closure(bare, ids)()
        bare_above = peak_resident_bytes() - bare_weights
    del bare
    peak_resident_bytes(reset=True)
    directory = tempfile.mkdtemp(dir=args.checkpoints)
    model = distzo2.from_pretrained(checkpoint, weights="disk", dtype=dtype, directory=directory)
    opt = distzo2.ZOSGD(model, lr=1e-7, eps=1e-3)
    loading_peak = peak_resident_bytes()
    for _ in range(args.repeats):
        opt.step(loss_closure(model, ids))
    peak = peak_resident_bytes()
    stats = distzo2.runtime_of(model).stats()
    distzo2.runtime_of(model).close()
    declared = {k: stats[k] for k in ("resident_bytes", "slot_bytes", "scratch_bytes")}
    bound = sum(declared.values()) + bare_above + 150_000_000
    result = {
        "bench": "peak memory, weights on disk",
        "model_bytes": stats["resident_bytes"] + stats["streamed_bytes"],
        **declared,
        "bare_one_layer_above_weights": bare_above,
        "bound": bound,
        "peak_loading": loading_peak,
        "peak": peak,
        "within": peak <= bound,
    }
    for key, value in result.items():
        print(f"{key:32s} {value}" if isinstance(value, (bool, str)) else f"{key:32s} {value / 1e9:.3f} GB")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--model", choices=SHAPES, default="opt-125m", help="published OPT shape, random weights")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--compute-dtype", help="what is computed in, and the bare forwards (default: as stored)")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--device", default="cpu", help="where it computes")
    parser.add_argument("--modes", default="host", help="where our weights live: host, disk, device, comma-separated")
    parser.add_argument("--lora", type=int, default=0, help="train adapters of this rank at q and v, and nothing else")
    parser.add_argument("--noise", default="normal", help="normal or rademacher")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repetitions; the median is told")
    parser.add_argument("--warmup", type=int, default=2, help="runs of each before any is timed")
    parser.add_argument("--skip-bare", action="store_true", help="ours only (the bare model is not built)")
    parser.add_argument("--skip-plain", action="store_true", help="without the plain torch loop")
    kept = tempfile.gettempdir() + "/distzo2-bench"
    parser.add_argument("--checkpoints", default=kept, help="where random models are kept")
    parser.add_argument("--json", help="append the result to this file, one line of JSON")
    args = parser.parse_args()
    result = time_steps(args) if args.what == "time" else measure_memory(args)
    result |= {"command": " ".join(sys.argv), "machine": machine()}
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
