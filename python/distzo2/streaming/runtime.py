"""One pass over the weights: units are made present in turn, and every lane runs on each as it passes.

The life of a lane: `run` starts its closure in a thread. Where the forward comes to a unit, a hook calls `enter`,
which parks the lane. When all lanes are parked at that unit, `_schedule` brings it; for each lane in turn `_turn`
points the parameters at the lane's perturbed copy and resumes it. The hook returns, the unit's forward computes, and at
its end a hook calls `exit`, which hides the parameters. The lane runs on to the next unit, and so to its loss.

Outside a pass the model is just a model: a forward streams one lane, with clean weights, in the caller's thread.
Parameters whose window is not open are placeholders.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Collection, Generator, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.interrupts import DeferredInterrupt
from distzo2.record.weight_file import KeptWeights
from distzo2.streaming.hooks import Windows, in_generate
from distzo2.streaming.isolation import BufferGuard, CacheSwitch, CallerState, RandomStream, ScheduleState, switches
from distzo2.streaming.lane_check import LANE_ALONE, check_alike, code_of
from distzo2.streaming.lanes import Lane, LaneGroup, Route, check_routes, line_of_control
from distzo2.streaming.presence import Parameters
from distzo2.weights.access import WeightAccess
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import HALVES, ParamInfo, Unit, dtypes_to_compute_in
from distzo2.weights.updates import CLEAN, Emission
from distzo2_core import walk_modules

MAX_WATCHED = 256  # closures' code that is remembered


class _Pointed(NamedTuple):
    """What an open unit's parameters show."""

    emission: Emission
    address: int  # of the scratch buffer; 0: none
    copied: bool  # the forward cannot reach what is stored


def _longest(lanes: Sequence[Lane]) -> Lane:
    """The first of the lanes that have entered the most units."""
    return max(lanes, key=lambda lane: len(lane.route.units))


