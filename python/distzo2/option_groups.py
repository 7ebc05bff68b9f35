"""Options that several commands have, in groups, beside those in `distzo2.run.options`."""

# ruff: noqa: RUF009  (`option` calls `dataclasses.field`)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from distzo2.errors import UsageError
from distzo2.option_types import Count, Decay, Estimator, Noise, Shape, Switch, option

OWN_BATCHES = ("spsa", "meazo", "spsa-sign")  # estimators that do not compare the losses of different probes


@dataclass(frozen=True, kw_only=True)
class Estimating:
    """Options of commands that make steps, or plan them: how losses become a step."""

    probes: Count = option(
        1, "perturbations a step; forwards of the batch: 2K, by fzoo K + 1, 1.5spsa 2K + 1, es with --es-one-sided K "
        "(default: 1; finetune --objective reward: 8)",
        "K", group="how it learns",
    )  # fmt: skip
    estimator: Estimator = option(
        "spsa",
        "what a step is made of (docs/estimators.md): spsa: differences of both sides; fzoo: one side, divided by the "
        "losses' spread; es: losses shaped over all members; 1.5spsa: spsa that damps curved probes; meazo: spsa whose "
        "rate adapts; spsa-sign: signs of differences. fzoo and es need 2 probes or more (default: spsa; "
        "finetune --objective reward: es)",
    )
    es_shape: Shape = option(
        "zscore",
        "of es: by mean and spread, by centred ranks, or by mean and spread in each of --micro-batches (group)",
    )
    es_one_sided: Switch = option(False, "of es: K members on one side, not 2K mirrored ones")
    probe_batches: Literal["shared", "own"] = option(
        "shared",
        "own: cut the batch into --probes parts, one for each perturbation: 1/K of the forwards (spsa and its "
        "kin: meazo, spsa-sign)",
    )
    noise: Noise | None = option(
        None, "distribution of a perturbation's elements (default: normal; by fzoo and 1.5spsa rademacher, signs)"
    )
    momentum: Decay = option(
        0.0,
        "add what earlier steps found, times this for each step of age; no memory is needed, and an update makes the "
        "noise of all steps of the window anew. --lr times (1 - BETA) moves weights as far as without",
        "BETA",
    )
    momentum_window: Count | None = option(
        None, "steps that --momentum reaches back (default: until BETA^W is below 1%, and at most 64)", "W"
    )

    def __post_init__(self) -> None:
        by_signs = self.estimator in ("fzoo", "1.5spsa")  # as in their papers
        object.__setattr__(self, "noise", self.noise or ("rademacher" if by_signs else "normal"))
        if self.estimator in ("fzoo", "es") and self.probes < 2:
            raise UsageError(f"--estimator {self.estimator} needs --probes 2 or more, to compare losses")
        if self.probe_batches == "own" and (self.estimator not in OWN_BATCHES or self.probes < 2):
            expected = f"--estimator {' or '.join(OWN_BATCHES)}, and --probes 2 or more"
            raise UsageError(f"--probe-batches own: {expected}, were expected")
        if self.estimator != "es" and (self.es_one_sided or self.es_shape != "zscore"):
            raise UsageError(f"--es-{'one-sided' if self.es_one_sided else 'shape'} needs --estimator es")
        if self.momentum_window is not None and not self.momentum:
            raise UsageError("--momentum-window needs --momentum")

    @property
    def estimator_options(self) -> dict[str, Any]:
        """What `make_estimator` takes besides the name."""
        return {"shape": self.es_shape, "mirrored": not self.es_one_sided} if self.estimator == "es" else {}
