"""Branches: a run that begins with the first steps of another one and continues with its own options.

The branch's journal holds the steps that it took over before its own. So base and journal are all of the run: replay,
resume and the best step need nothing of the parent. The header names each parent, with the number of steps taken over
and the SHA-256 of its journal up to there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from distzo2.errors import DistZO2Error
from distzo2.record.entry import StepEntry
from distzo2.record.header import (
    ANCHOR_VERSION,
    check_base,
    checksums_of,
    has_older_rules,
    known_members,
    parents_of,
    table_difference,
    with_older_rules,
)
from distzo2.record.journal import read_journal
from distzo2_core import FAMILIES
from distzo2_core.types import dense_family


class BranchPoint(NamedTuple):
    """Where a run leaves its parent: after `step` steps (None: all) of the journal at `journal`."""

    journal: str | os.PathLike[str]
    step: int | None = None


def branch_of(
    branch: BranchPoint, header: Mapping[str, Any], checksums: Callable[[], Sequence[str | None]]
) -> tuple[dict[str, Any], list[StepEntry]]:
    """What the journal of a branch begins with: `header` with the branch's parents, and their steps. The branch of an
    older run keeps its rules, and so its version.

    Args:
        header: of the branch, without parents.
        checksums: as `check_base` takes them.

    Raises:
        DistZO2Error: the parent has too few steps, or another seed, base or model, or noise of low rank alone.
    """
    path = os.fspath(branch.journal)
    contents = read_journal(path)
    parent = contents.header
    num_steps = len(contents.entries) if branch.step is None else branch.step
    if not 0 <= num_steps <= len(contents.entries):
        raise DistZO2Error(f"{path}: no branch at step {num_steps}: it holds {len(contents.entries)} steps")
    by_weights, known = checksums_of(parent) is not None, parent["base"]["files"]
    theirs, ours = (
        {key: h[key] for key in ("seed", "noise", "rounding")}
        | {"packed parameters": h.get("stored_formats")}
        | {f"base checkpoint: {name}": file for name, file in files.items() if not by_weights}
        for h, files in ((parent, known), (header, known_members(header["base"]["files"], known)))
    )
    for key in {**theirs, **ours}:
        if theirs.get(key) != ours.get(key):
            reason = f"{key} is {theirs.get(key)!r} in the parent's journal and {ours.get(key)!r} in its branch"
            raise DistZO2Error(f"{path}: {reason}")
    noise, ours = _noise_of(parent), _noise_of(header)
    if noise != dense_family(noise) and ours == dense_family(ours):
        # The table of dense noise does not say which weights are convolutions, whose noise was dense before.
        raise DistZO2Error(f"{path}: the parent's noise is {noise}: a branch has low-rank noise too, not {ours}")
    # A branch may change groups and noise.
    tables = ([{**row, "group": None, "noise": ""} for row in h["table"]] for h in (parent, header))
    difference = table_difference(*tables)
    if difference is not None:
        raise DistZO2Error(f"{path}: its run is of another model: {difference}")
    check_base(path, parent, checksums)
    source = _parent_groups(path, parent, header)
    record = {
        "name": Path(path).absolute().parent.name,
        "steps": num_steps,
        "sha256": digest_lines(path, 1 + num_steps),
        "chain": None,  # older versions filled it
        "options": parent["options"],
        "noise": _noise_of(parent),
        "software": parent["software"],
        "fingerprint": parent["fingerprint"],
    }
    entries = [
        replace(entry, update=entry.update._replace(groups=tuple(entry.update.groups[g] for g in source)))
        for entry in contents.entries[:num_steps]
    ]
    if has_older_rules(parent) and header["journal"] == ANCHOR_VERSION:
        raise DistZO2Error(f"{path}: an anchor in a branch of a journal of version {parent['journal']} is not possible")
    if parent["journal"] == ANCHOR_VERSION:  # the steps taken over may have anchors
        header = {**header, "journal": ANCHOR_VERSION}
    header = with_older_rules(header) if has_older_rules(parent) else header
    purposes = {**parent["purposes"], **header["purposes"]}
    return {**header, "purposes": purposes, "parents": [*parents_of(parent), record]}, entries


def parent_differences(header: Mapping[str, Any], path: str | os.PathLike[str]) -> list[str]:
    """Why the journal at `path` is not the one that the header's run was branched from; empty if it is."""
    if not parents_of(header):
        return [f"{os.fspath(path)}: the run was not branched from another one"]
    parent = parents_of(header)[-1]
    num_steps = len(read_journal(path).entries)
    if num_steps < parent["steps"]:
        return [f"{os.fspath(path)}: {num_steps} steps, and its branch took over {parent['steps']}"]
    if digest_lines(path, 1 + parent["steps"]) != parent["sha256"]:
        return [f"{os.fspath(path)}: another SHA-256 up to step {parent['steps']} than that of the branch's parent"]
    return []


def first_own_step(header: Mapping[str, Any]) -> int:
    """Number of steps that the header's run took over from its parents."""
    return parents_of(header)[-1]["steps"] if parents_of(header) else 0


def first_like_step(header: Mapping[str, Any]) -> int:
    """The first step whose coefficients can be compared with the run's own.

    Steps of parents count as far back as the parents had the run's kind of estimate and noise.
    """
    parents = parents_of(header)
    alike = _estimate_of(header["options"]), _noise_of(header)
    unlike = [i for i, p in enumerate(parents) if (_estimate_of(p["options"]), p["noise"]) != alike]
    return min(parent["steps"] for parent in parents[unlike[-1] :]) if unlike else 0


def _estimate_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the size of coefficients depends on: an update's own terms are the same with momentum."""
    return {key: value for key, value in options.items() if key not in ("momentum", "momentum_window")}


def digest_lines(path: str | os.PathLike[str], num_lines: int) -> str:
    """SHA-256 of a journal's first lines."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for line in islice(file, num_lines):
            digest.update(line)
    return digest.hexdigest()


def _noise_of(header: Mapping[str, Any]) -> str:
    """The kind of noise of the run's own steps."""
    return max(
        (row["noise"] for row in header["table"] if row["group"] is not None), key=FAMILIES.get, default="normal"
    )


def _parent_groups(path: str, parent: Mapping[str, Any], header: Mapping[str, Any]) -> list[int]:
    """For each parameter group of the branch, the group of the parent that its parameters were in."""
    source: dict[int, int] = {}
    for theirs, ours in zip(parent["table"], header["table"], strict=True):
        if ours["group"] is not None and source.setdefault(ours["group"], theirs["group"]) != theirs["group"]:
            raise DistZO2Error(
                f"{path}: group {ours['group']} of the branch joins parameters of the parent's groups "
                f"{source[ours['group']]} and {theirs['group']}, such as {ours['name']!r}: a branch may split groups, "
                "not join them"
            )
    return [source.get(group, 0) for group in range(len(header["groups"]))]
