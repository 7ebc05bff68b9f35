"""The signal of a step: how much of the difference of two losses is the perturbation, and how much is rounding.

The same probes are evaluated in several compute dtypes, and the differences L+ - L- are held against those of a
reference, float32. Storing 16 bits is right, since updates are rounded stochastically; computing and perturbing in 16
bits often is not: half the spacing of most weights may be above eps, and activations round besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from distzo2.interrupts import DeferredInterrupt
from distzo2.optim.settings import make_settings
from distzo2.optim.step_lanes import StepLanes
from distzo2.streaming.offload import runtime_of
from distzo2.streaming.runtime import StreamingRuntime
from distzo2.text import dtype_name
from distzo2.weights.units import main_dtype

REFERENCE = torch.float32
TF32 = "tf32"  # stands for a dtype: float32, whose products on a GPU are in TF32
ENOUGH = 0.95  # a correlation at which a step is made of signal
_SURE = 1.645  # standard deviations to either end of an interval of nine tenths


@dataclass(frozen=True)
class Signal:
    """What the differences of losses are worth in one compute dtype at one eps.

    Attributes:
        dtype: what modules computed with; "tf32" for float32 with products in TF32.
        eps: size of the perturbations.
        correlation: of the differences L+ - L- of all probes with the reference's, about 0, since the sign of a probe
            is arbitrary; nan if they are all 0.
        least, most: its interval of nine tenths, as so few probes tell it (Fisher's transformation).
        slope: of the differences over the reference's, through 0.
        relative_error: norm of what the two differ by, over the norm of the reference's.
        floor: rounding of one loss: the error of a difference, root mean square, over sqrt(2). The reference's is the
            least at any eps, an upper bound since curvature is in it; nan where there is one eps only. (One batch in
            two orders tells less: most orders of a sum have the same bits.)
        curvature: median of |L+ + L- - 2 L0| over that of |L+ - L-|. It cancels in SPSA, and is an error of FZOO.
        difference: median of |L+ - L-|.
        size: root mean square of the reference's differences; 0 where no dtype has signal.
        seconds: of the forwards of all probes.
        cost: of the seconds of the probes evaluated last, over the reference's.
        differences: float64 [probes].
    """

    dtype: torch.dtype | str
    eps: float
    correlation: float
    least: float
    most: float
    slope: float
    relative_error: float
    floor: float
    curvature: float
    difference: float
    size: float
    seconds: float
    cost: float
    differences: np.ndarray

    @property
    def is_enough(self) -> bool:
        """Whether steps are made of signal for sure."""
        return self.least >= ENOUGH

    @property
    def is_little(self) -> bool:
        """Whether they are not for sure. Where neither is, more probes may tell."""
        return not self.most >= ENOUGH

    @property
    def pays(self) -> bool:
        """Whether steps in this dtype take less time than in the reference for as much signal: what is rounding adds to
        a step's noise, and 1 / correlation² as many steps make up for that."""
        return self.cost < self.correlation**2


def measure_signal(
    lanes: StepLanes,
    closures: Sequence[Callable[[], Any]],
    step: int,
    *,
    dtypes: Sequence[torch.dtype | str],
    eps: Sequence[float],
    probes: int | Sequence[int],
    is_open: Callable[[Sequence[Signal]], bool] = lambda found: True,
) -> list[Signal]:
    """Evaluates perturbations, both ways, in each of `dtypes` at each of `eps`, and in the reference. Noise is that of
    `step`. Weights stay as they are, and the compute dtype is what it was.

    Args:
        probes: how many perturbations; or several numbers, ascending: each is reached only if the signal of the fewer
            before `is_open`.

    Returns:
        A signal for each dtype and eps, in this order. The reference is held against itself at the largest eps of at
        most 1e-3 (of the smallest, if all are larger), scaled: what differs there is curvature, or its own rounding.
    """
    runtime, before, settings = lanes.runtime, lanes.runtime.compute_dtype, lanes.settings
    losses: dict[tuple[torch.dtype | str, float], tuple[np.ndarray, float, float]] = {}
    found: list[Signal] = []
    try:
        for done, count in pairwise((0, *([probes] if isinstance(probes, int) else probes))):
            if done and not is_open(found):
                break
            both_ways = [(probe, sign) for probe in range(done, count) for sign in (1, -1)]
            for dtype in dict.fromkeys((*dtypes, REFERENCE)):
                runtime.compute_in(REFERENCE if dtype == TF32 else dtype)
                for size in eps:
                    lanes.settings = replace(settings, eps=float(np.float32(size)), older_rules=False)
                    start = time.perf_counter()
                    with _products_in(dtype):
                        rows = lanes.losses_of(step, both_ways if done else [(0, 0), *both_ways], closures)
                    total = seconds = time.perf_counter() - start
                    if done:
                        rows, total = np.append(losses[dtype, size][0], rows), losses[dtype, size][1] + seconds
                    losses[dtype, size] = rows, total, seconds
            found = [
                _signal(
                    dtype,
                    size,
                    *losses[dtype, size][:2],
                    _reference(losses, dtype, size, eps),
                    losses[dtype, size][2] / losses[REFERENCE, size][2],
                )
                for dtype in dict.fromkeys(dtypes)
                for size in eps
            ]
    finally:
        lanes.settings = settings
        runtime.compute_in(before)
    own = min((s.floor for s in found if s.dtype == REFERENCE and s.eps != _reference_eps(eps)), default=float("nan"))
    return [replace(s, floor=own) if s.dtype == REFERENCE else s for s in found]


@contextmanager
def _products_in(dtype: torch.dtype | str) -> Iterator[None]:
    """Multiplies float32 matrices in TF32 on a GPU for `TF32`, and otherwise exactly, whatever the process does."""
    matmul, wanted = torch.backends.cuda.matmul, dtype == TF32
    before = matmul.fp32_precision
    try:
        if wanted != (before == TF32):
            matmul.fp32_precision = TF32 if wanted else "ieee"
        yield
    finally:
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before


def signal_of(
    model: nn.Module,
    closures: Sequence[Callable[[], Any]],
    *,
    eps: Sequence[float],
    noise: str = "normal",
    seed: int = 0,
    max_lanes: int | None = None,
    **more: Any,
) -> list[Signal]:
    """`measure_signal` of a model before it has an optimizer, with all that is trainable perturbed alike."""
    runtime = runtime_of(model)
    settings = make_settings(
        eps=eps[0], estimator="spsa", seed=seed, noise=noise, num_probes=1, max_lanes=max_lanes, max_coef=None,
        max_clipped=0, max_skipped=1, verify_every=0, fsync_every=1,
    )  # fmt: skip
    lanes = StepLanes(runtime, settings, DeferredInterrupt())
    runtime.weights.bind(lanes, {p.index: 0 for p in runtime.params if p.trainable and p.requires_grad}, 1, seed)
    return measure_signal(lanes, closures, 0, eps=eps, **more)


def _differences(rows: np.ndarray) -> np.ndarray:
    return rows[1::2] - rows[2::2]


def _reference_eps(eps: Sequence[float]) -> float:
    return max((e for e in eps if e <= 1e-3), default=min(eps))


def _reference(losses: dict, dtype: torch.dtype | str, size: float, eps: Sequence[float]) -> np.ndarray:
    other = _reference_eps(eps) if dtype == REFERENCE else size
    return _differences(losses[REFERENCE, other][0]) * (size / other)


def _signal(
    dtype: torch.dtype | str, eps: float, rows: np.ndarray, seconds: float, reference: np.ndarray, cost: float = 1.0
) -> Signal:
    found, error = _differences(rows), _differences(rows) - reference
    size, norm = np.linalg.norm(found), np.linalg.norm(reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        bends = np.median(np.abs(rows[1::2] + rows[2::2] - 2 * rows[0])) / np.median(np.abs(found))
        correlation = np.clip(found @ reference / (size * norm), -1, 1) if error.any() else norm / norm  # 1, or nan
        spread = _SURE / np.sqrt(max(len(found) - 2, 1e-9))
        least, most = (np.tanh(np.arctanh(correlation) + way * spread) for way in (-1, 1))
        return Signal(
            dtype=dtype,
            eps=eps,
            correlation=float(correlation),
            least=float(least),
            most=float(most),
            slope=float(found @ reference / norm**2),
            relative_error=float(np.linalg.norm(error) / norm),
            floor=float(np.sqrt(np.mean(error**2) / 2)),
            curvature=float(bends),
            difference=float(np.median(np.abs(found))),
            size=float(np.sqrt(np.mean(reference**2))),
            seconds=seconds,
            cost=cost,
            differences=found,
        )


def computed_in(runtime: StreamingRuntime) -> torch.dtype | str:
    """What modules compute with, as `Signal.dtype` has it: of what most of the model is stored in."""
    dtype = runtime.compute_dtype or main_dtype(runtime.params)
    exact = runtime.device.type != "cuda" or torch.backends.cuda.matmul.fp32_precision != TF32
    return dtype if dtype != REFERENCE or exact else TF32


def advice(found: Signal) -> str | None:
    """One line for a run of whose steps much is rounding, with the remedy; None if that is not sure."""
    if not found.is_little:
        return None
    what, exact = f"of a correlation of {found.correlation:.2f} with those in float32", "--compute-dtype float32"
    if np.isnan(found.correlation):
        what = "0, or not finite"
    if found.dtype == TF32:
        exact = "no --tf32"
    remedy = f"try a larger --eps, or {exact} (weights stay stored as they are)"
    if not found.size > 0:
        what, remedy = f"{what}, in float32 too", "try a larger --eps or --batch-size"
    return (
        f"little signal: at eps {found.eps:g} in {dtype_name(found.dtype)}, differences of losses are {what}; {remedy}"
    )
