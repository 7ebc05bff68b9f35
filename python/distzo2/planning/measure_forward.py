"""What a plan needs to know of a device besides its links: the seconds of what a forward is made of, of a unit's visit,
and of handing lanes over. Rates depend on shapes, so that these are seconds at shapes."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import distzo2_core as core
from distzo2.planning.measure_compute import DTYPES, backends_of, synchronizer
from distzo2.planning.measure_timing import Effort, interleaved_seconds
from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update

HEAD = 64
VOCABULARY = 50304  # results of more than 32 MiB are fresh pages of the system at each call
# rows (tokens), inner, columns: a transformer's products at few and many tokens, up, down, and over a vocabulary
PRODUCTS = (
    (128, 768, 768),
    (128, 768, 3072),
    (512, 768, 768),
    (512, 768, 3072),
    (512, 3072, 768),
    (512, 2048, 2048),
    (2048, 1024, 1024),
    (256, 768, VOCABULARY),
)
GPU_SCALE = 4  # of inner and columns, where products of 1024 are over before they have begun
ATTENTION = ((128, 32), (512, 8), (1024, 4))  # tokens, sequences x heads
STREAM_BYTES = (1 << 20, 8 << 20, 64 << 20)  # of the result
COLD_BYTES = 128 << 20  # more than caches hold
# Kinds of visits: updates of one term that are applied and written back, perturbed copies of one other noise tensor.
VISITS = {"visit": (1, 2), "update": (1, 0), "pair": (0, 2), "single": (0, 1)}
SLOW_S = 0.4  # a product that takes longer says no more than a smaller one


@torch.no_grad()
def measure_forward(
    device: torch.device, effort: Effort, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> list[dict[str, Any]]:
    """Rows of device, what, dtype, size, threads, seconds.

    product: x·Wᵀ + b of size (rows, inner, columns); attention: causal, (tokens, tokens, head width, batch x heads);
    stream: relu to a new tensor, size (bytes of the result,); softmax: log_softmax over a vocabulary, (rows, columns).
    """
    scale = 1 if effort.quick or device.type == "cpu" else GPU_SCALE
    shrink = 8 if effort.quick else 1
    synchronize = synchronizer(device)
    contenders: dict[tuple, Callable[[], Any]] = {}
    for name, dtype in dtypes.items():

        def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.full(shape, 0.01, dtype=dtype, device=device)

        # As in a pass, weights are not in the caches: each call takes the next copy of them in this memory.
        cold = made(max(COLD_BYTES // dtype.itemsize, scale**2 * max(p[1] * p[2] for p in PRODUCTS)) // shrink)
        for rows, inner, columns in PRODUCTS:
            size = (rows, scale * inner // shrink, scale * columns // shrink)
            copies = cold.numel() // (size[1] * size[2])
            w = cold[: copies * size[1] * size[2]].view(copies, size[2], size[1])
            x, b = made(size[0], size[1]), made(size[2])
            turn = itertools.cycle(range(copies))
            call = functools.partial(lambda x, w, b, turn: F.linear(x, w[next(turn)], b), x, w, b, turn)
            if contenders and _once(call, synchronize) > SLOW_S:
                continue
            contenders["product", name, size] = call
        for tokens, batch in ATTENTION:
            q = made(1, scale * batch, tokens // shrink, HEAD)
            size = (tokens // shrink, tokens // shrink, HEAD, scale * batch)
            contenders["attention", name, size] = lambda q=q: F.scaled_dot_product_attention(q, q, q, is_causal=True)
        for num_bytes in STREAM_BYTES:
            x = made(num_bytes * scale // dtype.itemsize // shrink)
            contenders["stream", name, (num_bytes * scale // shrink,)] = lambda x=x: F.relu(x)
    logits = torch.full((256 // shrink, VOCABULARY), 0.01, device=device)
    contenders["softmax", "float32", tuple(logits.shape)] = lambda: torch.log_softmax(logits, -1)
    seconds = interleaved_seconds(contenders, effort, synchronize=synchronize)
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return [
        {"device": str(device), "what": w, "dtype": d, "size": list(size), "threads": threads, "seconds": seconds[key]}
        for key in contenders
        for w, d, size in [key]
    ]


def _once(call: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure_visits(
    device: torch.device, effort: Effort, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> list[dict[str, Any]]:
    """Rows of device, backend, what, family, dtype, threads, elements_per_s, of weights as large as a block's."""
    numel = 1 << (18 if effort.quick else 23 if device.type == "cpu" else 27)
    contenders: dict[tuple, Callable[[], Any]] = {}
    for backend in backends_of(device)[:1]:
        for name, dtype in dtypes.items():
            weights = torch.full((numel,), 0.02, dtype=dtype, device=device).view(torch.uint8)
            copies = [torch.empty_like(weights) for _ in range(2)]
            table = SegmentTable([Segment(0, numel, dtype, 3, 0, 0, 1024, numel // 1024)])
            for family, code in core.FAMILIES.items():
                update = Update(1, (GroupScalars(1e-6, 0.0, 1.0, 1.0),), (Term(code, 1, 0, 0, 1.0),))
                emits = [Emit((Term(code, 2, 0, 0, sign * 1e-3),), (1.0,)) for sign in (1, -1)]
                for what, (num_updates, num_emits) in VISITS.items():
                    contenders[backend, what, family, name] = functools.partial(
                        core.materialize,
                        weights,
                        table,
                        seed=1,
                        updates=[update] * num_updates,
                        emits=emits[:num_emits],
                        outs=copies[:num_emits],
                        write_back=num_updates > 0,
                        backend=backend,
                    )
    seconds = interleaved_seconds(contenders, effort, synchronize=synchronizer(device))
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return [
        {
            "device": str(device),
            "backend": backend,
            "what": what,
            "family": family,
            "dtype": name,
            "threads": threads,
            "elements_per_s": numel / value,
        }
        for (backend, what, family, name), value in seconds.items()
    ]


class _Chain(nn.Module):
    """Blocks of next to no work: what a pass over them takes is the hand-over."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


@torch.no_grad()
def measure_host(device: torch.device, effort: Effort) -> dict[str, Any]:
    """Seconds of the host, per unit of a pass: `visit_s` for the unit, `lane_s` for each lane that runs on it,
    `materialize_s` for a call that makes perturbed copies; `op_s` to start one small operation; `step_s` of a step for
    what is done once.

    From steps over two numbers of blocks and of lanes; the operations of the lanes themselves are taken off.
    """
    import distzo2

    few, many = 4, effort.pick(12, 36)
    x = torch.zeros(4, 8, device=device)
    chains = {n: _Chain(n).to(device) for n in (few, many)}
    contenders: dict[Any, Callable[[], Any]] = {}
    for n, chain in chains.items():
        contenders["bare", n] = lambda c=chain: c(x)
    streamed, runtimes = {}, []
    for n in chains:
        streamed[n] = distzo2.offload(_Chain(n), device=device, weights="device")
        runtimes.append(distzo2.runtime_of(streamed[n]))
        for lanes in (1, 5):
            calls = [lambda m=streamed[n]: m(x)] * lanes
            contenders["clean", n, lanes] = lambda m=streamed[n], c=calls: distzo2.evaluate(m, c)
    models = {n: distzo2.offload(_Chain(n), device=device, weights="device") for n in chains}
    for n, model in models.items():
        runtimes.append(distzo2.runtime_of(model))
        opt = distzo2.ZOSGD(model, lr=1e-9, eps=1e-3, max_coef=None)
        contenders["step", n] = lambda o=opt, m=model: o.step(lambda m=m: m(x))
    for call in contenders.values():  # the first passes watch the closures' code
        call()
    seconds = interleaved_seconds(contenders, effort, synchronize=synchronizer(device))
    for runtime in runtimes:
        runtime.close()

    def slope(*key: Any) -> float:
        """Seconds for each block."""
        return (seconds[key[0], many, *key[1:]] - seconds[key[0], few, *key[1:]]) / (many - few)

    bare = slope("bare")
    lane = (slope("clean", 5) - slope("clean", 1)) / 4 - bare
    visit = slope("clean", 1) - lane - bare
    made = slope("step") - visit - 2 * (lane + bare)
    once = seconds["step", few] - few * slope("step")
    small = torch.zeros(8, device=device)
    op_s = interleaved_seconds({"": lambda: small + small}, effort, synchronize=synchronizer(device))[""]
    floor = 1e-7  # of differences that noise has made negative
    figures = {"visit_s": visit, "lane_s": lane, "materialize_s": made, "op_s": op_s, "step_s": once}
    return {"device": str(device), **{name: max(value, floor) for name, value in figures.items()}}
