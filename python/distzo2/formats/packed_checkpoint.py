"""Quantized safetensors checkpoints opened as models: each parameter packed, as the files have it, or raw.

Transformers loads symbols of the decoded tensors (`checkpoint.symbols`), so names, tied weights, and experts that are
stored one by one and held in one parameter are those of the installed transformers. Where a parameter joins rows of
several packed matrices, their bytes follow each other in its buffer.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.config import QUANT_KEYS, class_of, load_config, parts_of
from distzo2.checkpoint.layout import Layout, LayoutError, row_major_strides
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor, trace_checkpoint
from distzo2.checkpoint.packed_param import PIECE_ALIGNMENT, PackedParam, Piece, starts
from distzo2.checkpoint.reading import CONFIG_FILE, CheckpointFiles
from distzo2.checkpoint.symbols import LayoutTensor
from distzo2.checkpoint.tensor_files import CheckpointError, TensorEntry, read_json
from distzo2.formats.matrices import Matrix, find_matrices
from distzo2.text import brief
from distzo2_core.packed import Field, PackedLayout

# By `quant_method`, the setting that says more, and those values of it that are decoded. AQLM, QuIP#, HQQ, SpQR, VPTQ,
# HIGGS, quanto, torchao and others decode otherwise.
_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2")),
    "awq": ("version", ("gemm", "GEMM")),
    "compressed-tensors": (
        "format",
        (
            *("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense"),
            *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
        ),
    ),
    **dict.fromkeys(("bitsandbytes", "mxfp4", "modelopt", "fp8", "fbgemm_fp8", "mxfp8"), ("", ())),
}
# Older quantizers write their settings beside config.json.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# The last parts of names that only packed tensors have.
_PACKED_NAMES = r"\.(qweight|weight_packed|weight_scale_inv|\w+_blocks|weight\.absmax)$"
_RANGE_BYTES = 4096  # less, of a part of a joined parameter, is copied and not read by itself


@dataclass
class PackingError:
    """By how much packed weights differ from those of the checkpoint, as far as they have been made.

    Attributes:
        sums: by parameter, and by the number of its first group, of each chunk: the sum of (v - w)^2, and of w^2.
    """

    sums: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)

    def of(self, *names: str) -> float:
        """The root mean square of v - w relative to that of w, over these parameters; none: over all."""
        parts = [part for name in names or self.sums for part in self.sums[name].values()]
        difference, total = (math.fsum(part[i] for part in parts) for i in (0, 1))
        return math.sqrt(difference / total) if total else 0.0

    def report(self) -> str:
        """One line for people: the error over all parameters, one or more, and the largest of one."""
        worst = max(self.sums, key=self.of)
        size = "of the weights' own size (root mean square)"
        return f"packing error {self.of():.2e} {size}, at most {self.of(worst):.2e} ({worst})"


def open_packed(
    path: str | os.PathLike, *, dtype: torch.dtype | str | None = None, auto_class: Any = None, **options: Any
) -> tuple[nn.Module, CheckpointMap]:
    """Opens a checkpoint whose weights are quantized, from the headers of its files.

    Tensors are read only where they decide between forms. Scales are not: `CheckpointMap.check_scales` reads and
    refuses those that are not finite. Activations are not quantized, whatever the checkpoint says of them.

    Args:
        path: a directory with config.json and safetensors files, in shards or not.
        dtype: that the parameters are computed in; None for the checkpoint's.
        auto_class: as for `distzo2.from_pretrained`.
        options: of the model class's `from_pretrained`.

    Returns:
        the model, its parameters on meta and its buffers real, in `eval()` mode, and what fills it.

    Raises:
        CheckpointError: the weights are not packed, or in a form that is not decoded (act-order, a codebook, groups
            that do not divide the columns, ...); or as for `distzo2.from_pretrained`.
    """
    directory = Path(path)
    config = load_config(directory)
    files = DecodedFiles(directory, dtype or getattr(config, "dtype", None))
    model_class = class_of(directory, config, auto_class)
    # It refuses what is packed in other forms, by name.
    model, found = trace_checkpoint(files, model_class, config, dtype=dtype or "auto", **options)
    if not files.matrices:
        raise CheckpointError(f"{directory}: expected packed weights, found none")
    for name, tensor in found.mapped.items():
        if files.is_packed(tensor):
            found.mapped[name] = replace(tensor, packed=_packed(tensor, files))
    return model.eval(), found


def is_quantized(directory: Path, files: CheckpointFiles | None = None) -> bool:
    """Whether a checkpoint directory says that its weights are quantized, or names of its tensors do, which are in
    `files` or else read."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        return False
    said = any(part.get(key) for part in parts_of(read_json(path)) for key in QUANT_KEYS)
    if said or any((directory / name).is_file() for name in SETTINGS_FILES):
        return True
    with suppress(CheckpointError), nullcontext(files) if files else closing(CheckpointFiles(directory)) as opened:
        return any(re.search(_PACKED_NAMES, entry.name) for entry in opened.entries)
    return False


