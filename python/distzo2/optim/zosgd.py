"""ZOSGD: the optimizer. A step runs its lanes in one pass over the weights, and becomes an update of a few scalars."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from distzo2.errors import DistZO2Error
from distzo2.interrupts import DeferredInterrupt
from distzo2.optim.clipping import CoefficientClip
from distzo2.optim.estimator import Estimator, Evaluation, coefficients_of, make_estimator, mean_loss
from distzo2.optim.parameter_groups import default_groups, scalars_of
from distzo2.optim.state import NON_FINITE_COEFFICIENT, NON_FINITE_LOSS, OptimizerState
from distzo2.optim.step_lanes import StepLanes
from distzo2.parallel.durability import ALWAYS_DURABLE
from distzo2.parallel.group import check_mesh, current
from distzo2.parallel.mesh import SHARDED, Deal
from distzo2.record.entry import StepEntry
from distzo2.record.header import index_table, make_header
from distzo2.record.journal import Journal, num_groups_of
from distzo2.record.lineage import BranchPoint, first_like_step, first_own_step
from distzo2.record.opening import fingerprint, open_own_journal, start_snapshots
from distzo2.streaming.offload import runtime_of
from distzo2_core import FAMILIES, GroupScalars, Term, Update

if TYPE_CHECKING:
    from distzo2.optim.shared_step import SharedStep
    from distzo2.parallel.group import Mesh
    from distzo2.record.snapshot import Snapshots
    from distzo2.record.snapshot_writer import SnapshotWriter
    from distzo2.weights.units import Unit


class NonFiniteLossError(DistZO2Error):
    """Too many steps in a row had a loss that is not finite."""


@dataclass
class StepRecord:
    """What the last step did. `losses` is [evaluations][micro-batches], in the estimator's order."""

    step: int
    loss: float
    losses: list[list[float]]
    evaluations: list[Evaluation]
    coefs: list[float]
    skipped: str | None = None  # why the step was not applied
    clipped: bool = False
    seconds: float = 0.0
    lr: list[float] = field(default_factory=list)


