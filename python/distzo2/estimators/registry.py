"""The estimators by name, and the options that each begins with on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from distzo2.errors import DistZO2Error
from distzo2.estimators.protocol import Estimator
from distzo2.estimators.shaped import ES, FZOO
from distzo2.estimators.spsa import SPSA, CurvatureSPSA, MeAZO, SPSASign

ESTIMATORS: Mapping[str, Callable[..., Estimator]] = {
    "spsa": SPSA, "fzoo": FZOO, "es": ES, "1.5spsa": CurvatureSPSA, "meazo": MeAZO, "spsa-sign": SPSASign,
}  # fmt: skip


def make_estimator(estimator: str | Estimator, **options: Any) -> Estimator:
    """The estimator of that name, or the object itself.

    Args:
        options: of the estimator's class, for a name.

    Raises:
        DistZO2Error: an unknown name or option, or an object without `evaluations` and `coefficients`.
    """
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise DistZO2Error(f"estimator={estimator!r}: expected one of {', '.join(ESTIMATORS)}, or an Estimator")
        kind = ESTIMATORS[estimator]
        if unknown := options.keys() - inspect.signature(kind).parameters.keys():
            known = ", ".join(inspect.signature(kind).parameters) or "none"
            raise DistZO2Error(f"estimator={estimator!r}: no option {min(unknown)}; its options: {known}")
        return kind(**options)
    if not isinstance(estimator, Estimator):
        raise DistZO2Error(f"estimator={estimator!r} has no evaluations() and coefficients()")
    return estimator


def name_of(estimator: Estimator) -> str:
    """What the journal's header calls it."""
    return getattr(estimator, "name", None) or type(estimator).__name__
