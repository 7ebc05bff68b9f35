"""Checks that ranks have the bits of one: a rank over NCCL on its GPU, or two over gloo on one GPU or on the CPU.

    python bench/check_ranks.py --backend nccl --device cuda --json ranks-nccl.json
    python bench/check_ranks.py --backend gloo --device cuda --json ranks-gloo.json
    python bench/check_ranks.py --backend gloo --device cpu

Each run is a model of random blocks with dropout, trained for some steps by processes that meet on the loopback
interface as torchrun's would, with streamed weights in slices or whole. Losses, coefficients and the weights' SHA-256
must equal those of one process without a mesh. Over NCCL it also checks that a mesh alone makes no communicator, that
gathers have streams of high priority and run beside a busy compute stream, and that a communicator gives its memory
back. Ends with 1 on a difference, an error, or when --timeout seconds have passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_common import write_results
from torch import nn

NUM_BLOCKS, NUM_STEPS, BATCH, VOCABULARY = 6, 6, 32, 64
WIDTH = {"cuda": 2048, "cpu": 192}  # on a GPU a block of bf16 has 8 MiB, so that a gather takes time
BEGUN_AHEAD = 1 << 30  # cycles that the compute stream is busy, half a second

MESHES = {
    "nccl": [("one rank, slices, host", (1, 1), "host", True), ("one rank, slices, disk", (1, 1), "disk", True)],
    "gloo": [
        ("pert=2, slices, host", (2, 1), "host", True),
        ("pert=2, slices, disk", (2, 1), "disk", True),
        ("pert=2, whole, host", (2, 1), "host", False),
        ("data=2, slices, host", (1, 2), "host", True),
    ],
}


class Blocks(nn.Module):
    """Embedding, blocks with dropout, and a head; equal in every process."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1))
            for _ in range(NUM_BLOCKS)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), ids.flatten())


