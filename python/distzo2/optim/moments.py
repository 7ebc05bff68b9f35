"""Momentum without memory: an update lists the terms of earlier steps beside its own, and visits make their noise anew.

With g_s the sum of c·z over the terms of step s, the direction of step t is

    m_t = sum over s of beta^(t - s)·g_s,  t - window < s <= t,

as heavy-ball momentum (Polyak 1964; torch's SGD) gathers it, whose memory would be as large as the weights. The order
in which terms are added is part of it: steps ascending, and probes ascending within a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from distzo2_core import Term

NEGLIGIBLE = 0.01  # of a step's weight in all updates together: what a window may leave out
MOST = 64  # steps in a window by default: each costs as much noise as the step's own
MAX_TERMS = 65536  # of an update: its journal line stays below the longest that is read


def default_window(beta: float) -> int:
    """Steps whose terms an update lists, its own among them: until beta^window is negligible, and at most `MOST`."""
    window, left = 1, beta
    while left > NEGLIGIBLE and window < MOST:
        window, left = window + 1, left * beta
    return window


class _Step(NamedTuple):
    step: int
    terms: tuple[Term, ...]
    unused: frozenset[int]  # parameters, by index


class Momentum:
    """The steps that updates to come still list.

    The coefficient of a term is float32(p·c), with c the float32 coefficient of its own step and p the product of as
    many float64 factors beta as the step is old. A step that was skipped adds no terms, and those before it are a step
    older all the same. Where a step used parameters that an earlier one did not use, its update leaves the earlier
    terms out: there they would be noise.
    """

    def __init__(self, beta: float, window: int) -> None:
        self._powers = list(itertools.accumulate([1.0] + [beta] * (window - 1), lambda a, b: a * b)) if beta else [1.0]
        self._steps: list[_Step] = []

    def terms(self, step: int, own: Sequence[Term], unused: Iterable[Sequence[int]]) -> tuple[Term, ...]:
        """The terms of the update of step `step`: `own` behind those of earlier steps. `unused` are ranges [first,
        last] of the parameters that the step leaves as they are."""
        left, listed = _indices(unused), []
        for earlier in self._steps:
            age = step - earlier.step
            if age < len(self._powers) and earlier.unused <= left:
                listed += [t._replace(c=float(np.float32(self._powers[age] * t.c))) for t in earlier.terms]
        return (*listed, *own)

    def count(self, step: int, own: Sequence[Term], unused: Iterable[Sequence[int]]) -> None:
        """Keeps the own terms of step `step`, none if it was skipped, for the updates after it."""
        if len(self._powers) > 1:
            self._steps = [s for s in self._steps if step + 1 - s.step < len(self._powers)]
            if own:
                self._steps.append(_Step(step, tuple(own), _indices(unused)))

    @property
    def newest(self) -> list[Any]:
        """The newest step of `state`, if there is one: ranks that compared all newest ones have the same window."""
        return self.state(self._steps[-1:])

    def clear(self) -> None:
        """Forgets all steps."""
        self._steps.clear()

    def state(self, steps: Sequence[_Step] | None = None) -> list[Any]:
        """What `load` takes: lists of numbers, of some of the steps; None: of all."""
        some = self._steps if steps is None else steps
        return [[s.step, [list(term) for term in s.terms], sorted(s.unused)] for s in some]

    def load(self, state: Iterable[Any]) -> None:
        """Takes over the steps of another's `state`, as far as the window reaches."""
        steps = (_Step(step, tuple(Term(*t) for t in terms), frozenset(unused)) for step, terms, unused in state)
        self._steps = list(steps) if len(self._powers) > 1 else []


def _indices(ranges: Iterable[Sequence[int]]) -> frozenset[int]:
    return frozenset(itertools.chain.from_iterable(range(first, last + 1) for first, last in ranges))
