"""Replay: a base checkpoint and a journal make the checkpoint of any step, without a forward pass (docs/journal.md).

One pass over the weights: a piece of the base is read, all updates are applied to it in one `materialize`, and it is
written. Reading, applying and writing run side by side on different pieces, so that memory is a few pieces and never
the model.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distzo2.checkpoint.checkpoint_files import CheckpointFiles
from distzo2.checkpoint.file_checksum import FileChecksum
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.pretrained import digest_files, open_checkpoint
from distzo2.checkpoint.weight_files import DTYPES, CheckpointError, header_limit
from distzo2.checkpoint.writing import CheckpointWriter, holds_checkpoint
from distzo2.record.header import table_difference
from distzo2.record.journal import read_journal
from distzo2.record.line import JournalError
from distzo2.text import brief
from distzo2_core import Segment, SegmentTable, Update, materialize

logger = logging.getLogger(__name__)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
PIECE_BYTES = 16 << 20  # of weights that are read, updated and written at once
_ALIGNMENT = 64  # bytes; where the tensors of a piece begin
_PIECES_IN_FLIGHT = 3  # one each that is read, updated and written


@dataclass(frozen=True)
class ReplayReport:
    """What a replay did: `num_steps` of the journal's `num_journal_steps` over `num_bytes` of weights. `torn` is the
    journal's torn last line in words, or None; `checksums`: of the files of weights that were written, by name."""

    num_steps: int
    num_journal_steps: int
    num_bytes: int
    torn: str | None
    checksums: Mapping[str, FileChecksum]


