"""Replay: a base checkpoint and a journal make the checkpoint of any step, without a forward pass (docs/journal.md).

One pass over the weights: a piece of the base is read, all updates are applied to it in one `materialize`, and it is
written. Different pieces are read, updated and written at the same time, so that memory is a few pieces and never the
model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import accumulate, chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from distzo2.checkpoint.layout import Layout, Piece
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.reading import CheckpointFiles, checkpoint_differences, strided_view
from distzo2.checkpoint.tensor_files import DTYPES, CheckpointError, header_limit
from distzo2.checkpoint.writing import CheckpointWriter, check_out_dir
from distzo2.formats.gains import GAINED, gains
from distzo2.formats.gguf import is_gguf
from distzo2.formats.gguf_config import gguf_tokenizer
from distzo2.formats.packing import pack_map
from distzo2.models.container import write_packed
from distzo2.models.pretrained import open_checkpoint
from distzo2.record.header import table_difference
from distzo2.record.journal import read_journal
from distzo2.record.line import MAX_HEADER_BYTES, JournalError
from distzo2.text import dtype_name
from distzo2.weights.units import GAIN, ParamInfo
from distzo2_core import Segment, SegmentTable, Update, materialize
from distzo2_core.types import dense_family, matrix_shape

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20  # of weights that are read, updated and written at once
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
_COMPARED = 1 << 20  # elements of a parameter whose places are compared at once, 8 bytes each
_ALIGNMENT = 64  # bytes; where the tensors of a piece begin
_PIECES_IN_FLIGHT = 3  # one is read, one updated, one written
_UPDATES_AT_ONCE = 128  # in a visit: kernels keep factors of low-rank noise for some 2000 terms
Unused = dict[tuple[tuple[int, int], ...], set[int]]  # ranges of parameters -> steps that left them as they were


def replay(
    base_dir: str | os.PathLike[str],
    journal_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    to_step: int | None = None,
    progress: bool = True,
    backend: str | None = None,
    *,
    auto_class: Any = None,
    piece_bytes: int = PIECE_BYTES,
    packed: bool = False,
) -> Steps:
    """Writes the checkpoint that a run had after `to_step` steps (None: all of the journal's), bit for bit.

    Args:
        base_dir: the checkpoint that the run started from; its files must have the journal's checksums.
        journal_path: the run's journal. The run may still be in progress.
        out_dir: where the checkpoint is written, in the layout of the base. It must not hold one.
        to_step: number of updates to apply, from 0 (the base in the run's dtype) to the number of steps in the journal.
        progress: whether to show a progress bar on stderr.
        backend: of the arithmetic: "native", "triton", "reference", or None for the default of the CPU.
        auto_class: as for `from_pretrained`, if the run named one.
        piece_bytes: bytes of weights in one piece; memory is about three times as much.
        packed: of a run that trains gains: writes the packed files of the base with the gains in their scales, as
            `distzo2.save_packed` does. All gains are in memory meanwhile.

    Returns:
        the steps that were applied.

    Raises:
        JournalError: the journal is damaged, or `to_step` is beyond it.
        CheckpointError: the base is not the run's, is corrupt, or `out_dir` holds a checkpoint or has too little room;
            or, with `packed`, the run trains no gains, or as for `distzo2.save_packed`.
            A replay that fails while it writes leaves `out_dir` as it was; one that fails later can be repeated.
    """
    # What is found quickly is refused before gigabytes are hashed.
    num_base_bytes = sum(file.stat().st_size for file in Path(base_dir).glob("*") if file.is_file())
    steps = read_steps(journal_path, to_step, header_limit(num_base_bytes))
    header = steps.header
    check_out_dir(Path(out_dir))
    if not header["base"]["files"]:
        raise JournalError(f"{journal_path}: the run did not start from a checkpoint, there is nothing to replay onto")
    for difference in checkpoint_differences(base_dir, header["base"]):
        raise CheckpointError(difference)

    checkpoint_map = open_map(Path(base_dir), header, os.fspath(journal_path), auto_class)
    with contextlib.closing(checkpoint_map):
        pieces = plan_pieces(checkpoint_map, header["table"], piece_bytes)
        if packed:  # gains come first in the pieces that have any
            pieces = [piece[:1] for piece in pieces if checkpoint_map.mapped[piece[0].name].is_gain]
            if not pieces:
                raise CheckpointError(f"{journal_path}: the run trains no gains, so that no packed files are written")
        bar = steps.bar(sum(part.num_bytes for piece in pieces for part in piece), progress)
        if packed:
            found: dict[str, torch.Tensor] = {}
            with bar:
                keep = lambda name, gain, _: found.update({name: gain.clone()})  # noqa: E731
                apply_updates(checkpoint_map, keep, pieces, steps, backend, bar)
            write_packed(checkpoint_map, found.__getitem__, out_dir)
            return steps
        with bar, CheckpointWriter(checkpoint_map, out_dir) as writer:
            apply_updates(checkpoint_map, writer.write, pieces, steps, backend, bar)
            if is_gguf(Path(base_dir)):
                gguf_tokenizer(base_dir).save_pretrained(writer.hidden)
    return steps


@dataclass(frozen=True)
class Steps:
    """The updates of the first `num_steps` of a journal's `num_journal_steps` steps, and which parameters they left as
    they were. `torn` describes the journal's torn last line, if it has one."""

    header: dict[str, Any]
    updates: list[Update]
    unused: Unused
    num_steps: int
    num_journal_steps: int
    torn: str | None

    def bar(self, num_bytes: int, progress: bool) -> tqdm:
        """A bar over as many bytes of weights, which is shown with `progress`."""
        text = f"replay {self.num_steps} steps"
        return tqdm(total=num_bytes, unit="B", unit_scale=True, desc=text, disable=not progress)


NO_STEPS = Steps({"seed": 0}, [], {}, 0, 0, None)


def read_steps(
    journal_path: str | os.PathLike[str], to_step: int | None, max_header_bytes: int = MAX_HEADER_BYTES
) -> Steps:
    """
    Raises:
        JournalError: the journal is damaged, or `to_step` is beyond it.
    """
    contents = read_journal(journal_path, max_header_bytes=max_header_bytes)
    num_journal_steps = len(contents.entries)
    num_steps = num_journal_steps if to_step is None else to_step
    if not 0 <= num_steps <= num_journal_steps:
        raise JournalError(f"{journal_path}: to_step {to_step} is not in it, it holds {num_journal_steps} steps")
    if contents.torn is not None:
        logger.warning("%s", contents.torn)
    unused: Unused = {}
    for entry in contents.entries[:num_steps]:
        if entry.unused:
            unused.setdefault(tuple(map(tuple, entry.unused)), set()).add(entry.step)
    updates = [entry.update for entry in contents.entries[:num_steps]]
    return Steps(contents.header, updates, unused, num_steps, num_journal_steps, contents.torn)


def open_map(directory: Path, header: Mapping[str, Any], journal: str, auto_class: Any = None) -> CheckpointMap:
    """The map from a base checkpoint to the parameters of a journal's index table, with the dtypes of the run.

    A GGUF file, and a directory with a config.json, is mapped as `from_pretrained` maps it, any other directory by the
    names of its tensors.

    Raises:
        JournalError: the table or the map differs from the header's.
    """
    table = header["table"]
    dtypes = {row["name"]: _DTYPES.get(row["dtype"]) for row in table}  # None: refused below
    if (directory / "config.json").is_file() or is_gguf(directory):
        model, checkpoint_map = open_checkpoint(directory, auto_class=auto_class)
        if any(checkpoint_map.mapped[n].dtype != dtypes.get(n) for n in checkpoint_map.names):
            # The run loaded the weights in its own dtype, which buffers then have too.
            numel: Counter = Counter()
            for n in checkpoint_map.names:
                numel[dtypes.get(n)] += math.prod(checkpoint_map.mapped[n].shape)
            dtype = numel.most_common(1)[0][0]
            model, checkpoint_map = open_checkpoint(directory, dtype=dtype, auto_class=auto_class)
        formats = header.get("stored_formats") or {}
        if formats and not checkpoint_map.is_packed:  # it was packed at load
            store = next(iter(formats.values())).split()[0]
            checkpoint_map = pack_map(model, checkpoint_map, store, names=formats)[0]
        if any(isinstance(text, str) and text.endswith(GAINED) for text in formats.values()):
            model, checkpoint_map = gains(model, checkpoint_map)
        if {name: packed.format for name, packed in checkpoint_map.packed.items()} != formats:
            raise JournalError(f"{journal}: {directory} holds weights packed in other ways than those of the run")
    else:
        checkpoint_map = _map_by_table(directory, table)
    mapped = checkpoint_map.mapped
    for name in checkpoint_map.names:
        mapped[name] = replace_fields(mapped[name], dtype=dtypes.get(name) or mapped[name].dtype)
    params = [mapped[name] for name in checkpoint_map.names]
    rows = [*table, *({"index": i} for i in range(len(table), len(params)))]
    ours = [
        {**row, "name": m.name, "shape": list(m.shape), "dtype": dtype_name(m.dtype)}
        for row, m in zip(rows, params, strict=False)
    ]
    difference = table_difference(table, ours)
    if difference is not None:
        raise JournalError(f"{journal}: {directory} holds another model: {difference}")
    if header["map"] is not None:
        made = {p.source for each in checkpoint_map.mapped.values() if each.made is not None for p in each.pieces}
        _check_map(header["map"], checkpoint_map.to_json(), journal, made)
    return checkpoint_map


def _map_by_table(directory: Path, table: Sequence[Mapping[str, Any]]) -> CheckpointMap:
    """Maps parameters by name. Other tensors of the files are carried over unchanged."""
    files = CheckpointFiles(directory)
    whole = {}
    for number, entry in enumerate(files.entries):
        pieces = Layout.leaf(number, entry.shape).pieces
        whole[entry.name] = MappedTensor(entry.name, entry.dtype, entry.shape, pieces, is_buffer=True)
    mapped = {}
    for row in table:
        if row["name"] not in whole:
            raise CheckpointError(f"{directory}: no tensor in the checkpoint fills {row['name']!r}")
        mapped[row["name"]] = replace_fields(whole.pop(row["name"]), is_buffer=False)
    return CheckpointMap(files.entries, mapped | whole, files=files)


def _check_map(theirs: Any, ours: Mapping[str, Any], journal: str, made: Collection[int] = ()) -> None:
    """`made` numbers tensors whose values are made of others. Earlier journals have them in the first file, as float32;
    the files' digests hold what they are from."""
    ours = json.loads(json.dumps(ours))  # with lists for tuples
    theirs = theirs if isinstance(theirs, dict) else {}
    params = theirs.get("params") if isinstance(theirs.get("params"), dict) else {}
    first = [0, *accumulate(math.prod(shape) for _, _, shape, _ in ours["tensors"])]
    for name, mapped in ours["params"].items():
        if params.get(name) != mapped and not _same_elements(params.get(name), mapped, first):
            raise JournalError(
                f"{journal}: parameter {name!r} is read from other places of the checkpoint than the run read it from; "
                "use the version of transformers that the header names"
            )

    def rows(found: Any) -> list[Any]:
        found = found if isinstance(found, list) else []
        return [[row[0], row[2]] if i in made and len(row) > 2 else row for i, row in enumerate(found)]

    if rows(theirs.get("tensors")) != rows(ours["tensors"]) or params.keys() != ours["params"].keys():
        raise JournalError(f"{journal}: the base checkpoint holds other tensors than those that the run read")


def _same_elements(theirs: Any, ours: list[Any], first: Sequence[int]) -> bool:
    """Whether two entries of a map read the same elements in the same order, however they are cut into pieces.

    `first` are the numbers of the tensors' first elements, where all elements of a checkpoint are counted through.
    """
    try:
        dtype, shape, theirs = theirs
        if [dtype, shape] != ours[:2]:
            return False
        numel = math.prod(shape)
        both = [[_checked_piece(piece, numel, len(first) - 1) for piece in pieces] for pieces in (theirs, ours[2])]
        if sum(piece.numel for piece in both[0]) != numel:
            return False
        windows = [(begin, min(_COMPARED, numel - begin)) for begin in range(0, numel, _COMPARED)]
        return all(torch.equal(*(_elements(pieces, *window, numel, first) for pieces in both)) for window in windows)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # a journal may hold anything
        return False


def _checked_piece(fields: Any, numel: int, num_tensors: int) -> Piece:
    piece = Piece(*(tuple(field) if isinstance(field, list) else field for field in fields))
    walk = zip(piece.sizes, piece.src_strides, piece.dst_strides, strict=True)
    numbers = [piece.source, piece.src_offset, piece.dst_offset, *chain.from_iterable(walk)]
    is_walk = all(type(n) is int and n >= 0 for n in numbers) and 0 not in piece.sizes
    if not is_walk or piece.dst_offset + piece.dst_span > numel or piece.source >= num_tensors:
        raise ValueError("not a piece of this parameter and this checkpoint")
    return piece


def _elements(pieces: Sequence[Piece], begin: int, length: int, numel: int, first: Sequence[int]) -> torch.Tensor:
    """The numbers of the checkpoint's elements that fill `length` elements of a parameter from `begin` on."""
    found = torch.full((length,), -1)
    for piece in Layout((numel,), tuple(pieces)).flat(begin, length).pieces:
        numbers = torch.tensor(first[piece.source] + piece.src_offset)
        for size, step in zip(piece.sizes, piece.src_strides, strict=True):
            numbers = numbers[..., None] + torch.arange(size) * step
        strided_view(found, piece).copy_(numbers)
    return found


class PiecePart(NamedTuple):
    """A part of a parameter, and where it lies in a piece. The segment of a frozen parameter has no group."""

    name: str
    segment: Segment
    packed: ParamInfo | None = None  # a whole parameter whose codes or gains are trained
    gains: PiecePart | None = None  # what is packed with these

    @property
    def num_bytes(self) -> int:
        return self.segment.numel * self.segment.dtype.itemsize if self.packed is None else self.packed.num_bytes

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The part in `buffer` (uint8), flat; of what is packed, its bytes."""
        begin = self.segment.byte_offset
        view = buffer[begin : begin + self.num_bytes]
        return view.view(self.segment.dtype) if self.packed is None else view

    def read(self, checkpoint_map: CheckpointMap, buffer: torch.Tensor) -> None:
        """Fills the part."""
        if self.packed is None:
            checkpoint_map.read(self.name, self.view(buffer), self.segment.element_offset)
        else:
            checkpoint_map.mapped[self.name].packed.read_into(self.view(buffer))

    def values(self, buffer: torch.Tensor) -> torch.Tensor:
        """What is written of the part, flat."""
        view, gains = self.view(buffer), self.gains.view(buffer) if self.gains is not None else None
        return view if self.packed is None else self.packed.value(view, gains=gains).view(-1)


def plan_pieces(
    checkpoint_map: CheckpointMap, table: Sequence[Mapping[str, Any]], piece_bytes: int
) -> list[list[PiecePart]]:
    """Cuts all parameters into pieces of at most `piece_bytes` (one element at least), in order. Small parameters share
    a piece. The map's parameters become flat; flat indices, and so the noise, stay."""
    pieces: list[list[PiecePart]] = []
    filled = 0  # bytes of the last piece
    rows_of = {row["name"]: row for row in table}
    for row in table:
        mapped = checkpoint_map.mapped[row["name"]]
        checkpoint_map.mapped[mapped.name] = replace_fields(mapped, shape=(mapped.numel,))
        has_dense_noise = row["noise"] == dense_family(row["noise"])
        rows, cols, matrices = matrix_shape(mapped.shape, is_convolution=has_dense_noise)
        if mapped.is_gain:  # it is in the piece of what is packed with it
            continue
        if mapped.packed is not None and (row["group"] is not None or mapped.packed.layout.gain is not None):
            pieces.append(_packed_piece(mapped, row, rows_of.get(mapped.name + GAIN)))
            filled = piece_bytes
            continue
        step = max(1, piece_bytes // mapped.dtype.itemsize)
        for begin in range(0, mapped.numel, step):
            numel = min(mapped.numel - begin, step)
            num_bytes = numel * mapped.dtype.itemsize
            if not pieces or filled + num_bytes > piece_bytes:
                pieces.append([])
                filled = 0
            place = filled, numel, mapped.dtype, row["index"], begin, row["group"]
            pieces[-1].append(PiecePart(mapped.name, Segment(*place, rows, cols, matrices=matrices)))
            filled += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return pieces


def _packed_piece(mapped: MappedTensor, row: Mapping[str, Any], gain_row: Mapping[str, Any] | None) -> list[PiecePart]:
    """A whole parameter whose codes are trained, or one behind its gains."""
    packed = mapped.packed.param(mapped.dtype, row["index"])
    if packed.layout.gain is None:
        whole = range(mapped.numel)
        segment = packed.segment(0, whole, row["group"], packed.scales_of(whole).start)
        segment = segment._replace(out_dtype=mapped.dtype)
        return [PiecePart(mapped.name, segment, packed)]
    numel = math.prod(gain_row["shape"])
    place = 0, numel, torch.float32, gain_row["index"], 0, gain_row["group"], numel, 0
    gains = PiecePart(gain_row["name"], Segment(*place, nonnegative=True))
    begin = -(-gains.num_bytes // _ALIGNMENT) * _ALIGNMENT
    segment = Segment(begin, mapped.numel, mapped.dtype, row["index"], 0, None, mapped.numel, 0)
    return [gains, PiecePart(mapped.name, segment, packed, gains)]


def apply_updates(
    checkpoint_map: CheckpointMap,
    write: Callable[[str, torch.Tensor, int], None],
    pieces: Sequence[list[PiecePart]],
    steps: Steps,
    backend: str | None,
    bar: tqdm,
) -> None:
    """Reads, updates and writes all pieces; `write` takes the part of a parameter, by name, from an element on."""
    updates, unused, seed = steps.updates, steps.unused, steps.header["seed"]
    largest = max((piece[-1].segment.byte_offset + piece[-1].num_bytes for piece in pieces), default=0)
    largest += -largest % _ALIGNMENT
    anchored = any(group.anchor for update in updates for group in update.groups)  # a copy of the base lies behind
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(_PIECES_IN_FLIGHT):
        buffers.put(torch.empty((1 + anchored) * largest, dtype=torch.uint8))
    updating, writing = threading.Lock(), threading.Lock()  # an update takes all cores; pieces may share a write

    def process(piece: list[PiecePart]) -> None:
        buffer = buffers.get()
        try:
            for part in piece:
                part.read(checkpoint_map, buffer)
            if anchored:
                buffer[largest:] = buffer[:largest]
            alike: dict[tuple, list[Segment]] = {}  # segments that the same steps left as they were
            for part in piece if updates else ():
                s = part.segment
                if anchored and part.packed is None and not s.nonnegative:
                    s = s._replace(start_offset=largest + s.byte_offset)
                if s.group is not None:
                    key = tuple(ranges for ranges in unused if any(a <= s.param <= b for a, b in ranges))
                    alike.setdefault(key, []).append(s)
            with updating:
                for key, segments in alike.items():
                    left = set().union(*(unused[ranges] for ranges in key))
                    some = [update for update in updates if update.step not in left] if left else updates
                    table = SegmentTable(segments, buffer.numel())
                    for first in range(0, len(some), _UPDATES_AT_ONCE):
                        part = some[first : first + _UPDATES_AT_ONCE]
                        materialize(buffer, table, seed=seed, updates=part, write_back=True, backend=backend)
            with writing:
                for part in piece:
                    write(part.name, part.values(buffer), part.segment.element_offset)
                    bar.update(part.num_bytes)
        finally:
            buffers.put(buffer)

    # After an error the pieces in flight are finished, before the writer cleans up, and no other begins.
    with ThreadPoolExecutor(_PIECES_IN_FLIGHT, "replay") as pool:
        for _ in pool.map(process, pieces):
            pass
