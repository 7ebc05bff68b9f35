"""Which implementation runs an op: the compiled extension, Triton, or the NumPy reference.

A backend is an object with the functions noise_, perturb_, update_, embedding and materialize in the raw signatures of
`torch.ops.distzo2`. One that the caller names is used or refused, never swapped for another. `None` stands for `native`
where it was built for the device and runs there, else `triton`; it is resolved once for each device and logged.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

BACKENDS = ("native", "triton", "reference")

logger = logging.getLogger("distzo2_core")

_Place = tuple[str, int | None]  # a device's type and index
_defaults: dict[_Place, str] = {}  # the resolved default of each device
_probed: dict[_Place, str | None] = {}  # what `_probe` found
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


def _probe(place: _Place) -> str | None:
    """Changes a few weights on the device, once, and compares them with the CPU's. A driver may be older than the CUDA
    runtime in the extension, and a GPU older than what the kernels were compiled for.

    Returns:
        Why the native kernels are of no use on the device; None if they are.
    """
    if place not in _probed:
        try:
            with _disable_current_modes():
                results = []
                for device in (torch.device("cpu"), torch.device(*place)):
                    w = torch.arange(-500, 503, dtype=torch.bfloat16, device="cpu").to(device)
                    torch.ops.distzo2.update_(w, 0.1, 0.7, 0.1, 1, 2, 3, 4, 5, 0)
                    torch.ops.distzo2.perturb_(w, 0.5, 1, 2, 3, 4, 5, 0)
                    results.append(w.view(torch.int16).cpu())
            _probed[place] = None if torch.equal(*results) else "its kernels give other bits there than on the CPU"
        except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
            _probed[place] = f"its kernels do not run there: {str(error).partition(chr(10))[0]}"
    return _probed[place]


_probe._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which takes seconds to import dynamo


def _why_not_native(device: torch.device) -> str | None:
    """Why the native backend cannot run on this device; None if it can."""
    if extension() is None:
        return "distzo2_core._C was not built"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it has no kernels for {device.type}"
    if not build_info()["cuda"]:
        return "distzo2_core._C was built without CUDA kernels"
    return _probe((device.type, device.index))


def _why_not_triton(device_type: str) -> str | None:
    """Why the Triton backend cannot run on this kind of device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from . import triton_kernels

    if device_type == "cuda" or (device_type == "cpu" and triton_kernels.INTERPRETED):
        return None
    return f"it runs on cuda tensors, and on cpu tensors in its interpreter (TRITON_INTERPRET=1), not on {device_type}"


def _default_backend(device: torch.device) -> str:
    place = device.type, device.index
    if place in _defaults:
        return _defaults[place]
    reasons = {"native": _why_not_native(device)}
    if reasons["native"] is not None:
        reasons["triton"] = _why_not_triton(device.type)
    for name, reason in reasons.items():
        if reason is None:
            if not torch.compiler.is_compiling():
                logger.info("distzo2_core: using the %s backend on %s", name, device)
                if name != "native" and build_info()["cuda"]:
                    logger.warning("distzo2_core: native cannot run on %s: %s", device, reasons["native"])
            _defaults[place] = name
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendError(f"no backend for {device.type} tensors ({listed}); backend='reference' runs on cpu tensors")


def resolve_backend(backend: str | None, device: torch.device | str) -> str:
    """The name of the backend that runs ops on `device`: the one named, or for None the default one.

    Raises:
        ValueError: no backend has this name.
        BackendError: the backend named was not built, is not installed or cannot run on this device.
    """
    device = torch.device(device)
    if backend is None:
        return _default_backend(device)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "native":
        reason = _why_not_native(device)
    elif backend == "triton":
        reason = _why_not_triton(device.type)
    else:
        reason = None if device.type == "cpu" else f"it runs on cpu tensors, not on {device.type}"
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run: {reason}")
    return backend


def implementation(backend: str | None, device: torch.device) -> Any:
    """The functions of the resolved backend: `torch.ops.distzo2`, or the module `triton_ops` or `reference_ops`."""
    name = resolve_backend(backend, device)
    if name == "native":
        return torch.ops.distzo2
    return importlib.import_module(f"distzo2_core.{name}_ops")
