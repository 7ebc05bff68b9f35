"""The map from ranges in checkpoint files to ranges in a model's parameters, and reads through it.

A checkpoint and a model may differ in names (prefixes, legacy names), in layout (experts stored one by one and held
fused), in dtype, and in what is tied. The map is found by tracing the installed transformers (`checkpoint_trace`), and
then serves loading, saving and replay alike: `read_param` fills a parameter from the files (`checkpoint_files`),
`ranges_of` lets several threads do it, and a `CheckpointWriter` runs the same pieces backwards. Beyond the destination,
a read needs one scratch block a thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.checkpoint_files import SCRATCH_BYTES, CheckpointFiles
from distzo2.checkpoint.layout import Layout, Piece
from distzo2.checkpoint.reading import Range
from distzo2.checkpoint.symbols import MISSING, LayoutTensor, Trace, trace_from_pretrained, trace_save
from distzo2.checkpoint.weight_files import CheckpointError, TensorEntry

SMALL_BUFFER_BYTES = 256 << 20  # of buffers that are in no file, whatever the size of the checkpoint


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
    in `named_parameters()` order, then buffers. `unexpected` are checkpoint tensors that the model has no use for.
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

    @property
    def buffer_names(self) -> list[str]:
        """Names of the persistent buffers."""
        return [name for name, tensor in self.mapped.items() if tensor.is_buffer]

    @staticmethod
    def build(model: nn.Module, directory: str | Path) -> CheckpointMap:
        """The map from the checkpoint in `directory` to `model`, whose parameters may be on meta.

        A transformers model is mapped as its class loads checkpoints, any other module by its names. Raises
        CheckpointError if a tensor is missing, has another shape, or is converted in a way that ranges cannot express.
        """
        if is_transformers_model(model):
            files = CheckpointFiles(directory)
            dtype = getattr(model.config, "dtype", None) or "auto"
            _, traced = trace_checkpoint(files, type(model), model.config, dtype=dtype)
            traced.generation_config = getattr(model, "generation_config", None)
            return traced._as_held_by(model)
        return _map_by_name(model, CheckpointFiles(directory))

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
        if is_transformers_model(model):
            ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
            held = [tensor for tensor in held if tensor.name not in ignored]
        trace = Trace([tensor.name for tensor in held])
        symbols = {t.name: LayoutTensor(Layout.leaf(i, t.shape), t.dtype, trace) for i, t in enumerate(held)}
        written = trace_save(model, symbols) if is_transformers_model(model) else symbols

        pieces: list[list[Piece]] = [[] for _ in held]
        tensors = []
        for number, (name, symbol) in enumerate(written.items()):
            tensors.append(TensorEntry(name, symbol.dtype, tuple(symbol.shape), 0, symbol.numel() * symbol.itemsize))
            for piece in symbol.where.pieces:
                pieces[piece.source].append(
                    Piece(number, piece.sizes, piece.dst_offset, piece.dst_strides, piece.src_offset, piece.src_strides)
                )
        mapped = {
            t.name: MappedTensor(t.name, t.dtype, t.shape, tuple(p), t.is_buffer)
            for t, p in zip(held, pieces, strict=True)
        }
        return CheckpointMap(
            tensors,
            mapped,
            config=getattr(model, "config", None),
            generation_config=getattr(model, "generation_config", None),
            model_class=type(model).__name__,
        )

    def _as_held_by(self, model: nn.Module) -> CheckpointMap:
        """This map with the dtypes of `model`, whose parameters must be those of the map."""
        held = dict(model.named_parameters())
        for name in self.names:
            if name not in held:
                raise CheckpointError(f"the model has no parameter {name!r}, which the checkpoint's own class has")
        for name, param in held.items():
            mapped = self.mapped.get(name)
            if mapped is None or mapped.shape != tuple(param.shape):
                got = "nothing" if mapped is None else f"shape {list(mapped.shape)}"
                raise CheckpointError(f"{self.directory}: parameter {name!r} has shape {list(param.shape)}, got {got}")
            self.mapped[name] = MappedTensor(name, param.dtype, mapped.shape, mapped.pieces)
        return self

    def read_param(self, name: str, out: torch.Tensor) -> None:
        """Fills `out`, a CPU tensor of the parameter's shape and dtype (any strides), from the checkpoint."""
        mapped = self._checked(name, out, self.mapped[name].shape)
        if out.is_contiguous():
            self._read_pieces(mapped.pieces, out)
        else:
            rows = max(1, SCRATCH_BYTES // max(1, math.prod(out.shape[1:]) * out.dtype.itemsize))
            for begin in range(0, out.shape[0], rows):
                block = torch.empty(out[begin : begin + rows].shape, dtype=out.dtype)
                self.read_range(name, begin, begin + block.shape[0], block)
                out[begin : begin + rows].copy_(block)

    def read_range(self, name: str, row_begin: int, row_end: int, out: torch.Tensor) -> None:
        """Fills `out` (contiguous) with rows `row_begin` to `row_end` (of the first dimension) of a parameter."""
        shape = self.mapped[name].shape
        mapped = self._checked(name, out, (row_end - row_begin, *shape[1:]))
        part = Layout(shape, mapped.pieces).narrow(0, row_begin, row_end - row_begin)
        self._read_pieces(part.pieces, out)

    def ranges_of(self, name: str, out: torch.Tensor, within: range | None = None) -> Iterator[Range]:
        """What fills `out`, a contiguous CPU tensor of the parameter's shape and dtype, for a `ParallelReader`; or at
        least its elements `within`, counted through all dimensions."""
        mapped = self._checked(name, out, self.mapped[name].shape)
        flat = out.detach().view(-1)
        for piece in mapped.pieces:
            yield from self.files.ranges_of(piece, flat, within)

    def _checked(self, name: str, out: torch.Tensor, shape: tuple[int, ...]) -> MappedTensor:
        mapped = self.mapped[name]
        if tuple(out.shape) != shape or out.dtype != mapped.dtype:
            raise ValueError(f"{name}: expected {mapped.dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
        if self.files is None:
            raise ValueError(f"{name}: this map belongs to no checkpoint files")
        return mapped

    def _read_pieces(self, pieces: Sequence[Piece], out: torch.Tensor) -> None:
        flat = out.detach().view(-1)
        for piece in pieces:
            self.files.read_piece(piece, flat)

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


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers model (without importing transformers for one that cannot be)."""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


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
    """A transformers model with its parameters on meta and its buffers real, and the map that fills it."""
    where = str(files.directory)
    trace = Trace([entry.name for entry in files.entries], files.equal)
    symbols = {
        entry.name: LayoutTensor(Layout.leaf(number, entry.shape), entry.dtype, trace)
        for number, entry in enumerate(files.entries)
    }
    max_bytes = max(SMALL_BUFFER_BYTES, sum(entry.num_bytes for entry in files.entries))
    model, report = trace_from_pretrained(model_class, config, symbols, trace, where, max_bytes, **kwargs)

    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, got, expected = mismatched[0]
        raise CheckpointError(
            f"{where}: tensor {name!r}: expected shape {list(expected)} as config.json says, got {list(got)}"
        )
    missing = sorted(set(report["missing_keys"]) | _unfilled(model))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: no tensor in the checkpoint fills {missing[0]!r}{more}")
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model)):
        if isinstance(tensor, LayoutTensor) and tensor.problem:
            raise CheckpointError(f"{where}: {name!r} cannot be mapped onto the checkpoint: {tensor.problem}")

    mapped = {name: _settle(name, tensor, files) for name, tensor in model.named_parameters()}
    buffers = {n: b for n, b in persistent_buffers(model) if isinstance(b, LayoutTensor)}
    mapped |= {name: _settle(name, tensor, files, is_buffer=True) for name, tensor in buffers.items()}
    _replace_symbols(model, files)
    model.config.name_or_path = where
    return model, CheckpointMap(
        files.entries, mapped, sorted(report["unexpected_keys"]), files, model.config, None, type(model).__name__
    )


def _unfilled(model: nn.Module) -> set[str]:
    tensors = [*model.named_parameters(), *persistent_buffers(model)]
    return {
        name
        for name, tensor in tensors
        if tensor.is_meta or (isinstance(tensor, LayoutTensor) and tensor.problem is MISSING)
    }


def _settle(name: str, symbol: torch.Tensor, files: CheckpointFiles, is_buffer: bool = False) -> MappedTensor:
    """The pieces of a loaded symbol in the order of the files, so that they are read front to back."""
    position = {file.path: number for number, file in enumerate(files.files)}

    def at(piece: Piece) -> tuple[int, int]:
        entry = files.entries[piece.source]
        return position[files.file_of[piece.source].path], entry.offset + piece.src_offset * entry.dtype.itemsize

    pieces = tuple(sorted((piece.coalesced() for piece in symbol.where.pieces), key=at))
    return MappedTensor(name, symbol.dtype, tuple(symbol.shape), pieces, is_buffer)


def _replace_symbols(model: nn.Module, files: CheckpointFiles) -> None:
    """Parameters become meta tensors (tied ones stay one object), loaded buffers take their values."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if isinstance(param, LayoutTensor):
                if id(param) not in made:
                    empty = torch.empty(param.shape, dtype=param.dtype, device="meta")
                    made[id(param)] = nn.Parameter(empty, requires_grad=param.is_floating_point())
                module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if isinstance(buffer, LayoutTensor):
                if id(buffer) not in made:
                    made[id(buffer)] = files.read_layout(buffer.where, buffer.dtype)
                module._buffers[name] = made[id(buffer)]


def _map_by_name(model: nn.Module, files: CheckpointFiles) -> CheckpointMap:
    number_of = {entry.name: number for number, entry in enumerate(files.entries)}
    names_of: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(param), []).append(name)
    tensors: Mapping[str, torch.Tensor] = dict(model.named_parameters())
    buffers = dict(persistent_buffers(model))
    mapped = {}
    used: set[str] = set()
    for name, tensor in [*tensors.items(), *buffers.items()]:
        names = names_of.get(id(tensor), [name])
        used.update(names)
        stored = next((n for n in names if n in number_of), None)
        if stored is None:
            raise CheckpointError(f"{files.directory}: no tensor in the checkpoint fills {name!r}")
        entry = files.entries[number_of[stored]]
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{files.directory}: tensor {stored!r}: expected shape {list(tensor.shape)}, got {list(entry.shape)}"
            )
        pieces = Layout.leaf(number_of[stored], entry.shape).pieces
        mapped[name] = MappedTensor(name, tensor.dtype, entry.shape, pieces, name in buffers)
    return CheckpointMap(files.entries, mapped, sorted(number_of.keys() - used), files)
