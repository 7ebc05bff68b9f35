"""Which backend runs, and what is said where one is missing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import needs_native

import distzo2_core
from distzo2_core import BackendError, backends

NATIVE = distzo2_core.build_info()["native"]
PLACE = {"seed": 1, "step": 2, "param": 3}


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="backend must be one of native, triton, reference or None, got 'cuda'"):
        distzo2_core.normal(4, **PLACE, backend="cuda")
    assert distzo2_core.resolve_backend("reference", "cpu") == "reference"
    with pytest.raises(BackendError, match="'reference' cannot run: it runs on cpu tensors, not on cuda"):
        distzo2_core.resolve_backend("reference", "cuda")
    with pytest.raises(BackendError, match="no backend for meta tensors"):
        distzo2_core.resolve_backend(None, "meta")


@needs_native
def test_the_default_is_native_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_defaults", {})
    with caplog.at_level(logging.INFO, logger="distzo2_core"):
        for _ in range(3):
            assert distzo2_core.resolve_backend(None, "cpu") == "native"
    assert [record.getMessage() for record in caplog.records] == ["distzo2_core: using the native backend on cpu"]


@needs_native
def test_build_info() -> None:
    info = distzo2_core.build_info()
    assert info["native"] is True and isinstance(info["cuda"], bool) and info["torch"] == torch.__version__
    if not info["cuda"]:
        with pytest.raises(BackendError, match=r"'native' cannot run: .* was built without CUDA kernels"):
            distzo2_core.resolve_backend("native", "cuda")


def test_without_the_extension() -> None:
    """Everything but native works, and native says what is missing."""
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "distzo2_core._C" else find_spec(name, *rest)
import distzo2_core
assert distzo2_core.build_info() == {"native": False, "cuda": False}
assert distzo2_core.normal(3, seed=0, step=0, param=0, backend="reference").shape == (3,)
assert len(distzo2_core.permutation(5, 0, 0)) == 5
for call in (
    lambda: distzo2_core.normal(3, seed=0, step=0, param=0, backend="native"),
    lambda: distzo2_core.normal(3, seed=0, step=0, param=0),
    lambda: distzo2_core.HostPool,
):
    try:
        call()
    except distzo2_core.BackendError as error:
        print(error)
    else:
        raise SystemExit("no error")
assert "triton" not in sys.modules or find_spec("triton")
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    named, default, pool = done.stdout.splitlines()
    assert named == "backend 'native' cannot run: distzo2_core._C was not built"
    assert default.startswith("no backend for cpu tensors (native: distzo2_core._C was not built; triton: ")
    assert pool == "distzo2_core.HostPool needs the compiled extension distzo2_core._C, which was not built"


@pytest.mark.parametrize(("module", "users"), [("distzo2_core", "4"), ("distzo2", None)])
def test_cuda_gets_a_connection_for_each_stream(module: str, users: str | None) -> None:
    """Unless the user has chosen. It is in the environment of the process, where a driver reads it."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    code = f"import {module}, ctypes as c; f = c.CDLL(None).getenv; f.restype = c.c_char_p; print(f(b'{name}'))"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: users} if users else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str((users or "32").encode()), done.stderr


@needs_native
def test_native_kernels_that_do_not_run(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver, or a GPU, that is too old: tried once, and told once."""
    calls = []

    def perturb_(w: torch.Tensor, *rest: object) -> None:
        calls.append(w)
        raise RuntimeError("cudaErrorNoKernelImageForDevice\nmore")

    monkeypatch.setattr(backends, "_defaults", {})
    monkeypatch.setattr(backends, "_probed", {("cuda", 1): None})
    monkeypatch.setattr(backends, "build_info", lambda: {"cuda": True})
    monkeypatch.setattr(backends, "_why_not_triton", lambda device_type: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)  # of what is made for the device
    monkeypatch.setattr(torch.ops.distzo2, "perturb_", perturb_)
    with caplog.at_level(logging.WARNING, logger="distzo2_core"):
        assert [distzo2_core.resolve_backend(None, "cuda:0") for _ in range(3)] == ["triton"] * 3
    with pytest.raises(
        BackendError, match=r"'native' cannot run: .* do not run there: cudaErrorNoKernelImageForDevice$"
    ):
        distzo2_core.resolve_backend("native", "cuda:0")
    assert len(calls) == len(caplog.records) == 1 and "cannot run on cuda:0: its kernels" in caplog.text
    assert distzo2_core.resolve_backend(None, "cuda:1") == "native"


@needs_native
def test_native_kernels_are_compared_with_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_probed", {})
    with torch.device("meta"):
        assert backends._probe(("cpu", None)) is None
    assert torch.compile(lambda: backends._probe(("cpu", None)), fullgraph=True, backend="eager")() is None
    original, turns = torch.ops.distzo2.perturb_, iter((0, 1))
    monkeypatch.setattr(torch.ops.distzo2, "perturb_", lambda w, c, *place: original(w, c + next(turns), *place))
    assert backends._probe(("cpu", 0)) == "its kernels give other bits there than on the CPU"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        distzo2_core.nothing  # noqa: B018
    for name in distzo2_core.__all__:
        if NATIVE:
            assert getattr(distzo2_core, name) is not None