class StreamingRuntime:
    """The passes over the weights of one model. Made by `distzo2.offload`.

    Attributes:
        model: the model that was handed over.
        weights: its units, where they are stored, and their updates.
        access: reads and replaces its weights outside of a pass.
        where: where streamed weights live: "device", "host" or "disk".
        kept: the weight file, which outlives a crash; None without one.
        compute_dtype: what modules compute with; None: as stored.
        told: what is to be known of how they were stored, a line.
        base: what the weights were loaded from, for a journal's header; None if it is not known. Set by whoever loads
            them.
    """

    def __init__(
        self, model: nn.Module, weights: UnitWeights, access: WeightAccess, where: str, kept: KeptWeights | None = None
    ) -> None:
        self.model, self.weights, self.access, self.where, self.kept = model, weights, access, where, kept
        self.base: Any = None
        self.told = ""
        self.compute_dtype: torch.dtype | None = None
        # Buffers of 16 bits, which have the dtype that modules compute with.
        self.stored_buffers = {name: b.dtype for name, b in model.named_buffers() if b.dtype in HALVES}
        self.units, self.params, self.device = weights.units, weights.params, weights.device
        self.trace = weights.trace
        self.stats, self.reset_stats = weights.stats, weights.reset_stats
        self._lanes = LaneGroup()
        self._buffers = BufferGuard()
        self._caches = CacheSwitch()
        self.parameters = Parameters(self.units, self.device, self)
        self._names = {module: name for name, module in model.named_modules()}
        # Parameters of the root itself may be used in any of its methods, so each lane has them open throughout.
        self._root_units = [u for u in self.units if u.resident and any(window is model for window in u.windows)]
        self.unit_of = {p.index: u for u in self.units for p in u.params}
        inside = [{m for w in u.windows for m in w.modules()} - set(u.windows) for u in self.units]
        # Units in whose windows others open, or that are entered several times in a row: their slots are wanted again.
        self._wanted_again = {
            i for i, modules in enumerate(inside) if any(w in modules for u in self.units for w in u.windows)
        }
        self._pointed: dict[int, _Pointed] = {}  # by the index of the open unit
        self._emissions: list[Emission] = []  # of the pass that runs
        self._state: ScheduleState | None = None
        self._since = 0  # when the running lane began, or went on
        self._computing = ""  # the unit that it is in
        self._switches: tuple[Any, ...] = ()  # of the caller
        self._switching = False  # a lane has been seen to change them
        self._in_pass = False
        self._outside: list[Unit] = []  # windows that ordinary forwards, outside a pass, have open
        self._outside_line: int | None = None  # of control, that opened them
        self._presenting = 0  # how many `presenting` of these are entered
        self._presented: set[int] = set()  # units that such code has seen
        self._interrupt = DeferredInterrupt()
        self._watched: set[Hashable] = set()  # code of closures whose lanes are known not to see each other
        self._entered: set[int] = set()  # units that an ordinary forward has entered
        self._parks_always = False
        self._summed = False  # every change of weights is looked for, and not only those that torch counts
        self._take_over()
        self._windows = Windows(model, self.units, self)
        weights.before_check = self._drop_stale_windows

    def _take_over(self) -> None:
        """Moves the model's weights to where they are to live, unit by unit, freeing as it goes."""
        with self.access.replacing("handing over a model's weights") as note:
            for unit in self.units:
                present = [p for p in unit.params if not p.tensor.is_meta]  # the others are to be filled from outside
                if present and not self.is_filled(unit):
                    with self.access.writing(unit, keep=len(present) < len(unit.params)) as views:
                        for param in present:
                            views[param.name].copy_(param.tensor.detach())
                if present:  # filled or not: the ranks compare what they were given
                    note(unit.name, [param.tensor.detach() for param in present])
                self.parameters.take_over(unit)

    def is_filled(self, unit: Unit) -> bool:
        """Whether files gave the unit's weights, so that nothing else may fill it."""
        given = self.kept is not None and unit.index in self.kept.versions
        return given or self.weights.copies[unit.index].is_fixed

    # ---- passes -------------------------------------------------------------------------------------------------

    def run(
        self,
        lanes: Sequence[Lane],
        *,
        expected: Route | None = None,
        interrupt: DeferredInterrupt | None = None,
        check: bool = False,
    ) -> Route:
        """Runs every lane to its end in one pass over the weights, or in several where they generate.

        The first time that lanes of some code share a pass, the first and the last of them run once more, each alone,
        and must have the same results: lanes may see each other through state that is not swapped.

        Args:
            lanes: lanes of the same emission should stand next to each other.
            expected: the route of lanes that ran before: these enter the same units, but may make fewer or more passes.
            interrupt: asked between units, the only points where Ctrl-C ends a pass.
            check: runs lanes alone in any case.

        Returns:
            The route of a lane that entered the most units.

        Raises:
            DistZO2Error: lanes entered different units, or none, or saw each other, or wrote weights. What a lane
                raises comes as it was raised.
        """
        codes = {code_of(lane.closure) for lane in lanes}
        new = not codes <= self._watched and len(self._watched) < MAX_WATCHED and not self._windows.has_compiled()
        starts = [copy.copy(lane.stream) for lane in lanes] if new or check else []

        def alone(i: int) -> Any:
            lane = lanes[i]
            place = lane.place and dataclasses.replace(lane.place, first=False)
            again = Lane(lane.emission, lane.batch, lane.closure, copy.copy(starts[i]), place)
            self._pass([again], None, interrupt)
            return again.result

        self._summed, self._parks_always = new, new or check
        try:
            self._pass(lanes, expected, interrupt)
        except Exception as error:  # shapes or dtypes that do not fit, for example
            failed = next((i for i, lane in enumerate(lanes) if lane.error is error), None)
            if failed is not None and isinstance(error, RuntimeError) and new and len(lanes) > 1:
                with suppress(Exception):
                    alone(failed)
                    error.add_note(f"distzo2: {LANE_ALONE}")
            if failed is not None and self.compute_dtype is not None and not isinstance(error, DistZO2Error):
                self._note_dtypes(error)
            raise
        finally:
            self._summed = self._parks_always = False
        if (new or check) and len(lanes) > 1:
            check_alike(self.model, lanes, alone)
        self._watched |= codes if new else set()
        for lane in lanes:
            lane.attributes.swap_in()  # the model has what a plain loop would have left
        lanes[-1].switches.swap_in()
        return _longest(lanes).route

    def _note_dtypes(self, error: Exception) -> None:
        """Adds a note to what a lane raised, if that, or the line that raised it, is about dtypes."""
        text = f"{error} {traceback.extract_tb(error.__traceback__)[-1].line}"
        if not any(word in text for word in ("dtype", "scalar type")):
            return
        modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [name for m in modules if isinstance(m, nn.Module) and (name := self.name_of(m))]
        error.add_note(
            f"distzo2: in {names[-1] if names else 'the model'}, which computes in {self.compute_dtype} and is stored "
            "in other dtypes: compute_dtype=None (--compute-dtype stored) computes in these"
        )

    def _pass(self, lanes: Sequence[Lane], expected: Route | None, interrupt: DeferredInterrupt | None) -> None:
        self.weights.check_idle("a pass")
        self._windows.check_not_compiled_whole()
        interrupt = interrupt or self._interrupt
        callers = [CallerState(self.device) for _ in lanes]
        slots, configs, training = walk_modules(self.model)
        # The caller's modes are for the lanes. Tensors made in inference mode could not be changed outside of it.
        with interrupt, torch._C.DisableTorchFunction(), torch.inference_mode(False), self._caches.off(configs):
            caller = RandomStream(self.device)
            self._switches = switches()
            self._emissions = list(dict.fromkeys(lane.emission for lane in lanes))
            self._state = ScheduleState(self.device)
            self.weights.busy = self._in_pass = True
            try:
                self._buffers.begin(slots, training)
                self._lanes.run(lanes, callers, self._schedule(lanes, interrupt), self._state)
                self._check_sequence(lanes, expected)
                self._close_windows(lanes)
                self.weights.end_pass()
            except BaseException:
                self._lanes.unwind(lanes)
                with suppress(Exception):  # the first exception is the one to be seen
                    self._close_windows(lanes)
                raise
            finally:
                self._buffers.end()
                caller.restore()
                self._state = None
                self.weights.busy = self._in_pass = self.weights.repeats = False

    def _schedule(self, lanes: Sequence[Lane], interrupt: DeferredInterrupt) -> Generator[Lane | None]:
        """The order of a pass, as `LaneGroup.run` takes it. It turns at each unit, so that the lane which came last to
        its end is the first at the next one, and goes on in the thread that it is in."""
        in_order = list(lanes)
        for unit in self._root_units:
            self.weights.bring(unit)
        for lane in in_order:
            lane.windows, lane.route.units = self._root_units[:], self._root_units[:]
            yield from self._turn(lane)
        agreed, last = 0, None
        while (unit := self._agreed_unit(lanes, agreed)) is not None:
            if any(lane.done for lane in lanes):
                lanes = [lane for lane in lanes if not lane.done]
                in_order = [lane for lane in in_order if not lane.done]
                self._emissions = list(dict.fromkeys(lane.emission for lane in lanes))
            agreed = len(lanes[0].route.units)
            if unit is last:  # several windows, or a block that is called again: its slot would come right back
                self._wanted_again.add(unit.index)
            last = unit
            if interrupt.pending or self.weights.ring.gathers:
                yield None  # on in the caller's thread: it alone is interrupted, and answers other ranks
            interrupt.check()
            self.weights.release_all_but({unit.index, *(u.index for lane in lanes for u in lane.windows)})
            self.weights.bring(unit)
            in_order.reverse()
            for i, lane in enumerate(in_order):
                if i and self.weights.ring.gathers:
                    yield None
                if not i or lane.emission != in_order[i - 1].emission:
                    to_come = list(dict.fromkeys(other.emission for other in in_order[i:]))
                yield from self._turn(lane, to_come)

    def _turn(self, lane: Lane, to_come: Sequence[Emission] = ()) -> Generator[Lane]:
        """Lets one lane run to its next unit or its end, with what is its own swapped in and out. Only the emissions
        `to_come`, the lane's among them, are still wanted of the unit that it enters."""
        self._show(lane, lane.request)
        if lane.request is not None and lane.request.index not in self._wanted_again:
            self.weights.release_early(lane.request, to_come)
        lane.stream.restore()
        lane.switches.swap_in()
        self._caches.allow(lane.generates)
        self._buffers.swap_in(lane.changed_buffers)
        lane.attributes.swap_in()  # its own buffers take the place of the model's
        lane.ahead = 0
        self._since = time.perf_counter_ns()
        try:
            yield lane
        finally:
            self._note_compute()
            if self.device.type == "cuda":
                torch._C._cuda_clearCublasWorkspaces()  # each thread has its own, of 32 MiB: they share memory in turn
            if self._summed or self._switching:
                self._switching |= lane.switches.swap_out(self._switches)
            lane.attributes.swap_out()
            self._buffers.swap_out(lane.changed_buffers)
        if lane.error is not None:
            raise lane.error
        lane.stream.capture()
        self.weights.ring.poll()

    def _go_on(self, lane: Lane, unit: Unit) -> None:
        """Lets the running lane enter a unit in place, without giving its turn on."""
        lane.ahead += 1
        with self._state:
            self._note_compute()
            self.weights.bring(unit)
            self._show(lane, unit)
        self._since = time.perf_counter_ns()

    def _show(self, lane: Lane, entering: Unit | None) -> None:
        """Points the parameters of the lane's open windows, and of the unit that it enters, and hides all others."""
        wanted = lane.windows if entering is None else [*lane.windows, entering]
        for index in [i for i in self._pointed if all(u.index != i for u in wanted)]:
            self._hide(self.units[index])
        for unit in wanted:
            self._point(unit, lane.emission, wanted, self._summed)
        self._computing = wanted[-1].name if wanted else "(start)"

    def _note_compute(self) -> None:
        self.trace.add("compute", self._computing, self._since, time.perf_counter_ns())

    def _close_windows(self, lanes: Sequence[Lane]) -> None:
        """Hides and releases every unit; raises the first error of `_hide` when all that is done."""
        for lane in lanes:
            lane.windows.clear()
        with ExitStack() as ends:
            ends.callback(self.weights.release_all_but)
            for index in self._pointed:
                ends.callback(self._hide, self.units[index])

    # ---- the order of units -------------------------------------------------------------------------------------

    def _agreed_unit(self, lanes: Sequence[Lane], agreed: int) -> Unit | None:
        """Returns the unit at which every lane stands that has not ended; None when all have. They are known to have
        entered the same first `agreed` units."""
        longest = _longest(lanes)
        for lane in lanes:
            if lane is not longest:
                check_routes(longest.route, lane.route, lane.batch, agreed)
        return next((lane.request for lane in lanes if not lane.done), None)

    def _check_sequence(self, lanes: Sequence[Lane], expected: Route | None) -> None:
        if not all(lane.entered for lane in lanes):
            raise DistZO2Error(
                "the closure ended without entering any unit of the model, so no perturbation reached it: is the "
                "model that it calls the one that was handed over? (Whole-model torch.compile and CUDA graphs skip "
                "the hooks; compile blocks with block.compile() instead.)"
            )
        longest = _longest(lanes)
        for lane in lanes:
            if len(lane.route.units) < len(longest.route.units):  # when it ended, the others had not
                check_routes(longest.route, lane.route, lane.batch)
        if expected is not None:
            check_routes(expected, longest.route, longest.batch)

    # ---- entering and leaving a window (from the hooks: in the running lane, or in the caller's thread) -----------

    def begin(self, module: nn.Module) -> None:
        """The forward of a module begins that is, or holds, a window of a unit."""
        lane = self._lanes.running
        if lane is None:
            return
        if not lane.depth:
            lane.route.calls.append((module, len(lane.route.units)))
            lane.generates = self.weights.repeats = in_generate()
            self._caches.allow(lane.generates)
        lane.depth += 1

    def end(self) -> None:
        """Such a forward has ended, or has failed."""
        if (lane := self._lanes.running) is not None:
            lane.depth -= 1

    def enter(self, unit: Unit) -> None:
        """The forward of one of the unit's windows begins."""
        if torch._C._get_tracing_state() is not None:
            raise DistZO2Error(
                "a model that was handed over cannot be traced: a trace would keep weights of one moment"
            )
        lane = self._lanes.running
        if lane is None:
            self._enter_outside(unit)
            return
        lane.entered = True
        if unit not in lane.windows:
            if threading.current_thread() is not lane.thread:
                raise DistZO2Error(f"unit {unit.name} was entered from a thread that is not a lane of this pass")
            lane.route.units.append(unit)
            if lane.ahead < self._most_ahead(unit):
                self._go_on(lane, unit)
            else:
                lane.park(unit)
        lane.windows.append(unit)

    def _most_ahead(self, unit: Unit) -> int:
        """How many units a lane may enter one after another while the others wait: as many as have room in scratch for
        the perturbed copies of all lanes, so that each is still made once. A unit that streams is a place to wait, and
        so is every unit where it is to be seen whether lanes see each other."""
        return 0 if self._parks_always else self.weights.room_ahead(unit, len(self._emissions))

    def exit(self, unit: Unit) -> None:
        """The forward of one of the unit's windows has ended, or has failed."""
        lane = self._lanes.running
        windows = self._outside if lane is None else lane.windows
        if unit not in windows:
            return  # its entry failed
        del windows[len(windows) - 1 - windows[::-1].index(unit)]
        if unit in windows:
            return
        try:
            if unit.index in self._pointed:  # else its weights could not be shown
                self._hide(unit)
        finally:
            if lane is None:
                with self._interrupt:
                    self.weights.release(unit)
                self.weights.busy = bool(self._outside)

    def _enter_outside(self, unit: Unit) -> None:
        """Enters a window of an ordinary forward, in the caller's thread."""
        line = line_of_control()
        if self._in_pass:
            raise DistZO2Error(f"unit {unit.name} was entered from a thread that is not a lane of the pass under way")
        if self._outside:
            self._drop_stale_windows()
        if not self._outside:
            self.weights.check_idle("a forward")
            self._outside_line = line
        elif line != self._outside_line:
            raise DistZO2Error("another thread is in the middle of a forward of this model")
        with self._interrupt, torch._C.DisableTorchFunction(), torch.inference_mode(False):
            self.weights.bring(unit)
            self.weights.busy = True
            self._outside.append(unit)
            self._point(unit, CLEAN, self._outside, unit.index not in self._entered)
            self._entered.add(unit.index)

    @contextmanager
    def presenting(self, units: Sequence[Unit]) -> Iterator[None]:
        """Opens a window of each of `units` in the lane, or in the thread outside of a pass, that calls.

        Raises:
            DistZO2Error: more of them stream than the device has slots.
        """
        ring, num_streamed = self.weights.ring, sum(self.weights.copies[u.index].streams for u in units)
        if ring.slot_bytes and num_streamed > ring.num_slots and not ring.gathers:
            raise DistZO2Error(
                f"{num_streamed} blocks that stream would be present at once, and the device has {ring.num_slots} "
                f"slots: name a smaller part, or hand the model over with slots={num_streamed + 1}"
            )
        outside = self._lanes.running is None
        self._presenting += outside
        try:
            with ExitStack() as windows:
                for unit in units:
                    if outside and unit.index not in self._presented:  # new code: watched as a first forward is
                        self._entered.discard(unit.index)
                        self._presented.add(unit.index)
                    self.enter(unit)
                    windows.callback(self.exit, unit)
                yield
        finally:
            self._presenting -= outside

    def _drop_stale_windows(self) -> None:
        """Closes, at the next use, windows that Ctrl-C left open: it ends a forward without torch calling the hooks."""
        if not self._outside or self._presenting or self._windows.has_compiled():
            return
        if threading.get_ident() != self._outside_line:  # nor in a lane, which is never interrupted
            return
        running, frame = set(), sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "_call_impl":
                running.add(id(frame.f_locals.get("self")))
            frame = frame.f_back
        if any(id(module) in running for unit in self._outside for module in unit.windows):
            return
        self._outside.clear()
        self.weights.busy = False
        self._close_windows(())

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Lets modules compute in another dtype than what is stored; None: in that. Their parameters are copies in it,
        made at each visit, and buffers of 16 bits follow.

        Raises:
            DistZO2Error: a pass or a forward is under way.
        """
        self.weights.compute_in(dtypes_to_compute_in(self.params, dtype))
        for unit in self.units:
            self.parameters.compute_anew(unit)
        self.compute_dtype = dtype if any(unit.converts for unit in self.units) else None
        self.cast_buffers(dtype)

    def cast_buffers(self, dtype: torch.dtype | None) -> None:
        """Gives buffers that have 16 bits another dtype; None: their own."""
        for name, stored in self.stored_buffers.items():
            owner, _, key = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if (buffer := module._buffers.get(key)) is not None:
                module._buffers[key] = buffer.to(dtype or stored)

    @contextmanager
    def editing(self) -> Iterator[None]:
        """While entered, no forward and no pass may run."""
        self.weights.check_idle("editing")
        self.weights.busy = True
        try:
            yield
        finally:
            self.weights.busy = False

    # ---- pointing parameters ----------------------------------------------------------------------------------------

    def _point(self, unit: Unit, emission: Emission, open_units: Sequence[Unit], summed: bool) -> None:
        """Shows a unit's weights as `emission` has them. With `summed`, clean ones are shown as copies, so that a
        forward that writes them, which `_hide` then finds, does not reach what is stored."""
        pointed = self._pointed.get(unit.index)
        if pointed is not None and pointed.emission == emission:
            return
        if pointed is not None:
            self._hide(unit)
        pinned: Collection[int] = ()
        if len(open_units) > 1:
            pinned = {self._pointed[u.index].address for u in open_units if u is not unit and u.index in self._pointed}
        views, address = self.weights.under(unit, emission, self._emissions, pinned)
        # What is decoded is made anew at each visit: a lane that changed it would differ from one that runs alone.
        summed = summed and unit.packed is None
        copied = summed and not address
        self.parameters.show(unit, [view.clone() for view in views] if copied else views, summed=summed)
        self._pointed[unit.index] = _Pointed(emission, address, copied)

    def _hide(self, unit: Unit) -> None:
        """
        Raises:
            DistZO2Error: the forward wrote weights.
        """
        pointed = self._pointed.pop(unit.index)
        written = self.parameters.hide(unit)
        if not written:
            return
        self.weights.forget_derived()  # perturbed copies that were written
        names = ", ".join(param.name for param in written[:3])
        owner = type(written[0].owners[0]).__name__
        lost = not pointed.address and not pointed.copied
        raise DistZO2Error(
            f"a forward wrote {names} ({owner}) in place; weights may change by the optimizer's steps and inside "
            "distzo2.edit(model) only" + ("; the stored weights are damaged: load them again" if lost else "")
        )

    def value_of(self, param: ParamInfo) -> torch.Tensor | None:
        """The up-to-date weights of a parameter of the root module, which its methods may read at any time."""
        if not any(user is self.model for user in param.users) or self._in_pass or self.weights.closed:
            return None
        unit = self.unit_of[param.index]
        present = unit.index in self._pointed
        with torch._C.DisableTorchFunction(), torch.inference_mode(False):
            self.weights.bring(unit)
            value = param.value(self.weights.up_to_date(unit)[unit.params.index(param)], param.seen).clone()
            if not present:
                self.weights.release(unit)
        return value

    def set_requires_grad(self, param: ParamInfo, value: bool) -> None:
        """Notes it. An optimizer that is made later, or the next step of one that trains it, raises what is wrong with
        it. Inside a pass nothing is noted: no gradient is made there, and PEFT freezes and thaws adapters for as long
        as it leaves them out of a forward."""
        if self._in_pass:
            return
        param.requires_grad = value

    def check_trained(self) -> None:
        """
        Raises:
            DistZO2Error: a parameter that the optimizer trains was frozen since that was made.
        """
        for param in self.params:
            if not param.requires_grad and param.index in self.weights.updates.group_of:
                raise DistZO2Error(f"parameter {param.name} is trained by an optimizer: freeze it before that is made")

    def in_forward(self) -> bool:
        """Whether a lane runs, or an ordinary forward."""
        return self._in_pass or bool(self._outside)

    def name_of(self, module: nn.Module) -> str | None:
        """The module's name in the model; None if it is no part of it."""
        return self._names.get(module)

    def close(self) -> None:
        """Ends threads and transfers and deletes the working block file; the model cannot be run afterwards."""
        if not self.weights.closed:
            self._lanes.close()
            self._windows.remove()
            if self.kept is not None:
                self.kept.stop_copying()
            try:
                self.weights.close()
            finally:
                if self.kept is not None:
                    self.kept.close()
