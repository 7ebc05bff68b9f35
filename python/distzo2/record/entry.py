"""One step of the journal: a `StepEntry` as a line, and back. A line with anything unknown is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from distzo2.record.line import (
    MAX_INT64,
    MAX_STEP_BYTES,
    JournalError,
    a_list,
    decode_line,
    encode_line,
    expect_members,
    from_hex,
    from_hex32,
    hex32,
    hex64,
    whole,
)
from distzo2.text import brief
from distzo2_core.types import FAMILIES, MAX_PROBE, MAX_STEP, GroupScalars, Term, Update

_SCALARS = GroupScalars._fields[:4]  # of a group in every line; an anchor follows where it is not 0
_OPTIONAL = {"counts": "list", "unused": "list"}  # since version 3, where they say anything
_MEMBERS = {
    "step": "integer", "groups": "list", "terms": "list", "eps": "string", "losses": "list",
    "skipped": "string or null", "tokens": "integer", "seconds": "string", "extra": "object",
}  # fmt: skip


@dataclass(frozen=True)
class StepEntry:
    """What one step did. `update` alone decides the weights; the other fields describe the step.

    Attributes:
        step: number of the step, 0 for the first; equal to `update.step`.
        update: learning rates, weight decays and terms, float32 values.
        eps: perturbation scale, a float32 value.
        losses: for each evaluation, the mean loss of each micro-batch; float64, may be nan or inf.
        skipped: why the update was not made, or None; a skipped step has lr 0 in every group.
        tokens: tokens that went through the forwards of the step.
        seconds: wall time of the step.
        extra: other JSON values, with finite numbers.
        counts: over how many tokens or examples each loss is the mean: for each micro-batch where all evaluations have
            the same, else for each evaluation and micro-batch; None where all are 1. A loss whose count is 0 is a sum.
        unused: ascending ranges [first, last] of parameters, by their indices in the index table, whose units no lane
            entered: the update leaves them as they are.
    """

    step: int
    update: Update
    eps: float
    losses: list[list[float]]
    skipped: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    counts: list[list[float]] | None = None
    unused: list[list[int]] = field(default_factory=list)

    @property
    def coefs(self) -> list[float]:
        """The coefficients of the step's own terms; terms of earlier steps are momentum."""
        return [term.c for term in self.update.terms if term.step == self.step]

    @property
    def mean_loss(self) -> float:
        """Mean of the losses, weighted by their counts; NaN if there is none."""
        losses = [loss for row in self.losses for loss in row]
        counts = [1.0] * len(losses) if self.counts is None else [n for row in self.counts for n in row]
        counts *= len(losses) // max(len(counts), 1)
        total = sum(loss * (n or 1.0) for loss, n in zip(losses, counts, strict=True))
        return total / sum(counts) if losses else math.nan

    def to_line(self) -> bytes:
        """The entry as one line with its newline.

        Raises:
            JournalError: a line cannot hold a value exactly.
        """
        _check_entry(self)
        record = {
            "step": int(self.step),
            "groups": [
                [
                    hex32(value, f"group {g} {name}")
                    for name, value in group._asdict().items()
                    if name in _SCALARS or value
                ]
                for g, group in enumerate(self.update.groups)
            ],
            "terms": [
                [int(t.family), int(t.step), int(t.probe), int(t.sub), hex32(t.c, f"term {i} c")]
                for i, t in enumerate(self.update.terms)
            ],
            "eps": hex32(self.eps, "eps"),
            "losses": [[float(loss).hex() for loss in row] for row in self.losses],
            "skipped": self.skipped,
            "tokens": int(self.tokens),
            "seconds": hex64(self.seconds, "seconds"),
            "extra": self.extra,
        }
        if self.counts is not None:
            record["counts"] = [[hex64(n, "counts") for n in row] for row in self.counts]
        if self.unused:
            record["unused"] = self.unused
        return encode_line(record, MAX_STEP_BYTES)

    @classmethod
    def from_line(cls, line: bytes) -> StepEntry:
        """The entry of a line that :meth:`to_line` wrote.

        Raises:
            JournalError: the line is damaged, or holds anything else.
        """
        record = decode_line(line, MAX_STEP_BYTES)
        members = _MEMBERS | {name: kind for name, kind in _OPTIONAL.items() if name in record}
        expect_members(record, members, "a step")
        if list(record) != list(members):
            raise JournalError(f"the members of a step are not spelled as {', '.join(members)}, in this order")
        counts, unused = record.get("counts"), record.get("unused", [])
        step, groups, terms = record["step"], map(_read_group, record["groups"]), map(_read_term, record["terms"])
        entry = cls(
            step=step,
            update=Update(step, tuple(groups), tuple(terms)),
            eps=from_hex32(record["eps"], "eps"),
            losses=[[from_hex(loss, "losses") for loss in a_list(row, "losses")] for row in record["losses"]],
            skipped=record["skipped"],
            tokens=record["tokens"],
            seconds=from_hex(record["seconds"], "seconds"),
            extra=record["extra"],
            counts=counts and [[from_hex(n, "counts") for n in a_list(row, "counts")] for row in counts],
            unused=[a_list(part, "a range of unused", 2) for part in unused],
        )
        if "unused" in record and not unused:
            raise JournalError("unused is empty, and must be left out")
        _check_entry(entry)
        return entry


