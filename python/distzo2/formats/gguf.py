"""Models out of GGUF files: each parameter packed, as the file has it, or raw.

llama.cpp renames tensors and changes a few (https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py).
Here that is undone exactly: the rows of q and k by the layout, Gemma's norms by a subtraction in float32, stacked
experts of gate and up, which transformers holds joined, by ranges. Names are those of `gguf.TensorNameMap`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.checkpoint.config import class_of
from distzo2.checkpoint.layout import Piece as Walk
from distzo2.checkpoint.layout import row_major_strides
from distzo2.checkpoint.mapping import CheckpointMap, trace_checkpoint
from distzo2.checkpoint.packed_param import PIECE_ALIGNMENT, PackedParam
from distzo2.checkpoint.reading import CheckpointFiles
from distzo2.checkpoint.tensor_files import CheckpointError, TensorEntry, TensorFile
from distzo2.errors import refusing
from distzo2.formats.gguf_config import EMBEDDINGS, ROPE_FACTORS, architecture_of, config_of
from distzo2.formats.gguf_file import MAGIC, RAW_DTYPES, SUPPORTED, GgufFile, GgufTensor, gguf_package
from distzo2.text import brief

_FIRST = re.compile(r"-00001-of-\d{5}\.gguf$")  # of a split model


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is a file that is called a GGUF file, or begins as one does."""
    if os.fspath(path).endswith(".gguf") and os.path.isfile(path):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def gguf_config(path: str | os.PathLike) -> Any:
    """The transformers configuration of a GGUF file, or of the first of a split one.

    Raises:
        CheckpointError: the architecture is not known, or the metadata lack something or ask for what is not computed.
        DistZO2Error: the package `gguf` is missing.
    """
    files = _GgufFiles(path)
    files.close()
    return config_of(files.directory, files.metadata, files.stored)


def gguf_tensors(path: str | os.PathLike) -> list[GgufTensor]:
    """The tensors of a GGUF file, or of all files of a split model. Raises as `gguf_config` does."""
    files = _GgufFiles(path)
    files.close()
    return list(files.stored.values())


def open_gguf(
    path: str | os.PathLike, *, dtype: torch.dtype | str | None = None, auto_class: Any = None, **options: Any
) -> tuple[nn.Module, CheckpointMap]:
    """Opens a GGUF file, or the first of a split one, as a model.

    Of the tensors only Gemma's norms and the factors of RoPE are read. A streamed model names scales that are not
    finite when it first decodes them.

    Args:
        dtype: that the parameters are computed in; None for that of the embeddings, bfloat16 where these are packed.
        auto_class: as for `distzo2.from_pretrained`.
        options: of the model class's `from_pretrained`.

    Returns:
        the model, its parameters on meta and its buffers real, in `eval()` mode, and what fills it.

    Raises:
        CheckpointError: a file is damaged, of an architecture or with a type of blocks that is not known, or its
            tensors are not those of its model.
        DistZO2Error: the package `gguf` is missing.
    """
    files = _GgufFiles(path)
    config = config_of(files.directory, files.metadata, files.stored)
    model_class = class_of(files.directory, config, auto_class)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if not isinstance(dtype, torch.dtype):
        dtype = RAW_DTYPES.get(files.stored[EMBEDDINGS].kind, torch.bfloat16)
    sources = files.sources(config, _shapes(files, model_class, config))
    files.add_parts([replace(s.parts[0], name=s.name, shape=s.shape) for s in sources], dtype)
    model, found = trace_checkpoint(files, model_class, config, dtype=dtype, **options)
    for number, source in enumerate(sources):
        tensor = found.mapped[source.name]
        if source.made is not None:
            found.mapped[source.name] = replace(tensor, made=source.made)
        elif source.parts[0].is_packed:
            found.mapped[source.name] = replace(tensor, packed=source.packed())
        elif source.head_dim or len(source.parts) > 1:
            walks = tuple(source.walks([number, *files.add_parts(source.parts[1:])]))
            found.mapped[source.name] = replace(tensor, pieces=walks)
    return model.eval(), found


