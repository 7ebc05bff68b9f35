"""A step of a small transformer, by the runtime: what a plan made of single operations is held against. In a step the
operations find caches full of other things, memory that was just freed, and threads that another lane has used."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distzo2.planning.measure_compute import DTYPES, synchronizer
from distzo2.planning.measure_timing import Effort

WIDTH, HEADS, LAYERS, VOCABULARY = 768, 12, 3, 16384
SIZES = {"float32": (4, 128), "bfloat16": (1, 64)}  # sequences, tokens; bf16 is slow without instructions for it
QUICK_SIZE = (1, 16)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkvo = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        y = self.norms[0](x)
        q, k, v = (m(y).view(rows, tokens, self.heads, -1).transpose(1, 2) for m in self.qkvo[:3])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.qkvo[3](y.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.down(F.relu(self.up(self.norms[1](x))))


class ProbeModel(nn.Module):
    """Blocks as OPT's, embeddings and a head; `forward` returns the loss of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(_Block(WIDTH, HEADS) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), input_ids[:, 1:].reshape(-1))


def measure_step(
    device: torch.device, effort: Effort, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> list[dict[str, Any]]:
    """Rows of device, dtype, rows, tokens, threads; compute_s and noise_s, medians of steps with weights on the device.

    On a GPU, whose work the host does not wait for, compute_s is the whole step and noise_s null.
    """
    import distzo2

    result = []
    for name, dtype in dtypes.items():
        rows, tokens = QUICK_SIZE if effort.quick else SIZES[name] if device.type == "cpu" else (8, 512)
        model = distzo2.offload(ProbeModel().to(dtype), device=device, weights="device")
        runtime, synchronize = distzo2.runtime_of(model), synchronizer(device)
        opt = distzo2.ZOSGD(model, lr=1e-9, eps=1e-3, max_coef=None, seed=1)
        ids = torch.arange(rows * tokens, device=device).view(rows, tokens) % VOCABULARY
        compute, noise = [], []
        for number in range(effort.rounds + 2):  # two to warm up
            runtime.reset_stats()
            opt.step(lambda m=model, i=ids: m(i))
            synchronize()
            if number >= 2:
                stats = runtime.stats()
                compute.append(stats["compute_s"] if device.type == "cpu" else opt.last.seconds)
                noise.append(stats["noise_s"])
        opt.close()
        runtime.close()
        result.append(
            {
                "device": str(device),
                "dtype": name,
                "rows": rows,
                "tokens": tokens,
                "threads": torch.get_num_threads() if device.type == "cpu" else None,
                "compute_s": statistics.median(compute),
                "noise_s": statistics.median(noise) if device.type == "cpu" else None,
            }
        )
    return result
