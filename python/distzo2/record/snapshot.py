"""What a snapshot is on disk: a file for each unit that is trained, and a manifest that is written last.

    RUN/snapshots/step-00000040/unit-00000.safetensors ...
                                manifest.json
    RUN/snapshots/.writing-...    one that is being made, or was when the run was killed

A unit's file is an ordinary safetensors file of its parameters. The manifest is one line of JSON with a CRC, as a line
of the journal is; it holds each file's size and CRC-32, and the unit's version: how many of the journal's updates its
copy holds. Units may differ in that, since training goes on while they are copied; whoever loads them applies to each
what it has missed. docs/snapshots.md has the format. Nothing here changes weights or knows a thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from distzo2.checkpoint.weight_files import DTYPE_NAMES
from distzo2.errors import DistZO2Error
from distzo2.record.line import JournalError, decode_line, encode_line
from distzo2.version import __version__
from distzo2.weights.units import Unit

FORMAT_VERSION = 1
CHUNK_BYTES = 4 << 20  # of a read or a write
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
HIDDEN = ".writing-"  # begins the name of a directory that is no snapshot yet, or no more
_HEADER_ALIGNMENT = 4096  # bytes; where the data of a unit's file begins
_NAME = re.compile(r"step-(\d{8,10})")
_MANIFEST_KEYS = {"snapshot", "step", "seed", "journal", "units", "software"}
_JOURNAL_KEYS = {"steps", "num_bytes", "sha256"}
_UNIT_KEYS = {"name", "file", "version", "num_bytes", "crc32"}
_MAX_STEP = 1 << 32

logger = logging.getLogger("distzo2")


class SnapshotError(DistZO2Error):
    """A snapshot that is not whole, is damaged, or is of another run. One line that names the file."""


@dataclass(frozen=True)
class Snapshots:
    """Where a run's snapshots are, and when they are made.

    directory: of the snapshots; those in it are read when the run is resumed.
    every: steps between two; 0: none by steps.
    minutes: minutes between two; 0: none by time.
    keep: how many are kept; an older one goes only when a newer one is whole.
    pace: the most that making one may take of the steps meanwhile, as a share of their time.
    log: is told what becomes of them, a line each.
    """

    directory: str | os.PathLike[str]
    every: int = 0
    minutes: float = 0.0
    keep: int = 1
    pace: float = 0.03
    log: Callable[[str], None] = field(default=logger.info)

    def __post_init__(self) -> None:
        if self.every < 0 or self.minutes < 0 or self.keep < 1 or not 0 < self.pace <= 1:
            raise DistZO2Error(
                f"snapshots every {self.every} steps or {self.minutes} minutes, {self.keep} kept, pace {self.pace}: "
                "expected 0 or more steps and minutes, at least 1 kept, and a pace above 0 and at most 1"
            )

    @property
    def are_made(self) -> bool:
        """Whether any are made, or those that are there are only read."""
        return self.every > 0 or self.minutes > 0


class StoredUnit(Protocol):
    """What a unit's file depends on; a `Unit` is one. Parameters have name, dtype, shape and num_bytes."""

    name: str
    params: Sequence[Any]


@dataclass(frozen=True)
class UnitImage:
    """The bytes of a unit's file but for the tensors: `header`, and for each parameter its index in `unit.params` and
    where its bytes begin. A function of the unit's parameters alone."""

    header: bytes
    places: tuple[tuple[int, int], ...]
    num_bytes: int

    @classmethod
    def of(cls, unit: StoredUnit) -> UnitImage:
        # Wide dtypes first: every tensor then starts on a multiple of its own item size.
        order = sorted(range(len(unit.params)), key=lambda i: (-unit.params[i].dtype.itemsize, i))
        record: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ends = [0]
        for i in order:
            param = unit.params[i]
            known = param.dtype in DTYPE_NAMES
            ends.append(ends[-1] + param.num_bytes)
            record[param.name] = {
                "dtype": DTYPE_NAMES[param.dtype] if known else "U8",
                "shape": list(param.shape) if known else [param.num_bytes],
                "data_offsets": ends[-2:],
            }
        text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
        header = struct.pack("<Q", len(text)) + text
        places = tuple((i, len(header) + begin) for i, begin in zip(order, ends, strict=False))
        return cls(header, places, len(header) + ends[-1])


