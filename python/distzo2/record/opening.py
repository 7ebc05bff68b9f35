"""What an optimizer does with its journal and snapshots when it begins or continues a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distzo2.errors import DistZO2Error
from distzo2.record.journal import Journal
from distzo2.record.snapshot import Snapshots, snapshots_in
from distzo2.record.snapshot_resume import Found, load_snapshot
from distzo2.record.snapshot_writer import SnapshotWriter, remove_unfinished

if TYPE_CHECKING:
    from distzo2.weights.access import WeightAccess


def check_no_others(snapshots: Snapshots | None, resume: bool) -> None:
    """Before a new journal is made: the directory of its snapshots must not hold those of another run.

    Raises:
        DistZO2Error: it does.
    """
    others = [] if resume or snapshots is None else snapshots_in(snapshots.directory)
    if others:
        raise DistZO2Error(f"{others[0]}: a snapshot of another run; name another directory for those of this one")


def tellers(runtime: WeightAccess, first_version: int) -> tuple[Callable[[int], None], Callable[[BaseException], None]]:
    """What a journal's thread calls as its lines become durable, and when they cannot. It keeps neither weights nor
    model: they are dropped together with a journal that nobody closed."""
    held = weakref.ref(runtime)

    def tell_durable(durable: int) -> None:
        if (alive := held()) is not None:
            alive.set_durable(first_version + durable)

    def tell_failure(error: BaseException) -> None:
        if (alive := held()) is not None:
            alive.fail(error)

    return tell_durable, tell_failure


def go_on_from(found: Found, runtime: WeightAccess, snapshots: Snapshots) -> None:
    """Fills the weights from a snapshot, if one was found, before the journal's updates are taken over."""
    for reason in found.reasons:
        snapshots.log(reason)
    if found.manifest is not None:
        load_snapshot(found, runtime, runtime.version)
        snapshots.log(f"went on from the snapshot {found.path.name}")
    elif found.reasons:
        snapshots.log("no snapshot can be used: the journal's updates are made again from the base checkpoint")


def start_snapshots(
    snapshots: Snapshots,
    runtime: WeightAccess,
    journal: Journal,
    resume: bool,
    first_version: int,
    invalid: list[Path],
) -> SnapshotWriter | None:
    """What makes them from now on, if any are to be made. `first_version` is that of the weights before the journal's
    first entry; `invalid` are removed when the next is whole. Of a run that goes on, those that a killed process had no
    time to remove go now."""
    remove_unfinished(snapshots.directory)
    if not snapshots.are_made:
        return None
    writer = SnapshotWriter(snapshots, runtime, journal, first_version, invalid)
    if resume:
        writer.remove_surplus()
    runtime.tap = writer.offer
    return writer
