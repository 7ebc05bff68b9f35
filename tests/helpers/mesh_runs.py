"""Meshes, and the equality of their runs with one rank's."""

from __future__ import annotations

from typing import Any

import numpy as np

MESHES = {
    "pert=2": ((2, 1), {}),
    "data=2": ((1, 2), {}),
    "data=2 of 3 micro-batches": ((1, 2), {"micro_batches": 3}),
    "pert=2,data=2": ((2, 2), {}),
    "pert=4 with two probes": ((4, 1), {"num_probes": 2}),
    "pert=2 with two probes": ((2, 1), {"num_probes": 2}),
    "data=4": ((1, 4), {"micro_batches": 5}),
    "pert=2 of fzoo": ((2, 1), {"num_probes": 4, "estimator": "fzoo", "noise": "rademacher", "lr": 1e-4}),
}


def assert_same_run(result: Any, expected: Any) -> None:
    assert result[0] == expected[0]
    assert result[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert np.array_equal(result[1][name], value), name