def _shapes(files: _GgufFiles, model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, tied ones once."""
    what = f"{files.directory}: {model_class.__name__} cannot be made"
    with refusing(what, CheckpointError), torch.device("meta"):
        model = model_class._from_config(config)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


@dataclass(frozen=True)
class _Source:
    """What fills a parameter.

    Attributes:
        parts: one tensor, or for experts' joined gate and up the two whose experts alternate.
        head_dim: as in `PackedLayout`.
        made: the parameter itself, where it is computed.
    """

    name: str
    shape: tuple[int, ...]
    parts: list[GgufTensor]
    head_dim: int = 0
    made: torch.Tensor | None = None

    def packed(self) -> PackedParam:
        first = self.parts[0]
        num_runs = self.shape[0] if len(self.parts) > 1 else 1
        rows = first.rows // num_runs  # of a run
        layout = first.layout(num_runs * rows * len(self.parts), self.head_dim)
        pieces = [part.piece(i * rows, (i + 1) * rows) for i in range(num_runs) for part in self.parts]
        if len(pieces) > 1 and pieces[0].num_bytes % PIECE_ALIGNMENT:  # never where rows are a multiple of 32
            where = f"{first.path}: tensor {first.name!r}"
            raise CheckpointError(f"{where}: expected experts of a multiple of 32 rows, got {rows}")
        return PackedParam(self.name, self.shape, first.kind, tuple(pieces), layout)

    def walks(self, numbers: list[int]) -> Iterable[Walk]:
        """How the entries of the parts fill the parameter, where that is not one run."""
        cols = self.shape[-1]
        if self.head_dim:
            sizes = (self.shape[0] // self.head_dim, 2, self.head_dim // 2, cols)
            strides = (self.head_dim * cols, cols, 2 * cols, 1)
            return [Walk(numbers[0], sizes, 0, strides, 0, row_major_strides(sizes)).coalesced()]
        run = self.parts[0].rows // self.shape[0] * cols
        size, strides = (self.shape[0], run), (run * len(numbers), 1)
        return [Walk(n, size, 0, (run, 1), i * run, strides).coalesced() for i, n in enumerate(numbers)]


class _GgufFiles(CheckpointFiles):
    """The files of a model, one or many. Its entries are the parameters, where they lie in one run."""

    def __init__(self, path: str | os.PathLike):
        self.directory = Path(path)  # what messages name
        self.files: dict[Path, TensorFile] = {}
        self.entries = []
        self.stored: dict[str, GgufTensor] = {}
        self.metadata: dict[str, Any] = self._open(Path(path)).metadata
        count = self.metadata.get("split.count", 1)
        is_first = _FIRST.search(self.directory.name) and not self.metadata.get("split.no")
        if count != 1 and not (is_first and isinstance(count, int)):
            expected = "expected the first file of a split model, ...-00001-of-....gguf"
            raise CheckpointError(f"{path}: {expected}, got one of {brief(count)}")
        for i in range(2, count + 1):
            self._open(self.directory.with_name(_FIRST.sub(f"-{i:05}-of-{count:05}.gguf", self.directory.name)))
        self.architecture = architecture_of(self.directory, self.metadata)

    def _open(self, path: Path) -> GgufFile:
        self.files[path] = file = GgufFile(path)
        for name, tensor in file.tensors.items():
            if self.stored.setdefault(name, tensor) is not tensor:
                raise CheckpointError(f"{path}: tensor {brief(name)} is in {self.stored[name].path.name} too")
        return file

    def sources(self, config: Any, shapes: dict[str, tuple[int, ...]]) -> list[_Source]:
        """What fills the parameters of these names and shapes.

        Raises:
            CheckpointError: a parameter has no tensor or one of another shape, a tensor has no parameter or a type that
                is not decoded.
        """
        gguf, name_of = gguf_package(), self.metadata["general.architecture"]
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == name_of)
        names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        sources, used = [], {ROPE_FACTORS}
        for name, shape in shapes.items():
            base, leaf = re.fullmatch(r"(.*?)(\.weight|\.bias|)", name).groups()
            is_joined = base.endswith(".experts.gate_up_proj")
            stem = names.get_name(base.replace("gate_up_proj", "down_proj") if is_joined else base)
            if stem is None:
                raise CheckpointError(f"{self.directory}: {name_of} has no tensor for {name!r}")
            stems = [stem.replace("down", "gate"), stem.replace("down", "up")] if is_joined else [stem]
            parts = [self._part(stem + (leaf or ".weight"), name, shape, len(stems)) for stem in stems]
            if parts[0].kind != parts[-1].kind:
                kinds = f"{parts[0].kind} and {parts[-1].kind}"
                raise CheckpointError(f"{self.directory}: {name!r} joins tensors of different types, {kinds}")
            used |= {part.name for part in parts}
            own = stem.rpartition(".")[2]
            head_dim = shape[0] // heads[own] if self.architecture.interleaved and own in heads else 0
            is_offset = self.architecture.norms_plus_one and stem.endswith("norm")
            sources.append(_Source(name, shape, parts, head_dim, self._values(parts[0]) - 1 if is_offset else None))
        if unused := sorted(self.stored.keys() - used):
            found = f"{brief(unused[0])} and {len(unused) - 1} others"
            raise CheckpointError(f"{self.directory}: a model of {config.model_type} has no place for {found}")
        return sources

    def _part(self, stored: str, name: str, shape: tuple[int, ...], num_parts: int) -> GgufTensor:
        """The tensor that is one of `num_parts` of a parameter."""
        where = f"{self.directory}: tensor {stored!r}"
        if stored not in self.stored:
            raise CheckpointError(f"{self.directory}: expected a tensor {stored!r} for {name!r}, found none")
        part = self.stored[stored]
        if part.kind not in SUPPORTED:
            raise CheckpointError(f"{where}: expected a type among {', '.join(SUPPORTED)}, got {part.kind}")
        rows, cols = torch.Size(shape[:-1]).numel(), shape[-1]
        if (part.rows * num_parts, part.shape[-1]) != (rows, cols):
            expected = f"{rows // num_parts} rows of {cols} for {name!r}"
            raise CheckpointError(f"{where}: expected {expected}, got shape {list(part.shape)}")
        return part

    def _values(self, tensor: GgufTensor) -> torch.Tensor:
        """A small tensor in float32."""
        if tensor.is_packed:
            raise CheckpointError(f"{self.directory}: tensor {tensor.name!r}: expected floats, got {tensor.kind}")
        return tensor.piece(0, tensor.rows).read().view(RAW_DTYPES[tensor.kind]).view(tensor.shape).float()

    def add_parts(self, parts: list[GgufTensor], dtype: torch.dtype = torch.float32) -> list[int]:
        """Entries for tensors, of `dtype` where they are packed, which are not read through them; returns their
        numbers."""
        for part in parts:
            kept = RAW_DTYPES.get(part.kind, dtype)
            self.entries.append(TensorEntry(part.name, kept, part.shape, part.offset, path=part.path))
        return [*range(len(self.entries) - len(parts), len(self.entries))]
