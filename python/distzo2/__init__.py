"""DistZO2: fine-tuning with forward passes only, for models larger than the memory of the device that computes."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from distzo2.errors import DistZO2Error
from distzo2.version import __version__

if TYPE_CHECKING:
    from distzo2.formats.gains import gains
    from distzo2.generation.generate import generate_batch
    from distzo2.models.container import save_packed
    from distzo2.models.pretrained import from_pretrained, save_pretrained
    from distzo2.optim.settings import StepRecord
    from distzo2.optim.zosgd import ZOSGD
    from distzo2.peft.adapters import adapter, save_adapter
    from distzo2.peft.merging import merge_adapter
    from distzo2.record.weight_file import WeightFile
    from distzo2.streaming.lanes import current_lane
    from distzo2.streaming.offload import edit, evaluate, offload, present, runtime_of, state_dict

# As distzo2_core says, which may be imported only when CUDA has started.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

# Imported when first used, so that `distzo2 --help` does not wait for torch and transformers.
_MODULE_OF = {
    "ZOSGD": "optim.zosgd",
    "StepRecord": "optim.settings",
    "adapter": "peft.adapters",
    "current_lane": "streaming.lanes",
    "edit": "streaming.offload",
    "evaluate": "streaming.offload",
    "generate_batch": "generation.generate",
    "from_pretrained": "models.pretrained",
    "gains": "formats.gains",
    "merge_adapter": "peft.merging",
    "offload": "streaming.offload",
    "present": "streaming.offload",
    "runtime_of": "streaming.offload",
    "save_adapter": "peft.adapters",
    "save_packed": "models.container",
    "save_pretrained": "models.pretrained",
    "state_dict": "streaming.offload",
    "WeightFile": "record.weight_file",
}

__all__ = [
    "ZOSGD",
    "DistZO2Error",
    "StepRecord",
    "WeightFile",
    "__version__",
    "adapter",
    "current_lane",
    "edit",
    "evaluate",
    "from_pretrained",
    "gains",
    "generate_batch",
    "merge_adapter",
    "offload",
    "present",
    "runtime_of",
    "save_adapter",
    "save_packed",
    "save_pretrained",
    "state_dict",
]


def __getattr__(name: str) -> Any:
    if name == "parallel":
        return importlib.import_module("distzo2.parallel")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"distzo2.{_MODULE_OF[name]}"), name)
    if name == "Snapshots":
        raise AttributeError("distzo2.Snapshots left: offload(..., weight_file=distzo2.WeightFile(...))")
    raise AttributeError(f"module 'distzo2' has no attribute {name!r}")
