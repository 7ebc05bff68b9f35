"""A parameter whose bytes are quantized: where they are in files, and how they are decoded.

The readers of GGUF files and of quantized safetensors checkpoints return these. Nothing here holds weights: a parameter
is byte ranges of files, and small tensors that could only be made at load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from distzo2_core.packed import PackedLayout

PIECE_ALIGNMENT = 64  # bytes: of each piece in a parameter's buffer


@dataclass(frozen=True)
class Piece:
    """Bytes that become part of a parameter's buffer: a range of a file, or what was made at load."""

    path: Path | None  # a file, read as it lies; None: `data` was made at load
    offset: int  # bytes, in the file
    num_bytes: int
    data: torch.Tensor | None = None  # uint8 [num_bytes], contiguous, on the CPU

    @classmethod
    def made(cls, tensor: torch.Tensor) -> Piece:
        """A piece with the bytes of a CPU tensor."""
        data = tensor.contiguous().view(-1).view(torch.uint8)
        return cls(None, 0, data.numel(), data)


@dataclass(frozen=True)
class PackedParam:
    """A packed parameter of a model.

    Attributes:
        name: of the parameter in transformers, e.g. model.layers.0.self_attn.q_proj.weight.
        shape: of the parameter in transformers.
        format: for people, e.g. "Q4_K", "gptq int4 g128", "nf4".
        pieces: laid one after another in a buffer, each from a multiple of `PIECE_ALIGNMENT` bytes on.
        layout: how the buffer is decoded; its offsets count from the first piece's first byte.
        transposed: whether the decoded rows are the parameter with its last two dimensions swapped, as for the experts
            of gpt-oss. The parameter is then a view of what is decoded: `rows.view(*leading, n, k).mT`.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    pieces: tuple[Piece, ...]
    layout: PackedLayout
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the buffer, without padding behind the last piece."""
        return starts(self.pieces)[-1] + self.pieces[-1].num_bytes


def starts(pieces: Sequence[Piece]) -> list[int]:
    """The byte at which each piece begins in the buffer."""
    lengths = (-(-piece.num_bytes // PIECE_ALIGNMENT) * PIECE_ALIGNMENT for piece in pieces[:-1])
    return [*accumulate(lengths, initial=0)]
