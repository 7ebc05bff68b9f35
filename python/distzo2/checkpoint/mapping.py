"""The map from ranges in checkpoint files to ranges in a model's parameters, and reads through it.

A checkpoint and a model may differ in names (prefixes, legacy names), in layout (experts stored one by one and held
fused), in dtype, and in what is tied. The map is found by tracing the installed transformers (`symbols`). Loading,
saving and replay share it: `ranges_of` serves several reading threads, `read` one, and a `CheckpointWriter` runs the
same pieces backwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.layout import Layout, Piece
from distzo2.checkpoint.packed_param import PackedParam
from distzo2.checkpoint.reading import NUM_THREADS, CheckpointFiles, Range, digest_adapter, digest_checkpoint, split
from distzo2.checkpoint.symbols import LayoutTensor, Trace, creation_bound, lenient_transformers
from distzo2.checkpoint.tensor_files import CheckpointError, TensorEntry
from distzo2.errors import one_line, refusing
from distzo2.text import dtype_name
from distzo2.weights.units import StoredAs

# The last part of a tensor's name where it scales or unpacks the weights beside it: GPTQ, AWQ, bitsandbytes,
# compressed-tensors, FP8, MXFP4, HQQ, AQLM, quanto. Where a model lacks tensors, the strong ones tell by themselves.
_STRONG = re.compile(
    r"(?i)qweight|qzeros|scales$|weight_scale|absmax|^scb$|packed|blocks$|code(s|book)|qidxs|w_q$|quant"
)
_PACKING = re.compile(rf"{_STRONG.pattern}|(^|_)(scale|zeros?|zp|idx|perm|amax)(_|\d|$)")
_FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass(frozen=True)
class MappedTensor:
    """A parameter or persistent buffer of the model and the pieces of checkpoint tensors that fill it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_buffer: bool = False
    packed: PackedParam | None = None  # of what is read through it; `pieces` then say where it is written, decoded
    made: torch.Tensor | None = field(default=None, compare=False)  # its values, where no file has them as they are
    is_gain: bool = False  # of packed weights

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
    adapter: Path | None = None  # the directory of what `files` hold beside the checkpoint's own
    _decoded: tuple[Any, torch.Tensor | None] = field(default=(None, None), repr=False)  # what `read` decoded last

    @property
    def directory(self) -> Path | None:
        return self.files.directory if self.files else None

    @property
    def names(self) -> list[str]:
        """Names of the parameters, tied weights once, in the model's order."""
        return [name for name, tensor in self.mapped.items() if not tensor.is_buffer]

    def digest(self) -> dict[str, Any]:
        """What a journal's header records of the checkpoint's files; all of them are read, or parts where weights are
        packed.

        Raises:
            CheckpointError: a file is no longer the one that was opened.
        """
        pieces = [piece for packed in self.packed.values() for piece in packed.pieces]
        headers = {file.path.name: file.header_bytes for file in self.files.files.values()}
        found = digest_checkpoint(
            self.files.directory, headers if any(piece.make is None for piece in pieces) else None
        )
        for file in self.files.files.values():
            if file.path.name in found["files"]:  # an adapter's may be written anew
                file.check_same()
        if self.adapter is not None:
            found["files"] |= digest_adapter(self.adapter)
        return found

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
        pieces, values, packed = self.pieces_of(name, out, begin), self.mapped[name].made, self.mapped[name].packed
        if packed is not None:
            held = self._decoded  # rows are asked for one after another; threads may read different parameters
            if held[0] != (name, out.dtype):
                self._decoded = held = (name, out.dtype), packed.value(out.dtype)
            values = held[1]
        if values is None:
            self.files.read_pieces(pieces, out)
        else:
            out.copy_(values.reshape(-1)[begin * math.prod(out.shape[1:]) :][: out.numel()].view(out.shape))

    def ranges_of(self, name: str, out: torch.Tensor, within: range) -> Iterator[Range]:
        """The ranges that fill `out`, a contiguous CPU tensor of the parameter's shape, for a `ParallelReader`.
        Elements outside `within`, counted through all dimensions, may be left out. Of what is packed, `out` and
        `within` are its bytes."""
        flat, packed = out.detach().view(-1), self.mapped[name].packed
        if packed is not None:
            for piece, start in packed.placed():
                part = range(max(start, within.start), min(start + piece.num_bytes, within.stop))
                if piece.make is None and part:
                    yield from split(
                        self.files.files[piece.path], piece.offset + part.start - start, flat[part.start : part.stop]
                    )
            return
        for piece in self.mapped[name].pieces if self.mapped[name].made is None else ():
            yield from self.files.ranges_of(piece, flat, within)

    def made_of(self, name: str, out: torch.Tensor) -> list[Callable[[], None]]:
        """What `ranges_of` leaves out: calls, each of which makes a part of `out`, values or the bytes of a packed
        parameter."""
        packed, made = self.mapped[name].packed, self.mapped[name].made
        if packed is None:
            return [] if made is None else [partial(out.copy_, made)]
        packed.clear_gaps(out)
        placed = [(piece, out[start : start + piece.num_bytes]) for piece, start in packed.placed()]
        return [partial(piece.read_into, part) for piece, part in placed if piece.make is not None]

    def check_scales(self) -> None:
        """Reads the scales that have tensors of their own, which are few bytes, and refuses those that are not finite.
        Scales among codes, as in GGUF files, are judged by what is decoded with them, when a unit is first visited.

        Raises:
            CheckpointError: as for `PackedParam.check_scales`.
        """
        apart = [packed for packed in self.packed.values() if packed.has_scales_apart]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(PackedParam.check_scales, apart))

    @property
    def packed(self) -> dict[str, PackedParam]:
        """The packed parameters by name, in the model's order."""
        return {name: each.packed for name, each in self.mapped.items() if each.packed is not None}

    @cached_property
    def is_packed(self) -> bool:
        """Whether a parameter is packed."""
        return bool(self.packed)

    @property
    def formats(self) -> str:
        """The formats of what is packed, for messages."""
        return ", ".join(sorted({packed.format for packed in self.packed.values()}))

    def stored_as(self, name: str) -> StoredAs | None:
        """How the files have a parameter; None if it is converted, or not in one order in its files. Beside packed
        parameters, which are most of the bytes, what is raw stays as it is and is not converted."""
        mapped, ranges, end = self.mapped[name], [], 0
        if mapped.packed is not None:
            return mapped.packed.stored_as()
        if mapped.made is not None:
            return None
        dtype = self.files.entries[mapped.pieces[0].source].dtype if self.is_packed else mapped.dtype
        for piece in sorted(mapped.pieces, key=lambda piece: piece.dst_offset):
            entry = self.files.entries[piece.source]
            as_is = piece.is_run and entry.dtype == dtype and entry.strides is None
            if not as_is or piece.dst_offset != end:
                return None
            item = dtype.itemsize
            offset = entry.offset + piece.src_offset * item
            ranges.append((entry.path, offset, piece.numel * item, end * item))
            end += piece.numel
        return StoredAs(end * dtype.itemsize, tuple(ranges), dtype) if end == mapped.numel else None

    def to_json(self) -> dict[str, Any]:
        """The map as plain data for JSON: checkpoint tensors with their files, and each parameter's pieces."""
        return {
            "tensors": [[t.name, dtype_name(t.dtype), t.shape, t.path.name] for t in self.tensors],
            "params": {name: [dtype_name(m.dtype), m.shape, m.pieces] for name, m in self.mapped.items()},
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

        with refusing(f"{type(model).__name__} has no checkpoint layout", CheckpointError):
            written = revert_weight_conversion(model, written)

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
    """The buffers that belong to a model's state dict, by name, in the dtypes that are stored."""
    found, stored = [], getattr(getattr(model, "_distzo2_runtime", None), "stored_buffers", {})
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
            found.append((name, buffer.to(stored.get(name, buffer.dtype))))
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
        _refuse_packed(where, files.entries, {}, strong=True)
        what = f"this checkpoint cannot be mapped onto {model_class.__name__}"
        if kwargs.get("dtype") == "auto" and any(entry.dtype in _FP8 for entry in files.entries):
            what += " (of 8-bit floats: name a dtype to hold them in)"
        raise CheckpointError(f"{where}: {what}: {one_line(error)}") from error

    params = dict(model.named_parameters())
    held = params | dict(persistent_buffers(model))
    missing = sorted({*report["missing_keys"], *(name for name, tensor in held.items() if tensor.is_meta)})
    used = {
        piece.source: symbol.dtype
        for symbol in held.values()
        if isinstance(symbol, LayoutTensor)
        for piece in symbol.where.pieces
    }
    _refuse_packed(where, files.entries, used, strong=bool(missing or report["mismatched_keys"]))
    if report["mismatched_keys"]:
        name, got, expected = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{where}: tensor {name!r}: expected shape {list(expected)} as config.json says, got {list(got)}"
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        unused = [entry.name for number, entry in enumerate(files.entries) if number not in used]
        more += _wrapping(missing, unused)
        raise CheckpointError(f"{where}: no tensor in the checkpoint fills {missing[0]!r}{more}")

    order = [*files.files]

    def in_file(piece: Piece) -> tuple[int, int]:
        entry = files.entries[piece.source]
        return order.index(entry.path), entry.offset + piece.src_offset * entry.dtype.itemsize

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
            made[symbol] = nn.Parameter(made[symbol], requires_grad=symbol.requires_grad)
        else:
            files.read_pieces(pieces, made[symbol])
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: made[tensor] for name, tensor in tensors.items() if tensor in made})
    model.config.name_or_path = where
    unexpected = sorted(report["unexpected_keys"])
    return model, CheckpointMap(files.entries, mapped, unexpected, files, model.config, None, type(model).__name__)


