"""`distzo2 finetune` on many ranks: options from rank 0, the mesh, going on after a restart, one message at the end.

torchrun starts the same command on every rank. Rank 0 alone reads options and the run directory, writes it and prints;
where an error ends a run, one rank tells of it and all of them end with a status that is not 0.
"""

from __future__ import annotations

import json
import os
import socket
import time
from argparse import Namespace
from collections.abc import Callable

from distzo2.errors import UsageError
from distzo2.parallel import group as parallel
from distzo2.parallel.mesh import parse_mesh, resolve_mesh
from distzo2.run.options import Parser

TOLD_SECONDS = 3.0  # that a rank gives the one that failed to tell of it itself
NOT_SHARED = ("run", "command")  # of the options: not text


def under_torchrun() -> bool:
    """Whether there may be other ranks."""
    return parallel.world_size_of_environment() > 1


def launch_id() -> str | None:
    """Names this launch of torchrun, the same after its restarts; None without it."""
    from distzo2.parallel.heartbeat import process_start

    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {os.getppid()} {process_start(os.getppid())}"


def restarts() -> int:
    """How often torchrun has started these ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def parse_on_rank_0(parse: Callable[[], Namespace], given: Namespace) -> Namespace:
    """The options of all ranks: what `parse` returns on rank 0. `given` is this rank's command line alone."""
    ranks = parallel.join(device=given.device, limit=given.heartbeat_limit, interval=heartbeat_interval(given))

    def read() -> bytes:
        return json.dumps({k: v for k, v in vars(parse()).items() if k not in NOT_SHARED}).encode()

    shared = json.loads(ranks.exchange.from_rank_0("reading the options", read))
    return Namespace(**shared, **{name: getattr(given, name) for name in NOT_SHARED})


def heartbeat_interval(options: Namespace) -> float:
    """Seconds between heartbeats: many in the time after which a rank is given up."""
    return min(parallel.INTERVAL, options.heartbeat_limit / 10)


def make_mesh(options: Namespace, log: Callable[[str], None]) -> parallel.Mesh | None:
    """The mesh that the options ask for; None on one rank.

    Raises:
        UsageError: it is impossible; nothing has been loaded yet.
    """
    asked = parse_mesh(options.parallel) if options.parallel else {}
    if options.slice == "on" and options.weights == "device":
        raise UsageError("--slice on: slices are of weights in host memory or on disk, and not of --weights device")
    from distzo2.optim.estimator import make_estimator

    evaluations = make_estimator(options.estimator).evaluations(options.probes)
    try:
        if not under_torchrun():
            resolve_mesh(1, **asked, evaluations=evaluations)
            return None
        return parallel.init(
            **asked,
            evaluations=evaluations,
            micro_batches=options.micro_batches,
            slice={"on": True, "off": False}.get(options.slice),
            device=options.device,
            limit=options.heartbeat_limit,
            interval=heartbeat_interval(options),
            log=log,
        )
    except UsageError as error:
        if under_torchrun() or not asked:
            raise UsageError(f"--parallel {error}" if asked else str(error)) from error
        size = asked.get("pert", 1) * asked.get("data", 1)
        raise UsageError(
            f"--parallel {error}: start it with torchrun --nproc-per-node {size} -m distzo2 finetune ..."
        ) from error


def first_cause(error: BaseException, terminated: bool) -> BaseException:
    """torchrun terminates all ranks once one has ended: the cause is then that rank, not the signal."""
    ranks = parallel.joined()
    if not (terminated and ranks is not None and isinstance(error, KeyboardInterrupt)):
        return error
    deadline = time.monotonic() + 2 * ranks.heartbeat.interval + 0.5
    while ranks.heartbeat.failure is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return ranks.heartbeat.failure or error


def tell(error: BaseException, text: str, show: Callable[[str], None]) -> None:
    """Calls `show(text)` on one rank, for an error that ends all of them."""
    from distzo2.parallel.heartbeat import STORE_SECONDS, RankFailedError, bounded

    ranks = parallel.joined()
    if ranks is None:
        if not under_torchrun() or os.environ.get("LOCAL_RANK", "0") == "0":
            show(text)
        return
    if ranks.world_size == 1:
        show(text)
        return
    if ranks.heartbeat.store_lost:  # then each machine tells what it knows
        if _first_of_this_machine():
            show(text)
        return

    def others_tell() -> bool:
        deadline = time.monotonic() + TOLD_SECONDS
        second_hand = isinstance(error, RankFailedError) and error.told
        second_hand = second_hand or (isinstance(error, KeyboardInterrupt) and ranks.rank != 0)  # rank 0 knows more
        while second_hand and not ranks.store.check(["told"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return ranks.store.add("tellers", 1) > 1

    if not bounded(others_tell, TOLD_SECONDS + STORE_SECONDS):
        show(text)
        bounded(lambda: ranks.store.set("told", "1"), STORE_SECONDS)


def _first_of_this_machine() -> bool:
    """Whether no rank beside this one, started by the same torchrun, is telling of its error."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0distzo2 told {os.getppid()}")  # a name without a file, free again when this process ends
    except OSError:
        return False
    claim.detach()
    return True


def parse(parser: Parser, arguments: list[str], given: Namespace) -> Namespace:
    """The options of `finetune`, on any number of ranks."""
    from distzo2.run.finetune_options import parse_finetune

    if not under_torchrun():
        return parse_finetune(parser, arguments)
    return parse_on_rank_0(lambda: parse_finetune(parser, arguments), given)
