"""The checkpoint in a run's directory, looked at without a replay: whether it is the one that the run wrote.

run.json holds the length and CRC-32 of each file as it was written; the journal's map says which tensors the files of
weights must hold. Nothing is made of what is read but headers, and files are read a piece at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from distzo2.checkpoint.checkpoint_files import INDEX_FILE, SINGLE_FILE, CheckpointFiles
from distzo2.checkpoint.file_checksum import FileChecksum, file_checksum
from distzo2.checkpoint.weight_files import DTYPES, CheckpointError, SafetensorsFile, brief, is_size
from distzo2.run.audit import DIRECTORY, FILE, Report, kind_of, tree_of
from distzo2.run.directory import RunDirectory

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def audit_checkpoint(run: RunDirectory, header: Mapping[str, Any] | None, num_steps: int, report: Report) -> None:
    """Looks at the checkpoint of a run whose journal has `header` and `num_steps` steps.

    Raises:
        OSError: a directory cannot be read.
    """
    directory, where, record = run.checkpoint, run.path / "run.json", run.record
    step, saving, kind = record.get("checkpoint_step"), record.get("saving_step"), kind_of(directory)
    is_known = is_size(step)
    report.find(where, _state_findings(where, record, num_steps))
    if kind is None:
        if is_known:
            report.findings.append(f"{directory}: not there, and run.json says that it was written at step {step}")
        elif saving is not None:
            report.notes.append(f"{directory}: was not written to its end: a resumed run writes it")
        return
    if kind != DIRECTORY:
        report.findings.append(f"{directory}: {kind}, where the checkpoint's directory was expected")
        return
    if not is_known and saving is not None and record.get("status") != "finished":
        report.notes.append(f"{directory}: may not be written, or not be removed, to its end: a resumed run writes it")
        return
    if record and not is_known:
        report.findings.append(f"{directory}: not written by this run, as run.json has it")
    there = dict(sorted(tree_of(directory)))
    odd = [name for name, kind in there.items() if kind not in (FILE, DIRECTORY)]
    report.find(directory, (f"{directory / name}: {there[name]}, where a file was expected" for name in odd))
    contents = None
    if is_known and record.get("checkpoint_contents") is not None:
        contents = _contents(record["checkpoint_contents"])
        if contents is None:
            report.findings.append(f"{where}: checkpoint_contents is not what a run writes there")
    if is_known:
        report.find(directory, _name_findings(directory, record, there, contents))
    if contents is not None:
        report.find(directory, _content_findings(directory, there, contents))
    if not odd and header is not None:
        report.find(directory, tensor_findings(directory, there, header))
    if contents is not None:
        report.checked.append(f"the checkpoint of step {step}")
    elif is_known:
        report.checked.append(f"the tensors' names, dtypes and shapes of the checkpoint of step {step}")
        report.notes.append(
            f"{directory}: what its files held when they were written is not in run.json, so only which tensors they "
            f"hold was looked at: distzo2 replay RUN --to-step {step} --out DIR makes them again, to be compared"
        )


def _state_findings(where: Path, record: Mapping[str, Any], num_steps: int) -> Iterator[str]:
    """Whether run.json's checkpoint is of the step that it must be of."""
    step, options = record.get("checkpoint_step"), record.get("options")
    if step is not None and not is_size(step):
        yield f"{where}: checkpoint_step is {brief(step)}, where a number of steps was expected"
        return
    if step is not None and step > num_steps:
        yield f"{where}: the checkpoint is of step {step}, and {num_steps} steps are in the journal"
    save = options.get("save") if isinstance(options, dict) else None
    if record.get("status") != "finished" or save not in ("last", "best"):
        return
    expected = record.get("best_step") if save == "best" else None
    expected = record.get("steps_done") if expected is None else expected
    if step != expected:
        which = "none" if step is None else f"one of step {step}"
        yield f"{where}: --save {save} is a checkpoint of step {brief(expected)}, and {which} was written"


