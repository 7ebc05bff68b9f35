"""Weights from outside of a pass: read, written, replaced and brought up to date, one unit at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import Unit
from distzo2_core import checksum


class WeightAccess(UnitWeights):
    """See the module. Not possible in the middle of a pass."""

    def trained_units(self) -> list[Unit]:
        """The units that updates reach."""
        return [unit for unit in self.units if self._updates.table(unit) is not None]

    def touch(self, unit: Unit) -> None:
        """Brings one unit up to date and lets go of it, as a pass that enters it does."""
        self._check_idle("reading weights")
        self._bring(unit)
        try:
            self._materialize(self._present[unit.index], (), ())
        finally:
            self._release(unit)

    def set_version(self, unit: Unit, version: int) -> None:
        """What was written last, with `writing`, holds so many updates; those after it are still to come."""
        unit.version = version
        if (part := self._slice_of(unit)) is not None:
            part.version = version

    def visit(self) -> Iterator[tuple[Unit, list[torch.Tensor]]]:
        """Every unit in turn with its parameters on the compute device, every update made so far in them. Each is read
        once, and written back if it had missed any."""
        self._check_idle("visiting the weights")
        for unit in self.units:
            self._bring(unit)
            try:
                present = self._present[unit.index]
                self._materialize(present, (), ())
                yield unit, present.views
            finally:
                self._release(unit)

    @contextmanager
    def reading(self, unit: Unit) -> Iterator[dict[str, torch.Tensor]]:
        """The unit's parameters in host memory, by name, with every update made so far. They must not be changed."""
        self._check_idle("reading weights")
        if self._slice_of(unit) is None:
            self._catch_up(unit)
            opened = self._store(unit).open(unit, write=False)
        else:  # whoever reads one unit is likely to read the next ones
            following = [u for u in self.units[unit.index + 1 :] if u.block >= 0]
            opened = self._ring.open(unit, write=False, following=following)
        with opened as buffer:
            yield {p.name: view for p, view in zip(unit.params, unit.views(buffer), strict=True)}

    @contextmanager
    def replacing(
        self, what: str, *, error: BaseException | None = None, source: Callable[[], Any] | None = None
    ) -> Iterator[Callable[[str, Sequence[torch.Tensor]], None]]:
        """Around all that replaces weights from outside. With slices all ranks enter and leave it together, so that
        none gathers a block that is half replaced, and what they write must be the same, since later a difference could
        not be seen.

        Args:
            what: the name of it, in words.
            error: this rank cannot enter; no rank does then.
            source: what it returns must be the same, where each rank writes its slices only.

        Yields:
            A function to be called with the name and the tensors of what is written; they are compared.
        """
        if self._exchange is None:
            if error is not None:
                raise error
            yield lambda name, tensors: None
            return
        fields: dict[str, Any] = {}
        try:
            if source is not None and error is None:
                fields["the source"] = source()
        except Exception as not_readable:
            error = not_readable
        self._exchange.agree(what, {} if error is not None else fields, error=error)
        written: list[tuple[str, int]] = []
        with self._all_ranks(f"{what}: the end") as agreed:
            yield lambda name, tensors: written.append((name, checksum([t.contiguous() for t in tensors])))
            agreed["the weights"] = written
        if self._ring is not None:
            self._ring.forget()

    @contextmanager
    def writing(self, unit: Unit, keep: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """The unit's parameters in host memory, by name, to be filled; they become the stored copy at the end.

        All of them must be filled; with `keep`, they hold their up-to-date values at first (of a unit in slices, those
        of this rank's slice).
        """
        self._check_idle("writing weights")
        if keep:
            self._catch_up(unit)
        unit.version = self.version
        self._scratch.forget()
        with self._store(unit).open(unit, write=True, keep=keep) as buffer:
            yield {p.name: view for p, view in zip(unit.params, unit.views(buffer), strict=True)}

    def kept_elements(self, unit: Unit) -> dict[str, range]:
        """Which elements of each parameter `writing` keeps on this rank: all, unless the unit is in slices."""
        part, result = self._slice_of(unit), {}
        for p in unit.params:
            result[p.name] = range(p.numel)
            if part is not None:
                begin, end = part.begin - p.byte_offset, part.begin + part.num_bytes - p.byte_offset
                item = p.dtype.itemsize
                result[p.name] = range(min(max(begin, 0), p.num_bytes) // item, min(max(end, 0), p.num_bytes) // item)
        return result

    def fills_in_place(self, unit: Unit) -> bool:
        """Whether `writing` a unit is writing its stored copy, so that several may be open at no cost in memory."""
        return self._store(unit).in_host_memory

    def rebase(self) -> None:
        """The weights were replaced from outside: the updates of before no longer lead to them."""
        self.flush()
        self._updates.restart()
        for unit in self.units:
            unit.version = 0
            if (part := self._slice_of(unit)) is not None:
                part.version = 0
        if self._ring is not None:
            self._ring.forget()
        self._scratch.forget()
        self.epoch += 1
