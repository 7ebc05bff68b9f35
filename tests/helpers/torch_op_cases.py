"""Arguments of the public and the raw ops, shared by their tests."""

from __future__ import annotations

import torch

from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update
from distzo2_core.types import encode_program

ops = torch.ops.distzo2
WORDS = (-1, 2, 3, 4, 5)  # seed 2^64 - 1, step, param, probe, offset
PLACE = {"seed": 2**64 - 1, "step": 2, "param": 3, "probe": 4, "offset": 5}
IN_PLACE = {"noise_": (), "perturb_": (0.1,), "update_": (0.1, 0.2, 0.3)}  # with their scalars
UPDATE = Update(7, (GroupScalars(0.1, 0.0),), (Term(0, 7, 0, 0, 1.0),))
EMIT = Emit((Term(0, 8, 0, 0, 1e-3),), (1.0,))


def update(step: int = 0, terms: tuple[Term, ...] = (Term(0, 0, 0, 0, 1.0),), num_groups: int = 1) -> Update:
    return Update(step, (GroupScalars(0.1, 0.0),) * num_groups, terms)


def segment(**changes: object) -> Segment:
    return Segment(0, 8, torch.float32, 0, 0, 0, 2, 4)._replace(**changes)


def in_place(name: str, w: torch.Tensor, *words: int, family: int = 0) -> None:
    getattr(ops, name)(w, *IN_PLACE[name], *(words or WORDS), family)


def materialize_arguments(dtype: torch.dtype = torch.float32, num_emits: int = 2) -> dict[str, object]:
    """The raw op's arguments by name: eight elements with an update, and an out for each of the emits."""
    weights = torch.arange(8).to(dtype).view(torch.uint8).clone()
    table = SegmentTable([segment(dtype=dtype)])
    program = encode_program([UPDATE], [EMIT] * num_emits, 1)._asdict()
    outs = [torch.zeros_like(weights) for _ in range(num_emits)]
    return {"weights": weights, "segments": table.tensor, "seed": 1, **program, "outs": outs, "write_back": True}
