"""Meshes of ranks, and which lanes each rank runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distzo2.errors import UsageError
from distzo2.optim.estimator import Evaluation
from distzo2.parallel import mesh as dealing


@dataclass(frozen=True)
class Mesh:
    """Ranks by perturbation and by data."""

    pert: int = 1
    data: int = 1

    @property
    def num_ranks(self) -> int:
        return self.pert * self.data

    def __str__(self) -> str:
        parts = [f"{name}={n}" for name, n in (("pert", self.pert), ("data", self.data)) if n > 1]
        return ",".join(parts) or "one device"


def parse_mesh(text: str) -> Mesh:
    """`pert=2,data=4` in any order, either left out.

    Raises:
        UsageError: anything else.
    """
    try:
        return Mesh(**dealing.parse_mesh(text))
    except ValueError:
        raise UsageError(f"--parallel {text}: expected pert=P,data=D with numbers of at least 1") from None


def perturbation_shares(evaluations: Sequence[Evaluation], pert: int) -> list[list[Evaluation]] | None:
    """The evaluations of each of `pert` ranks, as a step deals them; None if they cannot share them."""
    if not dealing.pert_fits(evaluations, pert):
        return None
    return [[evaluations[i] for i in indices] for indices in dealing.deal_evaluations(evaluations, pert)]


def busiest_share(mesh: Mesh, evaluations: Sequence[Evaluation], num_batches: int) -> tuple[list[Evaluation], int]:
    """Evaluations and micro-batches of a rank that has the most.

    Raises:
        UsageError: the mesh is impossible; the message says what would fit.
    """
    shares = perturbation_shares(evaluations, mesh.pert)
    if shares is None:
        fits = [p for p in range(1, len(evaluations) + 1) if perturbation_shares(evaluations, p)]
        raise UsageError(
            f"pert={mesh.pert} does not divide the step's {len(evaluations)} perturbations: "
            f"pert={', '.join(map(str, fits))} would"
        )
    if num_batches < mesh.data:
        raise UsageError(
            f"data={mesh.data} needs as many micro-batches, and there are {num_batches}: --micro-batches {mesh.data}, "
            f"or data={num_batches} at most"
        )
    return max(shares, key=len), -(-num_batches // mesh.data)


def possible_meshes(
    num_ranks: int, evaluations: Sequence[Evaluation], num_batches: int | None, batch: int
) -> list[Mesh]:
    """All of `num_ranks` ranks over which a step can be dealt; `num_batches` None: as many as the mesh needs, of those
    that divide the batch.

    Raises:
        UsageError: there is none.
    """
    found = []
    for pert in range(1, num_ranks + 1):
        if num_ranks % pert or perturbation_shares(evaluations, pert) is None:
            continue
        data = num_ranks // pert
        if (batch % data == 0) if num_batches is None else (num_batches >= data):
            found.append(Mesh(pert, data))
    if not found:
        raise UsageError(
            f"no mesh of {num_ranks} ranks can share {len(evaluations)} perturbations and "
            + (f"a batch of {batch}" if num_batches is None else f"{num_batches} micro-batches")
            + ": more --probes, or a --batch that more ranks divide"
        )
    return found
