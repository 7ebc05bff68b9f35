"""Branches: a run that begins with the first steps of another, and goes on with options of its own.

The branch's journal holds the steps that it took over, line by line, before its own. So base and journal are all of the
run, as they are of any other: replay, resume and the best step need nothing of the parent, which may be gone. What the
header says of each parent (name, steps, SHA-256 of that much of its journal) tells where they came from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from distzo2.errors import DistZO2Error
from distzo2.record.header import parents_of, table_difference, with_lineage
from distzo2.record.journal import Journal, StepEntry, read_journal
from distzo2.record.line import MAX_HEADER_BYTES, stated_chain
from distzo2.record.run_header import check_same_run


class BranchPoint(NamedTuple):
    """Where a run leaves its parent: after `step` steps (None: all) of the journal at `journal`."""

    journal: str | os.PathLike[str]
    step: int | None = None


def open_run_journal(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    *,
    resume: bool,
    branch: BranchPoint | None = None,
    chain: bool = False,
    fsync_every: int = 1,
) -> Journal:
    """The journal that a run with this header appends to. Its `entries` are the steps to take over.

    Raises:
        DistZO2Error: the journal is there already, or belongs to another run, or the branch cannot be made.
        OSError: the file cannot be read or written.
    """
    if resume:
        journal = Journal.open(path, fsync_every=fsync_every)
        try:
            check_same_run(path, journal.header, header)
            if chain and journal.chain is None:
                raise DistZO2Error(f"{path}: the run was begun without chained hashes, and goes on without them")
        except BaseException:
            journal.close()
            raise
        return journal
    parents, entries = ([], []) if branch is None else branch_of(branch, header)
    try:
        return Journal.create(path, with_lineage(header, chain, parents), entries, fsync_every=fsync_every)
    except FileExistsError as error:
        raise DistZO2Error(f"{path} exists: resume it, or choose another name") from error


def branch_of(branch: BranchPoint, header: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[StepEntry]]:
    """What the journal of a branch holds besides its own: the parents in its header, and their steps.

    Args:
        header: of the branch, without lineage.

    Raises:
        DistZO2Error: the parent has too few steps, or another seed, base or model.
    """
    path = os.fspath(branch.journal)
    contents = read_journal(path)
    parent = contents.header
    num_steps = len(contents.entries) if branch.step is None else branch.step
    if not 0 <= num_steps <= len(contents.entries):
        raise DistZO2Error(f"{path}: no branch at step {num_steps}: it holds {len(contents.entries)} steps")
    for key, theirs, ours in (
        ("seed", parent["seed"], header["seed"]),
        ("noise", parent["noise"], header["noise"]),
        ("rounding", parent["rounding"], header["rounding"]),
        *(
            (f"base checkpoint: {name}", parent["base"]["files"].get(name), header["base"]["files"].get(name))
            for name in sorted({*parent["base"]["files"], *header["base"]["files"]})
        ),
    ):
        if theirs != ours:
            raise DistZO2Error(f"{path}: {key} is {theirs!r} in the parent's journal and {ours!r} in its branch")
    difference = table_difference(_weights_only(parent["table"]), _weights_only(header["table"]))
    if difference is not None:
        raise DistZO2Error(f"{path}: its run is of another model: {difference}")
    source = parent_groups(path, parent, header)
    entries = [with_groups(entry, source) for entry in contents.entries[:num_steps]]
    sha256, chain = digest_lines(path, 1 + num_steps)
    record = {
        "name": Path(path).absolute().parent.name,
        "steps": num_steps,
        "sha256": sha256,
        "chain": chain,
        "options": parent["options"],
        "noise": noise_of(parent),
        "software": parent["software"],
        "fingerprint": parent["fingerprint"],
    }
    return [*parents_of(parent), record], entries


def first_own_step(header: Mapping[str, Any]) -> int:
    """Number of steps that the header's run took over from its parents."""
    return parents_of(header)[-1]["steps"] if parents_of(header) else 0


def first_like_step(header: Mapping[str, Any]) -> int:
    """The step from which on the coefficients are those of the run's own kind of estimate, so that they can be compared
    with those to come: its parents' steps count where only other options were changed."""
    num_steps = None
    for parent in reversed(parents_of(header)):
        num_steps = parent["steps"] if num_steps is None else min(num_steps, parent["steps"])
        if (parent["options"], parent["noise"]) != (header["options"], noise_of(header)):
            return num_steps
    return 0


def noise_of(header: Mapping[str, Any]) -> str:
    """The kind of noise of the run's own steps."""
    return next((row["noise"] for row in header["table"] if row["group"] is not None), "normal")


def _weights_only(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The index table without what a branch may change."""
    return [{k: v for k, v in row.items() if k not in ("group", "noise")} for row in table]


def with_groups(entry: StepEntry, source: Sequence[int]) -> StepEntry:
    """A parent's step as its branch has it, where group g is the parent's group `source[g]`."""
    return replace(entry, update=entry.update._replace(groups=tuple(entry.update.groups[g] for g in source)))


def parent_groups(path: str, parent: Mapping[str, Any], header: Mapping[str, Any]) -> list[int]:
    """For each parameter group of the branch, the group of the parent that its parameters were in."""
    source: list[int | None] = [None] * len(header["groups"])
    for theirs, ours in zip(parent["table"], header["table"], strict=True):
        if (theirs["group"] is None) != (ours["group"] is None):
            raise DistZO2Error(
                f"{path}: parameter {ours['name']!r} is trained in only one of the parent and its branch"
            )
        if ours["group"] is None:
            continue
        group = ours["group"]
        if source[group] not in (None, theirs["group"]):
            raise DistZO2Error(
                f"{path}: group {group} of the branch joins parameters of the parent's groups {source[group]} and "
                f"{theirs['group']}, such as {ours['name']!r}: a branch may split groups, not join them"
            )
        source[group] = theirs["group"]
    return [0 if group is None else group for group in source]


def digest_lines(path: str, num_lines: int) -> tuple[str, str | None]:
    """SHA-256 of a journal's first lines, and the chained hash of the last of them, if it has one."""
    digest, line = hashlib.sha256(), b""
    with open(path, "rb") as file:
        for _ in range(num_lines):
            line = file.readline(MAX_HEADER_BYTES + 1)
            digest.update(line)
    return digest.hexdigest(), stated_chain(line)
