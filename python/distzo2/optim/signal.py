"""The signal of a step: how much of the difference of two losses is the perturbation, and how much is rounding.

The same probes are evaluated in several compute dtypes, and the differences L+ - L- are held against those of a
reference, float32. Storing 16 bits is right, since updates are rounded stochastically; computing and perturbing in 16
bits often is not: half the spacing of most weights may be above eps, and activations round besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from distzo2.interrupts import DeferredInterrupt
from distzo2.optim.estimator import SPSA
from distzo2.optim.settings import make_settings
from distzo2.optim.step_lanes import StepLanes
from distzo2.streaming.offload import runtime_of
from distzo2.text import dtype_name

REFERENCE = torch.float32
ENOUGH = 0.95  # a correlation at which a step is made of signal


@dataclass(frozen=True)
class Signal:
    """What the differences of losses are worth in one compute dtype at one eps.

    Attributes:
        dtype: what modules computed with.
        eps: size of the perturbations.
        correlation: of the differences L+ - L- of all probes with the reference's, about 0, since the sign of a probe
            is arbitrary; nan if they are all 0.
        slope: of the differences over the reference's, through 0.
        relative_error: norm of what the two differ by, over the norm of the reference's.
        floor: rounding of one loss: the error of a difference, root mean square, over sqrt(2). The reference's is the
            least at any eps, an upper bound since curvature is in it; nan where there is one eps only.
        curvature: median of |L+ + L- - 2 L0| over that of |L+ - L-|. It cancels in SPSA, and is an error of FZOO.
        difference: median of |L+ - L-|.
        seconds: of the forwards of all probes.
        differences: float64 [probes].
    """

    dtype: torch.dtype
    eps: float
    correlation: float
    slope: float
    relative_error: float
    floor: float
    curvature: float
    difference: float
    seconds: float
    differences: np.ndarray

    @property
    def is_enough(self) -> bool:
        """Whether steps are made of signal."""
        return self.correlation >= ENOUGH


def measure_signal(
    lanes: StepLanes,
    closures: Sequence[Callable[[], Any]],
    step: int,
    *,
    dtypes: Sequence[torch.dtype],
    eps: Sequence[float],
    probes: int,
) -> list[Signal]:
    """Evaluates `probes` perturbations, both ways, in each of `dtypes` at each of `eps`, and in the reference. Noise is
    that of `step`. Weights stay as they are, and the compute dtype is what it was.

    Returns:
        A signal for each dtype and eps, in this order. The reference is held against itself at the largest eps of at
        most 1e-3 (of the smallest, if all are larger), scaled: what differs there is curvature, or its own rounding.
    """
    runtime, before = lanes.runtime, lanes.runtime.compute_dtype
    losses: dict[tuple[torch.dtype, float], tuple[np.ndarray, float]] = {}
    settings = lanes.settings
    try:
        for dtype in dict.fromkeys((*dtypes, REFERENCE)):
            runtime.compute_in(dtype)
            for size in eps:
                lanes.settings = replace(
                    settings, eps=float(np.float32(size)), num_probes=probes, estimator=SPSA(), older_rules=False
                )
                start = time.perf_counter()
                rows = lanes.losses_of(step, [*lanes.settings.evaluations, (0, 0)], closures)
                losses[dtype, size] = rows, time.perf_counter() - start
    finally:
        lanes.settings = settings
        runtime.compute_in(before)
    found = [
        _signal(dtype, size, *losses[dtype, size], _reference(losses, dtype, size, eps))
        for dtype in dict.fromkeys(dtypes)
        for size in eps
    ]
    own = min((s.floor for s in found if s.dtype == REFERENCE and s.eps != _reference_eps(eps)), default=float("nan"))
    return [replace(s, floor=own) if s.dtype == REFERENCE else s for s in found]


def signal_of(
    model: nn.Module,
    closures: Sequence[Callable[[], Any]],
    *,
    dtypes: Sequence[torch.dtype],
    eps: Sequence[float],
    probes: int,
    noise: str = "normal",
    seed: int = 0,
    max_lanes: int | None = None,
) -> list[Signal]:
    """`measure_signal` of a model before it has an optimizer, with all that is trainable perturbed alike."""
    runtime = runtime_of(model)
    settings = make_settings(
        eps=eps[0], estimator="spsa", seed=seed, noise=noise, num_probes=probes, max_lanes=max_lanes, max_coef=None,
        max_clipped=0, max_skipped=1, verify_every=0, fsync_every=1,
    )  # fmt: skip
    lanes = StepLanes(runtime, settings, DeferredInterrupt())
    runtime.weights.bind(lanes, {p.index: 0 for p in runtime.params if p.trainable and p.requires_grad}, 1, seed)
    return measure_signal(lanes, closures, 0, dtypes=dtypes, eps=eps, probes=probes)


def _differences(rows: np.ndarray) -> np.ndarray:
    return rows[:-1:2] - rows[1:-1:2]


def _reference_eps(eps: Sequence[float]) -> float:
    return max((e for e in eps if e <= 1e-3), default=min(eps))


def _reference(losses: dict, dtype: torch.dtype, size: float, eps: Sequence[float]) -> np.ndarray:
    other = _reference_eps(eps) if dtype == REFERENCE else size
    return _differences(losses[REFERENCE, other][0]) * (size / other)


def _signal(dtype: torch.dtype, eps: float, rows: np.ndarray, seconds: float, reference: np.ndarray) -> Signal:
    found, error = _differences(rows), _differences(rows) - reference
    size, norm = np.linalg.norm(found), np.linalg.norm(reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        bends = np.median(np.abs(rows[:-1:2] + rows[1:-1:2] - 2 * rows[-1])) / np.median(np.abs(found))
        return Signal(
            dtype=dtype,
            eps=eps,
            correlation=float(found @ reference / (size * norm)),
            slope=float(found @ reference / norm**2),
            relative_error=float(np.linalg.norm(error) / norm),
            floor=float(np.sqrt(np.mean(error**2) / 2)),
            curvature=float(bends),
            difference=float(np.median(np.abs(found))),
            seconds=seconds,
            differences=found,
        )


def advice(found: Signal) -> str | None:
    """One line for a run whose steps are mostly rounding, with the remedy; None if they are not."""
    if found.is_enough:
        return None
    name = dtype_name(found.dtype)
    what = f"a correlation of {found.correlation:.2f} with those in float32: steps are mostly rounding"
    if np.isnan(found.correlation):
        what = "no size: they are all 0, or not finite"
    return (
        f"little signal: at eps {found.eps:g} in {name}, differences of losses have {what}; try a larger --eps, or "
        "--compute-dtype float32 (weights stay stored as they are)"
    )
