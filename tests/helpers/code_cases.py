"""Visits of codes and of nonnegative float32 whose results are golden: nothing in them is drawn at random."""

from __future__ import annotations

import hashlib

import torch
from kernel_cases import Visit

from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update

FORMATS = {"code8": torch.int8, "code16": torch.int16, "nonnegative": torch.float32}


def format_visit(name: str, numel: int, element_offset: int, scale_group: int, num_updates: int) -> Visit:
    """Elements of one parameter, three updates of up to two terms, and both signs of a perturbation."""
    dtype = FORMATS[name]
    index = torch.arange(numel)
    if dtype == torch.float32:
        weights, scales, more = index % 7 * 0.25, torch.empty(0), {"nonnegative": True}
    else:
        largest = torch.iinfo(dtype).max
        weights = (index * 7919) % (2 * largest + 1) - largest
        groups = torch.arange(-(-numel // scale_group))
        scales = (groups % 5).float() * 2.0**-12 / (groups % 3 + 1)
        more = {"scale_offset": numel * dtype.itemsize + -numel * dtype.itemsize % 4, "scale_group": scale_group}
    stored = weights.to(dtype).view(torch.uint8)
    buffer = torch.cat([stored, torch.zeros(-stored.numel() % 4, dtype=torch.uint8), scales.view(torch.uint8)])
    place = (0, numel, dtype, 3, element_offset, 0, 1, element_offset + numel, 0, torch.bfloat16)
    updates = tuple(
        Update(
            step,
            (GroupScalars(2.0**-6, 0.125 * (step % 2)),),
            tuple(Term((step + j) % 2, step, j, 0, 0.75 - j) for j in range(1 + step % 2)),
        )
        for step in range(num_updates)
    )
    emits = tuple(Emit((Term(0, 9, 0, 0, sign * 2.0**-10),), (1.0,)) for sign in (1, -1))
    table = SegmentTable([Segment(*place, **more)], num_bytes=buffer.numel())
    return Visit(buffer, table, 2**63 + 11, updates, emits)


def make_golden(backend: str) -> dict[str, list[str]]:
    """SHA-256 of the buffer and of the emits, by format and number of updates."""
    golden = {}
    for name in FORMATS:
        for numel, element_offset, scale_group, num_updates in (
            (20_000, 0, 64, 0),
            (20_000, 0, 64, 1),
            (5_003, 2**34 - 1024, 32, 3),
            (4_999, 512, 256, 40),
        ):
            visit = format_visit(name, numel, element_offset, scale_group, num_updates)
            hashes = [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in visit.run(backend, True)]
            golden[f"{name}, {numel} elements, {num_updates} updates"] = hashes
    return golden
