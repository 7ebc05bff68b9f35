"""Where two journals part: the first field of their headers, and the first step, and what of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distzo2.record.journal import JournalContents, StepEntry
from distzo2.record.line import brief

NOT_COMPARED = ("seconds",)  # wall time, which no two runs share


@dataclass(frozen=True)
class Difference:
    """`header` and `step` are None where nothing differs; each is one line of text. `same_updates` steps from the first
    on make the same weights of the same base."""

    header: str | None
    step: str | None
    same_updates: int

    @property
    def is_none(self) -> bool:
        return self.header is None and self.step is None


def diff_journals(a: JournalContents, b: JournalContents) -> Difference:
    """Compares two journals, by bits; times are left out."""
    header = first_difference(a.header, b.header)
    step = None
    shared = list(zip(a.entries, b.entries, strict=False))
    for ours, theirs in shared:
        parts = step_differences(ours, theirs)
        if parts:
            step = f"step {ours.step}: {'; '.join(parts)}"
            break
    else:
        if len(a.entries) != len(b.entries):
            step = f"step {len(shared)}: only in the {'first' if len(a.entries) > len(b.entries) else 'second'} journal"
    same = next((i for i, (x, y) in enumerate(shared) if _bits(x.update) != _bits(y.update)), len(shared))
    return Difference(header, step, same)


def step_differences(a: StepEntry, b: StepEntry) -> list[str]:
    """What differs between two entries of one step."""
    pairs: list[tuple[str, Any, Any]] = [("step", a.step, b.step)]
    for g, (ours, theirs) in enumerate(zip(a.update.groups, b.update.groups, strict=False)):
        pairs += [(f"group {g} {name}", x, y) for name, x, y in zip(ours._fields, ours, theirs, strict=True)]
    pairs.append(("number of groups", len(a.update.groups), len(b.update.groups)))
    for k, (ours, theirs) in enumerate(zip(a.update.terms, b.update.terms, strict=False)):
        pairs += [(f"term {k} {name}", x, y) for name, x, y in zip(ours._fields, ours, theirs, strict=True)]
    pairs.append(("number of terms", len(a.update.terms), len(b.update.terms)))
    pairs += [(name, getattr(a, name), getattr(b, name)) for name in ("eps", "losses", "skipped", "tokens", "extra")]
    return [f"{name} {brief(x)} and {brief(y)}" for name, x, y in pairs if _bits(x) != _bits(y)]


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ, with what is there; None where they are equal."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                return f"{where}: only in the {'first' if key in a else 'second'} journal"
            found = first_difference(a[key], b[key], where)
            if found is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list):
        for position, (x, y) in enumerate(zip(a, b, strict=False)):
            found = first_difference(x, y, f"{path}[{position}]")
            if found is not None:
                return found
        return None if len(a) == len(b) else f"{path}: {len(a)} and {len(b)} entries"
    return None if _bits(a) == _bits(b) else f"{path}: {brief(a)} and {brief(b)}"


def _bits(value: Any) -> Any:
    """The value as one that is equal where the bits are: nan is itself, -0.0 is not 0.0, 1 is not 1.0 or True."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value.hex()
    if isinstance(value, Mapping):
        return {key: _bits(child) for key, child in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_bits(child) for child in value]
    return (type(value).__name__, value)
