"""DistZO2: fine-tuning with forward passes only, for models larger than the memory of the device that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distzo2.errors import DistZO2Error
from distzo2.model import edit, evaluate, offload, runtime_of
from distzo2.optimizer import ZOSGD, StepRecord
from distzo2.version import __version__

if TYPE_CHECKING:
    from distzo2.checkpoint import from_pretrained, save_pretrained

__all__ = [
    "ZOSGD",
    "DistZO2Error",
    "StepRecord",
    "__version__",
    "edit",
    "evaluate",
    "from_pretrained",
    "offload",
    "runtime_of",
    "save_pretrained",
]

_LAZY = {  # these import transformers
    "from_pretrained": "distzo2.checkpoint",
    "save_pretrained": "distzo2.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'distzo2' has no attribute {name!r}")