class ZOSGD(OptimizerState):
    """Zeroth-order SGD: w <- round(w - lr * (sum of c_k·z_k + weight_decay·w)), with c_k from forward passes only.

    SPSA as in MeZO (arXiv 2305.17333) or FZOO. The perturbed weights are made out of place, so clean weights do not
    drift; 16-bit weights are rounded stochastically, so that steps far below their spacing are not lost.

    Args:
        model: a module that `distzo2.offload` or `distzo2.from_pretrained` returned.
        params: None for all trainable parameters, or parameter groups as for any torch optimizer; parameters in no
            group are read and never changed. Groups may set lr, weight_decay, perturb_scale and update_scale.
        lr: learning rate; schedulers of torch.optim.lr_scheduler change it for the steps that follow.
        eps: size of the perturbation, as float32.
        weight_decay: decoupled from nothing: added to the estimate as in SGD. With params=None it leaves out biases
            and norms (parameters of fewer than 2 dimensions).
        num_probes: perturbations a step, K.
        noise: "normal" or "rademacher".
        estimator: "spsa", "fzoo", or an `Estimator`.
        seed: of the run, in [0, 2^64).
        journal: path of a journal to write (or to go on with, given `resume`), or None.
        resume: `journal` exists: check that it belongs to this model and seed, and take over its updates.
        branch_from: a `BranchPoint`, (journal of another run, number of its steps or None for all): take
            over these steps, and begin `journal` with them.
        fsync_every: sync the journal to the disk after so many steps; a power cut may cost the steps since.
        max_lanes: at most so many evaluations share a pass (for memory); None: all. The bits are the same.
        max_coef: coefficients are clipped to this multiple of their running median; None: never.
        max_clipped: so many clipped steps in a row end the run with an error.
        max_skipped: so many steps in a row with a non-finite loss end the run with an error.
        mesh: ranks that share every step; None: what `distzo2.parallel.init` made, if it was called. Rank 0 alone
            writes the journal.
        verify_every: compare the weights of all ranks after every so many steps; 0: only when the optimizer is made.
        snapshots: where copies of the weights are made while training goes on, and read on `resume`; needs a journal.

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
        num_probes: int = 1,
        noise: str = "normal",
        estimator: str | Estimator = "spsa",
        seed: int = 0,
        journal: str | os.PathLike | None = None,
        resume: bool = False,
        branch_from: BranchPoint | None = None,
        fsync_every: int = 1,
        max_lanes: int | None = None,
        max_coef: float | None = 10.0,
        max_clipped: int = 10,
        max_skipped: int = 5,
        mesh: Mesh | None = None,
        verify_every: int = 0,
        snapshots: Snapshots | None = None,
    ) -> None:
        runtime = runtime_of(model)
        if noise not in FAMILIES:
            raise DistZO2Error(f"noise={noise!r}: expected one of {', '.join(FAMILIES)}")
        exact_eps = float(np.float32(eps))
        if not (np.isfinite(exact_eps) and exact_eps > 0):
            raise DistZO2Error(f"eps={eps!r}: a positive number that float32 can hold was expected")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise DistZO2Error(f"seed={seed!r}: an integer in [0, 2^64) was expected")
        if not 1 <= num_probes < 2**20:
            raise DistZO2Error(f"num_probes={num_probes}: expected 1 to {2**20 - 1}")
        if max_lanes is not None and max_lanes < 1:
            raise DistZO2Error(f"max_lanes={max_lanes}: at least 1 was expected")
        branch = None if branch_from is None else BranchPoint(*branch_from)
        if branch is not None and (journal is None or resume):
            raise DistZO2Error("branch_from begins a new journal: give its name, without resume")
        if fsync_every < 1:
            raise DistZO2Error(f"fsync_every={fsync_every}: at least 1 was expected")
        if fsync_every > 1 and journal is not None and runtime.where == "disk":
            raise DistZO2Error(
                f"fsync_every={fsync_every} with weights on disk: a block is written back only after its step's "
                "line is on the disk, so every step is synced"
            )
        self.estimator = make_estimator(estimator)
        self._evaluations = self.estimator.evaluations(num_probes)
        clip = CoefficientClip(max_coef, max_clipped)
        mesh = mesh or current()
        if mesh is not None:
            check_mesh(mesh, self._evaluations)

        defaults = {"lr": lr, "weight_decay": weight_decay, "perturb_scale": 1.0, "update_scale": 1.0}
        if params is None:
            earlier = branch.journal if branch else journal if resume else None
            params = default_groups(runtime.params, weight_decay != 0 or _has_groups(earlier, mesh))
        super().__init__(
            runtime, params, defaults,
            eps=exact_eps, num_probes=num_probes, noise=noise, seed=seed, clip=clip, max_skipped=max_skipped,
        )  # fmt: skip
        self._model, self._branch = model, branch
        self._journal_options = {"fsync_every": fsync_every}
        self.max_lanes, self.verify_every = max_lanes, verify_every
        self.first_step = 0  # the first that is the run's own, and not one of the run that it was branched from
        self.last: StepRecord | None = None
        self._interrupt = DeferredInterrupt()
        self._lanes = StepLanes(self, self._interrupt)
        self._diagnosed = self._closed = False
        self._shared: SharedStep | None = None
        if mesh is not None:
            from distzo2.optim.shared_step import SharedStep

            self._shared = SharedStep(mesh, self)
            self._shared.join(journal is not None, snapshots is not None, resume)
            self._interrupt.also = mesh.heartbeat.check
            self.verify_replicas()
        self._snapshots: SnapshotWriter | None = None
        self._open_journal(journal, resume, snapshots)

    # ---- the journal --------------------------------------------------------------------------------------------

    def _open_journal(self, path: str | os.PathLike | None, resume: bool, snapshots: Snapshots | None) -> None:
        if path is None:
            if snapshots is not None:
                raise DistZO2Error("snapshots need a journal: it is what leads from one to the next")
            self._runtime.set_durable(ALWAYS_DURABLE)
            return
        first = self._runtime.version
        if self._shared is not None:
            self.journal, invalid = self._shared.open_journal(path, resume, snapshots)
        else:
            self.journal, invalid = open_own_journal(
                path, self.journal_header(), self._runtime, self._take_over_journal,
                resume=resume, branch=self._branch, snapshots=snapshots, **self._journal_options,
            )  # fmt: skip
        if self._shared is not None and self._shared.from_snapshot:
            self.verify_replicas()
        if snapshots is not None and self.journal is not None:
            self._snapshots = start_snapshots(snapshots, self._runtime, self.journal, resume, first, invalid)

    def journal_header(self) -> dict[str, Any]:
        """The header of this optimizer's run: everything that a line's scalars refer to."""
        base = None if self._runtime.replaced else getattr(self._model, "distzo2_source", None)
        return make_header(
            seed=self.seed,
            table=index_table(self._runtime.params, self.param_groups, self.noise),
            groups=self.param_groups,
            base=None if base is None else base.digest(),
            checkpoint_map=None if base is None else base.map.to_json(),
            options={"eps": self.eps, "num_probes": self.num_probes, "estimator": type(self.estimator).__name__},
            fingerprint=fingerprint(self._runtime.device),
        )

    def _take_over_journal(self, journal: Journal) -> None:
        self.first_step = first_own_step(journal.header)
        self.take_over(journal.entries, first_like_step(journal.header))

    # ---- a step -----------------------------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]],
        *,
        tokens: int = 0,
        sharded: bool | str = False,
    ) -> torch.Tensor:
        """Evaluates the step's perturbations and makes the update.

        Args:
            closure: returns the loss of a batch as a scalar, or per-example losses; or a list of such closures, one for
                each micro-batch. It is called once for each perturbation, under no_grad, in a thread of its own.
            tokens: how many tokens the batch has, for the journal.
            sharded: with a mesh, whose the closures are. False: the step's; every rank has the same list, and runs its
                part of it. True: the rank's own; it runs all evaluations of them, and lists may differ in length, or be
                empty. "data": those of its data coordinate; ranks that share it have the same list.

        Returns:
            float64 scalar: the mean of all losses evaluated, on all ranks. `last` has the details.

        Raises:
            NonFiniteLossError: `max_skipped` steps in a row had a non-finite loss. None of them was applied.
            DivergenceError: `max_clipped` steps in a row had to be clipped.
            DistZO2Error: the lanes did not enter the same units, or a parameter was used outside its window.
            RanksDisagreeError: the ranks of the mesh were about to make different steps.
            RankFailedError: another rank failed in this step, or is gone; it and the first cause are named.
            Anything that a closure raises, as it was raised; the step is then dropped whole, on all ranks.
        """
        try:
            closures, failure = self._closures(closure, sharded), None
        except Exception as error:
            if self._shared is None or self._closed:
                raise
            closures, failure = [], error  # the other ranks are to know
        with self._interrupt:
            return self._step(closures, tokens, sharded, failure)

    def _closures(self, closure: Any, sharded: bool | str) -> list[Callable[[], Any]]:
        closures = [closure] if callable(closure) else list(closure)
        may_be_empty = sharded and self._shared is not None
        if not (closures or may_be_empty) or not all(callable(c) for c in closures):
            raise DistZO2Error("step expects a closure or a non-empty list of closures")
        if sharded not in SHARDED:
            raise DistZO2Error(f'sharded={sharded!r}: expected False, True or "data"')
        if self._closed:
            raise DistZO2Error("this optimizer was closed, and its journal with it")
        if self._runtime.owner is not self:
            raise DistZO2Error("another optimizer was made for this model since: only the last one can step")
        if self._epoch != self._runtime.epoch:
            self._rebase()
        return closures

    def _step(
        self,
        closures: Sequence[Callable[[], Any]],
        tokens: int,
        sharded: bool | str,
        failure: BaseException | None,
    ) -> torch.Tensor:
        start, step = time.perf_counter(), self.step_count
        if self._shared is None:
            scalars, deal = scalars_of(self.param_groups), Deal.alone(len(self._evaluations), len(closures))
        else:
            scalars, deal, tokens = self._shared.open(step, len(closures), tokens, sharded, failure)
        self._runtime.set_perturb_scales([g.perturb_scale for g in scalars])
        losses = self._evaluate(step, deal, closures)
        loss = mean_loss(losses.reshape(-1))
        record = StepRecord(step, loss, losses.tolist(), self._evaluations, [], lr=[g.lr for g in scalars])
        if not np.isfinite(losses).all():
            self._diagnose(step, closures)

        def make() -> Update:
            update = self._update_from(losses, scalars, record)
            record.seconds = time.perf_counter() - start
            self._append(update, record, tokens)
            return update

        update = make() if self._shared is None else self._shared.decide(step, make, record)
        self._push(update, record)
        record.seconds = record.seconds or time.perf_counter() - start

        self._skipped_in_row = self._skipped_in_row + 1 if record.skipped else 0
        if self._skipped_in_row >= self.max_skipped:
            raise NonFiniteLossError(
                f"step {step}: {record.skipped}, for {self._skipped_in_row} steps in a row; none of them was applied"
            )
        self._clip.check(step)
        if self._snapshots is not None:
            self._snapshots.step_done(self._runtime, self.step_count, record.seconds)
        if self.verify_every and self.step_count % self.verify_every == 0:
            self.verify_replicas()
        return torch.tensor(loss, dtype=torch.float64)

    def _update_from(self, losses: np.ndarray, scalars: tuple[GroupScalars, ...], record: StepRecord) -> Update:
        """What the losses make of the weights; fills `record`."""
        step = record.step
        if np.isfinite(losses).all():
            coefs = coefficients_of(self.estimator, losses, self._evaluations, self.num_probes, self.eps)
            coefs, record.clipped = self._clip(coefs)
            if not np.isfinite(coefs).all():
                record.skipped = NON_FINITE_COEFFICIENT
        else:
            record.skipped = NON_FINITE_LOSS
        if record.skipped is not None:
            return Update(step, scalars_of(self.param_groups, lr=0.0), ())
        record.coefs = [float(c) for c in coefs]
        terms = tuple(Term(FAMILIES[self.noise], step, k, 0, c) for k, c in enumerate(record.coefs))
        return Update(step, scalars, terms)

    def _append(self, update: Update, record: StepRecord, tokens: int) -> None:
        """From here on the step is made: in the journal, and in every unit at its next visit."""
        if self.journal is not None:
            extra = {"clipped": True} if record.clipped else {}
            self.journal.append(
                StepEntry(update.step, update, self.eps, record.losses, record.skipped, tokens, record.seconds, extra)
            )

    def _push(self, update: Update, record: StepRecord) -> None:
        self._runtime.trim()
        self._runtime.push([update])
        self.step_count += 1
        self.last = record

    def _evaluate(self, step: int, deal: Deal, closures: Sequence[Callable[[], Any]]) -> np.ndarray:
        """float64 [evaluations, micro-batches], of all ranks."""

        def run(rank: int) -> tuple[np.ndarray, Sequence[Unit]]:
            return self._lanes.run(step, deal.lanes[rank], closures, deal.first_batch[rank])

        if self._shared is None:
            return run(0)[0].reshape(len(self._evaluations), len(closures))
        return self._shared.gather(step, deal, run)

    def _diagnose(self, step: int, closures: Sequence[Callable[[], Any]]) -> None:
        """Once: a non-finite loss may come from a parameter used where it is not present. Then say which."""
        if self._diagnosed:
            return
        self._diagnosed = True
        with self._shared.mesh.together(f"step {step}") if self._shared is not None else nullcontext():
            if closures and not self._runtime.has_compiled():
                self._lanes.run_guarded(step, closures[0])

    def check(self, closure: Callable[[], Any]) -> float:
        """Runs two clean lanes of `closure` and returns their loss.

        Raises:
            DistZO2Error: they differ. The forward is not deterministic, and every estimate would be made of that noise.
        """
        return self._lanes.check(self.step_count, closure)

    def verify_replicas(self) -> None:
        """Reads all weights once and compares them across the ranks of the mesh; all ranks call it. Nothing to do
        without one.

        Raises:
            ReplicasDifferError: they differ; names the first unit that does, and the ranks.
        """
        if self._shared is None:
            return
        from distzo2.parallel.replicas import compare_replicas

        with self._interrupt:
            compare_replicas(self._runtime, self._shared.mesh.exchange, self.step_count)

    def close(self) -> None:
        """Ends the journal; what was appended is on disk afterwards. No step can follow."""
        self._closed = True
        snapshots, self._snapshots = self._snapshots, None
        try:
            if snapshots is not None:
                self._runtime.tap = None
                snapshots.close()
        finally:
            journal, self.journal = self.journal, None
            if journal is not None:
                journal.close()
                self._runtime.set_durable(ALWAYS_DURABLE)
            elif self._shared is not None:
                self._shared.close()


def _has_groups(journal: str | os.PathLike | None, mesh: Mesh | None) -> bool:
    """Whether the run so far, if there is one, keeps weights and biases in groups of their own."""
    if journal is None:
        return False
    if mesh is None:
        return num_groups_of(journal) > 1
    return int(mesh.exchange.from_rank_0("reading the journal", lambda: b"%d" % num_groups_of(journal))) > 1
