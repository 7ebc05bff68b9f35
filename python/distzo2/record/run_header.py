"""The header of a run's journal: everything that a line's scalars refer to."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.record.journal import check_table, make_header, table_row
from distzo2.version import __version__
from distzo2.weights.units import ParamInfo
from distzo2_core import NOISE_VERSION, ROUNDING_VERSION

logger = logging.getLogger("distzo2")


def run_header(
    *,
    seed: int,
    options: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
    table: list[dict[str, Any]],
    source: Any | None,
    device: torch.device,
) -> dict[str, Any]:
    """The journal header of a run: index table, base checkpoint, versions, options, fingerprint.

    Args:
        seed: of the run.
        options: of the estimate: eps, num_probes, estimator.
        groups: the parameter groups, with their tensors.
        table: from `index_table`.
        source: the checkpoint that the weights are those of; None: of none.
        device: where forwards run.
    """
    return make_header(
        seed=seed,
        base=base_record(source),
        checkpoint_map=None if source is None else source.map.to_json(),
        table=table,
        groups=[
            {k: v for k, v in group.items() if k != "params" and isinstance(v, (int, float, str))} for group in groups
        ],
        noise_version=NOISE_VERSION,
        rounding_version=ROUNDING_VERSION,
        options=options,
        software={
            "distzo2": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        fingerprint=fingerprint(device),
    )


def base_record(path: os.PathLike | None) -> dict[str, Any]:
    """Name and checksums of the checkpoint that the run started from; no files for a model that came from none."""
    if path is None:
        return {"name": "", "files": {}}
    from distzo2.checkpoint.replay import digest_checkpoint

    return digest_checkpoint(path)


def check_same_run(path: str | os.PathLike, journal: dict[str, Any], run: dict[str, Any]) -> None:
    """Raises DistZO2Error unless a run with the header `run` can go on with the journal at `path`.

    A fingerprint that differs is logged: the journal still leads to the same weights, but the forwards to come may not
    have the bits that they would have had.
    """
    check_table(journal, run["table"])
    pairs = {key: (journal[key], run[key]) for key in ("seed", "noise", "rounding", "options")}
    pairs["base checkpoint"] = journal["base"]["files"], run["base"]["files"]
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise DistZO2Error(f"{os.fspath(path)}: {key} is {theirs!r} in the journal and {ours!r} in this run")
    before, now = journal["fingerprint"], run["fingerprint"]
    ranks_before, ranks_now = before.get("ranks") or [before], now.get("ranks") or [now]
    for key in sorted({key for each in ranks_now for key in each} - {"mesh", "ranks"}):
        was, is_now = [each.get(key) for each in ranks_before], [each.get(key) for each in ranks_now]
        if any(value != was[0] for value in was + is_now):
            change = f"{key} was {_by_rank(was)} and is {_by_rank(is_now)}"
            logger.warning("%s: %s: the bits of losses to come may differ", path, change)
    if before.get("mesh") != now.get("mesh"):
        logger.info("%s: the mesh was %s and is %s", path, before.get("mesh"), now.get("mesh"))


def _by_rank(values: Sequence[Any]) -> str:
    """`2`, or of ranks that differ `2 (rank 0), 1 (rank 1, 2)`."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(str(rank))
    if len(ranks) == 1:
        return next(iter(ranks))
    return ", ".join(f"{value} (rank {', '.join(which)})" for value, which in ranks.items())


def index_table(params: Iterable[ParamInfo], group_of: Mapping[int, int], noise: str) -> list[dict[str, Any]]:
    """What the noise depends on: one row for each parameter, in order. `group_of` maps a parameter's index to its
    group."""
    return [
        table_row(p.index, p.name, p.shape, p.dtype, p.stride, p.index in group_of, group_of.get(p.index), noise)
        for p in params
    ]


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What the bits of a forward depend on besides the weights."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_capability()
    return {
        "device": name,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "matmul_precision": _matmul_precision(),
    }


def _matmul_precision() -> str:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; asking in the old way is an error once the new one was used
        return str(matmul.fp32_precision)
    return "tf32" if matmul.allow_tf32 else "ieee"


def _cpu_capability() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
