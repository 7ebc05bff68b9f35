"""ZOSGD: the optimizer. A step runs its lanes in one pass over the weights, and becomes an update of a few scalars."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.estimators.protocol import Estimator, mean_loss
from distzo2.estimators.registry import name_of
from distzo2.interrupts import DeferredInterrupt
from distzo2.optim.moments import Momentum
from distzo2.optim.settings import (
    StepRecord,
    check_rates,
    default_groups,
    eps_of,
    group_of_each,
    make_settings,
    scalars_of,
)  # fmt: skip
from distzo2.optim.shared_step import ALWAYS_DURABLE, Alone, Evaluated, SharedStep, StepWord
from distzo2.optim.signal import REFERENCE, TF32, Signal, computed_in, measure_signal
from distzo2.optim.state import (
    NON_FINITE_COEFFICIENT,
    NON_FINITE_LOSS,
    WINDOW,
    DivergenceError,
    NonFiniteLossError,
    Progress,
)
from distzo2.optim.step_lanes import StepLanes
from distzo2.parallel.group import Mesh, current
from distzo2.parallel.mesh import SHARDED
from distzo2.record.header import index_table, make_header
from distzo2.record.journal import Journal, StepEntry, num_groups_of
from distzo2.record.lineage import BranchPoint
from distzo2.record.opening import fingerprint, open_run
from distzo2.streaming.offload import check_computes, runtime_of
from distzo2.text import brief, dtype_name
from distzo2.weights.units import Unit, ranges_of
from distzo2_core import FAMILIES, GroupScalars, Term, Update, checksum

logger = logging.getLogger("distzo2")

_SAME_IN_STATE = ("noise", "num_probes")  # settings that an optimizer and the state that it loads must share


class ZOSGD(torch.optim.Optimizer):
    """Zeroth-order SGD: w <- round(w - lr * (sum of c_k·z_k + weight_decay·w)), with c_k from forward passes only.

    SPSA as in MeZO (arXiv 2305.17333), or another estimator. The perturbed weights are made out of place, so clean
    weights do not drift; 16-bit weights are rounded stochastically, so that steps far below their spacing are not lost.

    Args:
        model: a module that `distzo2.offload` or `distzo2.from_pretrained` returned.
        params: None for all trainable parameters, or parameter groups as for any torch optimizer; parameters in no
            group are read and never changed. Groups may set lr, weight_decay, anchor, perturb_scale, update_scale.
        lr: learning rate; schedulers of torch.optim.lr_scheduler change it for the steps that follow.
        eps: size of the perturbation, as float32; the attribute `eps` changes it for the steps that follow.
        weight_decay: added to the estimate, as in SGD. With params=None it leaves out biases and norms (parameters of
            fewer than 2 dimensions).
        anchor: anchor·(w - w0) is added to the estimate, w0 the weights at the start (L2-SP, arXiv 1802.01483), which a
            model that was handed over with keep_start=True has.
        num_probes: perturbations a step, K.
        noise: "normal" or "rademacher"; or of low rank, "sign-r1", "sign-r4", "normal-r1" or "normal-r4":
            z = A B^T / sqrt(r) of matrices, A and B of r columns of signs or normals, and dense noise elsewhere.
        estimator: "spsa", "fzoo", "es", "1.5spsa", "meazo", "spsa-sign" (docs/estimators.md), or an `Estimator`.
        seed: of the run, in [0, 2^64).
        data_hash: SHA-256 of the run's examples, for the header of a new journal; nothing is compared with it.
        journal: path of a journal to write (or to continue, given `resume`), or None.
        resume: `journal` exists: checks that it belongs to this model and seed, and takes over its updates.
        branch_from: a `BranchPoint`, (journal of another run, number of its steps or None for all): takes over these
            steps, and begins `journal` with them.
        fsync_every: sync the journal to the disk after N steps; a power cut may cost the steps since.
        max_lanes: at most N evaluations share a pass (for memory); None: all. The bits are the same. With 1 they run
            one after another, as models need whose code keeps state elsewhere than in attributes of modules.
        max_coef: coefficients are clipped to this multiple of their running median; None: never.
        clip_percentile: P in (0, 100]: coefficients are clipped to the P-th percentile of the last 101 steps' largest,
            as these were before clipping, in place of the median. A step above `max_coef` times that is a clipped one.
        momentum: beta in [0, 1): updates are made of the terms of earlier steps too, times beta for each step of age.
            No memory is needed: their noise is made anew, which costs `momentum_window` times that of an update.
        momentum_window: steps whose terms an update lists, its own among them; None: until beta^window is below 1%, and
            at most 64.
        probe_batches: "shared", or "own": the K probes are evaluated on different micro-batches, the list of closures
            being cut into K equal parts, in order. For spsa, meazo, spsa-sign: the others compare probes.
        max_clipped: N clipped steps in a row end the run with an error; 0: never.
        max_skipped: N steps in a row with a non-finite loss end the run with an error.
        mesh: ranks that share every step; None: what `distzo2.parallel.init` made, if it was called. Rank 0 alone
            writes the journal.
        verify_every: compare the weights of all ranks after every N steps; 0: only when the optimizer is made.

    Attributes:
        settings: the options above that a step depends on, frozen.
        last: the `StepRecord` of the last step.
        journal: the open journal; None without one, and on ranks other than 0.
        first_step: the first step that is the run's own, and not one of the run that it was branched from.

    Raises:
        DistZO2Error: the model was not handed over, or an argument is out of range, or the ranks of the mesh have other
            models or arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        anchor: float = 0.0,
        num_probes: int = 1,
        noise: str = "normal",
        estimator: str | Estimator = "spsa",
        seed: int = 0,
        data_hash: str | None = None,
        journal: str | os.PathLike | None = None,
        resume: bool = False,
        branch_from: BranchPoint | None = None,
        fsync_every: int = 1,
        max_lanes: int | None = None,
        max_coef: float | None = 10.0,
        clip_percentile: float | None = None,
        max_clipped: int = 10,
        max_skipped: int = 5,
        momentum: float = 0.0,
        momentum_window: int | None = None,
        probe_batches: str = "shared",
        mesh: Mesh | None = None,
        verify_every: int = 0,
    ) -> None:
        self._runtime = runtime = runtime_of(model)
        known = {id(p.tensor) for p in runtime.params}
        for name in (name for name, p in model.named_parameters() if id(p) not in known):
            raise DistZO2Error(f"parameter {name} is not in the model that was handed over: hand over all of it")
        self.settings = settings = make_settings(
            seed=seed, eps=eps, noise=noise, num_probes=num_probes, estimator=estimator, max_lanes=max_lanes,
            max_coef=max_coef, max_clipped=max_clipped, max_skipped=max_skipped, verify_every=verify_every,
            fsync_every=fsync_every, momentum=momentum, momentum_window=momentum_window,
            clip_percentile=clip_percentile, probe_batches=probe_batches,
        )  # fmt: skip
        branch = None if branch_from is None else BranchPoint(*branch_from)
        if branch is not None and (journal is None or resume):
            raise DistZO2Error("branch_from begins a new journal: give its name, without resume")
        if fsync_every > 1 and journal is not None and runtime.where == "disk":
            raise DistZO2Error(
                f"fsync_every={fsync_every} with weights on disk: a block is written back only after its step's "
                "line is on the disk, so every step is synced"
            )
        mesh = mesh or current()
        self._ranks = Alone(settings) if mesh is None else SharedStep(mesh, runtime, settings)
        self._interrupt = DeferredInterrupt()
        self._interrupt.also = self._ranks.check
        self._lanes = StepLanes(runtime, settings, self._interrupt)
        self._progress = Progress(settings)
        self._momentum = Momentum(settings.momentum, settings.momentum_window)
        self.journal: Journal | None = None
        self.last: StepRecord | None = None
        self.first_step = 0
        self._data_hash = data_hash
        self._bound = self._closed = self._told_unused = False

        if params is None:
            earlier = branch.journal if branch else journal if resume else None
            split = weight_decay != 0  # weights and biases are in groups of their own, as in the run so far
            if not split and earlier is not None:
                count = self._ranks.from_rank_0("reading the journal", lambda: b"%d" % num_groups_of(earlier))
                split = int(count) > 1
            params = default_groups(runtime.params, split)
        defaults = {"lr": lr, "weight_decay": weight_decay, "anchor": anchor, "perturb_scale": 1.0, "update_scale": 1.0}
        if runtime.kept is not None:
            runtime.kept.check_optimizer(journal, runtime.weights.replaced)
        super().__init__(params, defaults)
        check_rates(self.param_groups)
        self._bind()
        self._scalars()
        given = {"having a journal": journal, "having a weight file": runtime.kept, "branching": branch}
        given = {name: value is not None for name, value in given.items()}
        self._ranks.join(self._index_table(), self.param_groups, {**given, "resume": resume})
        if not (resume and runtime.kept):  # blocks of weight files hold different numbers of updates
            self.verify_replicas()
        if journal is None:
            runtime.weights.set_durable(ALWAYS_DURABLE)
            return
        self._ranks.first_version = runtime.weights.version
        self.journal, self.first_step, older_rules = open_run(
            self._ranks, journal, self._header, self._checksums, runtime.weights, self.take_over,
            resume=resume, branch=branch, fsync_every=fsync_every, kept=runtime.kept,
        )  # fmt: skip
        self._set(older_rules=older_rules)
        if resume and runtime.kept is not None:
            self.verify_replicas()  # ranks that cannot read the weight file have made the updates again

    # ---- groups -----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; the updates made so far are applied first."""
        if self.journal is not None:
            raise DistZO2Error(f"the groups of a run are in its journal {self.journal.path}: they cannot change")
        super().add_param_group(param_group)
        if not self._bound:  # the constructor binds once it has all groups
            return
        try:
            self._bind()
        except BaseException:
            self.param_groups.pop()
            self._bind()
            raise
        self._momentum.clear()  # earlier steps did not perturb the new group

    def _bind(self) -> None:
        """Makes this the model's optimizer: from here on, its updates are of these groups and this seed."""
        group_of = group_of_each(self._runtime.params, self.param_groups)
        other = self._runtime.weights.owner
        if isinstance(other, ZOSGD) and other is not self and other.journal is not None:
            raise DistZO2Error(f"another optimizer of this model is writing the journal {other.journal.path}: close it")
        self._runtime.weights.bind(self, group_of, len(self.param_groups), self.settings.seed)
        self._epoch, self._bound = self._runtime.weights.epoch, True

    # ---- the journal --------------------------------------------------------------------------------------------

    def _header(self) -> dict[str, Any]:
        """The header of this optimizer's run: everything that a line's scalars refer to."""
        s, runtime, computed = self.settings, self._runtime, self._runtime.compute_dtype
        # Weights that were trained or replaced since they were loaded are no longer those of the checkpoint.
        # Those of a weight file are the run's: its base need not be read again.
        unread = self._ranks.world_size == 1 and runtime.kept is not None and runtime.kept.gave_all(runtime.weights)
        source = None if runtime.weights.replaced or unread else runtime.base
        return make_header(
            seed=s.seed,
            table=self._index_table(),
            groups=self.param_groups,
            base=None if source is None else source.digest(),
            checkpoint_map=None if source is None else source.to_json(),
            options={
                "eps": s.eps,
                "num_probes": s.num_probes,
                "estimator": name_of(s.estimator),
                **s.recorded,
                **({} if computed is None else {"compute_dtype": dtype_name(computed)}),
            },
            fingerprint={**fingerprint(runtime.device), **self._ranks.fingerprint},
            data_hash=self._data_hash,
            computed=[dtype_name(p.seen) for p in runtime.params],
            stored_formats={p.name: p.stored.format for p in runtime.params if p.layout is not None},
        )

    def _checksums(self) -> list[str | None]:
        """One for each parameter, in the order of the index table, of all its bytes; None where a weight file gave it.
        Reads every other unit once."""
        runtime, sums = self._runtime, [None] * len(self._runtime.params)
        units = [unit for unit in runtime.units if not runtime.is_filled(unit)]
        for unit, views in runtime.access.visit(units):
            for param, view in zip(unit.params, views, strict=True):
                sums[param.index] = f"{checksum([view]) % 2**64:016x}"
        return sums

    def _set(self, **changes: Any) -> None:
        """Changes settings."""
        self.settings = self._lanes.settings = self._ranks.settings = replace(self.settings, **changes)

    def _index_table(self) -> list[dict[str, Any]]:
        return index_table(self._runtime.params, self.param_groups, self.settings.noise)

    def take_over(self, entries: Sequence[StepEntry], first_like: int = 0) -> None:
        """Takes over the steps of a journal without a forward. Those from step `first_like` on count in the running
        median that clips later coefficients, and in the momentum, as if this optimizer had made them."""
        for entry in entries:
            self._runtime.weights.push(entry.update, entry.unused)
            if entry.step < first_like:
                self._progress.step += 1
                continue
            own = [term for term in entry.update.terms if term.step == entry.step]
            self._momentum.count(entry.step, own, entry.unused)
            with suppress(NonFiniteLossError, DivergenceError):  # the run ended there, and was resumed all the same
                self._progress.memory = self._progress.recalled(entry.extra.get("memory", self._progress.memory))
                clipped, largest = bool(entry.extra.get("clipped")), entry.extra.get("largest")
                self._progress.count(entry.coefs, entry.skipped, clipped, largest)

    # ---- a step -----------------------------------------------------------------------------------------------

    @property
    def eps(self) -> float:
        """Size of the next step's perturbations. A schedule sets it before each step, on all ranks alike, as a function
        of `step_count`, so that a resumed run has the same bits."""
        return self.settings.eps

    @eps.setter
    def eps(self, value: float) -> None:
        if (eps := eps_of(value)) != self.settings.eps:
            self._set(eps=eps)

    @property
    def step_count(self) -> int:
        """Steps made, skipped ones included: the number of the next step."""
        return self._progress.step

    def step(
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None,
        *,
        tokens: int = 0,
        sharded: bool | str = False,
        count: float | None = None,
    ) -> torch.Tensor | None:
        """Evaluates the step's perturbations and makes the update.

        Args:
            closure: returns the loss of a batch as a scalar; or per-example losses, of which the mean is taken; or
                (sum of losses, number of losses), for a mean over all of the step, however it is cut; or a `NoLoss`
                (distzo2.optim.state), which skips the step. Or a list of such
                closures, one for each micro-batch. It is called once for each perturbation, under no_grad, in a
                separate thread; code that is new, once more (see `check`); `distzo2.current_lane` says for which. None:
                no step is made, and None is returned, since training loops call `step()` where gradients are ready.
            tokens: how many tokens the batch has, for the journal.
            sharded: with a mesh, whose the closures are. False: the step's; every rank has the same list, and runs its
                part of it. True: the rank's own; it runs all evaluations of them, and lists may differ in length, or be
                empty. "data": those of its data coordinate; ranks that share it have the same list.
            count: how many losses the step has in all, on all ranks, where that is known beforehand: closures then
                return sums (of a vector, its sum is taken), and the loss of an evaluation is the sum of these over
                `count`. 1, where closures have divided by the number already, as Trainer's do.

        Returns:
            float64 scalar: the mean of all losses evaluated, on all ranks. `last` has the details. The loss of an
            evaluation is the sum of its closures' sums over that of their numbers; what is not a pair counts as one.

        Raises:
            NonFiniteLossError: `max_skipped` steps in a row had a non-finite loss. None of them was applied.
            DivergenceError: `max_clipped` steps in a row had to be clipped.
            UsageError: the closures do not fit the mesh, or the probes that are to have batches of their own.
            DistZO2Error: the lanes did not enter the same units, or a parameter was used outside its window, or what a
                closure returned is no loss, or the numbers of losses are all 0.
            RanksDisagreeError: the ranks of the mesh were about to make different steps.
            RankFailedError: another rank failed in this step, or is gone; it and the first cause are named.
            Exception: whatever a closure raises, as it was raised; the step is then dropped whole, on all ranks.
        """
        if closure is None:
            return None
        if self._closed:
            raise DistZO2Error("this optimizer was closed, and its journal with it")
        closures, scalars, failure = [], (), None
        try:
            closures, scalars = self._closures(closure, sharded), self._scalars()
            count = None if count is None else float(count)
            if count is not None and not 0 < count < np.inf:
                raise DistZO2Error(f"count={count!r}: expected a finite number above 0")
            if count is not None and self.settings.own_batches:
                raise DistZO2Error("count= is of a batch that all probes share, and they have batches of their own")
        except Exception as error:
            failure = error  # `open` raises it here, and tells the other ranks
        with self._interrupt:
            start, step, as_sums = time.perf_counter(), self.step_count, count is not None
            word = StepWord(step, scalars, len(closures), tokens, sharded, count, self._momentum)
            deal, tokens = self._ranks.open(word, failure)
            run = self._lanes.run
            found = self._ranks.gather(step, deal, lambda lanes, first: run(step, lanes, closures, first, as_sums))
            record, losses = self._record(step, found, count)
            record.lr, record.eps = [group.lr for group in scalars], self.settings.eps
            record.memory, update = self._progress.memory, None
            left_out = self._runtime.weights.left_out(found.entered)
            if not self.settings.older_rules:
                record.unused = ranges_of(p.index for unit in left_out for p in unit.params)

            def make() -> None:
                nonlocal update
                self._tell_unused(step, left_out)
                self._decide(losses, record)
                self._progress.warn_if_still(record.coefs)
                record.seconds, update = time.perf_counter() - start, self._update(record, scalars)
                if self.journal is not None:
                    self.journal.append(record.entry(update, tokens, self.settings.clip_percentile is not None))

            self._ranks.decide(record, make, self.journal)
            record.seconds = record.seconds or time.perf_counter() - start
            self._push(update or self._update(record, scalars), record)
        return torch.tensor(record.loss, dtype=torch.float64)

    def _closures(self, closure: Any, sharded: bool | str) -> list[Callable[[], Any]]:
        """The closures of a step, after checking that it can be made."""
        closures = [closure] if callable(closure) else list(closure)
        if not (closures or sharded) or not all(callable(c) for c in closures):
            raise DistZO2Error("step expects a closure or a non-empty list of closures")
        if sharded not in SHARDED:
            raise DistZO2Error(f'sharded={sharded!r}: expected False, True or "data"')
        if self._runtime.weights.owner is not self:
            raise DistZO2Error("a newer optimizer exists for this model; only the newest may call step()")
        self._runtime.check_trained()
        if self._epoch != self._runtime.weights.epoch:  # by load_state_dict or edit
            if self.journal is not None:
                raise DistZO2Error(
                    f"the weights were replaced from outside, so the journal {self.journal.path} no longer leads to "
                    "them: start a new run from a checkpoint of them"
                )
            self._epoch = self._runtime.weights.epoch
        return closures

    def _scalars(self) -> tuple[GroupScalars, ...]:
        """What a step takes of the groups now; perturbations have their scales from here on."""
        scalars = scalars_of(self.param_groups)
        self._runtime.weights.check_anchors(scalars)
        self._runtime.weights.updates.set_perturb_scales([group.perturb_scale for group in scalars])
        return scalars

    def _record(self, step: int, found: Evaluated, count: float | None) -> tuple[StepRecord, np.ndarray]:
        """A record of the losses, without coefficients yet; and the losses as an estimator takes them, a row for each
        evaluation: the means of micro-batches, or, where closures gave counts, the one mean over all of them."""
        sums, counts = found.sums, found.counts
        plain = bool((counts == 1).all())
        if count is not None:
            if not plain:
                raise DistZO2Error(f"step {step}: count={count:g} was given, and closures returned counts too")
            sums = sums * (sums.shape[1] / count)  # as means, of which each counts as one
        if not counts.any(1).all():
            raise DistZO2Error(f"step {step}: the closures returned 0 as the number of losses: there is no mean")
        loss = mean_loss(sums.reshape(-1), counts.reshape(-1))
        record = StepRecord(step, loss, sums.tolist(), self.settings.evaluations, [], found.skipped)
        if plain:
            return record, sums
        means = np.divide(sums, counts, out=sums.copy(), where=counts > 0)
        record.counts, record.losses = counts.tolist(), means.tolist()
        counted = counts.all(0)  # in all evaluations
        if getattr(self.settings.estimator, "by_batch", False) and counted.any():
            return record, means[:, counted]
        return record, np.array([[mean_loss(*each)] for each in zip(sums, counts, strict=True)])

    def _tell_unused(self, step: int, units: Sequence[Unit]) -> None:
        """Reports, once, units that no lane entered."""
        if not units or self._told_unused:
            return
        self._told_unused = True
        names, more = ", ".join(unit.name for unit in units[:8]), ", ..." if len(units) > 8 else ""
        effect = "the step leaves them as they are, as all such steps will"
        if self.settings.older_rules:
            effect = "their updates are noise, as the run began under an older version of the journal"
        num_params = sum(len(unit.params) for unit in units)
        logger.warning("step %d used none of the %d parameters of %s%s: %s", step, num_params, names, more, effect)

    def _decide(self, losses: np.ndarray, record: StepRecord) -> None:
        """Fills `record` with the coefficients that the losses lead to, or why the step is skipped. `losses` are as an
        estimator takes them."""
        if not np.isfinite(losses).all():
            record.skipped = record.skipped or NON_FINITE_LOSS
            return
        found, memory = self.settings.coefficients(losses, record.memory)
        coefs, record.clipped = self._progress.clip(found)
        if np.isfinite(coefs).all():
            record.coefs, record.memory = coefs.tolist(), memory
            record.largest = float(np.abs(found).max()) if record.clipped else None
        else:
            record.skipped = NON_FINITE_COEFFICIENT

    def _update(self, record: StepRecord, scalars: tuple[GroupScalars, ...]) -> Update:
        if record.skipped is not None:
            return Update(record.step, tuple(group._replace(lr=0.0) for group in scalars), ())
        return Update(record.step, scalars, self._momentum.terms(record.step, self._own_terms(record), record.unused))

    def _own_terms(self, record: StepRecord) -> list[Term]:
        family = FAMILIES[self.settings.noise]
        return [Term(family, record.step, k, 0, c) for k, c in enumerate(record.coefs)]

    def _push(self, update: Update, record: StepRecord) -> None:
        """Makes the step: from here on, every unit takes over the update at its next visit."""
        self._runtime.weights.trim()
        self._runtime.weights.push(update, record.unused)
        self.last, self._progress.memory = record, record.memory
        self._momentum.count(record.step, self._own_terms(record), record.unused)
        self._progress.count(record.coefs, record.skipped, record.clipped, record.largest)
        if self._runtime.kept is not None:
            self._runtime.kept.step_done(self._runtime.access, self.step_count, record.seconds)
        if self.settings.verify_every and self.step_count % self.settings.verify_every == 0:
            self.verify_replicas()

    # ---- besides steps ------------------------------------------------------------------------------------------

    def check(self, closure: Callable[[], Any]) -> float:
        """Runs two clean lanes of `closure` and two perturbed ones, which run alone as well; returns the loss.

        Raises:
            DistZO2Error: the clean ones differ: the forward is not deterministic, and every estimate would be made of
                that noise. Or the perturbed one differs: lanes see each other (see `max_lanes`).
        """
        self._scalars()
        return self._lanes.check(self.step_count, closure)

    def signal(
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]],
        *,
        probes: int = 8,
        eps: float | Sequence[float] | None = None,
        dtypes: Sequence[torch.dtype | str] | None = None,
    ) -> list[Signal]:
        """How much of L+ - L- is the perturbation: probes of the next step in several compute dtypes, beside float32.

        Args:
            closure: as `step` takes it.
            probes: perturbations, each evaluated both ways; 2 or more.
            eps: one size of them, or several; None: that of the steps.
            dtypes: of `compute_dtype`, and "tf32" on a GPU; None: what modules compute with, and float32.

        Returns:
            A `Signal` for each dtype and eps, in this order. Weights are not changed.
        """
        runtime = self._runtime
        sizes = [self.settings.eps] if eps is None else [eps] if isinstance(eps, (int, float)) else list(eps)
        if probes < 2 or not sizes or not all(np.isfinite(size) and size > 0 for size in sizes):
            raise DistZO2Error(f"signal: 2 probes or more and positive eps were expected, got {probes} and {sizes}")
        self._scalars()
        dtypes = (computed_in(runtime), REFERENCE) if dtypes is None else dtypes
        for dtype in dtypes:
            check_computes(runtime.device, REFERENCE if dtype == TF32 and runtime.device.type == "cuda" else dtype)
        closures = [closure] if callable(closure) else list(closure)
        return measure_signal(self._lanes, closures, self.step_count, dtypes=dtypes, eps=sizes, probes=probes)

    def verify_replicas(self) -> None:
        """Reads all weights once and compares them across the ranks of the mesh; all ranks call it. No-op without one.

        Raises:
            ReplicasDifferError: they differ; names the first unit that does, and the ranks.
        """
        with self._interrupt:
            self._ranks.verify(self.step_count)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """No-op: there are no gradients. Training loops may call it."""

    def state_dict(self) -> dict[str, Any]:
        """The groups without their tensors, the settings, and the number of the next step. Stored weights are brought
        up to date, so that a `model.state_dict()` made now or later goes with it."""
        self._runtime.weights.flush()
        return {**super().state_dict(), "distzo2": self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        state = {name: getattr(self.settings, name) for name in (*_SAME_IN_STATE, "eps", "seed")}
        state |= {"step": self.step_count, "clip": list(self._progress.window)}
        state |= {"momentum": self._momentum.state()} if self.settings.momentum else {}
        return state | ({"memory": list(self._progress.memory)} if self._progress.memory else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over groups, seed, eps and step; the model's weights are loaded with `model.load_state_dict`.

        The optimizer's own present state may always be loaded, as libraries do when they wrap an optimizer: the options
        of groups are taken over, and nothing else changes.

        Raises:
            DistZO2Error: the state is not ZOSGD's, its run had another kind of noise, or a journal is being written and
                the state is not that of its last step.
        """
        mine = state_dict.get("distzo2")
        if mine is None:
            raise DistZO2Error("this is not a state of ZOSGD: it has no entry 'distzo2'")
        ours = self._own_state()
        differing = next((key for key in ours if mine.get(key) != ours[key]), None)
        if differing is not None and (self.journal is not None or differing in _SAME_IN_STATE):
            theirs, present = brief(mine.get(differing)), brief(ours[differing])
            found = f"{differing} is {theirs} in the state and {present} in this optimizer"
            if self.journal is not None:
                found += (
                    f", which writes the journal {self.journal.path}: a run is resumed with ZOSGD(journal=..., "
                    "resume=True) and the weights that it began with, or branched off with branch_from="
                )
            raise DistZO2Error(found)
        if differing is not None and mine["step"] and any(group.get("anchor") for group in state_dict["param_groups"]):
            raise DistZO2Error(
                "the state has an anchor, and not the weights that it pulls to: resume a journal instead"
            )
        memory = self._progress.recalled(mine.get("memory", self.settings.memory))
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "distzo2"})
        if differing is None:
            return
        self._set(seed=mine["seed"], eps=mine["eps"])
        self._progress.step, self._progress.memory = mine["step"], memory
        self._progress.window = deque(mine["clip"], WINDOW)
        self._momentum.load(mine.get("momentum", ()))
        self._bind()

    def close(self) -> None:
        """Ends the journal; what was appended is on disk afterwards. No step can follow."""
        self._closed = True
        journal, self.journal = self.journal, None
        if self._runtime.kept is not None:
            self._runtime.kept.stop_copying()
        if journal is not None:
            journal.close()
            self._runtime.weights.set_durable(ALWAYS_DURABLE)
