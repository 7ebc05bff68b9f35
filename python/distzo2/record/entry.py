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
        losses: for each evaluation, the loss of each micro-batch or example; float64, may be nan or inf.
        skipped: why the update was not made, or None; a skipped step has lr 0 in every group.
        tokens: tokens that went through the forwards of the step.
        seconds: wall time of the step.
        extra: other JSON values, with finite numbers.
    """

    step: int
    update: Update
    eps: float
    losses: list[list[float]]
    skipped: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_loss(self) -> float:
        """Mean of the losses; NaN if there is none."""
        losses = [loss for row in self.losses for loss in row]
        return sum(losses) / len(losses) if losses else math.nan

    def to_line(self) -> bytes:
        """The entry as one line with its newline.

        Raises:
            JournalError: a line cannot hold a value exactly.
        """
        _check_entry(self)
        record = {
            "step": int(self.step),
            "groups": [
                [hex32(value, f"group {g} {name}") for name, value in group._asdict().items()]
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
        return encode_line(record, MAX_STEP_BYTES)

    @classmethod
    def from_line(cls, line: bytes) -> StepEntry:
        """The entry of a line that :meth:`to_line` wrote.

        Raises:
            JournalError: the line is damaged, or holds anything else.
        """
        record = decode_line(line, MAX_STEP_BYTES)
        expect_members(record, _MEMBERS, "a step")
        if list(record) != list(_MEMBERS):
            raise JournalError(f"the members of a step are not spelled as {', '.join(_MEMBERS)}, in this order")
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
        )
        _check_entry(entry)
        return entry


def _read_group(row: Any) -> GroupScalars:
    return GroupScalars(*(from_hex32(value, "group") for value in a_list(row, "a group", 4)))


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
