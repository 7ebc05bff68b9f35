"""The low-level API of DistZO2: counter-based noise, fused kernels, host memory and transfers.

Noise and kernels are functions of torch tensors on the CPU or a GPU. `HostPool`, `CopyEngine`, `BlockFile` and
`ThreadState` come from the compiled extension and are loaded when first used. Nothing here knows torch.distributed or
transformers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .backends import BackendError, build_info, require_extension, resolve_backend
from .ops import checksum, decode, embedding, low_rank, materialize, normal, perturb_, rademacher, restore_, update_
from .packed import Field, Kind, PackedLayout, PackedSegment, PackedTable
from .reference import permutation
from .types import (
    FAMILIES,
    FROZEN,
    NORMAL,
    RADEMACHER,
    Emit,
    GroupScalars,
    Program,
    Segment,
    SegmentTable,
    Term,
    Update,
    encode_program,
)

if TYPE_CHECKING:
    from ._C import (
        BlockFile,
        CopyEngine,
        HostPool,
        RangeFiles,
        ThreadState,
        aligned_buffer,
        cuda_available,
        memory_budget,
    )

# Streams that share one of a GPU's 8 connections wait for one another; copies and computing need more of them. CUDA
# reads this when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

# Versions that a journal records: changed bits are a new version.
NOISE_VERSION = "philox4x32-10/1"
ROUNDING_VERSION = "stochastic16/1"

# What a pass calls once a lane and unit, or once a step. Not for users: it may change with any release.
_FOR_RUNTIMES = ("hide_parameters", "show_parameters", "walk_modules")

__all__ = [
    "FAMILIES",
    "FROZEN",
    "NOISE_VERSION",
    "NORMAL",
    "RADEMACHER",
    "ROUNDING_VERSION",
    "BackendError",
    "BlockFile",
    "CopyEngine",
    "Emit",
    "Field",
    "GroupScalars",
    "HostPool",
    "Kind",
    "PackedLayout",
    "PackedSegment",
    "PackedTable",
    "Program",
    "RangeFiles",
    "Segment",
    "SegmentTable",
    "Term",
    "ThreadState",
    "Update",
    "aligned_buffer",
    "build_info",
    "checksum",
    "cuda_available",
    "decode",
    "embedding",
    "encode_program",
    "low_rank",
    "materialize",
    "memory_budget",
    "normal",
    "permutation",
    "perturb_",
    "rademacher",
    "resolve_backend",
    "restore_",
    "update_",
]


def __getattr__(name: str) -> Any:
    if name in __all__ or name in _FOR_RUNTIMES:  # what is not defined above is the extension's
        return getattr(require_extension(f"distzo2_core.{name}"), name)
    raise AttributeError(f"module 'distzo2_core' has no attribute {name!r}")
