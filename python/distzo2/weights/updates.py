"""The updates that some stored copies have missed, and how a visit encodes them.

An update is a few scalars. A unit that is made present applies the updates that its stored copy has missed in one pass
over its memory, together with the perturbations that are wanted: a `Program`, encoded once for all copies at the same
version, over the copy's `SegmentTable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distzo2.weights.store import StoredCopy
from distzo2.weights.units import TRAINABLE_DTYPES
from distzo2_core import Emit, Program, SegmentTable, Term, Update, encode_program

MAX_PROGRAMS = 64  # encoded visits that are kept within a step


@dataclass(frozen=True)
class Emission:
    """A perturbation of the weights: rne(w + sum of c·z over `terms`); without terms, the clean weights."""

    terms: tuple[Term, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether these are the weights themselves."""
        return not self.terms

    def mirrors(self, other: Emission) -> bool:
        """Whether both are one-term perturbations by the same z, so that one call can make both."""
        return len(self.terms) == len(other.terms) == 1 and self.terms[0][:4] == other.terms[0][:4]


CLEAN = Emission()


class Updates:
    """The updates made so far, as far as a stored copy may miss them.

    Attributes:
        version: the number of updates made.
        last: the latest of them, oldest first.
        excluded: maps the number of an update among all, from 0, to the units that it leaves as they are, by index.
        seed: of the run.
        group_of: maps a parameter's index to its group; a parameter without one is read and never changed.
        perturb_scales: a factor on eps for each group.
    """

    def __init__(self) -> None:
        self.version = self.seed = 0
        self.last: list[Update] = []
        self.excluded: dict[int, frozenset[int]] = {}  # empty in the steady state of most models
        self.group_of: dict[int, int] = {}
        self.perturb_scales: tuple[float, ...] = ()
        self._tables: dict[tuple[int, int, int, bool, bool], SegmentTable | None] = {}
        self._programs: dict[tuple, Program] = {}

    def bind(self, group_of: Mapping[int, int], num_groups: int, seed: int) -> None:
        """Sets the run's seed, and which parameters updates and perturbations reach from now on."""
        self.seed, self.group_of = seed, dict(group_of)
        self.perturb_scales = (1.0,) * num_groups
        self._tables.clear()
        self._programs.clear()

    def set_perturb_scales(self, scales: Sequence[float]) -> None:
        """Sets one factor on eps for each group, for the perturbations to come."""
        if self.perturb_scales != tuple(scales):
            self.perturb_scales = tuple(scales)
            self._programs.clear()

    def push(self, update: Update, excluded: frozenset[int] = frozenset()) -> None:
        """Adds an update; each unit but the `excluded` ones applies it at its next visit."""
        if excluded:
            self.excluded[self.version] = excluded
        self.last.append(update)
        self.version += 1
        self._programs.clear()

    def missed_at(self, version: int) -> list[Update]:
        """Returns the updates missing from a copy at `version`, oldest first."""
        return self.last[len(self.last) - (self.version - version) :] if version < self.version else []

    def drop_before(self, version: int) -> None:
        """Forgets the updates that a copy at `version` holds."""
        self.last = self.missed_at(version)
        self.excluded = {number: units for number, units in self.excluded.items() if number >= version}

    def pass_excluded(self, copy: StoredCopy) -> None:
        """Raises a copy's version past the next updates that leave its unit as it is."""
        while copy.unit.index in self.excluded.get(copy.version, ()):
            copy.version += 1

    def missed_by(self, copy: StoredCopy) -> bool:
        """Whether a copy misses an update that reaches it."""
        self.pass_excluded(copy)
        return copy.version < self.version and self.table(copy) is not None

    def restart(self) -> None:
        """Counts from 0 again, for weights that were replaced."""
        self.version = 0
        self.last.clear()
        self.excluded.clear()
        self._programs.clear()

    def program(self, copy: StoredCopy, emissions: tuple[Emission, ...]) -> Program:
        """Returns what a visit of a copy does, encoded once for all copies that miss the same updates."""
        left_out: tuple[int, ...] = ()
        if self.excluded:
            left_out = tuple(n for n, units in self.excluded.items() if n >= copy.version and copy.unit.index in units)
        key = copy.version, self.version, left_out, emissions
        if key not in self._programs:
            if len(self._programs) >= MAX_PROGRAMS:
                self._programs.clear()
            emits = [Emit(e.terms, self.perturb_scales) for e in emissions]
            missed = enumerate(self.missed_at(copy.version), copy.version)
            updates = [update for number, update in missed if number not in left_out]
            self._programs[key] = encode_program(updates, emits, len(self.perturb_scales))
        return self._programs[key]

    def table(self, copy: StoredCopy, for_modules: bool = False) -> SegmentTable | None:
        """Returns the segments of the copy that updates and perturbations reach; None if there are none. `for_modules`:
        all that are converted are in it, and emitted where and as modules see them."""
        key = copy.unit.index, copy.begin, copy.end, copy.is_gathered, for_modules
        if key not in self._tables:
            segments = []
            for p in copy.unit.params:
                part, group = copy.elements_of(p), self.group_of.get(p.index)
                is_read = group is not None or (for_modules and p.dtype in TRAINABLE_DTYPES)
                if not part or not is_read or (p.layout is not None and not p.is_coded):
                    continue
                offset = p.byte_offset + part.start * p.stored_itemsize - copy.begin
                scales = copy.scale_offset(p) if p.is_coded else 0
                segment = p.segment(offset, part, -1 if group is None else group, scales, copy.start_offset(offset))
                if for_modules or copy.unit.is_encoded:
                    segment = segment._replace(out_offset=p.seen_offset, out_dtype=p.seen)
                segments.append(segment)
            self._tables[key] = SegmentTable(segments) if segments else None
        return self._tables[key]

    def forget_tables(self) -> None:
        """Makes tables anew, since modules compute in other dtypes."""
        self._tables.clear()
