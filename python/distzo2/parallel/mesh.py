"""Shapes of a mesh of ranks, and which rank runs which lane of a step. Plain arithmetic: nothing here communicates.

A mesh is (data, pert): rank r has data coordinate r div pert and perturbation coordinate r mod pert. A lane is an
(evaluation, micro-batch) pair. Its noise and its random stream are functions of the pair, so which rank runs it changes
no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from distzo2.errors import UsageError

Evaluation = tuple[int, int]  # (probe, sign): sign +1 or -1; (0, 0) is the clean weights

# `sharded` of a step: its list of closures is the step's, the rank's own, or that of the rank's data coordinate.
GLOBAL, OWN, ROW = SHARDED = False, True, "data"


@dataclass(frozen=True)
class MeshShape:
    """Ranks along perturbations and along micro-batches."""

    pert: int
    data: int

    @property
    def size(self) -> int:
        return self.pert * self.data

    def __str__(self) -> str:
        return f"pert={self.pert},data={self.data}"


def parse_mesh(text: str) -> dict[str, int]:
    """`pert=2,data=2` as a dict; either may be left out.

    Raises:
        ValueError: it is not of that form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("pert", "data") or name in sizes or int(size) < 1:
            raise ValueError
        sizes[name] = int(size)
    return sizes


def num_perturbations(evaluations: Sequence[Evaluation]) -> int:
    """Distinct perturbations, signs not counted."""
    return len({probe for probe, sign in evaluations if sign})


def pert_fits(evaluations: Sequence[Evaluation], pert: int) -> bool:
    """Whether `pert` ranks can share the evaluations: it divides the perturbations, or else their evaluations."""
    return num_perturbations(evaluations) % pert == 0 or len(evaluations) % pert == 0


