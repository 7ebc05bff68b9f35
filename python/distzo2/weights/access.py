"""Weights outside of a pass: read, written, replaced and brought up to date, one unit at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from distzo2.interrupts import DeferredInterrupt
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import Unit
from distzo2_core import checksum


class Together(Protocol):
    """How the ranks that share blocks agree on what they do to them."""

    def agree(self, what: str, fields: dict[str, Any], *, error: BaseException | None = None) -> Any:
        """Raises on all ranks if `fields` differ between them, or if one has an `error`."""

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        """Surrounds what all ranks do. At its end all raise if one did, or if entries of the dict differ."""


class WeightAccess:
    """Reads and replaces the weights of one model. Every method raises DistZO2Error in the middle of a pass."""

    def __init__(self, weights: UnitWeights, together: Together | None = None) -> None:
        """`together` is given where ranks share blocks, each keeping a slice."""
        self.weights, self._together = weights, together
        self.before_replacing: Callable[[], None] = lambda: None

    # ---- reading ----------------------------------------------------------------------------------------------------

    def touch(self, unit: Unit) -> None:
        """Brings one unit up to date and lets go of it, as a pass that enters it does."""
        for _ in self.visit([unit]):
            pass

    def visit(self, units: Sequence[Unit] | None = None) -> Iterator[tuple[Unit, list[torch.Tensor]]]:
        """Yields each of `units` (None: of all) with its up-to-date parameters on the compute device. Each unit is read
        once, and written back if it had missed an update."""
        self.weights.check_idle("visiting the weights")
        for unit in self.weights.units if units is None else units:
            self.weights.bring(unit)
            try:
                with DeferredInterrupt():  # never between an update and the note that it was made
                    views = self.weights.up_to_date(unit)
                yield unit, views
            finally:
                self.weights.release(unit)

    @contextmanager
    def reading(self, unit: Unit) -> Iterator[dict[str, torch.Tensor]]:
        """Yields a unit's up-to-date parameters in host memory, by name, as modules declare them, with their gains
        applied. They must not be changed."""
        self.weights.check_idle("reading weights")
        copy = self.weights.copies[unit.index]
        store = self.weights.store_of(copy)
        if not store.gathers:
            self.weights.catch_up_stored(copy)
        with (
            self.reading(unit.beside) if unit.has_gains else nullcontext({}) as gains,
            store.open(copy, write=False) as buffer,
        ):
            own = zip(unit.params, unit.views(buffer), strict=True)
            yield {p.name: p.value(view, gains=gains.get(p.gain.name) if p.gain else None) for p, view in own}

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
        if error is None and source is None:  # a `source` fills weights that were handed over on meta
            self.before_replacing()
        if self._together is None:
            if error is not None:
                raise error
            yield lambda name, tensors: None
            return
        fields: dict[str, Any] = {}
        if source is not None and error is None:
            try:
                fields["the source"] = source()
            except Exception as not_readable:
                error = not_readable
        self._together.agree(what, fields, error=error)
        written: list[tuple[str, int]] = []
        with self._together.together(f"{what}: the end") as agreed:
            yield lambda name, tensors: written.append((name, checksum(tensors)))
            agreed["the weights"] = written
        self.weights.forget_derived()

    @contextmanager
    def writing(self, unit: Unit, keep: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Yields a unit's parameters in host memory, by name, to be filled; they become the stored copy at the end.

        All of them must be filled, unless `keep` is set: then they hold their up-to-date values at first (of a unit in
        slices, those of this rank's slice). Of those that are packed the bytes are yielded. What is written is the
        start that an anchor pulls to, where that is kept.
        """
        self.weights.check_idle("writing weights")
        copy = self.weights.copies[unit.index]
        if keep:
            self.weights.catch_up_stored(copy)
        self.weights.forget_derived()
        with self.weights.store_of(copy).open(copy, write=True, keep=keep) as buffer:
            yield {p.name: view for p, view in zip(unit.params, unit.views(buffer), strict=True)}
            if not self.weights.store_of(copy).gathers:
                copy.take_start(buffer)
        copy.version = self.weights.version

    def is_replaceable(self, unit: Unit) -> bool:
        """Whether a unit can hold other values than it was given: it is not packed, and not in files of others."""
        return not (self.weights.copies[unit.index].is_fixed or unit.is_encoded)

    def holds(self, unit: Unit, values: Mapping[str, torch.Tensor]) -> bool:
        """Whether some parameters of a unit have these values, bit for bit."""
        with self.reading(unit) as views:
            for name, value in values.items():
                before, after = (t.reshape(-1).view(torch.uint8) for t in (views[name], value))
                if not torch.equal(before, after):
                    return False
        return True

    def kept_elements(self, unit: Unit) -> dict[str, list[range]]:
        """Returns which elements of each parameter (bytes, where it is packed) `writing` keeps on this rank: all,
        unless the unit is in slices."""
        copy = self.weights.copies[unit.index]
        return {p.name: copy.kept_of(p) for p in unit.params}

    def fills_in_place(self, unit: Unit) -> bool:
        """Whether `writing` yields the stored copy itself, so that several units may be open at no cost in memory."""
        return self.weights.store_of(self.weights.copies[unit.index]).in_host_memory