def _refuse_packed(where: str, entries: Sequence[TensorEntry], used: dict[int, torch.dtype], *, strong: bool) -> None:
    """Refuses weights that are packed or scaled: the model takes their codes for values.

    `used` are the numbers of the tensors that the model takes, with the dtypes it holds them in. With `strong`, which
    is where the model lacks tensors, a name alone can tell.
    """
    for number, dtype in used.items():
        if dtype.is_floating_point and not entries[number].dtype.is_floating_point:
            _refuse(where, entries[number], f"would fill a parameter of {dtype}")
    names = {entries[number].name for number in used}
    owners = {name.rpartition(".")[0] for name in names} - {""}
    is_fp8 = any(entries[number].dtype in _FP8 for number in used)
    for number, entry in enumerate(entries):
        owner, _, leaf = entry.name.rpartition(".")
        beside = owner in names or ((owner in owners or is_fp8) and _PACKING.search(leaf))
        if number not in used and re.search(r"(^|\.)(lora_|base_layer\.)", entry.name):
            raise CheckpointError(
                f"{where}: tensor {entry.name!r} is of an adapter (LoRA) that is not merged into the weights: merge it"
            )
        if number not in used and (beside or (strong and _STRONG.search(leaf))):
            _refuse(where, entry, "belongs to other weights and has no use in the model")


