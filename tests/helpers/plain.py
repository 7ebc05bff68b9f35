"""The plain whole-model ZO loop that streamed runs are compared with, bit for bit.

Its ops are those of one tensor, native unless `backend` says otherwise: tests/core shows that the reference, in NumPy
and ten times as slow, has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

import distzo2_core
from distzo2_core.types import matrix_shape


def flat_losses(opt) -> list[float]:
    """The losses of an optimizer's last step, in the order of `plain_loop`."""
    return np.ravel(opt.last.losses).tolist()


def plain_loop(
    model: nn.Module,
    closures: Sequence[Sequence[Callable[[], torch.Tensor]]],
    *,
    lr: Callable[[int], float],
    eps: float,
    seed: int,
    num_probes: int = 1,
    weight_decay: float = 0.0,
    noise: str = "normal",
    trainable: Callable[[str], bool] = lambda name: True,
    compute: torch.dtype | None = None,
    wide: Callable[[str], bool] = lambda name: False,
    backend: str | None = None,
) -> list[list[float]]:
    """Two-sided SPSA over the whole model in memory.

    Args:
        model: changed in place.
        closures: for each step the closures of its micro-batches.
        lr: the learning rate of a step.
        compute: what modules compute with: weights are perturbed in float32 from the stored ones, and rounded to it.
        wide: of what float32 is stored, and modules compute with what they declare where `compute` is None.

    Returns:
        The losses of each step, in the order of evaluation: probe 0 +, all micro-batches; probe 0 −; ...
    """
    eps = float(np.float32(eps))
    params = [(i, n, p) for i, (n, p) in enumerate(model.named_parameters()) if trainable(n)]
    history = []
    seen = {n: compute or (p.dtype if wide(n) else None) for n, p in model.named_parameters()}  # None: as stored
    stored = {n: p.data.float() if wide(n) else p.data for n, p in model.named_parameters()}
    kept = {b: b.dtype for b in model.buffers() if compute and b.dtype in (torch.float16, torch.bfloat16)}
    for b in kept:
        b.data = b.data.to(compute)
    for step, micro_batches in enumerate(closures):
        for n, p in model.named_parameters():
            p.data = stored[n]
        clean = {i: p.data.clone() for i, _, p in params}
        losses = {}
        for n, p in model.named_parameters():
            p.data = p.data if seen[n] is None else p.data.to(seen[n])
        for probe in range(num_probes):
            for sign in (+1, -1):
                for i, n, p in params:
                    w = clean[i].clone() if seen[n] is None else clean[i].float().clone()
                    w = distzo2_core.perturb_(
                        w, sign * eps, seed=seed, step=step, param=i, probe=probe, family=noise, backend=backend
                    )
                    p.data = w if seen[n] is None else w.to(seen[n])
                with torch.no_grad():
                    losses[probe, sign] = [float(c()) for c in micro_batches]
        history.append([v for values in losses.values() for v in values])
        coefs = []
        for probe in range(num_probes):
            plus, minus = (sum(losses[probe, s]) / len(micro_batches) for s in (+1, -1))
            coefs.append(float(np.float32((plus - minus) / (2.0 * eps * num_probes))))
        for i, n, p in params:
            p.data = clean[i]
            decay = weight_decay if p.dim() > 1 else 0.0
            update_(p.data, coefs, lr(step), decay, seed=seed, step=step, param=i, noise=noise, backend=backend)
            stored[n] = p.data
    for n, p in model.named_parameters():
        p.data = stored[n]
    for b, dtype in kept.items():
        b.data = b.data.to(dtype)
    return history


def update_(w, coefs, lr, weight_decay, *, seed, step, param, noise, backend=None) -> None:
    """An update by the terms of one step, rounded stochastically where `w` has 16 bits."""
    family = distzo2_core.FAMILIES[noise]
    rows, cols, matrices = matrix_shape(w.shape)
    segment = distzo2_core.Segment(0, w.numel(), w.dtype, param, 0, 0, rows, cols, matrices=matrices)
    table = distzo2_core.SegmentTable([segment])
    update = distzo2_core.Update(
        step,
        (distzo2_core.GroupScalars(lr, weight_decay),),
        tuple(distzo2_core.Term(family, step, k, 0, c) for k, c in enumerate(coefs)),
    )
    buffer = w.reshape(-1).view(torch.uint8)
    distzo2_core.materialize(buffer, table, seed=seed, updates=[update], write_back=True, backend=backend)
    w.copy_(buffer.view(w.dtype).view(w.shape))
