"""The updates that some stored copies have missed, and how a visit applies them.

An update is a few scalars. A unit that is made present applies those that its stored copy has missed in one pass over
its memory, with the perturbations that are wanted: a `Program`, encoded once for all units at the same version, over
the unit's `SegmentTable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from distzo2.parallel.sliced_store import Slice
from distzo2.streaming.lanes import Emission
from distzo2.weights.units import Unit
from distzo2_core import Emit, Program, Segment, SegmentTable, Update, encode_program

MAX_PROGRAMS = 64  # encoded visits that are kept within a step


class Updates:
    """`version`: updates made so far. `group_of`: of a parameter's index, its group; absent: read, never changed.
    `perturb_scales`: a factor on eps for each group."""

    def __init__(self) -> None:
        self.version = 0
        self.seed = 0
        self.group_of: dict[int, int] = {}
        self.perturb_scales: tuple[float, ...] = ()
        self._last: list[Update] = []  # the first one's number is version - len(_last)
        self._tables: dict[int, SegmentTable | None] = {}
        self._slice_tables: dict[int, tuple[SegmentTable | None, bool]] = {}
        self._programs: dict[tuple, Program] = {}

    def bind(self, group_of: Mapping[int, int], num_groups: int, seed: int) -> None:
        """Sets what updates and perturbations reach from now on, and the run's seed."""
        self.seed, self.group_of = seed, dict(group_of)
        self.perturb_scales = (1.0,) * num_groups
        self._tables.clear()
        self._slice_tables.clear()
        self._programs.clear()

    def set_perturb_scales(self, scales: Sequence[float]) -> None:
        """For the perturbations to come."""
        if self.perturb_scales != tuple(scales):
            self.perturb_scales = tuple(scales)
            self._programs.clear()

    def push(self, updates: Iterable[Update]) -> None:
        """Adds updates."""
        for update in updates:
            self._last.append(update)
            self.version += 1
        self._programs.clear()

    def missed_at(self, version: int) -> list[Update]:
        """Those that a copy with the first `version` of them has not got, oldest first."""
        return self._last[len(self._last) - (self.version - version) :] if version < self.version else []

    def forget_but(self, num_kept: int) -> None:
        """Every stored copy holds all but the last `num_kept`."""
        self._last = self._last[len(self._last) - num_kept :]

    def restart(self) -> None:
        """The weights were replaced: counts from 0 again."""
        self.version = 0
        self._last.clear()
        self._programs.clear()

    def program(self, version: int, emissions: tuple[Emission, ...]) -> Program:
        """What a visit of a unit at `version` does, encoded once for all units."""
        key = version, self.version, emissions
        if key not in self._programs:
            if len(self._programs) >= MAX_PROGRAMS:
                self._programs.clear()
            emits = [Emit(e.terms, self.perturb_scales) for e in emissions]
            self._programs[key] = encode_program(self.missed_at(version), emits, len(self.perturb_scales))
        return self._programs[key]

    def table(self, unit: Unit) -> SegmentTable | None:
        """The segments of the unit that updates and perturbations reach; None if there are none."""
        if unit.index not in self._tables:
            segments = [
                Segment(p.byte_offset, p.numel, p.dtype, p.index, 0, self.group_of[p.index], *p.matrix_shape)
                for p in unit.params
                if p.index in self.group_of and p.numel
            ]
            self._tables[unit.index] = SegmentTable(segments) if segments else None
        return self._tables[unit.index]

    def slice_table(self, part: Slice) -> tuple[SegmentTable | None, bool]:
        """As `table`, of the part of the unit that is in the slice; and whether nothing else is in it."""
        if part.index not in self._slice_tables:
            segments, is_whole = [], True
            for p in part.unit.params:
                begin = max(p.byte_offset, part.begin)
                end = min(p.byte_offset + p.num_bytes, part.begin + part.num_bytes)
                if begin >= end:
                    continue
                group = self.group_of.get(p.index)
                is_whole &= group is not None
                if group is not None:
                    numel, first = (end - begin) // p.dtype.itemsize, (begin - p.byte_offset) // p.dtype.itemsize
                    segments.append(Segment(begin - part.begin, numel, p.dtype, p.index, first, group, *p.matrix_shape))
            self._slice_tables[part.index] = SegmentTable(segments) if segments else None, is_whole
        return self._slice_tables[part.index]
