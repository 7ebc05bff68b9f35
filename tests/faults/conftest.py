"""Runs whose file system calls are counted, and fail when asked."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from cli_runs import make_files
from fault_forms import arguments
from shimmed_runs import ShimmedRuns, build_shim


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_files(tmp_path_factory.mktemp("faults"), layers=2)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShimmedRuns]:
    try:
        shim = build_shim(tmp_path_factory.mktemp("shim"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C++ compiler that makes a shared library: {error}")
    runs = ShimmedRuns(shim)
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def undisturbed(files, runs, tmp_path_factory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("undisturbed")
    answer = runs.run(path, arguments(files))
    assert answer.status == 0, answer.text
    assert json.loads((path / "out/run.json").read_text())["best_step"] == 6  # so that saving it is replaying six
    assert answer.num_calls > 50
    return SimpleNamespace(path=path / "out", num_calls=answer.num_calls)
