"""Which implementation runs an op: the compiled extension, Triton, or the NumPy reference.

A backend is an object with the functions normal, rademacher, noise_, perturb_, restore_, update_, embedding and
materialize in the raw signatures of `torch.ops.distzo2`. One that the caller names is used or refused,
never swapped for another. `None` stands for `native` where it was built for the device, else `triton`; it is resolved
once for each kind of device and logged.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("native", "triton", "reference")

logger = logging.getLogger("distzo2_core")

_defaults: dict[str, str] = {}  # the resolved default of each kind of device
_extension: ModuleType | None = None


class BackendError(RuntimeError):
    """A backend that is not there, or that cannot run on the device asked for."""


def extension() -> ModuleType | None:
    """The compiled extension `distzo2_core._C`, or None where it was not built.

    Raises:
        BackendError: it was built but cannot be loaded, most often because torch has changed since.
    """
    global _extension
    if _extension is not None:
        return _extension
    if importlib.util.find_spec("distzo2_core._C") is None:
        return None
    try:
        module = importlib.import_module("distzo2_core._C")
    except ImportError as error:
        raise BackendError(
            f"distzo2_core._C is there but cannot be loaded with torch {torch.__version__}: {error}. Build it again."
        ) from error
    from . import fake_ops

    fake_ops.register()
    _extension = module
    return module


def require_extension(what: str) -> ModuleType:
    """The compiled extension, for `what` that exists nowhere else.

    Raises:
        BackendError: it was not built or cannot be loaded.
    """
    module = extension()
    if module is None:
        raise BackendError(f"{what} needs the compiled extension distzo2_core._C, which was not built")
    return module


def build_info() -> dict[str, Any]:
    """What the compiled extension was built with.

    Returns:
        A dict; "native" says whether the extension is there at all, "cuda" whether it holds CUDA kernels.
    """
    module = extension()
    if module is None:
        return {"native": False, "cuda": False}
    return {"native": True, **module.build_info()}


def _why_not_native(device_type: str) -> str | None:
    """Why the native backend cannot run on this kind of device; None if it can."""
    if extension() is None:
        return "distzo2_core._C was not built"
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"it has no kernels for {device_type}"
    return None if build_info()["cuda"] else "distzo2_core._C was built without CUDA kernels"


def _why_not_triton(device_type: str) -> str | None:
    """Why the Triton backend cannot run on this kind of device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from . import triton_kernels

    if device_type == "cuda" or (device_type == "cpu" and triton_kernels.INTERPRETED):
        return None
    return f"it runs on cuda tensors, and on cpu tensors in its interpreter (TRITON_INTERPRET=1), not on {device_type}"


def _default_backend(device_type: str) -> str:
    if device_type in _defaults:
        return _defaults[device_type]
    reasons = {"native": _why_not_native(device_type)}
    if reasons["native"] is not None:
        reasons["triton"] = _why_not_triton(device_type)
    for name, reason in reasons.items():
        if reason is None:
            if not torch.compiler.is_compiling():
                logger.info("distzo2_core: using the %s backend on %s", name, device_type)
            _defaults[device_type] = name
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendError(f"no backend for {device_type} tensors ({listed}); backend='reference' runs on cpu tensors")


def resolve_backend(backend: str | None, device: torch.device | str) -> str:
    """The name of the backend that runs ops on `device`: the one named, or for None the default one.

    Raises:
        ValueError: no backend has this name.
        BackendError: the backend named was not built, is not installed or cannot run on this device.
    """
    device_type = torch.device(device).type
    if backend is None:
        return _default_backend(device_type)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "native":
        reason = _why_not_native(device_type)
    elif backend == "triton":
        reason = _why_not_triton(device_type)
    else:
        reason = None if device_type == "cpu" else f"it runs on cpu tensors, not on {device_type}"
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run: {reason}")
    return backend


def implementation(backend: str | None, device: torch.device) -> Any:
    """The functions of the resolved backend: `torch.ops.distzo2`, or the module `triton_ops` or `reference_ops`."""
    name = resolve_backend(backend, device)
    if name == "native":
        return torch.ops.distzo2
    return importlib.import_module(f"distzo2_core.{name}_ops")
