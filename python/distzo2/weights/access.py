"""Weights from outside of a pass: read, written, replaced and brought up to date, one unit at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import Unit
from distzo2_core import checksum


class Together(Protocol):
    """How the ranks that share blocks agree on what they do to them."""

    def agree(self, what: str, fields: dict[str, Any], *, error: BaseException | None = None) -> Any:
        """Begins something that all ranks do; `fields` must be equal on all of them. `error` is raised on all."""

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        """Something that all ranks do; an exception of one is an error of all at its end, and so are entries of the
        dict that differ."""


class WeightAccess:
    """Reads and replaces `weights`, those of one model. Not possible in the middle of a pass."""

    def __init__(self, weights: UnitWeights, together: Together | None = None) -> None:
        """`together` is given where ranks share blocks, each keeping a slice."""
        self.weights, self._together = weights, together
        self.before_replacing: Callable[[], None] = lambda: None

    # ---- reading ----------------------------------------------------------------------------------------------------

    def trained_units(self) -> list[Unit]:
        """Returns the units that updates reach."""
        return [unit for unit in self.weights.units if self.weights.reaches(unit)]

    def touch(self, unit: Unit) -> None:
        """Brings one unit up to date and lets go of it, as a pass that enters it does."""
        self.weights.check_idle("reading weights")
        self.weights.bring(unit)
        try:
            self.weights.up_to_date(unit)
        finally:
            self.weights.release(unit)

    def visit(self) -> Iterator[tuple[Unit, list[torch.Tensor]]]:
        """Yields every unit with its up-to-date parameters on the compute device. Each unit is read once, and written
        back if it had missed an update."""
        self.weights.check_idle("visiting the weights")
        for unit in self.weights.units:
            self.weights.bring(unit)
            try:
                yield unit, self.weights.up_to_date(unit)
            finally:
                self.weights.release(unit)

    @contextmanager
    def reading(self, unit: Unit) -> Iterator[dict[str, torch.Tensor]]:
        """Gives a unit's up-to-date parameters in host memory, by name. They must not be changed."""
        self.weights.check_idle("reading weights")
        copy = self.weights.copies[unit.index]
        store = self.weights.store_of(copy)
        if not store.gathers:
            self.weights.catch_up_stored(copy)
        with store.open(copy, write=False) as buffer:
            yield {p.name: view for p, view in zip(unit.params, unit.views(buffer), strict=True)}

    # ---- replacing --------------------------------------------------------------------------------------------------

    @contextmanager
    def replacing(
        self, what: str, *, error: BaseException | None = None, source: Callable[[], Any] | None = None
    ) -> Iterator[Callable[[str, Sequence[torch.Tensor]], None]]:
        """Surrounds all that replaces weights. With slices all ranks enter and leave it together, so that none gathers
        a block that is half replaced, and all must write the same, since a difference could not be seen later.

        Args:
            what: its name, for messages.
            error: why this rank cannot enter; then no rank does.
            source: its result must be the same on all ranks, where each reads and writes its own slices only.

        Yields:
            A function to be called with the name and the tensors of what is written; they are compared.
        """
        if error is None and source is None:  # a `source` fills what was handed over empty
            self.before_replacing()
        if self._together is None:
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
        self._together.agree(what, {} if error is not None else fields, error=error)
        written: list[tuple[str, int]] = []
        with self._together.together(f"{what}: the end") as agreed:
            yield lambda name, tensors: written.append((name, checksum(tensors)))
            agreed["the weights"] = written
        self.weights.forget_derived()

    @contextmanager
    def writing(self, unit: Unit, keep: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Gives a unit's parameters in host memory, by name, to be filled; they become the stored copy at the end.

        All of them must be filled, unless `keep` is set: then they hold their up-to-date values at first (of a unit in
        slices, those of this rank's slice).
        """
        self.weights.check_idle("writing weights")
        copy = self.weights.copies[unit.index]
        if keep:
            self.weights.catch_up_stored(copy)
        self.weights.forget_derived()
        with self.weights.store_of(copy).open(copy, write=True, keep=keep) as buffer:
            yield {p.name: view for p, view in zip(unit.params, unit.views(buffer), strict=True)}
        copy.version = self.weights.version

    def set_version(self, unit: Unit, version: int) -> None:
        """Says how many updates the copy holds that was written last; those after it are still to come."""
        self.weights.copies[unit.index].version = version

    def kept_elements(self, unit: Unit) -> dict[str, range]:
        """Returns which elements of each parameter `writing` keeps on this rank: all, unless the unit is in slices."""
        copy = self.weights.copies[unit.index]
        return {p.name: copy.elements_of(p) for p in unit.params}

    def fills_in_place(self, unit: Unit) -> bool:
        """Whether `writing` gives the stored copy itself, so that several may be open at no cost in memory."""
        return self.weights.store_of(self.weights.copies[unit.index]).in_host_memory

    def rebase(self) -> None:
        """Makes the weights, which were replaced, the base of the updates that follow."""
        self.weights.restart()
