"""Packed parameters decoded by the core, in float32."""

from __future__ import annotations

import torch

import distzo2_core
from distzo2.checkpoint.packed_param import PackedParam
from distzo2_core.packed import PackedLayout, PackedSegment, PackedTable


def decode(param: PackedParam) -> torch.Tensor:
    """The weights, float32 of the parameter's shape, before any rounding to 16 bits."""
    rows = decode_rows(param.read(), param.layout)
    if not param.transposed:
        return rows.view(param.shape)
    return rows.view(*param.shape[:-2], param.shape[-1], param.shape[-2]).mT


def decode_rows(buffer: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """float32 [rows, cols]."""
    out = torch.empty(layout.rows * layout.cols * 4, dtype=torch.uint8)
    distzo2_core.decode(buffer, PackedTable([PackedSegment(layout, 0, torch.float32)]), out)
    return out.view(torch.float32).view(layout.rows, layout.cols)
