"""Going on from a snapshot: the newest whole one of a run fills the units, each at its own version.

Snapshots are looked at from the newest on. One that is damaged or of another run is told, with the file and what was
expected, and the next older one is tried; where none is left, the base checkpoint and the whole journal lead to the
same weights. All files of a snapshot are read and checked before a weight is touched, and checked again as they fill
the weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from distzo2.checkpoint.weight_files import bytes_of
from distzo2.record.snapshot import (
    MANIFEST,
    JournalDigest,
    Manifest,
    SnapshotError,
    check_file,
    check_units,
    read_manifest,
    snapshots_in,
)
from distzo2.weights.access import WeightAccess
from distzo2.weights.units import Unit

_NUM_READERS = 2


@dataclass(frozen=True)
class Found:
    """A snapshot whose files are all as its manifest says; None in `manifest`: there is none. `invalid`: those that
    are newer and damaged, and `reasons`, why."""

    path: Path | None
    manifest: Manifest | None
    invalid: list[Path] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def find_snapshot(
    directory: str | os.PathLike[str],
    access: WeightAccess,
    journal: str | os.PathLike[str],
    num_steps: int,
) -> Found:
    """The newest snapshot in a directory that belongs to this model and is a part of a journal of `num_steps` steps."""
    invalid, reasons = [], []
    for path in snapshots_in(directory):
        try:
            manifest = read_manifest(path)
            check_journal(path / MANIFEST, manifest, journal, num_steps)
            _check_all(path, manifest, access.trained_units(), access.weights.seed)
        except SnapshotError as error:
            invalid.append(path)
            reasons.append(f"the snapshot {path.name} cannot be used: {error}")
            continue
        return Found(path, manifest, invalid, reasons)
    return Found(None, None, invalid, reasons)


def find_same(directory: str | os.PathLike[str], access: WeightAccess, name: str, line: bytes) -> Found:
    """On another rank: the snapshot that rank 0 goes on from, where this rank sees the same one."""
    path = Path(directory) / name
    try:
        manifest = read_manifest(path)
        if manifest.line != line:
            raise SnapshotError(f"{path / MANIFEST}: not what rank 0 reads there")
        _check_all(path, manifest, access.trained_units(), access.weights.seed)
    except SnapshotError as error:
        return Found(None, None, [], [str(error)])
    return Found(path, manifest)


def load_snapshot(found: Found, access: WeightAccess, first_version: int) -> None:
    """Fills the units. Each must then still get the journal's updates from its own version on, which
    `UnitWeights.push` brings; `first_version` is that of the weights before the journal's first entry.

    Raises:
        SnapshotError: a file changed since it was checked. The weights are then of no use.
    """
    try:
        for unit, record in zip(access.trained_units(), found.manifest.units, strict=True):
            with access.writing(unit) as views:
                places = [bytes_of(views[p.name]) for p in unit.params]
                check_file(found.path / record.file, record, unit, places)
            access.set_version(unit, first_version + record.version)
    except BaseException:
        access.weights.close()  # weights of which some are of another step are no model
        raise


def check_journal(where: Path, manifest: Manifest, journal: str | os.PathLike[str], num_steps: int) -> None:
    """Raises SnapshotError unless the manifest is of the first of a journal's `num_steps` steps; names `where`."""
    if manifest.journal_steps > num_steps:
        raise SnapshotError(
            f"{where}: it holds {manifest.journal_steps} steps of the journal, which has {num_steps} now"
        )
    num_bytes, sha256 = JournalDigest(journal).upto(manifest.journal_steps)
    if (num_bytes, sha256) != (manifest.journal_bytes, manifest.journal_sha256):
        raise SnapshotError(f"{where}: the first {manifest.journal_steps} steps of the journal are not those it holds")


def _check_all(path: Path, manifest: Manifest, units: Sequence[Unit], seed: int) -> None:
    try:
        check_units(manifest, units, seed)
    except SnapshotError as error:
        raise SnapshotError(f"{path / MANIFEST}: {error}") from None
    with ThreadPoolExecutor(_NUM_READERS, "distzo2-snapshot") as pool:
        checks = [
            pool.submit(check_file, path / record.file, record, unit)
            for unit, record in zip(units, manifest.units, strict=True)
        ]
        try:
            for check in checks:
                check.result()
        finally:
            for check in checks:
                check.cancel()


__all__ = ["Found", "SnapshotError", "check_journal", "find_same", "find_snapshot", "load_snapshot"]
