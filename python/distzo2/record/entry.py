"""A step of the journal: its entry as a record, and back; whatever is not known is refused (docs/journal.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from distzo2.record.line import (
    MAX_DEPTH,
    MAX_INT64,
    MAX_STEP_BYTES,
    JournalError,
    a_list,
    brief,
    check_depth,
    decode_line,
    encode_record,
    expect_keys,
    from_hex,
    from_hex32,
    hex32,
    hex64,
    seal_line,
    sized,
    whole,
)
from distzo2_core.types import FAMILIES, MAX_PROBE, MAX_STEP, GroupScalars, Term, Update

_GROUP_FIELDS = ("lr", "weight_decay", "perturb_scale", "update_scale")
_STEP_KEYS = ("step", "groups", "terms", "eps", "losses", "skipped", "tokens", "seconds", "extra")


@dataclass(frozen=True)
class StepEntry:
    """What one step did. ``update`` alone decides the weights; the rest is told beside it.

    step: number of the step, 0 for the first; equal to ``update.step``.
    update: learning rates, weight decays and terms, float32 values.
    eps: perturbation scale, a float32 value.
    losses: one list for each evaluation of the step, one number for each micro-batch (or example); float64, may be
    nan or inf. skipped: None, or why the update was not made; a skipped step has lr 0 in every group. tokens: tokens
    that went through the forwards of the step. seconds: wall time of the step. extra: anything else, as JSON values
    with finite numbers.
    """

    step: int
    update: Update
    eps: float
    losses: list[list[float]]
    skipped: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """The entry as one line, newline included. Raises JournalError where a value cannot be kept exactly."""
        return seal_line(self.to_record(), None)[0]

    def to_record(self) -> bytes:
        """The line without what seals it (:func:`distzo2.record.line.seal_line`). Raises as :meth:`to_line`."""
        _check_entry(self)
        update = self.update
        record = {
            "step": int(self.step),
            "groups": [
                [hex32(v, f"group {g} {name}") for name, v in zip(_GROUP_FIELDS, scalars, strict=True)]
                for g, scalars in enumerate(update.groups)
            ],
            "terms": [
                [int(t.family), int(t.step), int(t.probe), int(t.sub), hex32(t.c, f"term {i} c")]
                for i, t in enumerate(update.terms)
            ],
            "eps": hex32(self.eps, "eps"),
            "losses": [[float(v).hex() for v in row] for row in self.losses],
            "skipped": self.skipped,
            "tokens": int(self.tokens),
            "seconds": hex64(self.seconds, "seconds"),
            "extra": self.extra,
        }
        return encode_record(record, MAX_STEP_BYTES)

    @classmethod
    def from_line(cls, line: bytes, previous: str | None = None) -> StepEntry:
        """Reads a line written by :meth:`to_line`; of a journal with chained hashes, after the line whose hash is
        ``previous``. Raises JournalError with the reason."""
        record = decode_line(line, MAX_STEP_BYTES, previous)
        expect_keys(record, _STEP_KEYS, "a step")
        if tuple(record) != _STEP_KEYS:
            raise JournalError(f"the members of a step are not spelled as {', '.join(_STEP_KEYS)}, in this order")
        groups = tuple(
            GroupScalars(*(from_hex32(v, "group") for v in sized(row, len(_GROUP_FIELDS), "group")))
            for row in a_list(record["groups"], "groups")
        )
        terms = tuple(_read_term(row) for row in a_list(record["terms"], "terms"))
        step = whole(record["step"], 0, MAX_STEP, "step")
        entry = cls(
            step=step,
            update=Update(step, groups, terms),
            eps=from_hex32(record["eps"], "eps"),
            losses=[
                [from_hex(v, "losses") for v in a_list(row, "losses")] for row in a_list(record["losses"], "losses")
            ],
            skipped=record["skipped"],
            tokens=record["tokens"],
            seconds=from_hex(record["seconds"], "seconds"),
            extra=record["extra"],
        )
        _check_entry(entry)
        return entry


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
    if entry.skipped is not None:
        if not isinstance(entry.skipped, str):
            raise JournalError("skipped must be null or the reason as a string")
        if any(group.lr != 0 for group in update.groups):
            raise JournalError(f"step {entry.step} is skipped, so its lr must be 0 in every group")
    whole(entry.tokens, 0, MAX_INT64, "tokens")
    if not math.isfinite(entry.seconds):
        raise JournalError("seconds must be finite")
    if not isinstance(entry.extra, dict):
        raise JournalError("extra must be an object")
    check_depth(entry.extra, MAX_DEPTH - 1)


def _read_term(row: Any) -> Term:
    family, step, probe, sub, coef = sized(row, 5, "term")
    return Term(family, step, probe, sub, from_hex32(coef, "a term's c"))