def verify_checkpoint(directory: str | os.PathLike[str], base: Mapping[str, Any]) -> None:
    """Checks a directory against what :func:`digest_checkpoint` returned for it.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    for difference in checkpoint_differences(directory, base):
        raise CheckpointError(difference)


def checkpoint_differences(directory: str | os.PathLike[str], base: Mapping[str, Any]) -> Iterator[str]:
    """Each difference between a directory and what :func:`digest_checkpoint` returned for it, as a line that names the
    file; what is quick to see comes first."""
    path = Path(directory)
    there = []
    for name, record in base["files"].items():
        file = path / name
        if not file.is_file():
            yield f"{file}: the journal's base checkpoint has this file, but it is not there"
            continue
        num_bytes = file.stat().st_size
        if num_bytes != record["num_bytes"]:
            yield f"{file}: {num_bytes} bytes, the journal's base checkpoint has {record['num_bytes']}"
        else:
            there.append(name)
    for name, record in digest_files(path, there).items():
        expected = base["files"][name]["sha256"]
        if record["sha256"] != expected:
            yield f"{path / name}: SHA-256 {record['sha256']}, the journal's base checkpoint has {expected}"


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
) -> ReplayReport:
    """Writes the checkpoint that a run had after `to_step` steps (None: all of the journal's), bit for bit.

    Args:
        base_dir: the checkpoint that the run started from; its files must have the journal's checksums.
        journal_path: the run's journal. It may be of a run that still goes on.
        out_dir: where the checkpoint is written, in the layout of the base. It must not hold one.
        to_step: number of updates to apply, from 0 (the base in the run's dtype) to the number of steps in the journal.
        progress: whether to show a progress bar on stderr.
        backend: of the arithmetic: "native", "triton", "reference", or None for the default of the CPU.
        auto_class: as for `from_pretrained`, if the run named one.
        piece_bytes: how many bytes of weights are worked on at once; memory is about three times as much.

    Raises:
        JournalError: the journal is damaged, or `to_step` is beyond it.
        CheckpointError: the base is not the run's, is corrupt, or `out_dir` holds a checkpoint or has too little room.
            A replay that fails leaves `out_dir` as it was.
    """
    # What is quick to refuse is refused before gigabytes are hashed.
    contents = read_journal(journal_path, max_header_bytes=header_limit(_num_bytes_in(base_dir)))
    num_journal_steps = len(contents.entries)
    num_steps = num_journal_steps if to_step is None else to_step
    if not 0 <= num_steps <= num_journal_steps:
        raise JournalError(f"{journal_path}: to_step {to_step} is not in it, it holds {num_journal_steps} steps")
    if contents.torn is not None:
        logger.warning("%s", contents.torn)
    held = holds_checkpoint(out_dir)
    if held:
        raise CheckpointError(f"{out_dir}: already holds {held[0]}; name another directory")
    header = contents.header
    if not header["base"]["files"]:
        raise JournalError(
            f"{journal_path}: the run did not start from a checkpoint, so there is nothing to replay onto"
        )
    verify_checkpoint(base_dir, header["base"])

    checkpoint_map = open_map(Path(base_dir), header, os.fspath(journal_path), auto_class)
    updates = [entry.update for entry in contents.entries[:num_steps]]
    torn = contents.torn
    del contents  # losses and the like are not needed any more
    params = [checkpoint_map.mapped[name] for name in checkpoint_map.names]
    num_bytes = sum(param.numel * param.dtype.itemsize for param in params)
    try:
        pieces = plan_pieces(checkpoint_map, header["table"], piece_bytes)
        bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc=f"replay {num_steps} steps", disable=not progress)
        with (
            bar,
            CheckpointWriter(checkpoint_map, out_dir) as writer,
            # Closed before the writer, so that no thread writes while it gives up.
            contextlib.closing(_run(checkpoint_map, writer, pieces, updates, header["seed"], backend)) as run,
        ):
            for done in run:
                bar.update(done)
    finally:
        checkpoint_map.close()
    return ReplayReport(num_steps, num_journal_steps, num_bytes, torn, writer.checksums)


def open_map(directory: Path, header: Mapping[str, Any], journal: str, auto_class: Any = None) -> CheckpointMap:
    """The map from a base checkpoint to the parameters of a journal's index table, with the dtypes of the run.

    A directory with a config.json is mapped as `from_pretrained` maps it, any other by the names of its tensors.

    Raises:
        JournalError: the table or the map is another than the header's.
    """
    table = header["table"]
    dtypes = {row["name"]: _torch_dtype(row) for row in table}
    if (directory / "config.json").is_file():
        _, checkpoint_map = open_checkpoint(directory, auto_class=auto_class)
        if any(checkpoint_map.mapped[n].dtype != dtypes.get(n) for n in checkpoint_map.names):
            # The run loaded the weights in a dtype of its own, which buffers then have too.
            checkpoint_map.close()
            dtype = Counter(dtypes.values()).most_common(1)[0][0]
            _, checkpoint_map = open_checkpoint(directory, dtype=dtype, auto_class=auto_class)
    else:
        checkpoint_map = _map_by_table(directory, table)
    try:
        for name in checkpoint_map.names:
            dtype = dtypes.get(name, checkpoint_map.mapped[name].dtype)
            checkpoint_map.mapped[name] = replace_fields(checkpoint_map.mapped[name], dtype=dtype)
        mapped = [checkpoint_map.mapped[name] for name in checkpoint_map.names]
        ours = [
            {**row, "name": m.name, "shape": list(m.shape), "dtype": str(m.dtype).removeprefix("torch.")}
            for row, m in zip(table, mapped, strict=False)
        ]
        ours += [{"index": i, "name": m.name} for i, m in enumerate(mapped)][len(ours) :]
        difference = table_difference(table, ours)
        if difference is not None:
            raise JournalError(f"{journal}: {directory} holds another model: {difference}")
        if header["map"] is not None:
            _check_map(header["map"], checkpoint_map.to_json(), journal)
    except BaseException:
        checkpoint_map.close()
        raise
    return checkpoint_map


@dataclass(frozen=True)
class PiecePart:
    """Rows [row_begin, row_end) of a parameter cut into rows of `cols` elements; `matrix` is its own shape as a
    matrix."""

    name: str
    dtype: torch.dtype
    param: int
    group: int | None
    matrix: tuple[int, int]
    cols: int
    row_begin: int
    row_end: int
    byte_offset: int

    @property
    def numel(self) -> int:
        return (self.row_end - self.row_begin) * self.cols

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The part as a tensor [rows, cols] over `buffer` (uint8)."""
        flat = buffer[self.byte_offset : self.byte_offset + self.num_bytes].view(self.dtype)
        return flat.view(self.row_end - self.row_begin, self.cols)


def plan_pieces(
    checkpoint_map: CheckpointMap, table: Sequence[Mapping[str, Any]], piece_bytes: int
) -> list[list[PiecePart]]:
    """All parameters cut into pieces of at most `piece_bytes` (one element at least), in order. Small ones share a
    piece.

    The map's parameters become matrices whose rows a piece can hold; flat indices, and so the noise, stay.
    """
    pieces: list[list[PiecePart]] = []
    filled = 0  # bytes of the last piece
    for row in table:
        mapped = checkpoint_map.mapped[row["name"]]
        if not mapped.numel:
            continue
        rows, cols = _matrix_shape(mapped.shape, max(1, piece_bytes // mapped.dtype.itemsize))
        checkpoint_map.mapped[mapped.name] = replace_fields(mapped, shape=(rows, cols))
        matrix_rows = mapped.shape[0] if len(mapped.shape) > 1 else 1
        matrix = matrix_rows, mapped.numel // matrix_rows
        row_bytes = cols * mapped.dtype.itemsize
        most_rows = max(1, piece_bytes // row_bytes)
        for begin in range(0, rows, most_rows):
            end = min(rows, begin + most_rows)
            num_bytes = (end - begin) * row_bytes
            if not pieces or filled + num_bytes > piece_bytes:
                pieces.append([])
                filled = 0
            part = PiecePart(mapped.name, mapped.dtype, row["index"], row["group"], matrix, cols, begin, end, filled)
            pieces[-1].append(part)
            filled += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return pieces


def _matrix_shape(shape: Sequence[int], max_cols: int) -> tuple[int, int]:
    """(rows, cols) of a parameter: as many trailing dimensions as `max_cols` elements hold make a row."""
    cols = 1
    for size in reversed(shape[1:]):
        if cols * size > max_cols:
            break
        cols *= size
    return math.prod(shape) // cols, cols


def _run(
    checkpoint_map: CheckpointMap,
    writer: CheckpointWriter,
    pieces: Sequence[list[PiecePart]],
    updates: Sequence[Update],
    seed: int,
    backend: str | None,
) -> Iterator[int]:
    """Reads, updates and writes all pieces; yields the bytes of each when it is written."""
    largest = max((part.byte_offset + part.num_bytes for piece in pieces for part in piece), default=0)
    free = deque(torch.empty(largest, dtype=torch.uint8) for _ in range(min(_PIECES_IN_FLIGHT, len(pieces))))

    def read(piece: list[PiecePart], buffer: torch.Tensor) -> torch.Tensor:
        for part in piece:
            checkpoint_map.read_range(part.name, part.row_begin, part.row_end, part.view(buffer))
        return buffer

    def write(piece: list[PiecePart], buffer: torch.Tensor) -> torch.Tensor:
        for part in piece:
            writer.write_range(part.name, part.row_begin, part.row_end, part.view(buffer))
        return buffer

    with ThreadPoolExecutor(1, "replay-read") as reader, ThreadPoolExecutor(1, "replay-write") as writes:
        todo = deque(pieces)
        reading: deque[tuple[list[PiecePart], Future[torch.Tensor]]] = deque()
        writing: deque[tuple[list[PiecePart], Future[torch.Tensor]]] = deque()
        try:
            while todo or reading or writing:
                while todo and free:
                    reading.append((todo[0], reader.submit(read, todo.popleft(), free.popleft())))
                if reading:
                    piece, future = reading.popleft()
                    buffer = future.result()
                    _apply(piece, buffer, updates, seed, backend)
                    writing.append((piece, writes.submit(write, piece, buffer)))
                # Wait for a write only if there is nothing to be read or updated meanwhile.
                while writing and (writing[0][1].done() or not reading):
                    piece, future = writing.popleft()
                    free.append(future.result())
                    yield sum(part.num_bytes for part in piece)
        finally:
            for _, future in (*reading, *writing):
                future.cancel()


def _apply(
    piece: Sequence[PiecePart], buffer: torch.Tensor, updates: Sequence[Update], seed: int, backend: str | None
) -> None:
    segments = [
        Segment(p.byte_offset, p.numel, p.dtype, p.param, p.row_begin * p.cols, p.group, *p.matrix)
        for p in piece
        if p.group is not None
    ]
    if segments and updates:
        table = SegmentTable(segments, buffer.numel())
        materialize(buffer, table, seed=seed, updates=updates, write_back=True, backend=backend)


def _num_bytes_in(directory: str | os.PathLike[str]) -> int:
    """Bytes of the files in a directory."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(directory) if entry.is_file())
    except OSError:
        return 0


def _torch_dtype(row: Mapping[str, Any]) -> torch.dtype:
    dtype = _DTYPES.get(row["dtype"])
    if dtype is None:
        raise JournalError(f"parameter {row['index']} {row['name']!r}: no dtype of weights is {brief(row['dtype'])}")
    return dtype


def _map_by_table(directory: Path, table: Sequence[Mapping[str, Any]]) -> CheckpointMap:
    """Parameters by name; what else the files hold is carried over as it is."""
    files = CheckpointFiles(directory)
    number_of = {entry.name: number for number, entry in enumerate(files.entries)}
    mapped: dict[str, MappedTensor] = {}
    for row in table:
        name = row["name"]
        if name not in number_of:
            files.close()
            raise CheckpointError(f"{directory}: no tensor in the checkpoint fills {name!r}")
        number = number_of.pop(name)
        entry = files.entries[number]
        mapped[name] = MappedTensor(name, entry.dtype, entry.shape, Layout.leaf(number, entry.shape).pieces)
    for name, number in number_of.items():
        entry = files.entries[number]
        pieces = Layout.leaf(number, entry.shape).pieces
        mapped[name] = MappedTensor(name, entry.dtype, entry.shape, pieces, is_buffer=True)
    return CheckpointMap(files.entries, mapped, files=files)


def _check_map(theirs: Mapping[str, Any], ours: Mapping[str, Any], journal: str) -> None:
    theirs, ours = ({key: value.get(key) or {} for key in ("tensors", "params")} for value in (theirs, _plain(ours)))
    for name, mapped in ours["params"].items():
        if theirs["params"].get(name) != mapped:
            raise JournalError(
                f"{journal}: parameter {name!r} is read from other places of the checkpoint than the run read it from; "
                "use the version of transformers that the header names"
            )
    if theirs != ours:
        raise JournalError(f"{journal}: the base checkpoint holds other tensors than those that the run read")


def _plain(value: Any) -> Any:
    """Tuples as lists, as they are after a journey through JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, (list, tuple)) else value
