"""The updates that some stored copies have missed, and how a visit encodes them.

An update is a few scalars. A unit that is made present applies the updates that its stored copy has missed in one pass
over its memory, together with the perturbations that are wanted: a `Program`, encoded once for all copies at the same
version, over the copy's `SegmentTable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distzo2.weights.store import StoredCopy
from distzo2_core import Emit, Program, Segment, SegmentTable, Term, Update, encode_program

MAX_PROGRAMS = 64  # encoded visits that are remembered within a step


@dataclass(frozen=True)
class Emission:
    """A perturbation of the weights: rne(w + sum of c·z over `terms`); without terms, the clean weights."""

    terms: tuple[Term, ...] = ()

    @property
    def clean(self) -> bool:
        return not self.terms

    def mirrors(self, other: Emission) -> bool:
        """Whether both are one-term perturbations by the same z, so that one call can make both."""
        return len(self.terms) == len(other.terms) == 1 and self.terms[0][:4] == other.terms[0][:4]


CLEAN = Emission()


class Updates:
    """The updates made so far, as far as a stored copy still misses them.

    `version` is their number. `group_of` maps a parameter's index to its group; a parameter without one is read and
    never changed. `perturb_scales` holds a factor on eps for each group.
    """

    def __init__(self) -> None:
        self.version = 0
        self.seed = 0
        self.group_of: dict[int, int] = {}
        self.perturb_scales: tuple[float, ...] = ()
        self._last: list[Update] = []  # the first one's number is version - len(_last)
        self._tables: dict[tuple[int, int, int], tuple[SegmentTable | None, bool]] = {}
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

    def push(self, updates: Iterable[Update]) -> None:
        """Adds updates, oldest first."""
        for update in updates:
            self._last.append(update)
            self.version += 1
        self._programs.clear()

    def missed_at(self, version: int) -> list[Update]:
        """Returns the updates missing from a copy at `version`, oldest first."""
        return self._last[len(self._last) - (self.version - version) :] if version < self.version else []

    def missed_by(self, copy: StoredCopy) -> list[Update]:
        """Returns the updates missing from a copy, oldest first; none if no update reaches it."""
        return self.missed_at(copy.version) if self.table(copy) is not None else []

    def forget_but(self, num_last: int) -> None:
        """Forgets all but the last `num_last` updates, which every stored copy must hold."""
        self._last = self._last[len(self._last) - num_last :]

    def restart(self) -> None:
        """Counts from 0 again, for weights that were replaced."""
        self.version = 0
        self._last.clear()
        self._programs.clear()

    def program(self, version: int, emissions: tuple[Emission, ...]) -> Program:
        """Returns what a visit of a copy at `version` does, encoded once for all copies."""
        key = version, self.version, emissions
        if key not in self._programs:
            if len(self._programs) >= MAX_PROGRAMS:
                self._programs.clear()
            emits = [Emit(e.terms, self.perturb_scales) for e in emissions]
            self._programs[key] = encode_program(self.missed_at(version), emits, len(self.perturb_scales))
        return self._programs[key]

    def table(self, copy: StoredCopy) -> SegmentTable | None:
        """Returns the segments of the copy that updates and perturbations reach; None if there are none."""
        return self._table(copy)[0]

    def reaches_all_of(self, copy: StoredCopy) -> bool:
        """Whether every element of the copy is in its table."""
        return self._table(copy)[1]

    def _table(self, copy: StoredCopy) -> tuple[SegmentTable | None, bool]:
        key = copy.unit.index, copy.begin, copy.num_bytes
        if key not in self._tables:
            segments, reaches_all = [], True
            for p in copy.unit.params:
                elements, group = copy.elements_of(p), self.group_of.get(p.index)
                if elements and group is not None:
                    offset = p.byte_offset + elements.start * p.dtype.itemsize - copy.begin
                    segments.append(
                        Segment(offset, len(elements), p.dtype, p.index, elements.start, group, *p.matrix_shape)
                    )
                reaches_all &= not elements or group is not None
            self._tables[key] = SegmentTable(segments) if segments else None, reaches_all
        return self._tables[key]
