"""Ranks that several tests share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import parallel_cases as cases
import pytest
from parallel_ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one rank with the same lanes; its bits do not depend on where the weights live."""

    @functools.cache
    def run(**options: Any) -> Any:
        return cases.train(0, 1, None, tmp_path_factory.mktemp("alone"), weights="device", **options)

    return run
