"""What all tests share: no network, no random order, this checkout in child processes, no CUDA tests without a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is, here and in the processes that tests start: a second thread only spins beside such small tensors, and
# a forward's last bits depend on how many there are. Tests of threads set their own number.
os.environ["OMP_NUM_THREADS"] = "1"
# For the processes that tests start; what pytest itself imports from is in pyproject.toml.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        *(str(Path(__file__).parents[1] / name) for name in ("", "python", "tests/helpers")),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # without a GPU the Triton kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("distzo2", deadline=None, derandomize=True)
hypothesis.settings.load_profile("distzo2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `cuda` where torch sees no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU, or a torch without CUDA")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Takes back a number of threads that a test leaves."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint and data that no test changes."""
    from cli_runs import make_files

    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test in an empty directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that a test runs on; CUDA only where there is a GPU."""
    return request.param
