"""Snapshots looked at without their model: whatever would keep a run from going on from one.

The journal's index table says which parameters there are. A unit's file says which of them it holds, and must then be,
to the byte of its header, what the writer of a snapshot makes of these. How a model is cut into units only the model
can say; here every parameter that is trained must be in one unit, and in no other. Files are read a piece at a time.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distzo2.checkpoint.file_checksum import open_plain
from distzo2.record.snapshot import (
    HIDDEN,
    MANIFEST,
    Manifest,
    SnapshotError,
    UnitImage,
    UnitRecord,
    check_file,
    read_into,
    read_manifest,
    snapshot_name,
    snapshots_in,
)
from distzo2.record.snapshot_resume import check_journal
from distzo2.run.audit import DIRECTORY, entries_of, kind_of

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_UNIT_FILE = re.compile(r"unit-([0-9]{5,8})\.safetensors")
_MANIFEST_SLACK = 4096  # bytes of a manifest beside its units


@dataclass(frozen=True)
class TableParam:
    """A parameter as the journal's index table has it."""

    index: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_trained: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TableUnit:
    """A unit that holds these parameters, in the order of the table."""

    name: str
    params: list[TableParam]


class SnapshotAuditor:
    """Looks at the snapshots of one journal."""

    def __init__(
        self, header: Mapping[str, Any], header_bytes: int, journal: str | os.PathLike[str], num_steps: int
    ) -> None:
        """
        Args:
            header: of the journal, whose line has `header_bytes`.
            num_steps: that the journal at `journal` holds.

        Raises:
            SnapshotError: no snapshot can be of such a header.
        """
        self._journal, self._num_steps, self._seed = journal, num_steps, header["seed"]
        self._params: dict[str, TableParam] = {}
        for row in header["table"]:
            dtype = _DTYPES.get(row["dtype"])
            if dtype is None:
                raise SnapshotError(f"{journal}: parameter {row['name'][:200]!r} has no dtype that is known")
            param = TableParam(row["index"], row["name"], dtype, tuple(row["shape"]), row["group"] is not None)
            self._params[param.name] = param
        try:  # a unit of all parameters has the longest header that there can be
            self._max_header = len(UnitImage.of(TableUnit("", list(self._params.values()))).header) - 8
        except UnicodeEncodeError:
            raise SnapshotError(f"{journal}: a parameter's name is no text that a file can hold") from None
        # What a manifest says of a unit is shorter than what the header says of a parameter.
        self._max_manifest = 2 * header_bytes + _MANIFEST_SLACK

    def findings(self, path: Path) -> Iterator[str]:
        """What is wrong with the snapshot at `path`, a line each."""
        where = path / MANIFEST
        if kind_of(path) != DIRECTORY:
            yield f"{path}: {kind_of(path)}, where the directory of a snapshot was expected"
            return
        try:
            manifest = read_manifest(path, self._max_manifest)
        except SnapshotError as error:
            yield str(error)
            return
        if snapshot_name(manifest.step) != path.name:
            yield f"{where}: of step {manifest.step}, which its directory's name does not say"
        if manifest.seed != self._seed:
            yield f"{where}: a run with seed {manifest.seed}, not {self._seed}"
        try:
            check_journal(where, manifest, self._journal, self._num_steps)
        except SnapshotError as error:
            yield str(error)
        yield from self._unit_findings(path, manifest)

    def _unit_findings(self, path: Path, manifest: Manifest) -> Iterator[str]:
        file_of: dict[str, str] = {}  # of a parameter
        last, all_known = -1, True
        for record in manifest.units:
            try:
                last = _checked_number(path / MANIFEST, record, last)
                unit = self._unit_of(path / record.file, record)
                twice = next((param.name for param in unit.params if param.name in file_of), None)
                if twice is not None:
                    raise SnapshotError(f"{path / record.file}: parameter {twice!r} is in {file_of[twice]} too")
                file_of |= {param.name: record.file for param in unit.params}
            except SnapshotError as error:
                all_known = False
                yield str(error)
                continue
            try:
                check_file(path / record.file, record, unit)
            except SnapshotError as error:
                yield str(error)
        missing = [p.name for p in self._params.values() if p.is_trained and p.name not in file_of]
        if missing and all_known:  # otherwise it may be in a file of which that could not be told
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            yield f"{path / MANIFEST}: no unit holds {missing[0]!r}{more}, which the journal's run trains"

    def _unit_of(self, path: Path, record: UnitRecord) -> TableUnit:
        """The unit whose parameters the header of a file names.

        Raises:
            SnapshotError: there is no such unit, or it would have another length; names the file.
        """
        try:
            with open_plain(path) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes != record.num_bytes:
                    raise SnapshotError(f"{path}: {num_bytes} bytes, the manifest has {record.num_bytes}")
                prefix = bytearray(8)
                read_into(file, memoryview(prefix), 0, path)
                (length,) = struct.unpack("<Q", prefix)
                if length > min(self._max_header, num_bytes - 8):
                    raise SnapshotError(f"{path}: it announces a header of {length} bytes, which no unit has")
                text = bytearray(length)
                read_into(file, memoryview(text), 0, path)
        except OSError as error:
            raise SnapshotError(f"{path}: {error.strerror}") from None
        try:
            names = set(json.loads(text)) - {"__metadata__"}
        except (ValueError, TypeError, RecursionError):
            raise SnapshotError(f"{path}: its header is not JSON") from None
        unknown = sorted(str(name) for name in names if name not in self._params)
        if unknown:
            raise SnapshotError(f"{path}: tensor {unknown[0][:200]!r} is no parameter of the journal's run")
        params = sorted((self._params[name] for name in names), key=lambda param: param.index)
        if not any(param.is_trained for param in params):
            raise SnapshotError(f"{path}: none of its tensors is trained by the journal's run")
        unit = TableUnit(record.name, params)
        expected = UnitImage.of(unit).num_bytes
        if expected != num_bytes:
            raise SnapshotError(f"{path}: {num_bytes} bytes, where its parameters make up a file of {expected}")
        return unit

    def strangers(self, path: Path) -> Iterator[str]:
        """What else is in the directory of a snapshot, a line each."""
        try:
            known = {MANIFEST, *(record.file for record in read_manifest(path, self._max_manifest).units)}
            others = [entry for entry in entries_of(path) if entry.name not in known]
        except (OSError, SnapshotError):  # told as a finding
            return
        for entry in others:
            yield f"{entry}: not of the snapshot, and not looked at"


def others_in(directory: Path, in_use: bool = False) -> Iterator[str]:
    """What a directory of snapshots holds beside them, a line each. `in_use`: by a run that is making one."""
    snapshots = set(snapshots_in(directory))
    for entry in entries_of(directory):
        if entry.name.startswith(HIDDEN):
            if not in_use:
                yield f"{entry}: being made or removed when a run was killed, and no snapshot: the next run removes it"
        elif entry not in snapshots and kind_of(entry) is not None:
            yield f"{entry}: not a snapshot, and not looked at"


def _checked_number(where: Path, record: UnitRecord, last: int) -> int:
    """The number of a unit, from its file's name; those of a manifest ascend."""
    match = _UNIT_FILE.fullmatch(record.file)
    if match is None or int(match[1]) <= last:
        raise SnapshotError(
            f"{where}: unit {record.name[:200]!r} is in {record.file[:80]!r}, where unit-<number>.safetensors was "
            f"expected, with a number above {last}"
        )
    return int(match[1])