def _read_group(row: Any) -> GroupScalars:
    num_values = 5 if isinstance(row, list) and len(row) == 5 else 4
    group = GroupScalars(*(from_hex32(value, "group") for value in a_list(row, "a group", num_values)))
    if num_values == 5 and not group.anchor:
        raise JournalError("an anchor is 0, and must be left out")
    return group


def _read_term(row: Any) -> Term:
    family, step, probe, sub, coef = a_list(row, "a term", 5)
    return Term(family, step, probe, sub, from_hex32(coef, "a term's c"))


def _check_entry(entry: StepEntry) -> None:
    update = entry.update
    whole(entry.step, 0, MAX_STEP, "step")
    if update.step != entry.step:
        raise JournalError(f"step {entry.step} holds the update of step {update.step}")
    if not update.groups:
        raise JournalError("an entry needs at least one group")
    for term in update.terms:
        if type(term.family) is not int or term.family not in FAMILIES.values():
            raise JournalError(f"unknown family {brief(term.family)} in a term")
        if type(term.sub) is not int or term.sub != 0:
            raise JournalError(f"unknown sub {brief(term.sub)} in a term, only 0 is known")
        whole(term.step, 0, MAX_STEP, "a term's step")
        whole(term.probe, 0, MAX_PROBE, "a term's probe")
    if entry.skipped is not None and any(group.lr != 0 for group in update.groups):
        raise JournalError(f"step {entry.step} is skipped, so its lr must be 0 in every group")
    whole(entry.tokens, 0, MAX_INT64, "tokens")
    if not math.isfinite(entry.seconds):
        raise JournalError("seconds must be finite")
    if entry.counts is not None:
        _check_counts(entry.counts, entry.losses)
    end = -1  # of the range before, and one: neighbours are one range
    for first, last in entry.unused:
        end = whole(last, whole(first, end + 1, MAX_INT64, "unused"), MAX_INT64 - 1, "unused") + 1


def _check_counts(counts: list[list[float]], losses: list[list[float]]) -> None:
    each = counts * len(losses) if len(counts) == 1 else counts
    if [len(row) for row in each] != [len(row) for row in losses]:
        raise JournalError("counts and losses must be of the same lengths")
    if len(counts) > 1 and all(row == counts[0] for row in counts):
        raise JournalError("counts are the same for all evaluations, and must be given once")
    if not all(math.isfinite(n) and n >= 0 for row in counts for n in row):
        raise JournalError("counts must be finite and at least 0")
    if not all(any(row) for row in counts):
        raise JournalError("the counts of an evaluation are all 0")
    if all(n == 1 for row in counts for n in row):
        raise JournalError("counts are all 1, and must be left out")