def _refuse(where: str, entry: TensorEntry, why: str) -> None:
    dtype = dtype_name(entry.dtype)
    raise CheckpointError(
        f"{where}: the weights are packed or scaled, which cannot be decoded: tensor {entry.name!r} ({dtype}) {why}; "
        "expected plain floating-point weights"
    )


def _wrapping(missing: Sequence[str], unused: Sequence[str]) -> str:
    """How the names in a checkpoint differ from those of the missing parameters, as the end of a message."""
    for verb, wanted, found in (("strip", missing, unused), ("add", unused, missing)):
        for name in wanted[:: -(-len(wanted) // 8) or 1]:
            for longer in found:
                rest, extra = name.split("."), []
                for part in reversed(longer.split(".")):
                    if rest and part == rest[-1]:
                        rest.pop()
                    else:
                        extra.insert(0, part)
                front = ".".join(extra) + "."
                in_front = longer.startswith(front)
                if rest or not extra or (verb == "add" and not in_front):
                    continue
                shorter = {
                    other.removeprefix(front) if in_front else ".".join(p for p in other.split(".") if p not in extra)
                    for other in found
                }
                if 2 * len(shorter & {*wanted}) >= min(len(wanted), len(found)):
                    which = [front] if in_front else [f"{part}." for part in dict.fromkeys(extra)]
                    held = longer if verb == "strip" else name
                    to = "from" if verb == "strip" else "to"
                    return f"; {verb} {', '.join(map(repr, which))} {to} the checkpoint's names, such as {held!r}"
    return ""
