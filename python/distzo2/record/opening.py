"""How a run's journal is begun or resumed, and the weights with it, on one rank or on several.

Callers hand in the header (:func:`distzo2.record.header.make_header`); nothing here asks an optimizer or a checkpoint.
"""

from __future__ import annotations

import logging
import os
import platform
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from distzo2.errors import DistZO2Error
from distzo2.record.entry import StepEntry
from distzo2.record.header import check_base, checksums_of, has_older_rules, known_members, table_difference
from distzo2.record.journal import Journal
from distzo2.record.line import JournalError
from distzo2.record.lineage import BranchPoint, branch_of, digest_lines, first_like_step, first_own_step
from distzo2.record.weight_file import KeptWeights
from distzo2.weights.unit_weights import UnitWeights

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


def check_same_run(
    path: str | os.PathLike[str], journal: Mapping[str, Any], run: Mapping[str, Any], reads_base: bool
) -> None:
    """Raises DistZO2Error unless a run with the header `run` can resume the journal at `path`. The base checkpoint is
    compared only with `reads_base`: where the weight file gave every weight, it was not read. `check_base` compares
    weights that did not come from files.

    A fingerprint that differs is logged: the journal still leads to the same weights, but the losses of forwards to
    come may have other bits.
    """
    difference = table_difference(journal["table"], run["table"])
    if difference is not None:
        raise JournalError(f"the journal is of another model: {difference}")
    pairs = {key: (journal[key], run[key]) for key in ("seed", "noise", "rounding")}
    theirs, ours = journal["options"], run["options"]
    pairs |= {key: (theirs.get(key), ours.get(key)) for key in {**theirs, **ours}}
    pairs["packed parameters"] = journal.get("stored_formats"), run.get("stored_formats")
    if reads_base and checksums_of(journal) is None:
        known = journal["base"]["files"]
        pairs["base checkpoint"] = known, known_members(run["base"]["files"], known)
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


class Ranks(Protocol):
    """The ranks that share a run, as its opening knows them. Rank 0 alone has the journal."""

    world_size: int

    def together(self, what: str) -> AbstractContextManager[Any]:
        """Around what every rank does: an exception of one of them is an error of all at its end."""

    def from_rank_0(self, what: str, make: Callable[[], bytes]) -> bytes:
        """Returns on all ranks what `make` returns on rank 0."""


def open_run(
    ranks: Ranks,
    path: str | os.PathLike[str],
    make_header: Callable[[], dict[str, Any]],
    checksums: Callable[[], list[str | None]],
    weights: UnitWeights,
    take_over: Callable[[Sequence[StepEntry], int], None],
    *,
    resume: bool,
    branch: BranchPoint | None,
    fsync_every: int,
    kept: KeptWeights | None,
) -> tuple[Journal | None, int, bool]:
    """Opens or makes the journal of a run, and brings the weights of every rank to its last step.

    Args:
        make_header: called on rank 0 for the header of the run as it is now.
        checksums: called on rank 0, where no files tell what the run began with, for one of each parameter; None where
            a weight file gave the parameter.
        take_over: called with the journal's entries, and the first step whose coefficients are of the same estimator
            and noise as those to come. It pushes their updates, which each unit applies as far as it misses them.
        kept: the weight file that this rank's weights came from, and which is the run's from here on.

    Returns:
        The journal, open on rank 0 and None on the others; the first step that is the run's own, and not one of a run
        that it was branched from; and whether the run has the rules of older versions (`has_older_rules`).

    Raises:
        DistZO2Error: the journal exists already, or belongs to another run, or the branch cannot be made.
        OSError: the file cannot be read or written.
    """
    first = weights.version  # of the weights before the journal's first entry
    journal: Journal | None = None

    def on_rank_0() -> bytes:
        nonlocal journal
        header = make_header()
        if resume:
            journal = Journal.open(path, fsync_every=fsync_every)
            base_unread = ranks.world_size == 1 and kept is not None and kept.gave_all(weights)
            check_same_run(path, journal.header, header, reads_base=not base_unread)
            if kept is None or ranks.world_size == 1:  # ranks may have whole blocks, or slices, from their own files
                check_base(path, journal.header, checksums)
        else:
            header, entries = (header, []) if branch is None else branch_of(branch, header, checksums)
            if not header["base"]["files"]:
                header["base"]["checksums"] = checksums()
            try:
                journal = Journal.create(path, header, entries, fsync_every=fsync_every)
            except FileExistsError as error:
                raise DistZO2Error(f"{path} exists: resume it, or choose another name") from error
        header, entries = journal.header, journal.entries if ranks.world_size > 1 else ()
        numbers = first_own_step(header), first_like_step(header), int(has_older_rules(header))
        about = f"{' '.join(map(str, numbers))} {digest_lines(path, 1)}\n"
        return about.encode() + b"".join(entry.to_line() for entry in entries)

    try:
        about, *lines = ranks.from_rank_0("opening the journal", on_rank_0).splitlines(True)
        first_step, first_like, older, digest = about.decode().split()
        entries = [StepEntry.from_line(line) for line in lines] if journal is None else journal.entries
        with ranks.together("taking over the journal"):
            if kept is not None:
                kept.begin(digest, journal, weights)
            take_over(entries, int(first_like))
        weights.set_durable(first + len(entries))
        if journal is not None:
            held = weakref.ref(weights)  # a journal that nobody closed is dropped together with the weights
            journal.on_durable(lambda durable: (alive := held()) and alive.set_durable(first + durable))
            journal.on_failure(lambda error: (alive := held()) and alive.fail(error))
        return journal, int(first_step), bool(int(older))
    except BaseException:
        if journal is not None:
            journal.close()
        raise
