"""How a run's journal is begun or resumed, and the weights with it, on one rank or on several."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distzo2.errors import DistZO2Error
from distzo2.record.journal import Journal, StepEntry
from distzo2.record.lineage import BranchPoint, first_like_step, first_own_step, open_run_journal
from distzo2.record.snapshot import Snapshots, snapshots_in
from distzo2.record.snapshot_resume import Found, find_same, find_snapshot, load_snapshot
from distzo2.record.snapshot_writer import SnapshotWriter, remove_unfinished
from distzo2.weights.access import WeightAccess


class Ranks(Protocol):
    """The ranks that share a run, as its opening knows them. Rank 0 alone has the journal."""

    world_size: int

    def together(self, what: str) -> AbstractContextManager[Any]:
        """Around what every rank does: an exception of one of them is an error of all at its end."""

    def from_rank_0(self, what: str, make: Callable[[], bytes]) -> bytes:
        """Returns on all ranks what `make` returns on rank 0."""


@dataclass(frozen=True)
class OpenedRun:
    """A run that can be continued. `first_step` is the first that is its own, and not one of a run that it was
    branched from."""

    journal: Journal | None  # on rank 0
    snapshots: SnapshotWriter | None
    first_step: int


def open_run(
    ranks: Ranks,
    path: str | os.PathLike[str],
    make_header: Callable[[], Mapping[str, Any]],
    runtime: WeightAccess,
    take_over: Callable[[Sequence[StepEntry], int], None],
    *,
    resume: bool,
    branch: BranchPoint | None,
    fsync_every: int,
    snapshots: Snapshots | None,
) -> OpenedRun:
    """Opens or makes the journal of a run, and brings the weights of every rank to its last step.

    Args:
        make_header: called on rank 0 for the header of the run as it is now.
        take_over: called with the journal's entries, and the first of them whose coefficients can be compared with
            those to come. It pushes their updates; a snapshot may have filled the weights before.
    """
    first = runtime.version  # of the weights before the journal's first entry
    opened: list[Journal] = []

    def on_rank_0() -> bytes:
        check_no_others(snapshots, resume)
        opened.append(open_run_journal(path, make_header(), resume=resume, branch=branch, fsync_every=fsync_every))
        header, entries = opened[0].header, opened[0].entries if ranks.world_size > 1 else ()
        firsts = b"%d %d\n" % (first_own_step(header), first_like_step(header))
        return firsts + b"".join(entry.to_line() for entry in entries)

    try:
        firsts, *lines = ranks.from_rank_0("opening the journal", on_rank_0).splitlines(True)
        first_step, first_like = (int(number) for number in firsts.split())
        journal = opened[0] if opened else None
        entries = [StepEntry.from_line(line) for line in lines] if journal is None else journal.entries
        found = Found(None, None)
        if resume and snapshots is not None:
            found = _choose_snapshot(ranks, snapshots, runtime, path, len(entries))
        with ranks.together("taking over the journal"):
            if snapshots is not None:
                go_on_from(found, runtime, snapshots)
            take_over(entries, first_like)
        runtime.set_durable(first + len(entries))
        writer = None
        if journal is not None:
            tell_durable, tell_failure = tellers(runtime, first)
            journal.on_durable(tell_durable)
            journal.on_failure(tell_failure)
            if snapshots is not None:
                writer = start_snapshots(snapshots, runtime, journal, resume, first, found.invalid)
        return OpenedRun(journal, writer, first_step)
    except BaseException:
        for journal in opened:
            journal.close()
        raise


def _choose_snapshot(
    ranks: Ranks, snapshots: Snapshots, runtime: WeightAccess, journal: str | os.PathLike[str], num_steps: int
) -> Found:
    """The newest snapshot that is whole, as rank 0 finds it, where this rank sees it too. A rank that does not see it
    makes the journal's updates again, which lead to the same weights."""
    chosen: list[Found] = []

    def choose() -> bytes:
        found = find_snapshot(snapshots.directory, runtime, journal, num_steps)
        chosen.append(found)
        return b"" if found.path is None else found.path.name.encode() + b"\n" + found.manifest.line

    name, _, line = ranks.from_rank_0("choosing a snapshot", choose).partition(b"\n")
    if chosen:
        return chosen[0]
    return find_same(snapshots.directory, runtime, name.decode(), line) if name else Found(None, None)


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
