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
from distzo2.checkpoint.reading import CheckpointFiles, Range, digest_checkpoint
from distzo2.checkpoint.symbols import LayoutTensor, Trace, creation_bound, lenient_transformers
from distzo2.checkpoint.tensor_files import CheckpointError, TensorEntry
from distzo2.errors import one_line


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

    def digest(self) -> dict[str, Any]:
        """What a journal's header records of the checkpoint's files, all of which are read."""
        return digest_checkpoint(self.files.directory)

    def pieces_of(self, name: str, tensor: torch.Tensor, begin: int = 0) -> tuple[Piece, ...]:
        """The pieces of the parameter that `tensor` is, or whose rows from `begin` on it is.

        Raises:
            ValueError: its dtype or its shape is not the parameter's.
        """
        mapped, shape = self.mapped[name], tuple(tensor.shape)
        if tensor.dtype != mapped.dtype or shape[1:] != mapped.shape[1:] or len(shape) != len(mapped.shape):
            wanted = f"{mapped.dtype} {list(mapped.shape)}"
            raise ValueError(f"{name}: expected {wanted} or rows of it, got {tensor.dtype} {list(shape)}")
        if shape == mapped.shape:
            return mapped.pieces
        return Layout(mapped.shape, mapped.pieces).flat(begin * math.prod(shape[1:]), tensor.numel()).pieces

    def read(self, name: str, out: torch.Tensor, begin: int = 0) -> None:
        """Fills `out`, a contiguous CPU tensor, with a parameter or its rows from `begin` on, in the calling thread."""
        self.files.read_pieces(self.pieces_of(name, out, begin), out)

    def ranges_of(self, name: str, out: torch.Tensor, within: range) -> Iterator[Range]:
        """The ranges that fill `out`, a contiguous CPU tensor of the parameter's shape and dtype, for a
        `ParallelReader`. Elements outside `within`, counted through all dimensions, may be left out."""
        flat = out.detach().view(-1)
        for piece in self.pieces_of(name, out):
            yield from self.files.ranges_of(piece, flat, within)

    def to_json(self) -> dict[str, Any]:
        """The map as plain data for JSON: checkpoint tensors with their files, and each parameter's pieces."""
        return {
            "tensors": [
                [t.name, str(t.dtype).removeprefix("torch."), t.shape, file.path.name]
                for t, file in zip(self.tensors, self.files.file_of, strict=True)
            ],
            "params": {
                name: [str(m.dtype).removeprefix("torch."), m.shape, m.pieces] for name, m in self.mapped.items()
            },
        }

    def close(self) -> None:
        """Closes the checkpoint's files; the map can still be written through."""
        if self.files is not None:
            self.files.close()


def map_for_saving(model: nn.Module, params: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> CheckpointMap:
    """The map that writes `params` (name, dtype, shape; tied weights once) and the persistent buffers of `model`.

    A transformers model is written as transformers itself would, any other module by its names.
    """
    held = [MappedTensor(name, dtype, tuple(shape), ()) for name, dtype, shape in params]
    held += [MappedTensor(name, b.dtype, tuple(b.shape), (), is_buffer=True) for name, b in persistent_buffers(model)]
    is_transformers = any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)
    if is_transformers:
        ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
        held = [tensor for tensor in held if tensor.name not in ignored]
    trace = Trace([tensor.name for tensor in held])
    written = {t.name: LayoutTensor(Layout.leaf(i, t.shape), t.dtype, trace) for i, t in enumerate(held)}
    if is_transformers:
        from transformers.core_model_loading import revert_weight_conversion

        try:
            written = revert_weight_conversion(model, written)
        except Exception as error:
            raise CheckpointError(f"{type(model).__name__} has no checkpoint layout: {one_line(error)}") from error

    pieces: list[list[Piece]] = [[] for _ in held]
    tensors = []
    for number, (name, symbol) in enumerate(written.items()):
        if symbol.problem:
            raise CheckpointError(f"{type(model).__name__} has no checkpoint layout for {name!r}: {symbol.problem}")
        tensors.append(TensorEntry(name, symbol.dtype, tuple(symbol.shape)))
        for piece in symbol.where.pieces:
            pieces[piece.source].append(
                Piece(number, piece.sizes, piece.dst_offset, piece.dst_strides, piece.src_offset, piece.src_strides)
            )
    mapped = {t.name: replace(t, pieces=tuple(p)) for t, p in zip(held, pieces, strict=True)}
    config, generation_config = getattr(model, "config", None), getattr(model, "generation_config", None)
    return CheckpointMap(tensors, mapped, [], None, config, generation_config, type(model).__name__)


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
    state = {e.name: LayoutTensor(Layout.leaf(i, e.shape), e.dtype, trace) for i, e in enumerate(files.entries)}
    bound = creation_bound(len(state), sum(entry.num_bytes for entry in files.entries))
    kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with torch.device("cpu"), bound, lenient_transformers(trace):
            model, report = model_class.from_pretrained(None, config=config, state_dict=state, **kwargs)
    except Exception as error:
        what = f"this checkpoint cannot be mapped onto {model_class.__name__}"
        raise CheckpointError(f"{where}: {what}: {one_line(error)}") from error

    if report["mismatched_keys"]:
        name, got, expected = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{where}: tensor {name!r}: expected shape {list(expected)} as config.json says, got {list(got)}"
        )
    params = dict(model.named_parameters())
    held = params | dict(persistent_buffers(model))
    missing = sorted({*report["missing_keys"], *(name for name, tensor in held.items() if tensor.is_meta)})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: no tensor in the checkpoint fills {missing[0]!r}{more}")

    def in_file(piece: Piece) -> tuple[int, int]:
        entry, file = files.entries[piece.source], files.file_of[piece.source]
        return files.files.index(file), entry.offset + piece.src_offset * entry.dtype.itemsize

    mapped: dict[str, MappedTensor] = {}
    made: dict[torch.Tensor, torch.Tensor] = {}  # by symbol, so that tied parameters stay one object
    for name, symbol in held.items():
        if not isinstance(symbol, LayoutTensor):
            continue
        if symbol.problem:
            raise CheckpointError(f"{where}: {name!r} cannot be mapped onto the checkpoint: {symbol.problem}")
        # Pieces are read from front to back.
        pieces = tuple(sorted((piece.coalesced() for piece in symbol.where.pieces), key=in_file))
        mapped[name] = MappedTensor(name, symbol.dtype, tuple(symbol.shape), pieces, name not in params)
        made[symbol] = torch.empty(symbol.shape, dtype=symbol.dtype, device="meta" if name in params else "cpu")
        if name in params:
            made[symbol] = nn.Parameter(made[symbol], requires_grad=symbol.is_floating_point())
        else:
            files.read_pieces(pieces, made[symbol])
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: made[tensor] for name, tensor in tensors.items() if tensor in made})
    model.config.name_or_path = where
    unexpected = sorted(report["unexpected_keys"])
    return model, CheckpointMap(files.entries, mapped, unexpected, files, model.config, None, type(model).__name__)
