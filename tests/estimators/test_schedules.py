"""Schedules are functions of the step."""

from __future__ import annotations

import pytest

from distzo2.errors import DistZO2Error
from distzo2.estimators.schedules import SCHEDULES, factor_of


def test_values() -> None:
    for schedule, num_steps, warmup, factors in (
        ("constant", 4, 0, [1, 1, 1, 1]),
        ("linear", 4, 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 4, 0, [1, 0.8535534, 0.5, 0.1464466]),
        ("linear", 5, 3, [0.25, 0.5, 0.75, 1, 0.5]),
        ("linear", 4, 0, [1, 0.75, 0.5, 0.25, 0, 0]),
        ("wsd", 10, 1, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0]),
        ("wsd", 2, 2, [1 / 3, 2 / 3, 1]),
    ):
        factor = factor_of(schedule, num_steps, warmup)
        assert [factor(step) for step in range(len(factors))] == pytest.approx(factors)


def test_of_eps_there_is_no_rise_and_a_share_is_left() -> None:
    for schedule in SCHEDULES:
        factor = factor_of(schedule, 10, 2, final=0.1, rises=False, decay=0.5)
        assert [factor(0), factor(1), factor(2)] == [1, 1, 1]
        assert factor(10) == factor(11) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert factor_of("wsd", 10, final=0.5, decay=0.4)(8) == pytest.approx(0.75)


def test_an_unknown_schedule() -> None:
    with pytest.raises(DistZO2Error, match="schedule='cosin': expected one of constant, linear, cosine, wsd"):
        factor_of("cosin", 10)
