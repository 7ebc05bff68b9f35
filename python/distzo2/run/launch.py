"""What stands before and after a run of `distzo2 finetune`: its options, its mesh of ranks, and one message at the end.

torchrun starts the same command on every rank. Rank 0 alone reads options and the run directory, writes it and prints;
where an error ends a run, one rank reports it and all of them end with a status that is not 0.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from distzo2.datasets.protocol import TUNED_BY, protocol
from distzo2.errors import UsageError
from distzo2.estimators.registry import make_estimator
from distzo2.option_types import checked, made, read_config
from distzo2.parallel import group as parallel
from distzo2.parallel.heartbeat import STORE_SECONDS, RankFailedError, bounded, process_start
from distzo2.parallel.mesh import parse_mesh, resolve_mesh
from distzo2.peft.library import method_of
from distzo2.run.directory import saved_options
from distzo2.run.options import KEPT_BY_BRANCHES, OWNED, FinetuneOptions, check_needs

REPORT_SECONDS = 3.0  # how long the other ranks leave it to the one that failed to report its error

# --lr and --eps where only an adapter is trained, as in MeZO (arXiv 2305.17333); a prompt has a prefix's.
_OF_PROMPTS = {"lr": 1e-2, "eps": 1e-1}
_OF_LORA = {"lr": 1e-4, "eps": 1e-2}
RATES = {"lora": _OF_LORA, "gain": _OF_LORA, "prefix": _OF_PROMPTS, "prompt": _OF_PROMPTS}
# In the place of those by spsa, whose steps have another size; None: all weights, the least rate of docs/precision.md,
# which an eps below 1e-3 takes too. Of prompts nothing was tried.
_OF_ONE_SIZE = {None: {"lr": 2e-3}, "lora": {"lr": 3e-2}, "gain": {"lr": 3e-2}}  # steps do not grow with the losses
BY_ESTIMATOR = dict.fromkeys(("fzoo", "es", "meazo", "spsa-sign"), _OF_ONE_SIZE)
BY_ESTIMATOR["1.5spsa"] = {None: {"lr": 1e-4, "eps": 1e-4}}  # the paper's
# With --objective reward: members are compared with each other, since rewards have no scale of their own.
REWARDED = {"estimator": "es", "probes": 8}


def finetune_options(given: Mapping[str, Any], config: str | None = None) -> FinetuneOptions:
    """The options of a run. The command line wins over the file, the file over the run that is resumed or branched, and
    that over the defaults. On many ranks they are rank 0's.

    Args:
        given: checked values from the command line.
        config: a file of options.

    Raises:
        UsageError: the file cannot be used, an option is missing or out of range, or two do not go together.
    """
    if parallel.world_size_of_environment() > 1:
        limit = given.get("heartbeat_limit", FinetuneOptions.heartbeat_limit)
        device = given.get("device", FinetuneOptions.device)
        parallel.join(device=device, limit=limit, interval=heartbeat_interval(limit))
    return FinetuneOptions(**from_rank_0("reading the options", lambda: asdict(_read_options(given, config))))


def together(mesh: parallel.Mesh | None, what: str) -> AbstractContextManager[None]:
    """A block that the ranks of a mesh run together: an exception of one is an error of all. No-op without a mesh."""
    return nullcontext() if mesh is None else mesh.together(what)


def from_rank_0(what: str, read: Callable[[], Any]) -> Any:
    """The JSON value that `read` returns on rank 0; without ranks, here."""
    exchange = parallel.joined()
    if exchange is None:
        return read()
    return json.loads(exchange.from_rank_0(what, lambda: json.dumps(read()).encode()))


def _read_options(given: Mapping[str, Any], config: str | None) -> FinetuneOptions:
    values = given = read_config(FinetuneOptions, config) | given
    if values.get("resume") and values.get("branch_from"):
        raise UsageError("--resume continues the run in --out, --branch-from begins another: give one of them")
    if values.get("resume"):
        if not values.get("out"):
            raise UsageError("--resume needs --out, the directory of the run")
        values = _saved(values["out"]) | values
    else:
        values = protocol(values) | values
    parent = _saved(values["branch_from"]) if values.get("branch_from") else {}
    if parent:
        values = _taken_over(parent, values) | values
    elif values.get("objective") == "reward":
        values = REWARDED | values
    method = values.get("peft") or method_of(values.get("adapter")) or TUNED_BY.get(values.get("tune"))
    by_estimator = BY_ESTIMATOR.get(values.get("estimator"), {}).get(method, {})
    options = check_needs(made(FinetuneOptions, RATES.get(method, {}) | by_estimator | values), given)
    for name in KEPT_BY_BRANCHES if parent else ():
        if getattr(options, name) != parent.get(name, getattr(options, name)):
            change = f"was {parent[name]!r} in {options.branch_from} and is {getattr(options, name)!r}"
            raise UsageError(f"--{name} {change}: a branch keeps it")
    return options


def _taken_over(parent: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parent that a branch with these `values` takes over."""
    before = {name: parent.get(name, getattr(FinetuneOptions, name)) for name in OWNED}
    changed = [name for name, was in before.items() if values.get(name, was) != was]
    return {name: value for name, value in parent.items() if not any(name in OWNED[other] for other in changed)}