def _contents(value: Any) -> dict[str, FileChecksum] | None:
    """Checksums by name; None: that is not what they are."""
    if not isinstance(value, dict):
        return None
    contents = {}
    for name, row in value.items():
        if not isinstance(row, dict) or set(row) != {"num_bytes", "crc32"} or not is_size(row["num_bytes"]):
            return None
        if not isinstance(row["crc32"], str) or not re.fullmatch("[0-9a-f]{8}", row["crc32"]):
            return None
        contents[name] = FileChecksum(row["num_bytes"], int(row["crc32"], 16))
    return contents


def _name_findings(
    directory: Path, record: Mapping[str, Any], there: Mapping[str, str], contents: Mapping[str, FileChecksum] | None
) -> Iterator[str]:
    """Files that went and files that came since the run wrote its checkpoint."""
    names = record.get("checkpoint_files")
    known = {name for name in names if isinstance(name, str)} if isinstance(names, list) else None
    if contents is not None:
        known = (known or set()) | set(contents)
    if known is None:
        return
    for name in sorted(known - there.keys()):
        yield f"{directory}: {name[:200]!r} is not there any more"
    for name in sorted(there.keys() - known):
        yield f"{directory / name}: not written by this run"


def _content_findings(directory: Path, there: Mapping[str, str], contents: Mapping[str, FileChecksum]) -> Iterator[str]:
    """Files that are not what the run wrote. Only names that were found are opened."""
    for name, kind in there.items():
        expected = contents.get(name)
        if kind != FILE or expected is None:
            continue
        path = directory / name
        try:
            num_bytes = os.lstat(path).st_size
            if num_bytes != expected.num_bytes:
                yield f"{path}: {num_bytes} bytes, {expected.num_bytes} were written"
                continue
            found = file_checksum(path)
        except OSError as error:
            yield f"{path}: {error.strerror}"
            continue
        if found != expected:
            yield f"{path}: CRC-32 {found.crc32:08x}, of what was written {expected.crc32:08x}"


def tensor_findings(directory: Path, there: Mapping[str, str], header: Mapping[str, Any]) -> Iterator[str]:
    """Whether the files of weights can be read and hold the tensors that the run's checkpoint has.

    Args:
        there: everything in the directory, with its kind; plain files and directories only.
        header: of the journal.
    """
    if there.get(SINGLE_FILE) != FILE and there.get(INDEX_FILE) != FILE:
        yield f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither"
        return
    is_readable = True
    for name, kind in there.items():
        if kind != FILE or os.sep in name or not name.endswith(".safetensors"):
            continue
        try:
            SafetensorsFile(directory / name).close()
        except CheckpointError as error:
            is_readable = False
            yield str(error)
    if not is_readable:
        return
    try:
        files = CheckpointFiles(directory)
    except (CheckpointError, OSError) as error:
        yield str(error)
        return
    files.close()
    expected = expected_tensors(header["map"])
    if expected is None:
        yield f"{directory}: the journal's header does not say which tensors it must hold"
        return
    for entry, file in zip(files.entries, files.file_of, strict=True):
        what = expected.pop(entry.name, None)
        if what is None:
            yield f"{file.path}: tensor {brief(entry.name)} is not in a checkpoint of this run"
        elif what != (entry.dtype, entry.shape):
            yield (
                f"{file.path}: tensor {brief(entry.name)} is {_words(entry.dtype, entry.shape)}, that of the run is "
                f"{_words(*what)}"
            )
    for name in expected:
        yield f"{directory}: tensor {brief(name)} is in none of its files"


def expected_tensors(record: Any) -> Tensors | None:
    """The tensors that a checkpoint holds which is written through the map of a journal's header, by name; None: that
    is no such map. A tensor has the dtype of the parameters and buffers that hold it."""
    dtypes: dict[int, torch.dtype] = {}
    try:
        for name, _, pieces in record["params"].values():
            for source, *_ in pieces:
                dtypes[source] = torch.promote_types(dtypes.get(source, _DTYPES[name]), _DTYPES[name])
        return {
            record["tensors"][source][0]: (dtype, tuple(record["tensors"][source][2]))
            for source, dtype in dtypes.items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError):  # dtypes may have no common one
        return None


def _words(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {brief(list(shape))}"