def deal_evaluations(evaluations: Sequence[Evaluation], pert: int) -> list[list[int]]:
    """For each of `pert` ranks the indices of its evaluations, ascending.

    Where `pert` divides the perturbations, both signs of one stay together: their difference is divided by 2·eps, so
    they should come from the same hardware. An evaluation of the clean weights then goes to the first rank.
    """
    probes = sorted({probe for probe, sign in evaluations if sign})
    if not probes or len(probes) % pert:
        return [list(part) for part in deal_evenly(len(evaluations), pert)]
    dealt: list[list[int]] = [[] for _ in range(pert)]
    for index, (probe, sign) in enumerate(evaluations):
        dealt[probes.index(probe) * pert // len(probes) if sign else 0].append(index)
    return dealt


def deal_evenly(count: int, parts: int) -> list[range]:
    """`count` things in `parts` consecutive ranges whose lengths differ by at most one, the longer ones first."""
    part, longer = divmod(count, parts)
    starts = [i * part + min(i, longer) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def resolve_mesh(
    world_size: int,
    pert: int | None = None,
    data: int | None = None,
    *,
    evaluations: Sequence[Evaluation] | None = None,
    micro_batches: int | None = None,
) -> MeshShape:
    """The mesh asked for, checked, or the best one for what is known of the step.

    Where nothing is asked, the mesh is the one whose busiest rank has the fewest lanes; among equals one that keeps
    both signs of a perturbation on one rank; then the one with the largest `pert`, whose ranks make the least noise.

    Args:
        world_size: number of ranks.
        pert, data: what was asked; None: to be chosen.
        evaluations: of the estimator; None: not known yet, those of one two-sided probe if a choice is needed.
        micro_batches: closures of a step; None: not known yet.

    Raises:
        UsageError: the mesh is impossible; the message says what would fit.
    """
    if pert is None and data is None:
        return _best(world_size, evaluations, micro_batches)
    shape = next((s for s in _shapes(world_size) if pert in (None, s.pert) and data in (None, s.data)), None)
    if shape is None:
        asked = ",".join(f"{name}={size}" for name, size in (("pert", pert), ("data", data)) if size is not None)
        needed = f"a multiple of {data if pert is None else pert}" if None in (pert, data) else pert * data
        there = "there is 1" if world_size == 1 else f"there are {world_size}"
        fitting = _fitting(world_size, evaluations, micro_batches)
        raise UsageError(f"{asked}: {needed} ranks would be needed, and {there}; {fitting}")
    check_step(shape, evaluations, micro_batches)
    return shape


def _misfit(shape: MeshShape, evaluations: Sequence[Evaluation] | None, micro_batches: int | None) -> str | None:
    if evaluations is not None and not pert_fits(evaluations, shape.pert):
        count = num_perturbations(evaluations)
        return f"{shape.pert} ranks share neither {count} perturbations nor their {len(evaluations)} evaluations evenly"
    if micro_batches is not None and micro_batches < shape.data:
        return f"{_counted(micro_batches, 'micro-batch', 'es')} a step cannot be dealt to {shape.data} data ranks"
    return None


def check_step(shape: MeshShape, evaluations: Sequence[Evaluation] | None, micro_batches: int | None) -> None:
    """Checks what is known of a step against the mesh; None: not known yet.

    Raises:
        UsageError: its lanes cannot be dealt to the mesh; the message says what would fit.
    """
    reason = _misfit(shape, evaluations, micro_batches)
    if reason:
        raise UsageError(f"{shape}: {reason}; {_fitting(shape.size, evaluations, micro_batches)}")


def _counted(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{'' if count == 1 else plural}"


def _shapes(world_size: int) -> list[MeshShape]:
    return [MeshShape(pert, world_size // pert) for pert in range(1, world_size + 1) if world_size % pert == 0]


def _fitting(world_size: int, evaluations: Sequence[Evaluation] | None, micro_batches: int | None) -> str:
    fitting = [str(s) for s in _shapes(world_size) if _misfit(s, evaluations, micro_batches) is None]
    ranks = _counted(world_size, "rank")
    if fitting:
        return f"on {ranks}, {' or '.join(fitting)} would fit"
    return (
        f"no mesh of {ranks} fits: more micro-batches or more probes would help, or as many ranks as divide "
        f"{_counted(len(evaluations or ()), 'evaluation')} x {_counted(micro_batches or 0, 'micro-batch', 'es')}"
    )


def _best(world_size: int, evaluations: Sequence[Evaluation] | None, micro_batches: int | None) -> MeshShape:
    evaluations = [(0, +1), (0, -1)] if evaluations is None else evaluations
    # If a step of one closure fits nowhere, there will be more of them.
    for num_batches in (1, world_size) if micro_batches is None else (micro_batches,):
        if shapes := [s for s in _shapes(world_size) if _misfit(s, evaluations, num_batches) is None]:
            break
    else:
        raise UsageError(_fitting(world_size, evaluations, num_batches))

    def cost(shape: MeshShape) -> tuple[int, bool, int]:
        dealt = deal_evaluations(evaluations, shape.pert)
        split = sum(len({evaluations[i][0] for i in part if evaluations[i][1]}) for part in dealt)
        busiest = max(map(len, dealt)) * -(-num_batches // shape.data)
        return busiest, split > num_perturbations(evaluations), -shape.pert

    return min(shapes, key=cost)


@dataclass(frozen=True)
class Deal:
    """Who runs which lane of a step. A lane is (index of the evaluation, global index of the micro-batch)."""

    num_batches: int  # of each evaluation; micro-batch m is the (m mod num_batches)-th of its evaluations
    lanes: list[list[tuple[int, int]]]  # [ranks], in the order in which a rank runs them
    first_batch: list[int]  # [ranks]: the micro-batch of a rank's closure 0


def deal_lanes(
    shape: MeshShape,
    evaluations: Sequence[Evaluation],
    num_closures: Sequence[int],
    sharded: bool | str,
    own_batches: bool = False,
) -> Deal:
    """Deals a step's lanes; each is run by exactly one rank.

    Args:
        shape: of the mesh.
        evaluations: of the step.
        num_closures: of each rank.
        sharded: GLOBAL: all ranks have the same list; OWN: each rank's closures are its own micro-batches, numbered in
            the order of ranks, and it runs all evaluations of them; ROW: the ranks of one data coordinate have the same
            list, numbered in the order of data coordinates.
        own_batches: the micro-batches are cut into as many equal parts as there are probes, in order, and a probe is
            evaluated on its own part alone. Ranks that have the same list then share it by micro-batches, whatever
            their coordinates.

    Raises:
        UsageError: ranks that should have equally many closures do not, or there is no closure at all; or the closures
            cannot be cut into as many parts.
    """
    width = 1 if sharded == OWN else shape.pert  # of the ranks that have the same list
    dealt = [range(len(evaluations))] if sharded == OWN or own_batches else deal_evaluations(evaluations, shape.pert)
    lists = num_closures[::width]
    for rank, count in enumerate(num_closures):
        if count != lists[rank // width]:
            raise UsageError(
                f"rank {rank} has {_counted(count, 'closure')} and rank {rank - rank % width}, of the same data "
                f"coordinate, {lists[rank // width]}"
            )
    if own_batches:
        return _deal_parts(evaluations, num_closures, shape.size if sharded == GLOBAL else width)
    if sharded == GLOBAL:
        spans, starts = deal_evenly(lists[0], shape.data), [0] * shape.data
    else:
        starts = [0, *accumulate(lists)]
        spans = [range(a, b) for a, b in pairwise(starts)]
    total = sum(map(len, spans))
    if total == 0:
        raise UsageError("no rank has a closure: a step needs at least one")
    lanes = [[(e, m) for e in dealt[r % width] for m in spans[r // width]] for r in range(shape.size)]
    return Deal(total, lanes, [starts[r // width] for r in range(shape.size)])


def _deal_parts(evaluations: Sequence[Evaluation], num_closures: Sequence[int], width: int) -> Deal:
    """Deals lanes of probes that have micro-batches of their own, where `width` ranks have the same list."""
    lists, num_probes = num_closures[::width], num_perturbations(evaluations)
    starts = [0, *accumulate(lists)]
    if starts[-1] % num_probes or not starts[-1]:
        total = _counted(starts[-1], "micro-batch", "es")
        raise UsageError(f"{total} cannot be cut into equal parts for {num_probes} probes with batches of their own")
    if width > 1 and min(lists) < width:
        raise UsageError(f"{width} ranks cannot share {_counted(min(lists), 'micro-batch', 'es')}, each of one probe")
    each, lanes = starts[-1] // num_probes, []
    for count, start in zip(lists, starts, strict=False):
        for part in deal_evenly(count, width):
            batches = [start + m for m in part]
            lanes.append([(e, m) for e, (probe, _) in enumerate(evaluations) for m in batches if m // each == probe])
    return Deal(each, lanes, [starts[r // width] for r in range(len(num_closures))])