def run_rank(job: dict[str, Any]) -> dict[str, Any]:
    """Trains as the job says; returns the bits, and what a rank over NCCL has seen."""
    import distzo2
    import distzo2.parallel

    torch.set_num_threads(1)
    device, mesh, seen = torch.device(job["device"]), None, {}
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0  # makes the context
    if job["shape"] is not None:
        mesh = distzo2.parallel.init(*job["shape"], slice=job["slices"], device=device, limit=20.0)
    if job["backend"] == "nccl" and mesh is not None:
        seen["init_bytes"] = free - torch.cuda.mem_get_info(device)[0]
    model = Blocks(WIDTH[device.type]).to(torch.bfloat16)
    distzo2.offload(model, device=device, weights=job["weights"], directory=job["directory"], train=True)
    opt = distzo2.ZOSGD(model, lr=1e-3, eps=1e-3, seed=11)
    ids = torch.randint(0, VOCABULARY, (NUM_STEPS, 2, BATCH, 16), generator=torch.Generator().manual_seed(3)).to(device)
    history, start = [], time.perf_counter()
    for step in range(NUM_STEPS):
        opt.step([lambda part=part: model(part) for part in ids[step]])
        history.append(repr((opt.last.losses, opt.last.coefs)))
    seen["train_s"] = time.perf_counter() - start
    state = {
        name: hashlib.sha256(value.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in model.state_dict().items()
    }
    if job["slices"]:
        seen["gathers"] = distzo2.parallel.stats()["slice_gathers"]
        seen["groups"] = sorted(mesh.node.groups)
    if job["backend"] == "nccl" and mesh is not None:
        seen |= look_at_nccl(mesh, device)
    opt.close()
    distzo2.runtime_of(model).close()
    distzo2.parallel.shutdown()
    return {"history": history, "state": state, "seen": seen}


def look_at_nccl(mesh: Any, device: torch.device) -> dict[str, Any]:
    """Priority of a gather's stream, whether one runs beside a busy compute stream, and a communicator's memory."""
    from distzo2.parallel.slice_rounds import SliceExchange

    node = SliceExchange(mesh.exchange, mesh.node.nodes)
    block = torch.ones(2 * 256 * 1024 * node.size, dtype=torch.uint8, device=device)
    bounds = range(0, block.numel() + 1, block.numel() // node.size)
    side, busy = torch.cuda.Stream(device, priority=-1), torch.cuda.Event()
    torch.cuda.synchronize(device)
    free = [torch.cuda.mem_get_info(device)[0]]
    node.connect("nccl")
    for is_busy in (False, True):  # the first one makes the communicator
        if is_busy:
            free.append(torch.cuda.mem_get_info(device)[0])
            torch.cuda._sleep(BEGUN_AHEAD)
            busy.record(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            works = node.gather([block[a:b] for a, b in pairwise(bounds)], "nccl")
            for work in works:
                node.wait(work, "nccl")
        side.synchronize()
    beside = not busy.query()
    torch.cuda.synchronize(device)
    options = node.groups["nccl"]._get_backend(torch.device("cuda")).options
    node.disconnect("nccl")
    free.append(torch.cuda.mem_get_info(device)[0])
    return {
        "high_priority": options.is_high_priority_stream,
        "gather_beside_compute": beside,
        "communicator_bytes": free[0] - free[1],
        "returned_bytes": free[2] - free[1],
    }


def faults(job: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """What a rank has seen that should be otherwise."""
    found = []
    if job["slices"] and (seen["gathers"] == 0 or seen["groups"] != sorted(["words", job["backend"]])):
        found.append(f"{seen['gathers']} gathers through {seen['groups']}")
    if job["backend"] == "nccl":
        found += [name for name in ("high_priority", "gather_beside_compute") if not seen[name]]
        if seen["init_bytes"] > 64 << 20:
            found.append(f"the mesh alone took {seen['init_bytes']} bytes of the GPU")
    return found


def run(job: dict[str, Any], directory: Path, deadline: float) -> list[dict[str, Any]]:
    """Runs a job on its ranks, as torchrun would start them; returns each rank's result, or {"error"}."""
    num_ranks = 1 if job["shape"] is None else job["shape"][0] * job["shape"][1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [directory / f"rank{rank}" for rank in range(num_ranks)]
    processes = []
    for rank, place in enumerate(places):
        place.mkdir(parents=True)
        (place / "job.json").write_text(json.dumps(job | {"directory": str(place)}))
        env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
        if job["shape"] is not None:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
            env |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(place / "log", "wb") as log:
            command = [sys.executable, __file__, "--rank", str(place)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    results = []
    for rank, (process, place) in enumerate(zip(processes, places, strict=True)):
        if process.returncode == 0:
            results.append(json.loads((place / "result.json").read_text()))
        else:
            why = "ran out of time" if process.returncode == -9 else f"ended with {process.returncode}"
            results.append({"error": f"rank {rank} {why}: {(place / 'log').read_text()[-2000:]}"})
    return results


def compare(results: list[dict[str, Any]], expected: dict[str, Any], job: dict[str, Any]) -> list[str]:
    """How the results of ranks differ from those of one rank."""
    found = []
    for rank, result in enumerate(results):
        if "error" in result or "error" in expected:
            found.append(result.get("error") or f"one rank alone: {expected['error']}")
            continue
        steps = [i for i, (a, b) in enumerate(zip(result["history"], expected["history"], strict=True)) if a != b]
        names = [name for name, digest in expected["state"].items() if result["state"][name] != digest]
        found += [f"rank {rank}: losses or coefficients differ from step {steps[0]} on"] if steps else []
        found += [f"rank {rank}: {len(names)} weights differ, first {names[0]}"] if names else []
        found += [f"rank {rank}: {fault}" for fault in faults(job, result["seen"])]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=MESHES, default="gloo", help="what slices are gathered through")
    parser.add_argument("--device", choices=WIDTH, default="cpu", help="where the ranks compute")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that all runs may take")
    parser.add_argument("--json", type=Path, help="where the result is written; by default nowhere")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        result = run_rank(json.loads((args.rank / "job.json").read_text()))
        (args.rank / "result.json").write_text(json.dumps(result))
        return 0
    if args.backend == "nccl" and args.device == "cpu":
        parser.error("--backend nccl: expected --device cuda")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the ranks end too
    deadline, rows = time.monotonic() + args.timeout, []
    device = "cuda:0" if args.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        alone = {"shape": None, "weights": "host", "slices": False, "device": device, "backend": None}
        (expected,) = run(alone, Path(scratch) / "alone", deadline)
        for number, (what, shape, weights, slices) in enumerate(MESHES[args.backend]):
            job = alone | {"shape": shape, "weights": weights, "slices": slices, "backend": args.backend}
            start = time.monotonic()
            results = run(job, Path(scratch) / str(number), deadline)
            found = compare(results, expected, job)
            row = {"what": what, "same_bits": not found, "found": found, "seconds": time.monotonic() - start}
            rows.append(row | results[0].get("seen", {}))
            print(f"{what:24s} {'ok' if not found else 'FAILED'}  {row['seconds']:.1f} s", *found, sep="\n    ")
    if args.json:
        write_results(args.json, "ranks", rows, backend=args.backend, device=args.device)
    return 0 if all(row["same_bits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
