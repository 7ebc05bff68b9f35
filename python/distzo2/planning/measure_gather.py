"""Rate of an all-gather between the GPUs of this machine (NCCL), or between two processes without any (gloo).

The ranks are processes of their own, started here and ended here, by their ids; they speak over the loopback interface
only, and find one another through a file. Run as a module this file is one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from distzo2.errors import DistZO2Error

TIME_LIMIT_S = 90.0


def measure_gather(
    backend: str, num_ranks: int, block_bytes: int, num_rounds: int, time_limit_s: float = TIME_LIMIT_S
) -> dict[str, Any]:
    """Each rank holds a slice of a block and gets the whole; bytes/s are the block's over the slowest rank's time.

    Raises:
        DistZO2Error: the ranks did not end within the time limit, or one failed. None is left running.
    """
    block_bytes -= block_bytes % num_ranks
    source = str(Path(__file__).parents[1])  # where distzo2 was imported from
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="distzo2-gather-") as directory:
        command = [
            sys.executable,
            "-m",
            "distzo2.planning.measure_gather",
            f"--meet={directory}/ranks",
            f"--backend={backend}",
        ]
        command += [f"--ranks={num_ranks}", f"--bytes={block_bytes // num_ranks}", f"--rounds={num_rounds}"]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_ranks):
                with open(f"{directory}/out-{rank}", "wb") as out, open(f"{directory}/err-{rank}", "wb") as err:
                    ranks.append(
                        subprocess.Popen(
                            [*command, f"--rank={rank}"],
                            stdin=subprocess.PIPE,  # closed when this process ends, which ends the ranks
                            stdout=out,
                            stderr=err,
                            env=environment,
                        )
                    )
            _wait(ranks, Path(directory), time_limit_s)
            samples = [json.loads(Path(f"{directory}/out-{rank}").read_text()) for rank in range(num_ranks)]
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
                process.stdin.close()
    slowest = [max(times) for times in zip(*samples, strict=True)]
    seconds = statistics.median(slowest)
    return {
        "backend": backend,
        "ranks": num_ranks,
        "block_bytes": block_bytes,
        "bytes_per_s": block_bytes / seconds,
    }


def _wait(ranks: list[subprocess.Popen[bytes]], directory: Path, time_limit_s: float) -> None:
    """Until all have ended well; the first that fails ends the waiting, since the others wait for it."""
    deadline = time.monotonic() + time_limit_s
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > deadline:
            raise DistZO2Error(f"the gather did not end within {time_limit_s:g} s")
        if any(process.poll() for process in ranks):
            break
        time.sleep(0.02)
    for rank, process in enumerate(ranks):
        if process.poll():
            lines = (directory / f"err-{rank}").read_text(errors="replace").strip().splitlines()
            raise DistZO2Error(f"rank {rank} of the gather failed: {lines[-1] if lines else process.returncode}")


# ---- a rank -------------------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent closes its end, or dies
    os._exit(1)


def _run_rank(options: argparse.Namespace) -> list[float]:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", options.rank) if options.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        options.backend,
        init_method=f"file://{options.meet}",
        rank=options.rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=TIME_LIMIT_S),
    )
    part = torch.full((options.bytes,), options.rank + 1, dtype=torch.uint8, device=device)
    whole = torch.zeros(options.bytes * options.ranks, dtype=torch.uint8, device=device)
    places = whole.split(options.bytes)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13's name for it
    times = []
    for number in range(options.rounds + 2):  # two to warm up
        dist.barrier()
        start = time.perf_counter()
        if device.type == "cuda":
            all_gather(whole, part)
            torch.cuda.synchronize(device)
        else:  # as slices are gathered, see `SliceExchange.gather`
            places[options.rank].copy_(part)
            for work in [dist.broadcast(place, rank, async_op=True) for rank, place in enumerate(places)]:
                work.wait()
        if number >= 2:
            times.append(time.perf_counter() - start)
    if any(int(whole[rank * options.bytes]) != rank + 1 for rank in range(options.ranks)):
        raise RuntimeError("the gathered block holds other bytes than the ranks sent")
    dist.barrier()
    dist.destroy_process_group()
    return times


def main() -> None:
    """One rank: prints its seconds of each round as JSON."""
    parser = argparse.ArgumentParser()
    for name in ("--rank", "--ranks", "--bytes", "--rounds"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--meet", required=True)
    parser.add_argument("--backend", required=True)
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print(json.dumps(_run_rank(options)), flush=True)


if __name__ == "__main__":
    main()