def _saved(run: str) -> dict[str, Any]:
    return checked(FinetuneOptions, saved_options(run), f"{run}/run.json")


def launch_id() -> str | None:
    """Names this launch of torchrun, the same after its restarts; None without it."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {os.getppid()} {process_start(os.getppid())}"


def restarts() -> int:
    """How often torchrun has restarted these ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def heartbeat_interval(limit: float) -> float:
    """Seconds between heartbeats: many in `limit`, the seconds after which a rank is given up."""
    return min(parallel.INTERVAL, limit / 10)


def make_mesh(options: FinetuneOptions, log: Callable[[str], None]) -> parallel.Mesh | None:
    """The mesh that the options ask for; None on one rank.

    Raises:
        UsageError: it is impossible; nothing has been loaded yet.
    """
    try:
        asked = parse_mesh(options.parallel) if options.parallel else {}
    except ValueError:
        raise UsageError(f"--parallel {options.parallel}: expected a mesh (such as pert=2,data=2)") from None
    evaluations = make_estimator(options.estimator, **options.estimator_options).evaluations(options.probes)
    ranks = parallel.world_size_of_environment()
    alone = ranks == 1
    if options.probe_batches == "own" and options.parts < ranks:
        raise UsageError(f"--probe-batches own: {ranks} ranks cannot share {options.parts} parts of a batch")
    try:
        if alone:
            resolve_mesh(1, **asked, evaluations=evaluations)
            return None
        return parallel.init(
            **asked,
            evaluations=evaluations,
            micro_batches=options.parts,
            slice={"on": True, "off": False}.get(options.slice),
            device=options.device,
            limit=options.heartbeat_limit,
            interval=heartbeat_interval(options.heartbeat_limit),
            log=log,
        )
    except UsageError as error:
        text = f"--parallel {error}" if asked else str(error)
        if alone and asked:
            size = asked.get("pert", 1) * asked.get("data", 1)
            text += f": start it with torchrun --nproc-per-node {size} -m distzo2 finetune ..."
        raise UsageError(text) from error


def first_cause(error: BaseException, terminated: bool) -> BaseException:
    """What ended this rank: where torchrun terminates all ranks once one has ended, that rank and not the signal."""
    ranks = parallel.joined()
    if not (terminated and ranks is not None and isinstance(error, KeyboardInterrupt)):
        return error
    deadline = time.monotonic() + 2 * ranks.heartbeat.interval + 0.5
    while ranks.heartbeat.failure is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return ranks.heartbeat.failure or error


def report(error: BaseException, text: str, show: Callable[[str], None]) -> None:
    """Calls `show(text)` on one rank, for an error that ends all of them."""
    ranks = parallel.joined()
    if ranks is None or ranks.world_size == 1:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            show(text)
        return
    if ranks.heartbeat.store_lost:  # then one rank of each machine reports what it knows
        if _first_of_this_machine():
            show(text)
        return

    interrupted = isinstance(error, KeyboardInterrupt)
    waits = ranks.rank != 0 if interrupted else isinstance(error, RankFailedError) and error.told  # others know more

    def another_reports() -> bool:
        deadline = time.monotonic() + REPORT_SECONDS
        while waits and not ranks.store.check(["reported"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return ranks.store.add("reporters", 1) > 1

    if not bounded(another_reports, REPORT_SECONDS + STORE_SECONDS):
        show(text)
        bounded(lambda: ranks.store.set("reported", "1"), STORE_SECONDS)


def _first_of_this_machine() -> bool:
    """Whether no other rank that the same torchrun started here is reporting its error."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0distzo2 reports {os.getppid()}")  # a name without a file, free again when this process ends
    except OSError:
        return False
    claim.detach()
    return True
