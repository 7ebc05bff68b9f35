"""What stays fixed while an optimizer steps, what a step takes of its parameter groups, and what it reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from distzo2.errors import DistZO2Error
from distzo2.estimators.protocol import Estimator, Remembering
from distzo2.estimators.registry import ESTIMATORS, make_estimator, name_of
from distzo2.optim.moments import MAX_TERMS, default_window
from distzo2.parallel.mesh import Evaluation
from distzo2.record.entry import StepEntry
from distzo2.weights.units import ParamInfo
from distzo2_core import FAMILIES, GroupScalars, Update

GROUP_FIELDS = GroupScalars._fields
PROBE_BATCHES = SHARED, OWN = "shared", "own"


@dataclass(frozen=True)
class Settings:
    """The options of an optimizer that its steps depend on. `eps`, a float32 value, is the next step's."""

    seed: int
    eps: float
    noise: str
    num_probes: int
    estimator: Estimator
    max_lanes: int | None
    max_coef: float | None
    max_clipped: int
    max_skipped: int
    verify_every: int
    fsync_every: int
    momentum: float = 0.0
    momentum_window: int = 1  # without momentum 1
    clip_percentile: float | None = None
    probe_batches: str = SHARED
    older_rules: bool = False  # those of a run that began under version 1 or 2 of the journal (`has_older_rules`)

    @property
    def own_batches(self) -> bool:
        """Whether each probe is evaluated on micro-batches of its own."""
        return self.probe_batches == OWN

    @property
    def recorded(self) -> dict[str, Any]:
        """Options of the journal's header, which older journals lack, where they differ from the defaults."""
        momentum = {"momentum": self.momentum, "momentum_window": self.momentum_window} if self.momentum else {}
        return momentum | ({"probe_batches": OWN} if self.own_batches else {})

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The perturbations that each step evaluates, in the order in which they run."""
        return self.estimator.evaluations(self.num_probes)

    @property
    def memory(self) -> tuple[float, ...]:
        """What the estimator remembers before the first step; empty if it needs no earlier steps."""
        return self.estimator.memory if isinstance(self.estimator, Remembering) else ()

    def coefficients(self, losses: np.ndarray, memory: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
        """float32 [num_probes] from `losses`, finite float64 as an estimator takes them, a row for each evaluation; and
        what it remembers from this step on. A coefficient too large for float32 is infinite.

        Raises:
            DistZO2Error: the estimator gave another number of coefficients.
        """
        losses_of = dict(zip(self.evaluations, losses, strict=True))
        if isinstance(self.estimator, Remembering):
            coefs, memory = self.estimator.coefficients_after(memory, losses_of, self.num_probes, self.eps)
        else:
            coefs = self.estimator.coefficients(losses_of, self.num_probes, self.eps)
        coefs = np.asarray(coefs)
        if coefs.shape != (self.num_probes,):
            raise DistZO2Error(
                f"estimator {name_of(self.estimator)} gave coefficients of shape {coefs.shape}; one for each of "
                f"{self.num_probes} probes was expected"
            )
        with np.errstate(over="ignore"):
            return coefs.astype(np.float64).astype(np.float32), tuple(map(float, memory))


def make_settings(
    *,
    eps: float,
    estimator: str | Estimator,
    momentum: float = 0.0,
    momentum_window: int | None = None,
    **others: Any,
) -> Settings:
    """Checks the options of `ZOSGD`.

    Raises:
        DistZO2Error: one is out of range.
    """
    if not 0 <= momentum < 1:
        raise DistZO2Error(f"momentum={momentum!r}: expected a number from 0 to below 1")
    if momentum_window is not None and not momentum:
        raise DistZO2Error(f"momentum_window={momentum_window!r}: there is no momentum")
    window = default_window(momentum) if momentum_window is None else momentum_window
    s = Settings(
        eps=eps_of(eps), estimator=make_estimator(estimator), momentum=float(momentum), momentum_window=window, **others
    )
    most = MAX_TERMS // max(1, s.num_probes)
    expected = {
        "noise": (s.noise in FAMILIES, f"one of {', '.join(FAMILIES)}"),
        "seed": (type(s.seed) is int and 0 <= s.seed < 2**64, "an integer in [0, 2^64)"),
        "num_probes": (1 <= s.num_probes < 2**20, f"1 to {2**20 - 1}"),
        "max_lanes": (s.max_lanes is None or s.max_lanes >= 1, "at least 1"),
        "max_coef": (s.max_coef is None or s.max_coef > 1, "a number above 1, or None"),
        "fsync_every": (s.fsync_every >= 1, "at least 1"),
        "momentum_window": (
            type(window) is int and 1 <= window <= max(1, most),
            f"1 to {most} steps of {s.num_probes} probes",
        ),
        "clip_percentile": (s.clip_percentile is None or 0 < s.clip_percentile <= 100, "above 0 and at most 100"),
        "probe_batches": (s.probe_batches in PROBE_BATCHES, " or ".join(map(repr, PROBE_BATCHES))),
    }
    for name, (is_right, what) in expected.items():
        if not is_right:
            raise DistZO2Error(f"{name}={getattr(s, name)!r}: expected {what}")
    if s.own_batches and not getattr(s.estimator, "own_batches", False):
        suited = ", ".join(name for name, kind in ESTIMATORS.items() if getattr(kind, "own_batches", False))
        raise DistZO2Error(
            f"probe_batches='own': estimator {name_of(s.estimator)} compares losses of several probes, which must be "
            f"of the same batch: expected one of {suited}"
        )
    if s.own_batches and s.num_probes < 2:
        raise DistZO2Error("probe_batches='own': there is one probe, which has the whole batch")
    _ = s.evaluations  # the estimator refuses a number of probes that does not suit it
    return s


def eps_of(value: Any) -> float:
    """The size of a perturbation as a float32 value.

    Raises:
        DistZO2Error: it is not a positive number that float32 can hold.
    """
    with suppress(TypeError, ValueError), np.errstate(over="ignore"):
        if np.isfinite(eps := float(np.float32(value))) and eps > 0:
            return eps
    raise DistZO2Error(f"eps={value!r}: expected a positive number that float32 can hold")


@dataclass
class StepRecord:
    """What a step did.

    Attributes:
        step: its number, from 0.
        loss: mean of all losses that it evaluated.
        losses: a list for each of `evaluations`, with the mean loss on each of its micro-batches.
        evaluations: the perturbations evaluated, (probe, sign) pairs; (0, 0) is the clean weights.
        coefs: the coefficient of each probe, as it was used; empty where the step was skipped.
        skipped: why the update was not made; None: it was.
        clipped: whether the coefficients were scaled down (`max_coef`, `clip_percentile`).
        seconds: wall time.
        lr: learning rate of each parameter group.
        eps: size of the perturbations.
        counts: as `losses`, how many losses each is the mean of; None: 1.
        unused: ranges [first, last] of the indices of parameters that no lane entered and that stay as they are.
        memory: what the estimator remembers from this step on (`Remembering`).
        largest: the largest |c| before clipping, where `clipped`.
    """

    step: int
    loss: float
    losses: list[list[float]]
    evaluations: list[Evaluation]
    coefs: list[float]
    skipped: str | None = None
    clipped: bool = False
    seconds: float = 0.0
    lr: list[float] = field(default_factory=list)
    eps: float = 0.0
    counts: list[list[float]] | None = None
    unused: list[list[int]] = field(default_factory=list)
    memory: tuple[float, ...] = ()
    largest: float | None = None

    def entry(self, update: Update, tokens: int, by_percentile: bool) -> StepEntry:
        """The step for the journal; `by_percentile`: with `largest`, which a resumed run needs."""
        counts, extra = self.counts, {"clipped": True} if self.clipped else {}
        extra |= {"memory": list(self.memory)} if self.memory else {}
        if self.clipped and by_percentile:
            extra["largest"] = self.largest
        if counts is not None and all(row == counts[0] for row in counts):
            counts = counts[:1]
        return StepEntry(
            self.step, update, self.eps, self.losses, self.skipped, tokens, self.seconds, extra, counts, self.unused
        )

    @property
    def difference(self) -> float | None:
        """What the step is made of: the median over probes of |L+ - L-|, or of |L+ - L0| where there is no L-."""
        means = dict(zip(self.evaluations, np.average(self.losses, -1, self.counts), strict=True))
        others = ((plus, means.get((k, -1), means.get((0, 0)))) for (k, sign), plus in means.items() if sign > 0)
        found = [abs(plus - other) for plus, other in others if other is not None]
        return float(np.median(found)) if found else None


# ---- parameter groups ---------------------------------------------------------------------------------------------


def default_groups(params: Iterable[ParamInfo], split: bool) -> list[dict[str, Any]]:
    """One group of all trainable parameters. With `split`, those of fewer than 2 dimensions (biases, norms) are in a
    second group, without weight decay."""
    trainable = [p for p in params if p.requires_grad]
    if thawed := [p.name for p in trainable if not p.trainable]:
        raise DistZO2Error(
            f"parameter {thawed[0]} was frozen when it was handed over: make it trainable inside "
            "`with distzo2.edit(model):`"
        )
    if not trainable:
        raise DistZO2Error("no parameter of the model is trainable")
    if not split:
        return [{"params": [p.tensor for p in trainable]}]
    groups = [
        {"params": [p.tensor for p in trainable if len(p.shape) > 1]},
        {"params": [p.tensor for p in trainable if len(p.shape) <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def group_of_each(params: Iterable[ParamInfo], groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Maps the index of each parameter to the number of its group; parameters in no group are left out."""
    known = {id(p.tensor): p for p in params}
    group_of: dict[int, int] = {}
    for number, group in enumerate(groups):
        for tensor in group["params"]:
            param = known.get(id(tensor))
            if param is None:
                raise DistZO2Error(
                    f"parameter group {number} holds a tensor of shape {tuple(tensor.shape)} that is no parameter "
                    "of the model; take parameters from the model after it was handed over"
                )
            if not param.trainable:
                raise DistZO2Error(
                    f"parameter {param.name} in group {number} was frozen when the model was handed over"
                )
            group_of[param.index] = number
    return group_of


