"""The map from ranges in checkpoint files to ranges in a model's parameters, and reads through it.

A checkpoint and a model may differ in names (prefixes, legacy names), in layout (experts stored one by one and held
fused), in dtype, and in what is tied. The map is found by tracing the installed transformers (`symbols`). Loading,
saving and replay share it: `ranges_of` serves several reading threads, `read` one, and a `CheckpointWriter` runs the
same pieces backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.layout import Layout, Piece
from distzo2.checkpoint.reading import CheckpointFiles, Range
from distzo2.checkpoint.symbols import MISSING, LayoutTensor, Trace, trace_from_pretrained, trace_save
from distzo2.checkpoint.tensor_files import CheckpointError, TensorEntry


@dataclass(frozen=True)
class MappedTensor:
    """A parameter or persistent buffer of the model and the pieces of checkpoint tensors that fill it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_buffer: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class CheckpointMap:
    """How the tensors of one checkpoint and the parameters of one model correspond.

    `tensors` are the checkpoint's, by the number that pieces name as their source; `mapped` are the model's, by name
    in `named_parameters()` order, then buffers. `unexpected` names checkpoint tensors that the model has no use for.
    `files` is None for a map that is only written through (a model that came from no checkpoint).
    """

    tensors: list[TensorEntry]
    mapped: dict[str, MappedTensor]
    unexpected: list[str] = field(default_factory=list)
    files: CheckpointFiles | None = None
    config: Any = None
    generation_config: Any = None
    model_class: str | None = None

    @property
    def directory(self) -> Path | None:
        return self.files.directory if self.files else None

    @property
    def names(self) -> list[str]:
        """Names of the parameters, tied weights once, in the model's order."""
        return [name for name, tensor in self.mapped.items() if not tensor.is_buffer]

    @staticmethod
    def for_saving(model: nn.Module, params: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> CheckpointMap:
        """The map that writes `params` (name, dtype, shape; tied weights once) and the persistent buffers of `model`.

        A transformers model is written as transformers itself would, any other module by its names.
        """
        held = [MappedTensor(name, dtype, tuple(shape), ()) for name, dtype, shape in params]
        held += [
            MappedTensor(name, buffer.dtype, tuple(buffer.shape), (), is_buffer=True)
            for name, buffer in persistent_buffers(model)
        ]
        is_transformers = any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)
        if is_transformers:
            ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
            held = [tensor for tensor in held if tensor.name not in ignored]
        trace = Trace([tensor.name for tensor in held])
        symbols = {t.name: LayoutTensor(Layout.leaf(i, t.shape), t.dtype, trace) for i, t in enumerate(held)}
        written = trace_save(model, symbols) if is_transformers else symbols

        pieces: list[list[Piece]] = [[] for _ in held]
        tensors = []
        for number, (name, symbol) in enumerate(written.items()):
            tensors.append(TensorEntry(name, symbol.dtype, tuple(symbol.shape), 0, symbol.numel() * symbol.itemsize))
            for piece in symbol.where.pieces:
                pieces[piece.source].append(
                    Piece(number, piece.sizes, piece.dst_offset, piece.dst_strides, piece.src_offset, piece.src_strides)
                )
        mapped = {t.name: replace(t, pieces=tuple(p)) for t, p in zip(held, pieces, strict=True)}
        return CheckpointMap(
            tensors,
            mapped,
            config=getattr(model, "config", None),
            generation_config=getattr(model, "generation_config", None),
            model_class=type(model).__name__,
        )

    def pieces_of(self, name: str, tensor: torch.Tensor, begin: int = 0) -> tuple[Piece, ...]:
        """The pieces of the parameter that `tensor` is, or whose rows from `begin` on it is.

        Raises:
            ValueError: its dtype or its shape is not the parameter's.
        """
        mapped, shape = self.mapped[name], tuple(tensor.shape)
        expected = (*shape[:1], *mapped.shape[1:]) if mapped.shape else ()
        if shape != expected or tensor.dtype != mapped.dtype:
            wanted = f"{mapped.dtype} {list(mapped.shape)}"
            raise ValueError(f"{name}: expected {wanted} or rows of it, got {tensor.dtype} {list(shape)}")
        if shape == mapped.shape:
            return mapped.pieces
        return Layout(mapped.shape, mapped.pieces).narrow(0, begin, len(tensor)).pieces

    def read(self, name: str, out: torch.Tensor, begin: int = 0) -> None:
        """Fills `out`, a contiguous CPU tensor, with a parameter or its rows from `begin` on, in the calling thread."""
        self.files.read_pieces(self.pieces_of(name, out, begin), out)

    def ranges_of(self, name: str, out: torch.Tensor, within: range | None = None) -> Iterator[Range]:
        """The ranges that fill `out`, a contiguous CPU tensor of the parameter's shape and dtype, for a
        `ParallelReader`. Elements outside `within`, counted through all dimensions, may be left out."""
        flat = out.detach().view(-1)
        for piece in self.pieces_of(name, out):
            yield from self.files.ranges_of(piece, flat, within)

    def to_json(self) -> dict[str, Any]:
        """The map as plain JSON data: checkpoint tensors with their files, and each parameter's pieces."""
        file_of = self.files.file_of if self.files else [None] * len(self.tensors)
        return {
            "tensors": [
                [t.name, str(t.dtype).removeprefix("torch."), list(t.shape), file.path.name if file else None]
                for t, file in zip(self.tensors, file_of, strict=True)
            ],
            "params": {
                name: [str(m.dtype).removeprefix("torch."), list(m.shape), [piece.to_json() for piece in m.pieces]]
                for name, m in self.mapped.items()
            },
        }

    def close(self) -> None:
        """Closes the checkpoint's files; the map can still be written through."""
        if self.files is not None:
            self.files.close()


def persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that belong to a model's state dict, by name."""
    found = []
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
            found.append((name, buffer))
    return found


def trace_checkpoint(
    files: CheckpointFiles, model_class: Any, config: Any, **kwargs: Any
) -> tuple[nn.Module, CheckpointMap]:
    """A transformers model with its parameters on meta and its buffers real, and the map that fills it.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is converted in a way that ranges cannot express.
    """
    where = str(files.directory)
    trace = Trace([entry.name for entry in files.entries], files.equal)
    symbols = {
        entry.name: LayoutTensor(Layout.leaf(number, entry.shape), entry.dtype, trace)
        for number, entry in enumerate(files.entries)
    }
    num_bytes = sum(entry.num_bytes for entry in files.entries)
    model, report = trace_from_pretrained(model_class, config, symbols, trace, where, num_bytes, **kwargs)

    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, got, expected = mismatched[0]
        raise CheckpointError(
            f"{where}: tensor {name!r}: expected shape {list(expected)} as config.json says, got {list(got)}"
        )
    held = dict((*model.named_parameters(), *persistent_buffers(model)))
    symbols = {name: tensor for name, tensor in held.items() if isinstance(tensor, LayoutTensor)}
    unfilled = {name for name, tensor in held.items() if tensor.is_meta}
    unfilled |= {name for name, symbol in symbols.items() if symbol.problem is MISSING}
    missing = sorted(set(report["missing_keys"]) | unfilled)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: no tensor in the checkpoint fills {missing[0]!r}{more}")
    for name, symbol in symbols.items():
        if symbol.problem:
            raise CheckpointError(f"{where}: {name!r} cannot be mapped onto the checkpoint: {symbol.problem}")

    is_param = dict(model.named_parameters()).keys()
    mapped = {name: _mapped(name, symbol, files, name not in is_param) for name, symbol in symbols.items()}
    _replace_symbols(model, files)
    model.config.name_or_path = where
    return model, CheckpointMap(
        files.entries, mapped, sorted(report["unexpected_keys"]), files, model.config, None, type(model).__name__
    )


def _mapped(name: str, symbol: LayoutTensor, files: CheckpointFiles, is_buffer: bool) -> MappedTensor:
    """A loaded symbol's pieces, in the order of the files, so that they are read from front to back."""
    position = {file: number for number, file in enumerate(files.files)}

    def at(piece: Piece) -> tuple[int, int]:
        entry = files.entries[piece.source]
        return position[files.file_of[piece.source]], entry.offset + piece.src_offset * entry.dtype.itemsize

    pieces = tuple(sorted((piece.coalesced() for piece in symbol.where.pieces), key=at))
    return MappedTensor(name, symbol.dtype, tuple(symbol.shape), pieces, is_buffer)


def _replace_symbols(model: nn.Module, files: CheckpointFiles) -> None:
    """Turns parameters into meta tensors (tied ones stay one object), and gives loaded buffers their values."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, symbol in held.items():
                if not isinstance(symbol, LayoutTensor):
                    continue
                if id(symbol) not in made and held is module._parameters:
                    empty = torch.empty(symbol.shape, dtype=symbol.dtype, device="meta")
                    made[id(symbol)] = nn.Parameter(empty, requires_grad=symbol.is_floating_point())
                elif id(symbol) not in made:
                    made[id(symbol)] = torch.empty(symbol.shape, dtype=symbol.dtype)
                    files.read_pieces(symbol.where.pieces, made[id(symbol)])
                held[name] = made[id(symbol)]
