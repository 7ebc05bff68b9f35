"""What all tests share: no network, no random order, and a skip of CUDA tests where there is no GPU."""

import os

# Before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that a test runs on; CUDA only where there is a GPU."""
    return request.param