def scalars_of(groups: Sequence[Mapping[str, Any]]) -> tuple[GroupScalars, ...]:
    """The scalars that a step takes of each group, as float32 values."""
    older = {"anchor": 0.0}  # what groups of older states lack
    return tuple(
        GroupScalars(
            *(
                _float32(group.get(name, older.get(name)), f"{name} of parameter group {number}")
                for name in GROUP_FIELDS
            )
        )
        for number, group in enumerate(groups)
    )


def check_rates(groups: Sequence[Mapping[str, Any]]) -> None:
    """Checks groups that an optimizer is made of; a schedule's last rate may be a rounding error below 0.

    Raises:
        DistZO2Error: a scalar is not a finite number, or a rate, a weight decay or an anchor is below 0.
    """
    for number, scalars in enumerate(scalars_of(groups)):
        for name in ("lr", "weight_decay", "anchor"):
            if (value := getattr(scalars, name)) < 0:
                raise DistZO2Error(f"{name} of parameter group {number} is {value}; 0 or more was expected")


def _float32(value: Any, name: str) -> float:
    with suppress(TypeError, ValueError), np.errstate(over="ignore"):
        if np.isfinite(number := float(np.float32(float(value)))):
            return number
    raise DistZO2Error(f"{name} is {value!r}; a finite number was expected")
