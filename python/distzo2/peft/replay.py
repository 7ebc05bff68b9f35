"""Replay of a run that trains an adapter: the adapter of any step from its start and the journal, without the base."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.reading import (
    ADAPTER_FILE,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    CheckpointFiles,
    checkpoint_differences,
)
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.formats.gguf import is_gguf
from distzo2.formats.packed_checkpoint import is_quantized
from distzo2.models.replay import PIECE_BYTES, Steps, apply_updates, plan_pieces, read_steps
from distzo2.peft.adapters import write_adapter
from distzo2.peft.library import read_config
from distzo2.peft.merging import NO_MERGE, merge_adapter
from distzo2.record.line import JournalError


def replay_adapter(
    start: str | os.PathLike,
    journal_path: str | os.PathLike,
    out_dir: str | os.PathLike,
    to_step: int | None = None,
    progress: bool = True,
    *,
    base_dir: str | os.PathLike | None = None,
) -> Steps:
    """Writes the adapter that a run had after `to_step` steps (None: all of the journal's), bit for bit.

    Args:
        start: the adapter that the run began with, which its journal names by its digests.
        out_dir: where the adapter is written; it must not hold one.
        journal_path, progress: as for `distzo2.models.replay.replay`.
        base_dir: the run's base checkpoint, into which the adapter is merged, in the dtype of the run; `out_dir`
            becomes a whole checkpoint.

    Raises:
        JournalError: the journal is damaged, of a run without an adapter, or `to_step` is beyond it.
        CheckpointError: `start` or `base_dir` is not the run's, or `out_dir` holds an adapter.
    """
    start, out_dir, steps = Path(start), Path(out_dir), read_steps(journal_path, to_step)
    header, keys = steps.header, adapter_keys(steps.header, os.fspath(journal_path))
    if base_dir is not None:
        if is_gguf(Path(base_dir)) or is_quantized(Path(base_dir)):
            formats = sorted(set((header.get("stored_formats") or {}).values()))
            raise CheckpointError(f"{base_dir}: {NO_MERGE.format(', '.join(formats))}")
        files = {name: file for name, file in header["base"]["files"].items() if name not in ADAPTER_FILES}
        for difference in checkpoint_differences(base_dir, {"files": files}):
            raise CheckpointError(difference)
        dtypes = Counter(row["dtype"] for row in header["table"] if row["name"] not in keys)
        dtype = getattr(torch, dtypes.most_common(1)[0][0], None)
        with tempfile.TemporaryDirectory(prefix="distzo2-") as scratch:
            replay_adapter(start, journal_path, Path(scratch, "adapter"), to_step, progress)
            merge_adapter(base_dir, Path(scratch, "adapter"), out_dir, dtype=dtype)
        return steps
    if (out_dir / ADAPTER_FILE).exists():
        raise CheckpointError(f"{out_dir}: already holds {ADAPTER_FILE}; name another directory")
    record = {name: header["base"]["files"].get(name) for name in (ADAPTER_FILE, ADAPTER_WEIGHTS)}
    if None in record.values():
        raise JournalError(f"{journal_path}: the run began with no adapter")
    for difference in checkpoint_differences(start, {"files": record}):
        raise CheckpointError(difference)
    with closing(CheckpointFiles(start, ADAPTER_WEIGHTS)) as files:
        rows, tensors, mapped = [], {}, {}
        number = {entry.name: i for i, entry in enumerate(files.entries)}
        for row in header["table"]:
            if (name := row["name"]) in keys:
                rows.append(row)
                tensors[name] = out = torch.empty(row["shape"], dtype=getattr(torch, row["dtype"]))
                pieces = Layout.leaf(number[keys[name]], tuple(out.shape)).pieces
                mapped[name] = MappedTensor(name, out.dtype, tuple(out.shape), pieces)
            elif row["group"] is not None:
                raise JournalError(f"{journal_path}: the run trained {name!r}, which is not in the adapter")
        adapter = CheckpointMap(files.entries, mapped, files=files)

        def write(name: str, part: torch.Tensor, begin: int) -> None:
            tensors[name].view(-1)[begin : begin + part.numel()] = part

        with steps.bar(sum(t.nbytes for t in tensors.values()), progress) as bar:
            pieces = plan_pieces(adapter, rows, PIECE_BYTES)
            apply_updates(adapter, write, pieces, steps, None, bar)
    write_adapter(out_dir, read_config(start), {keys[name]: value for name, value in tensors.items()})
    return steps


def adapter_keys(header: dict[str, Any], journal: str) -> dict[str, str]:
    """The tensors of the adapter's file, by the names of the parameters that they fill, as a header's map has them."""
    try:
        tensors, params = header["map"]["tensors"], header["map"]["params"]
        sources = {name: tensors[pieces[0][0]] for name, (_, _, pieces) in params.items() if pieces}
        return {name: key for name, (key, _, _, file) in sources.items() if file == ADAPTER_WEIGHTS}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise JournalError(f"{journal}: its map names no tensors of an adapter") from error