def find_settings(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of its quantisation, wherever its config.json has it, or an older file beside it.

    Raises:
        CheckpointError: a method or a format that is not decoded, by name; or two that differ.
    """
    path = directory / CONFIG_FILE
    found = [part[key] for part in parts_of(read_json(path)) for key in QUANT_KEYS if part.get(key)]
    for name in SETTINGS_FILES:
        if not found and (directory / name).is_file():
            path = directory / name
            found = [read_json(path)]
            found[0].setdefault("quant_method", {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(name))
    settings: dict[str, Any] = {}
    for part in found:
        if not isinstance(part, dict) or part.get("quant_method") != found[0].get("quant_method"):
            raise CheckpointError(f"{path}: expected one quantisation, got {brief(part)} too")
        settings |= part
    method = settings.get("quant_method") or "modelopt"  # whose own file has no such key
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"{path}: weights quantized by {brief(method)} cannot be decoded: expected {', '.join(_METHODS)}, or "
            "weights in 16 bits (which --store packs) or in a GGUF file"
        )
    groups, (key, known) = settings.get("config_groups"), _METHODS[method]
    parts = [p for p in (settings, *(groups.values() if isinstance(groups, dict) else ())) if isinstance(p, dict)]
    for part in parts:
        if part.get(key) and part[key] not in known:
            raise CheckpointError(f"{path}: expected {key} among {', '.join(known)}, got {brief(part[key])}")
    blocks = [part["weights"].get("block_structure") for part in parts if isinstance(part.get("weights"), dict)]
    if blocks := [block for block in blocks if block]:
        settings.setdefault("weight_block_size", blocks[0] if all(b == blocks[0] for b in blocks) else blocks)
    for key in ("transform_config", "sparsity_config"):
        told = settings.get(key)
        is_idle = isinstance(told, dict) and (told.get("format") == "dense" or told.get("config_groups") == {})
        if told and not is_idle:
            raise CheckpointError(f"{path}: {key} is not decoded, got {brief(told)}")
    block = settings.get("weight_block_size") or [1, 1]
    if not isinstance(block, list) or len(block) != 2 or any(type(b) is not int or b < 1 for b in block):
        expected = "expected numbers of rows and columns as weight_block_size"
        raise CheckpointError(f"{path}: {expected}, got {brief(block)}")
    return settings


class DecodedFiles(CheckpointFiles):
    """A checkpoint's tensors with each packed matrix as one tensor, which is never read, in the place of its parts."""

    def __init__(self, directory: Path, dtype: torch.dtype | str | None = None):
        settings = find_settings(directory)
        super().__init__(directory)
        known = {e.name: e for e in self.entries}
        matrices, used = find_matrices(known, settings)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        kept = [e for e in self.entries if e.name not in used]
        self.entries = kept + [TensorEntry(m.name, dtype, m.shape, path=known[m.used[0]].path) for m in matrices]
        self.matrices: dict[int, Matrix] = dict(enumerate(matrices, len(kept)))  # by number of the entry

    def is_packed(self, tensor: MappedTensor) -> bool:
        """Whether a parameter is made of packed matrices.

        Raises:
            CheckpointError: of packed matrices and raw tensors.
        """
        sources = {piece.source for piece in tensor.pieces}
        if sources & self.matrices.keys() and not sources <= self.matrices.keys():
            names = " and ".join(repr(self.entries[source].name) for source in sorted(sources)[:: len(sources) - 1])
            raise CheckpointError(f"{self.directory}: {tensor.name!r} joins packed weights and others: {names}")
        return bool(sources & self.matrices.keys())

    def equal(self, a: LayoutTensor, b: torch.Tensor) -> bool:
        symbols = [each for each in (a, b) if isinstance(each, LayoutTensor)]
        if any(piece.source in self.matrices for each in symbols for piece in each.where.pieces):
            return len(symbols) == 2 and a.where == b.where  # the same bytes; others are taken to differ
        return super().equal(a, b)


def _packed(tensor: MappedTensor, files: DecodedFiles) -> PackedParam:
    """A parameter that packed matrices fill."""
    for is_swapped in (False, True):
        parts = _row_ranges(tensor, files.matrices, is_swapped)
        if parts is not None:
            break
    else:
        name = files.entries[tensor.pieces[0].source].name
        raise CheckpointError(
            f"{files.directory}: {tensor.name!r} takes packed weights apart within their rows: {name!r}"
        )
    matrices = [matrix for matrix, _ in parts]
    first = matrices[0]
    if len({_way(matrix) for matrix in matrices}) > 1:
        formats = ", ".join(sorted({m.format for m in matrices}))
        raise CheckpointError(f"{files.directory}: {tensor.name!r} joins weights packed in different ways: {formats}")
    pieces: list[Piece] = []
    fields = {}
    for role in first.planes:
        place, data = _joined([(*matrix.planes[role], rows) for matrix, rows in parts])
        fields[role] = replace(place, offset=starts([*pieces, data[0]])[-1])
        pieces += data
    rows = math.prod(tensor.shape) // first.cols
    layout = PackedLayout(rows, first.cols, first.cols, **fields, **first.constants)
    return PackedParam(
        tensor.name, tensor.shape, first.format, tuple(pieces), layout, is_swapped is not first.transposed
    )


def _way(matrix: Matrix) -> tuple[Any, ...]:
    """What matrices have in common that one layout describes."""
    planes = ((role, replace(place, rows=1)) for role, (_, place) in matrix.planes.items())
    return matrix.cols, matrix.transposed, *planes, *sorted(matrix.constants.items())


def _row_ranges(
    tensor: MappedTensor, matrices: Mapping[int, Matrix], is_swapped: bool
) -> list[tuple[Matrix, range]] | None:
    """The rows of matrices that a parameter consists of, one after another, or, with `is_swapped`, that the parameter
    with its last two dimensions swapped does; None if it consists of something else."""
    layout = Layout(tensor.shape, tensor.pieces)
    if is_swapped:
        if len(tensor.shape) < 2:
            return None
        strides = row_major_strides(tensor.shape)
        swap = (*range(len(strides) - 2), len(strides) - 1, len(strides) - 2)
        try:
            layout = layout.strided([tensor.shape[d] for d in swap], [strides[d] for d in swap], 0)
        except LayoutError:
            return None
    ranges = []
    for piece in sorted(layout.pieces, key=lambda piece: piece.dst_offset):
        matrix = matrices[piece.source]
        # Of what is transposed, only whole slices are rows one after another.
        unit = math.prod(matrix.shape[-2:]) if matrix.transposed else matrix.cols
        if not piece.is_run or piece.src_offset % unit or piece.numel % unit:
            return None
        begin = piece.src_offset // matrix.cols
        ranges.append((matrix, range(begin, begin + piece.numel // matrix.cols)))
    return ranges


def _joined(parts: list[tuple[Piece, Field, range]]) -> tuple[Field, list[Piece]]:
    """Where the values of matrices' rows one after another are, and their pieces.

    These stay ranges of files where their lines follow each other in the buffer as they are; else lines are copied, and
    repeated where a line's rows are not all there.
    """
    first, pieces = parts[0][1], []
    for piece, place, rows in parts:
        begin, end = rows.start // place.rows, -(-rows.stop // place.rows)
        pieces.append(piece.part(begin * place.row_stride, (end - begin) * place.row_stride))
    is_whole = all(
        at.rows == first.rows and rows.start % at.rows == 0 and (len(parts) == 1 or len(rows) % at.rows == 0)
        for _, at, rows in parts
    )
    is_aligned = all(piece.num_bytes % PIECE_ALIGNMENT == 0 and piece.num_bytes >= _RANGE_BYTES for piece in pieces)
    if is_whole and (len(parts) == 1 or is_aligned):
        return first, pieces
    shared = math.gcd(*(bound for _, at, rows in parts for bound in (at.rows, rows.start, rows.stop)))
    lines = [torch.arange(r.start, r.stop, shared) // at.rows - r.start // at.rows for _, at, r in parts]
    num_lines, stride = sum(each.numel() for each in lines), first.row_stride

    def make() -> torch.Tensor:
        return torch.cat([p.read().view(-1, stride)[each] for p, each in zip(pieces, lines, strict=True)])

    return replace(first, rows=shared), [Piece.made(num_lines * stride, make)]
