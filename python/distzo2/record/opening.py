"""How an optimizer begins or goes on with its journal and snapshots; with a mesh `shared_step.py` opens it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distzo2.errors import DistZO2Error
from distzo2.record.journal import Journal
from distzo2.record.lineage import first_like_step, first_own_step, open_run_journal
from distzo2.record.run_header import run_header
from distzo2.record.snapshot import Snapshots, snapshots_in
from distzo2.record.snapshot_resume import Found, find_snapshot, load_snapshot
from distzo2.record.snapshot_writer import SnapshotWriter, remove_unfinished

if TYPE_CHECKING:
    from distzo2.optim.zosgd import ZOSGD
    from distzo2.weights.access import WeightAccess


def check_no_others(snapshots: Snapshots | None, resume: bool) -> None:
    """Before a new journal is made: the directory of its snapshots must not hold those of another run.

    Raises:
        DistZO2Error: it does.
    """
    others = [] if resume or snapshots is None else snapshots_in(snapshots.directory)
    if others:
        raise DistZO2Error(f"{others[0]}: a snapshot of another run; name another directory for those of this one")


def open_own_journal(
    optimizer: ZOSGD, path: str | os.PathLike, resume: bool, snapshots: Snapshots | None
) -> tuple[Journal, list[Path]]:
    """Opens or makes it, and takes over its steps, from a snapshot on where there is one.

    Returns:
        The journal, and the snapshots that were found to be damaged.
    """
    check_no_others(snapshots, resume)
    access, invalid = optimizer._runtime.access, []
    version = access.weights.version
    journal = open_run_journal(
        path, run_header(optimizer), resume=resume, branch=optimizer._branch, **optimizer._journal_options
    )
    try:
        optimizer.first_step = first_own_step(journal.header)
        if resume and snapshots is not None:
            found = find_snapshot(snapshots.directory, access, path, len(journal.entries))
            invalid = found.invalid
            go_on_from(found, access, snapshots)
        optimizer.take_over(journal.entries, first_like_step(journal.header))
    except BaseException:
        journal.close()
        raise
    access.weights.set_durable(version + journal.durable)
    tell_durable, tell_failure = tellers(access, version)
    journal.on_durable(tell_durable)
    journal.on_failure(tell_failure)
    return journal, invalid


def tellers(access: WeightAccess, first_version: int) -> tuple[Callable[[int], None], Callable[[BaseException], None]]:
    """What a journal's thread calls as its lines become durable, and when they cannot. It keeps neither weights nor
    model: they are dropped together with a journal that nobody closed."""
    held = weakref.ref(access)

    def tell_durable(durable: int) -> None:
        if (alive := held()) is not None:
            alive.weights.set_durable(first_version + durable)

    def tell_failure(error: BaseException) -> None:
        if (alive := held()) is not None:
            alive.weights.fail(error)

    return tell_durable, tell_failure


def go_on_from(found: Found, access: WeightAccess, snapshots: Snapshots) -> None:
    """Fills the weights from a snapshot, if one was found, before the journal's updates are taken over."""
    for reason in found.reasons:
        snapshots.log(reason)
    if found.manifest is not None:
        load_snapshot(found, access, access.weights.version)
        snapshots.log(f"went on from the snapshot {found.path.name}")
    elif found.reasons:
        snapshots.log("no snapshot can be used: the journal's updates are made again from the base checkpoint")


def start_snapshots(
    snapshots: Snapshots,
    access: WeightAccess,
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
    writer = SnapshotWriter(snapshots, access, journal, first_version, invalid)
    if resume:
        writer.remove_surplus()
    access.weights.tap = writer.offer
    return writer
