"""What an optimizer's step exchanges with the other ranks of its mesh.

A step opens with an agreed word, runs this rank's lanes, gathers all losses as float64, and takes over what rank 0
makes of them: three collectives, which `parallel.stats()` counts. Rank 0 alone writes the journal.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distzo2.errors import DistZO2Error, UsageError
from distzo2.optim.parameter_groups import scalars_of
from distzo2.optim.state import NON_FINITE_COEFFICIENT, NON_FINITE_LOSS
from distzo2.parallel.durability import ALWAYS_DURABLE, DurabilityListener, DurabilityTeller
from distzo2.parallel.exchange import hash64
from distzo2.parallel.heartbeat import RankFailedError
from distzo2.parallel.mesh import GLOBAL, OWN, SHARDED, Deal, check_step, deal_lanes
from distzo2.record.entry import StepEntry
from distzo2.record.header import index_table
from distzo2.record.journal import Journal
from distzo2.record.lineage import first_like_step, first_own_step
from distzo2.record.opening import check_no_others, durability_callbacks, fingerprint, go_on_from, open_run_journal
from distzo2_core import FAMILIES, NOISE_VERSION, ROUNDING_VERSION, GroupScalars, Term, Update

if TYPE_CHECKING:
    from pathlib import Path

    from distzo2.optim.zosgd import ZOSGD, StepRecord
    from distzo2.parallel.group import Mesh
    from distzo2.record.snapshot import Snapshots
    from distzo2.record.snapshot_resume import Found
    from distzo2.weights.units import Unit

logger = logging.getLogger("distzo2")

SKIPPED = (None, NON_FINITE_LOSS, NON_FINITE_COEFFICIENT)  # by their numbers in what rank 0 broadcasts
GROUP_FIELDS = ("lr", "weight_decay", "perturb_scale", "update_scale")


class SharedStep:
    """One optimizer's part in a mesh."""

    def __init__(self, mesh: Mesh, optimizer: ZOSGD) -> None:
        self.mesh, self._exchange, self._rank = mesh, mesh.exchange, mesh.rank
        self._optimizer = weakref.proxy(optimizer)
        self._units = hash64([(u.name, u.num_bytes) for u in optimizer._runtime.units])
        self._listener: DurabilityListener | None = None
        self.from_snapshot = False  # some ranks may have read one, and others made the updates before it again
        self._journal_from = 0  # version of the weights before the journal's first entry
        self.fingerprints: list[dict[str, Any]] = []
        self._runtime = runtime = weakref.ref(optimizer._runtime)
        mesh.heartbeat.on_failure(lambda error: (alive := runtime()) is not None and alive.fail(error))

    # ---- joining ------------------------------------------------------------------------------------------------

    def join(self, journal: bool, snapshots: bool, resume: bool) -> None:
        """Compares the optimizers of all ranks, and what the bits of their forwards depend on.

        Raises:
            RanksDisagreeError: they are not the same; on all ranks.
        """
        optimizer = self._optimizer
        fields = {
            "the parameters": index_table(optimizer._runtime.params, optimizer.param_groups, optimizer.noise),
            "seed": optimizer.seed,
            "eps": optimizer.eps,
            "noise": optimizer.noise,
            "num_probes": optimizer.num_probes,
            "the estimator": type(optimizer.estimator).__name__,
            "the versions": (NOISE_VERSION, ROUNDING_VERSION),
            "having a journal": journal,
            "having snapshots": snapshots,
            "the journal's options": optimizer._journal_options,
            "resume": resume,
            "branching": optimizer._branch is not None,
            "verify_every": optimizer.verify_every,
            **self._scalar_fields(scalars_of(optimizer.param_groups)),
        }
        self._exchange.agree("making the optimizer", fields)
        mine = json.dumps(fingerprint(optimizer._runtime.device)).encode()
        self.fingerprints = [json.loads(text) for text in self._exchange.gather_bytes(mine)]
        if self._rank == 0:
            for rank, other in enumerate(self.fingerprints):
                for key, value in self.fingerprints[0].items():
                    if other.get(key) != value:
                        logger.warning(
                            "rank %d has %s %r and rank 0 %r: a run on another number of ranks may have other bits",
                            rank, key, other.get(key), value,
                        )  # fmt: skip

    @staticmethod
    def _scalar_fields(scalars: Sequence[GroupScalars]) -> dict[str, Any]:
        return {name: [getattr(group, name) for group in scalars] for name in GROUP_FIELDS}

    # ---- the journal --------------------------------------------------------------------------------------------

    def open_journal(self, path: Any, resume: bool, snapshots: Snapshots | None) -> tuple[Journal | None, list[Path]]:
        """Opens or makes the journal on rank 0, and gives every rank the entries that it held. Weights are filled from
        the snapshot that rank 0 chooses, on each rank that sees it; on the others the updates lead from the base to the
        same weights.

        Returns:
            The journal on rank 0, None on the others; and the snapshots that were found to be damaged.
        """
        optimizer, runtime = self._optimizer, self._optimizer._runtime
        self._journal_from = runtime.version
        opened: list[Journal] = []

        def on_rank_0() -> bytes:
            check_no_others(snapshots, resume)
            header = optimizer.journal_header()
            header["fingerprint"] |= {
                "mesh": {"pert": self.mesh.shape.pert, "data": self.mesh.shape.data},
                "ranks": self.fingerprints,
            }
            journal = open_run_journal(
                path, header, resume=resume, branch=optimizer._branch, **optimizer._journal_options
            )
            opened.append(journal)
            firsts = b"%d %d\n" % (first_own_step(journal.header), first_like_step(journal.header))
            return firsts + b"".join(entry.to_line() for entry in journal.entries)

        try:
            firsts, *lines = self._exchange.from_rank_0("opening the journal", on_rank_0).splitlines(True)
            entries = opened[0].entries if opened else [StepEntry.from_line(line) for line in lines]
            found = self._choose_snapshot(snapshots, path, len(entries)) if resume and snapshots is not None else None
            with self._exchange.together("taking over the journal"):
                optimizer.first_step, first_like = (int(number) for number in firsts.split())
                if found is not None:
                    go_on_from(found, runtime, snapshots)
                optimizer.take_over(entries, first_like)
        except BaseException:
            for journal in opened:
                journal.close()
            raise
        name = self.mesh.ranks.unique_name("durable")
        first = self._journal_from
        tell_durable, tell_failure = durability_callbacks(runtime, first)
        if self._rank != 0:
            runtime.set_durable(first + len(entries))
            store = self.mesh.ranks.store
            self._listener = DurabilityListener(store, store.clone(), name, self._rank, len(entries), tell_durable)
            self.mesh.ranks.closers.append(self.close)
            return None, []
        journal, teller = opened[0], DurabilityTeller(self.mesh.ranks.store.clone(), name, self.mesh.world_size)
        heartbeat = self.mesh.heartbeat
        runtime.set_durable(first + journal.durable)

        def on_durable(durable: int) -> None:
            tell_durable(durable)
            teller.tell(durable)

        journal.on_durable(on_durable)
        journal.on_failure(tell_failure)
        journal.on_failure(lambda error: heartbeat.post(f"rank 0: {error}"))
        return journal, found.invalid if found is not None else []

    def _choose_snapshot(self, snapshots: Snapshots, journal: Any, num_steps: int) -> Found:
        """The newest snapshot that is whole, as rank 0 finds it."""
        from distzo2.record.snapshot_resume import Found, find_same, find_snapshot

        runtime, chosen = self._optimizer._runtime, []

        def choose() -> bytes:
            found = find_snapshot(snapshots.directory, runtime, journal, num_steps)
            chosen.append(found)
            return b"" if found.path is None else found.path.name.encode() + b"\n" + found.manifest.line

        name, _, line = self._exchange.from_rank_0("choosing a snapshot", choose).partition(b"\n")
        self.from_snapshot = bool(name)
        if chosen:
            return chosen[0]
        return find_same(snapshots.directory, runtime, name.decode(), line) if name else Found(None, None)

    def close(self) -> None:
        """Ends what `open_journal` began on ranks that do not write it, once all lines so far are durable. Weights that
        wait for lines that will never be are given up with an error."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        runtime, reached = self._runtime(), False
        try:
            in_memory = runtime is not None and runtime.where != "disk"  # such weights do not wait for the journal
            wanted, heartbeat = self._optimizer.step_count, self.mesh.heartbeat
            reached = in_memory or listener.wait_until(wanted, heartbeat.limit, heartbeat.check)
        except (RankFailedError, ReferenceError):  # another rank is gone, or the optimizer
            pass
        finally:
            listener.close(**({"seconds": 0.0} if self.mesh.heartbeat.store_lost else {}))
        if runtime is not None:
            if reached:
                runtime.set_durable(ALWAYS_DURABLE)
            else:
                runtime.fail(DistZO2Error("the journal on rank 0 is not known to be durable up to the last steps"))

    # ---- a step -------------------------------------------------------------------------------------------------

    def open(
        self,
        step: int,
        num_closures: int,
        tokens: int,
        sharded: bool | str,
        error: BaseException | None,
    ) -> tuple[tuple[GroupScalars, ...], Deal, int]:
        """The agreed word of a step. `error` is why this rank cannot take part.

        Returns:
            The groups' scalars, who runs which lane, and the tokens of all ranks.

        Raises:
            RanksDisagreeError: the ranks are about to make different steps; on all of them.
        """
        optimizer, mode = self._optimizer, SHARDED.get(sharded, GLOBAL)
        scalars: tuple[GroupScalars, ...] = ()
        try:
            scalars = scalars_of(optimizer.param_groups)
        except Exception as unfit:
            error = error or unfit
        fields = {
            "the step": step,
            "sharded": sharded,
            "the number of closures": num_closures if mode == GLOBAL else "its own",
            "tokens (lists of each rank's own closures need sharded=True)": tokens if mode == GLOBAL else "its own",
            "seed": optimizer.seed,
            "eps": optimizer.eps,
            "noise": optimizer.noise,
            "the evaluations": optimizer._evaluations,
            "the units": self._units,
            **self._scalar_fields(scalars),
        }
        numbers = self._exchange.agree(f"step {step}", fields, numbers=(num_closures, tokens), error=error)
        counts = [row[0] for row in numbers]
        if mode == GLOBAL:
            try:
                check_step(self.mesh.shape, optimizer._evaluations, num_closures)
            except UsageError as unfit:
                raise UsageError(f"{unfit}; or, if each rank has closures of its own, sharded=True") from None
        deal = deal_lanes(self.mesh.shape, optimizer._evaluations, counts, mode)
        rows = range(0, self.mesh.world_size, 1 if mode == OWN else self.mesh.shape.pert)
        return scalars, deal, tokens if mode == GLOBAL else sum(numbers[rank][1] for rank in rows)

    def gather(self, step: int, deal: Deal, run: Callable[[int], tuple[np.ndarray, Sequence[Unit]]]) -> np.ndarray:
        """float64 [evaluations, micro-batches] of all ranks.

        Args:
            run: runs the lanes of this rank, and gives their losses and the units that they entered. What ends it is
                raised here, and an error on the other ranks.
        """
        losses, entered, error = np.zeros(0), (), None
        try:
            losses, entered = run(self._rank)
        except BaseException as raised:
            error = raised
            if self._exchange.broken:  # in a gather of slices: the others know
                raise
        most = max(len(lanes) for lanes in deal.lanes)
        mine = np.zeros(2 + most, dtype=np.int64)  # failed, hash of the units, the bits of the losses
        mine[0] = error is not None
        if error is None:
            mine[1] = hash64([unit.name for unit in entered])
            mine[2 : 2 + len(losses)] = losses.view(np.int64)
        rows = self._exchange.gather(torch.from_numpy(mine)).numpy()
        self._exchange.settle(f"step {step}", [bool(f) for f in rows[:, 0]], error)
        working = [rank for rank, lanes in enumerate(deal.lanes) if lanes]
        for rank in working[1:]:
            if rows[rank, 1] != rows[working[0], 1]:
                raise DistZO2Error(
                    f"step {step}: the lanes of all ranks must enter the same units in the same order, and those of "
                    f"rank {rank} entered others than those of rank {working[0]}. Where a forward skips blocks for "
                    "some batches or perturbations, name with units= a module around them."
                )
        result = np.zeros((len(self._optimizer._evaluations), deal.num_batches))
        for rank, lanes in enumerate(deal.lanes):
            values = rows[rank, 2 : 2 + len(lanes)].view(np.float64)
            for (evaluation, batch), value in zip(lanes, values, strict=True):
                result[evaluation, batch] = value
        return result

    def decide(self, step: int, make: Callable[[], Update], record: StepRecord) -> Update:
        """The step's update: `make`, which fills `record` too, is called on rank 0 alone."""
        optimizer = self._optimizer
        num_probes, num_groups = optimizer.num_probes, len(optimizer.param_groups)
        update, failure = None, None
        made = np.zeros(3 + num_probes + len(GROUP_FIELDS) * num_groups)
        if self._rank == 0:
            try:
                update = make()
                scalars = [getattr(group, name) for group in update.groups for name in GROUP_FIELDS]
                coefs = record.coefs or [0.0] * num_probes
                made[:] = [0.0, SKIPPED.index(record.skipped), record.clipped, *coefs, *scalars]
            except BaseException as error:
                failure, made[0] = error, 1.0
        made = self._exchange.broadcast(torch.from_numpy(made)).numpy()
        self._exchange.settle(f"step {step}", [bool(made[0]), *[False] * (self.mesh.world_size - 1)], failure)
        if update is not None:
            return update
        record.skipped, record.clipped = SKIPPED[int(made[1])], bool(made[2])
        if record.skipped is None:
            record.coefs = made[3 : 3 + num_probes].tolist()
        if record.skipped != NON_FINITE_LOSS:
            optimizer._clip.take(record.coefs, record.clipped)
        groups = made[3 + num_probes :].reshape(num_groups, len(GROUP_FIELDS)).tolist()
        family = FAMILIES[optimizer.noise]
        terms = tuple(Term(family, step, k, 0, c) for k, c in enumerate(record.coefs))
        return Update(step, tuple(GroupScalars(*group) for group in groups), terms)