@dataclass(frozen=True)
class UnitRecord:
    """What the manifest says of one unit: `version` counts the journal's updates in its copy."""

    name: str
    file: str
    version: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """`line`: its bytes. `journal_steps`, `journal_bytes`, `journal_sha256`: the lines of the journal that the copies
    are made of, header included, and their digest."""

    line: bytes
    step: int
    seed: int
    journal_steps: int
    journal_bytes: int
    journal_sha256: str
    units: tuple[UnitRecord, ...]


def snapshot_name(step: int) -> str:
    return f"step-{step:08d}"


def unit_file(unit: Unit) -> str:
    return f"unit-{unit.index:05d}.safetensors"


def snapshots_in(directory: str | os.PathLike[str]) -> list[Path]:
    """What is called a snapshot in a directory, newest first."""
    try:
        found = [(int(match[1]), path) for path in Path(directory).iterdir() if (match := _NAME.fullmatch(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(found, reverse=True)]


def encode_manifest(
    *, step: int, seed: int, journal_steps: int, journal_bytes: int, journal_sha256: str, units: Sequence[UnitRecord]
) -> bytes:
    """The manifest's line, newline included."""
    record = {
        "snapshot": FORMAT_VERSION,
        "step": step,
        "seed": seed,
        "journal": {"steps": journal_steps, "num_bytes": journal_bytes, "sha256": journal_sha256},
        "units": [
            {"name": u.name, "file": u.file, "version": u.version, "num_bytes": u.num_bytes, "crc32": f"{u.crc32:08x}"}
            for u in units
        ],
        "software": {"distzo2": __version__, "torch": torch.__version__},
    }
    return encode_line(record, MAX_MANIFEST_BYTES)


def decode_manifest(line: bytes) -> Manifest:
    """Raises SnapshotError with the reason, without a file's name."""
    try:
        record = decode_line(line, MAX_MANIFEST_BYTES)
    except JournalError as error:
        raise SnapshotError(str(error)) from None
    if record.get("snapshot") != FORMAT_VERSION or isinstance(record["snapshot"], bool):
        raise SnapshotError(f"format {str(record.get('snapshot'))[:40]!r}, this program knows {FORMAT_VERSION}")
    _expect(record, _MANIFEST_KEYS, "the manifest")
    _expect(record["journal"], _JOURNAL_KEYS, "journal")
    if not isinstance(record["units"], list):
        raise SnapshotError("units: a list was expected")
    journal_steps = _count(record["journal"]["steps"], "journal.steps", _MAX_STEP)
    units = []
    for row in record["units"]:
        _expect(row, _UNIT_KEYS, "a unit")
        if not (isinstance(row["name"], str) and isinstance(row["file"], str)):
            raise SnapshotError("a unit's name and file: strings were expected")
        version = _count(row["version"], f"version of {row['file'][:80]}", journal_steps)
        num_bytes = _count(row["num_bytes"], f"num_bytes of {row['file'][:80]}", 1 << 62)
        units.append(UnitRecord(row["name"], row["file"], version, num_bytes, int(_hex(row["crc32"], 8), 16)))
    return Manifest(
        line,
        _count(record["step"], "step", _MAX_STEP),
        _count(record["seed"], "seed", (1 << 64) - 1),
        journal_steps,
        _count(record["journal"]["num_bytes"], "journal.num_bytes", 1 << 62),
        _hex(record["journal"]["sha256"], 64),
        tuple(units),
    )


def read_manifest(snapshot: Path, max_bytes: int = MAX_MANIFEST_BYTES) -> Manifest:
    """Raises SnapshotError: there is none, or it is longer or damaged; names the file."""
    path = snapshot / MANIFEST
    try:
        with open_plain(path) as file:
            line = file.read(min(max_bytes, MAX_MANIFEST_BYTES) + 1)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None
    try:
        if len(line) > max_bytes:
            raise SnapshotError(f"longer than {max_bytes} bytes")
        return decode_manifest(line)
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from None


def check_units(manifest: Manifest, units: Sequence[Unit], seed: int) -> None:
    """Raises SnapshotError unless the manifest is of these units, in their order, of a run with this seed."""
    if manifest.seed != seed:
        raise SnapshotError(f"a run with seed {manifest.seed}, not {seed}")
    if len(manifest.units) != len(units):
        raise SnapshotError(f"{len(manifest.units)} units, the model has {len(units)} that are trained")
    for record, unit in zip(manifest.units, units, strict=True):
        ours = (unit.name, unit_file(unit), UnitImage.of(unit).num_bytes)
        if (record.name, record.file, record.num_bytes) != ours:
            raise SnapshotError(
                f"unit {record.name[:200]!r} in {record.file[:80]!r} of {record.num_bytes} bytes, where the model has "
                f"unit {ours[0]!r}, which would be {ours[1]!r} of {ours[2]} bytes"
            )


def check_file(path: Path, record: UnitRecord, unit: StoredUnit, fill: Sequence[memoryview] | None = None) -> None:
    """Reads a unit's file through and compares size, header and CRC with what they must be.

    Args:
        fill: the memory of each parameter, in the order of `unit.params`, which takes the tensors; None: they are read
            past.

    Raises:
        SnapshotError: it differs; names the file and what was expected.
    """
    image = UnitImage.of(unit)
    try:
        with open_plain(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != record.num_bytes:
                raise SnapshotError(f"{path}: {num_bytes} bytes, the manifest has {record.num_bytes}")
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            header = bytearray(len(image.header))
            crc = read_into(file, memoryview(header), 0, path)
            if header != image.header:
                raise SnapshotError(f"{path}: its header is not that of unit {unit.name!r}")
            passed = memoryview(bytearray(min(CHUNK_BYTES, record.num_bytes))) if fill is None else None
            for i, _ in image.places:
                left = unit.params[i].num_bytes
                if fill is not None:
                    crc = read_into(file, fill[i], crc, path)
                    continue
                while left:
                    crc = read_into(file, passed[: min(left, len(passed))], crc, path)
                    left -= min(left, len(passed))
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None
    if crc != record.crc32:
        raise SnapshotError(f"{path}: CRC-32 {crc:08x}, the manifest has {record.crc32:08x}")


def read_into(file: Any, place: memoryview, crc: int, path: Path) -> int:
    """Fills `place` from where the file stands; returns the CRC with its bytes."""
    done = 0
    while done < len(place):
        count = file.readinto(place[done : done + CHUNK_BYTES])
        if not count:
            raise SnapshotError(f"{path}: truncated while it was read")
        crc = zlib.crc32(place[done : done + count], crc)
        done += count
    return crc


class JournalDigest:
    """SHA-256 of a journal's header and first lines, which only grows."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._hash = hashlib.sha256()
        self._lines = 0
        self._num_bytes = 0

    def upto(self, num_steps: int) -> tuple[int, str]:
        """(bytes, SHA-256 in hex) of the header and `num_steps` lines, of which no fewer were asked for before."""
        with open(self._path, "rb") as file:
            file.seek(self._num_bytes)
            while self._lines < num_steps + 1:
                line = file.readline()
                if not line.endswith(b"\n"):
                    raise SnapshotError(f"{self._path}: {self._lines - 1} whole steps, {num_steps} were expected")
                self._hash.update(line)
                self._lines += 1
                self._num_bytes += len(line)
        return self._num_bytes, self._hash.copy().hexdigest()


def _expect(record: Any, keys: set[str], what: str) -> None:
    if not isinstance(record, Mapping) or set(record) != keys:
        got = sorted(record) if isinstance(record, Mapping) else type(record).__name__
        raise SnapshotError(f"{what}: expected {sorted(keys)}, got {str(got)[:200]}")


def _count(value: Any, what: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise SnapshotError(f"{what}: a whole number up to {most} was expected, got {str(value)[:40]}")
    return value


def _hex(value: Any, digits: int) -> str:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise SnapshotError(f"{digits} hex digits were expected, got {str(value)[:80]!r}")
    return value


def open_plain(path: Path) -> Any:
    """A plain file opened for reading, unbuffered.

    Raises:
        OSError: it cannot be opened, or is a link or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a plain file")
    return os.fdopen(descriptor, "rb", buffering=0)
