"""What an optimizer exchanges with the other ranks of its mesh; without a mesh, `Alone` stands in for them.

A step opens with an agreed word, runs this rank's lanes, gathers all losses as float64, and takes over the coefficients
that rank 0 makes of them: three collectives. Rank 0 alone writes the journal.

Write-ahead rule: a stored copy at version v may reach a disk once the journal's lines before v are durable. Where a
rank keeps its weights on disk, rank 0 therefore syncs a step's line before it broadcasts the update, and no rank waits
in the middle of a step. Elsewhere the broadcast says how many lines are durable so far.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from distzo2.errors import DistZO2Error, UsageError
from distzo2.estimators.registry import name_of
from distzo2.optim.moments import Momentum
from distzo2.optim.settings import GROUP_FIELDS, Settings, StepRecord, scalars_of
from distzo2.optim.state import SKIPPED
from distzo2.parallel.exchange import by_ranks, hash64
from distzo2.parallel.group import Mesh
from distzo2.parallel.mesh import GLOBAL, OWN, Deal, MeshShape, check_step, deal_lanes
from distzo2.record.journal import Journal
from distzo2.record.opening import fingerprint
from distzo2.streaming.lanes import Route
from distzo2.streaming.runtime import StreamingRuntime
from distzo2_core import NOISE_VERSION, ROUNDING_VERSION, GroupScalars, checksum

logger = logging.getLogger("distzo2")

ALWAYS_DURABLE = 2**62  # a version; without a journal nothing waits for one
_HEAD = 5  # numbers before the coefficients: failed, skipped, clipped, the largest before, lines that are durable

# (lanes as (evaluation, micro-batch), micro-batch of the first closure) -> sums and counts, their longest route, and
# the number of why the step is to be skipped, or 0
RunLanes = Callable[[Sequence[tuple[int, int]], int], tuple[np.ndarray, Route, int]]


class StepWord(NamedTuple):
    """What a rank says before a step."""

    step: int
    scalars: tuple[GroupScalars, ...]
    num_closures: int
    tokens: int
    sharded: bool | str
    count: float | None  # of losses in the step, if it is known
    momentum: Momentum


class Evaluated(NamedTuple):
    """What the lanes of all ranks gave, float64 [evaluations, micro-batches of each], which units they entered, and why
    the step is to be skipped."""

    sums: np.ndarray
    counts: np.ndarray
    entered: frozenset[int]  # indices of units
    skipped: str | None


class ReplicasDifferError(DistZO2Error):
    """Weights that must be bit-identical on all ranks are not; raised on all of them."""


class Alone:
    """A process without a mesh: has the methods of `SharedStep`, and asks nobody."""

    world_size = 1
    fingerprint: Mapping[str, Any] = {}
    first_version: int | None = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def join(self, table: Sequence[Any], groups: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> None:
        """No-op: there is nobody to agree with."""

    def check(self) -> None:
        """No-op: no other rank can fail."""

    def together(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def from_rank_0(self, what: str, make: Callable[[], bytes]) -> bytes:
        return make()

    def open(self, word: StepWord, error: Exception | None) -> tuple[Deal, int]:
        if error is not None:
            raise error
        s = self.settings
        return deal_lanes(MeshShape(1, 1), s.evaluations, [word.num_closures], GLOBAL, s.own_batches), word.tokens

    def gather(self, step: int, deal: Deal, run: RunLanes) -> Evaluated:
        losses, route, skipped = run(deal.lanes[0], 0)
        sums, counts = losses.T.reshape(2, len(self.settings.evaluations), deal.num_batches)
        return Evaluated(sums, counts, frozenset(unit.index for unit in route.units), SKIPPED[skipped])

    def decide(self, record: StepRecord, make: Callable[[], None], journal: Journal | None) -> None:
        make()

    def verify(self, step: int) -> None:
        """No-op: there is one replica."""


class SharedStep:
    """One optimizer's part in the steps of a mesh."""

    def __init__(self, mesh: Mesh, runtime: StreamingRuntime, settings: Settings) -> None:
        """
        Raises:
            UsageError: the mesh cannot share the evaluations of a step; the message says what would fit.
        """
        check_step(mesh.shape, settings.evaluations, None)
        self.settings = settings
        self.first_version: int | None = None  # of the weights before the journal's first entry; None: no journal
        self.fingerprint: dict[str, Any] = {}  # for the journal's header
        self.world_size, self.check = mesh.world_size, mesh.exchange.heartbeat.check
        self.together, self.from_rank_0 = mesh.together, mesh.exchange.from_rank_0
        self._shape, self._exchange, self._rank, self._runtime = mesh.shape, mesh.exchange, mesh.rank, runtime
        self._syncs = False  # rank 0 syncs each line before the update is broadcast

    # ---- when the optimizer is made -----------------------------------------------------------------------------

    def join(self, table: Sequence[Any], groups: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> None:
        """Compares the optimizers of all ranks, and what the bits of their forwards depend on.

        `table` is the index table, and `given` says which optional arguments were given. Raises RanksDisagreeError on
        all ranks if the optimizers differ; other forwards are reported.
        """
        s = self.settings
        fields = {
            "the units": [(u.name, u.num_bytes) for u in self._runtime.units],
            "the parameters": table,
            **{name: getattr(s, name) for name in ("seed", "eps", "noise", "fsync_every", "verify_every")},
            **{f"the {name}": getattr(s, name) for name in ("momentum", "momentum_window", "probe_batches")},
            "the evaluations": s.evaluations,
            "the estimator": name_of(s.estimator),
            "the versions": (NOISE_VERSION, ROUNDING_VERSION),
            **given,
            **_fields_of(scalars_of(groups)),
        }
        on_disk = self._exchange.agree("making the optimizer", fields, numbers=[int(self._runtime.where == "disk")])
        self._syncs = any(row[0] for row in on_disk)
        mine = json.dumps(fingerprint(self._runtime.device)).encode()
        prints = [json.loads(text) for text in self._exchange.gather_bytes(mine)]
        self.fingerprint = {"mesh": vars(self._shape).copy(), "ranks": prints}
        for rank, other in enumerate(prints if self._rank == 0 else ()):
            for key in [key for key, value in prints[0].items() if other.get(key) != value]:
                message = "rank %d has %s %r and rank 0 %r: a run on another number of ranks may have other bits"
                logger.warning(message, rank, key, other.get(key), prints[0][key])

    # ---- a step -------------------------------------------------------------------------------------------------

    def open(self, word: StepWord, error: Exception | None) -> tuple[Deal, int]:
        """The agreed word of a step. `error` is why this rank cannot take part.

        Returns:
            Who runs which lane, and the tokens of all ranks.

        Raises:
            RanksDisagreeError: the ranks are about to make different steps; on all of them.
        """
        s, shape, tokens, is_global = self.settings, self._shape, word.tokens, word.sharded == GLOBAL
        fields = {
            "the step": word.step,
            "sharded": word.sharded,
            "the number of closures": word.num_closures if is_global else "its own",
            "tokens (lists of each rank's own closures need sharded=True)": tokens if is_global else "its own",
            "count": word.count,
            "eps": s.eps,
            "the terms of earlier steps": hash64(word.momentum.newest),
            "seed": s.seed,  # `join` has compared what else does not change
            **_fields_of(word.scalars),
        }
        numbers = self._exchange.agree(f"step {word.step}", fields, numbers=(word.num_closures, tokens), error=error)
        if is_global:
            try:
                check_step(shape, s.evaluations, word.num_closures)
            except UsageError as unfit:
                raise UsageError(f"{unfit}; or, if each rank has closures of its own, sharded=True") from None
        deal = deal_lanes(shape, s.evaluations, [row[0] for row in numbers], word.sharded, s.own_batches)
        rows = range(0, shape.size, 1 if word.sharded == OWN else shape.pert)
        return deal, tokens if is_global else sum(numbers[rank][1] for rank in rows)

    def gather(self, step: int, deal: Deal, run: RunLanes) -> Evaluated:
        """Runs this rank's lanes, and gathers the losses of all.

        Raises:
            Anything that `run` raises; the other ranks get a RankFailedError.
            DistZO2Error: the lanes of two ranks entered different units.
        """
        losses, route, skipped, error = np.zeros((0, 2)), Route(), 0, None
        try:
            losses, route, skipped = run(deal.lanes[self._rank], deal.first_batch[self._rank])
        except BaseException as raised:
            error = raised
            if self._exchange.broken:  # in a gather of slices: the other ranks know
                raise
        most, num_words = max(len(lanes) for lanes in deal.lanes), -(-len(self._runtime.units) // 64)
        first = 3 + num_words
        # failed, hash of the units in their order, why to skip, a bit for each unit, the bits of sums and counts
        mine = np.zeros(first + 2 * most, dtype=np.int64)
        mine[0], mine[2] = error is not None, skipped
        if error is None:
            mine[1] = hash64([unit.name for unit in route.units])
            in_units = np.zeros(64 * num_words, dtype=bool)
            in_units[[unit.index for unit in route.units]] = True
            mine[3:first] = np.packbits(in_units).view(np.int64)
            mine[first : first + losses.size] = losses.reshape(-1).view(np.int64)
        rows = self._exchange.gather(torch.from_numpy(mine)).numpy()
        self._exchange.settle(f"step {step}", [bool(f) for f in rows[:, 0]], error)
        working = [rank for rank, lanes in enumerate(deal.lanes) if lanes]
        if len({int(rows[rank, 1]) for rank in working}) > 1:
            self._compare(step, route, {rank: rows[rank, 3:first].tolist() for rank in working})
        result = np.zeros((2, len(self.settings.evaluations), deal.num_batches))
        for rank, lanes in enumerate(deal.lanes):
            for lane, loss in zip(lanes, rows[rank, first:].view(np.float64).reshape(-1, 2), strict=False):
                result[:, lane[0], lane[1] % deal.num_batches] = loss
        words = np.bitwise_or.reduce(rows[:, 3:first])  # ranks without lanes entered none
        units = frozenset(np.flatnonzero(np.unpackbits(words.view(np.uint8))).tolist())
        return Evaluated(*result, units, SKIPPED[rows[:, 2].max()])

    def _compare(self, step: int, route: Route, units: Mapping[int, list[int]]) -> None:
        """Compares the routes of the ranks that have lanes: one may be the first passes of another. `units` says of
        each of them, a bit a unit, which units it entered.

        Raises:
            DistZO2Error: the lanes of two ranks entered different units.
        """
        passes = np.array([hash64([unit.name for unit in one]) for one in route.passes()], dtype=np.int64)
        found = [np.frombuffer(data, np.int64).tolist() for data in self._exchange.gather_bytes(passes.tobytes())]
        longest = max(units, key=lambda rank: len(found[rank]))
        for rank in units:
            if found[rank] != found[longest][: len(found[rank])] or units[rank] != units[longest]:
                one, other = sorted((rank, longest))
                raise DistZO2Error(
                    f"step {step}: the lanes of all ranks must enter the same units in the same order, and those of "
                    f"rank {other} entered others than those of rank {one}. Where a forward skips blocks for some "
                    "batches or perturbations, name with units= a module around them."
                )

    def decide(self, record: StepRecord, make: Callable[[], None], journal: Journal | None) -> None:
        """Rank 0 calls `make`, which fills `record` and appends to the journal; the other ranks take `record` over."""
        num_probes, failure = self.settings.num_probes, None
        made = np.zeros(_HEAD + num_probes + len(record.memory))
        if self._rank == 0:
            try:
                make()
                if journal is not None and self._syncs:
                    journal.sync()
                durable = 0 if journal is None else journal.durable
                skipped, largest = SKIPPED.index(record.skipped), record.largest or 0.0
                made[:_HEAD] = 0.0, skipped, record.clipped, largest, durable
                made[_HEAD:] = *(record.coefs or [0.0] * num_probes), *record.memory
            except BaseException as error:
                failure, made[0] = error, 1.0
        failed, skipped, clipped, largest, durable, *coefs = self._exchange.broadcast(torch.from_numpy(made)).tolist()
        others = [False] * (self.world_size - 1)
        self._exchange.settle(f"step {record.step}", [bool(failed), *others], failure)
        if self._rank == 0:
            return
        if self.first_version is not None:
            self._runtime.weights.set_durable(self.first_version + int(durable))
        record.skipped, record.clipped = SKIPPED[int(skipped)], bool(clipped)
        record.coefs, record.memory = coefs[:num_probes] if record.skipped is None else [], tuple(coefs[num_probes:])
        record.largest = largest if clipped else None

    def verify(self, step: int) -> None:
        """Reads every unit once, with every update made so far, and compares it across ranks.

        Raises:
            ReplicasDifferError: on all ranks; names the first unit that differs and which ranks agree with each other.
        """
        units = self._runtime.units
        sums = torch.zeros(len(units), dtype=torch.int64)
        with self.together(f"comparing replicas at step {step}"):
            for unit, views in self._runtime.access.visit():
                sums[unit.index] = checksum(views)
        for unit, row in zip(units, self._exchange.gather(sums).T.tolist(), strict=True):
            if len(set(row)) > 1:
                sums_of_ranks = by_ranks([f"{value % 2**64:016x}" for value in row])
                raise ReplicasDifferError(
                    f"after {step} steps the ranks differ, first in unit {unit.name!r} ({sums_of_ranks})"
                )


def _fields_of(scalars: Sequence[GroupScalars]) -> dict[str, Any]:
    return {name: [getattr(group, name) for group in scalars] for name in GROUP_FIELDS}
