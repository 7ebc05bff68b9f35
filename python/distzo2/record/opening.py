"""How a run's journal is begun or resumed, and the weights with it.

Callers hand in the header (:func:`distzo2.record.header.make_header`); nothing here asks an optimizer or a checkpoint.
"""

from __future__ import annotations

import logging
import os
import platform
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.record.header import check_table, with_parents
from distzo2.record.journal import Journal
from distzo2.record.lineage import BranchPoint, branch_of
from distzo2.record.snapshot import Snapshots, snapshots_in
from distzo2.record.snapshot_resume import Found, find_snapshot, load_snapshot
from distzo2.record.snapshot_writer import SnapshotWriter, remove_unfinished
from distzo2.weights.access import WeightAccess

logger = logging.getLogger("distzo2")


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What the bits of a forward depend on besides the weights."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    matmul = torch.backends.cuda.matmul
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "matmul_precision": str(matmul.fp32_precision),
    }


def check_same_run(path: str | os.PathLike[str], journal: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises DistZO2Error unless a run with the header `run` can resume the journal at `path`.

    A fingerprint that differs is logged: the journal still leads to the same weights, but the losses of forwards to
    come may have other bits.
    """
    check_table(journal, run["table"])
    pairs = {key: (journal[key], run[key]) for key in ("seed", "noise", "rounding", "options")}
    pairs["base checkpoint"] = journal["base"]["files"], run["base"]["files"]
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise DistZO2Error(f"{os.fspath(path)}: {key} is {theirs!r} in the journal and {ours!r} in this run")
    before, now = journal["fingerprint"], run["fingerprint"]
    ranks_before, ranks_now = before.get("ranks") or [before], now.get("ranks") or [now]
    for key in sorted({key for each in ranks_now for key in each} - {"mesh", "ranks"}):
        was, is_now = [each.get(key) for each in ranks_before], [each.get(key) for each in ranks_now]
        if any(value != was[0] for value in was + is_now):
            change = f"{key} was {_by_rank(was)} and is {_by_rank(is_now)}"
            logger.warning("%s: %s: the bits of losses to come may differ", path, change)
    if before.get("mesh") != now.get("mesh"):
        logger.info("%s: the mesh was %s and is %s", path, before.get("mesh"), now.get("mesh"))


def _by_rank(values: Sequence[Any]) -> str:
    """`2`, or where ranks differ `2 (rank 0), 1 (rank 1, 2)`."""
    ranks = {repr(value): [str(r) for r, other in enumerate(values) if other == value] for value in values}
    if len(ranks) == 1:
        return next(iter(ranks))
    return ", ".join(f"{value} (rank {', '.join(which)})" for value, which in ranks.items())


# ---- the journal ------------------------------------------------------------------------------------------------


def open_run_journal(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    *,
    resume: bool,
    branch: BranchPoint | None = None,
    fsync_every: int = 1,
) -> Journal:
    """The journal that a run with this header appends to. Its `entries` are the steps to take over.

    Raises:
        DistZO2Error: the journal exists already, or belongs to another run, or the branch cannot be made.
        OSError: the file cannot be read or written.
    """
    if resume:
        journal = Journal.open(path, fsync_every=fsync_every)
        try:
            check_same_run(path, journal.header, header)
        except BaseException:
            journal.close()
            raise
        return journal
    parents, entries = ([], []) if branch is None else branch_of(branch, header)
    try:
        return Journal.create(path, with_parents(header, parents), entries, fsync_every=fsync_every)
    except FileExistsError as error:
        raise DistZO2Error(f"{path} exists: resume it, or choose another name") from error


def open_own_journal(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    runtime: WeightAccess,
    take_over: Callable[[Journal], None],
    *,
    resume: bool,
    branch: BranchPoint | None,
    fsync_every: int,
    snapshots: Snapshots | None,
) -> tuple[Journal, list[Path]]:
    """Opens or makes the journal of a run without a mesh, and brings the weights to its last step.

    Args:
        take_over: pushes the updates of the journal's entries; a snapshot may have filled the weights before.

    Returns:
        The journal, and the snapshots that were found to be damaged.
    """
    check_no_others(snapshots, resume)
    version, invalid = runtime.version, []
    journal = open_run_journal(path, header, resume=resume, branch=branch, fsync_every=fsync_every)
    try:
        if resume and snapshots is not None:
            found = find_snapshot(snapshots.directory, runtime, path, len(journal.entries))
            invalid = found.invalid
            go_on_from(found, runtime, snapshots)
        take_over(journal)
    except BaseException:
        journal.close()
        raise
    runtime.set_durable(version + journal.durable)
    on_durable, on_failure = durability_callbacks(runtime, version)
    journal.on_durable(on_durable)
    journal.on_failure(on_failure)
    return journal, invalid


def durability_callbacks(
    runtime: WeightAccess, first_version: int
) -> tuple[Callable[[int], None], Callable[[BaseException], None]]:
    """What a journal's thread calls as its lines become durable, and when they cannot.

    They hold the weights weakly: a journal that nobody closed is dropped together with them and the model.
    """
    held = weakref.ref(runtime)

    def on_durable(durable: int) -> None:
        if (alive := held()) is not None:
            alive.set_durable(first_version + durable)

    def on_failure(error: BaseException) -> None:
        if (alive := held()) is not None:
            alive.fail(error)

    return on_durable, on_failure


# ---- snapshots --------------------------------------------------------------------------------------------------


def check_no_others(snapshots: Snapshots | None, resume: bool) -> None:
    """Raises DistZO2Error if a new run's directory of snapshots holds those of another run."""
    others = [] if resume or snapshots is None else snapshots_in(snapshots.directory)
    if others:
        raise DistZO2Error(f"{others[0]}: a snapshot of another run; name another directory for those of this one")


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
    """The writer of the run's snapshots, or None if none are to be made. Removes what a killed run left.

    Args:
        first_version: of the weights before the journal's first entry.
        invalid: snapshots to remove when the next one is whole.
    """
    remove_unfinished(snapshots.directory)
    if not snapshots.are_made:
        return None
    writer = SnapshotWriter(snapshots, runtime, journal, first_version, invalid)
    if resume:
        writer.remove_surplus()
    runtime.tap = writer.offer
    return writer
