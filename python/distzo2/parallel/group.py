"""Ranks that share every step: perturbations (PertP), micro-batches (DDP) or both, over torch.distributed.

    torchrun --nproc-per-node 2 train.py

    distzo2.parallel.init(pert=2)                  # before the optimizer is made
    opt = distzo2.ZOSGD(model, lr=1e-6)            # steps are shared over `current()`
    opt.step([closure, ...])                       # the same list on every rank

Weights are whole on every rank, or in slices that the ranks of a node gather. They stay bit-identical; besides slices
only scalars travel, over gloo. See docs/parallel.md.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing import util
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distzo2.errors import DistZO2Error
from distzo2.parallel.exchange import Exchange, is_known
from distzo2.parallel.heartbeat import Heartbeat, describe, host_name
from distzo2.parallel.mesh import Evaluation, MeshShape, resolve_mesh
from distzo2.parallel.rendezvous import init_process_group
from distzo2.parallel.slice_rounds import SliceExchange, leave_plain

INTERVAL = 1.0  # seconds between heartbeats
LIMIT = 30.0  # seconds without one after which a rank is given up
TIMEOUT = 1800.0

_current: Mesh | None = None
_exchange: Exchange | None = None
_owns_default_group = False


@dataclass(eq=False)
class Mesh:
    """This rank's place among the others, and what they do together. `init` makes it.

    Attributes:
        rank, world_size, local_rank: as torchrun counts them.
        shape: `shape.pert` ranks along perturbations, `shape.data` along micro-batches.
        device_mesh: torch's DeviceMesh, of dimensions ("data", "pert").
        slice: whether streamed blocks are kept in slices; None: by what is measured.
        node: the ranks of this node, which may share slices; None: no slices.
        exchange, log: what the ranks exchange scalars through, and what gets a line about choices.
    """

    shape: MeshShape
    exchange: Exchange
    device_mesh: Any
    slice: bool | None
    node: SliceExchange | None
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self.rank, self.world_size = self.exchange.rank, self.exchange.world_size
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))

    @property
    def data_rank(self) -> int:
        """This rank's coordinate along micro-batches: what a DistributedSampler of `shape.data` replicas wants."""
        return self.rank // self.shape.pert

    def together(self, what: str) -> AbstractContextManager[None]:
        """`with mesh.together("loading"):` an exception of one rank in it is an error of all at its end, where the
        others wait as long as it takes, unless a rank is lost."""
        return self.exchange.together(what)

    def barrier(self) -> None:
        """Waits for all ranks, and serves them slices meanwhile."""
        self.exchange.agree("barrier")

    def __str__(self) -> str:
        return str(self.shape)


def current() -> Mesh | None:
    """The mesh that `init` made; None without one."""
    return _current


def joined() -> Exchange | None:
    """The exchange of the ranks that `join` or `init` met; None before."""
    return _exchange


def barrier() -> None:
    """Waits for all ranks of the mesh, and serves them slices meanwhile, so that one may still evaluate or save.

    No-op without a mesh.

    Raises:
        RanksDisagreeError: another rank does something else; on all of them.
        RankFailedError: another rank has failed, or is gone.
    """
    if _current is not None:
        _current.barrier()


def world_size_of_environment() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init(
    pert: int | None = None,
    data: int | None = None,
    slice: bool | None = None,
    *,
    timeout: float = TIMEOUT,
    device: str | torch.device | None = None,
    evaluations: Sequence[Evaluation] | None = None,
    micro_batches: int | None = None,
    interval: float = INTERVAL,
    limit: float = LIMIT,
    log: Callable[[str], None] = print,
) -> Mesh:
    """Makes the mesh that steps are shared over. Every rank calls it, before it makes an optimizer.

    Under torchrun, torch.distributed is initialized if it is not: gloo, and NCCL beside it where each rank of this
    machine has a GPU of its own. Without torchrun the mesh has one rank.

    Args:
        pert: ranks along perturbations; up to 2K for K probes of SPSA.
        data: ranks along micro-batches. Where one of the two is not given it follows from the number of ranks; where
            neither is, a mesh is chosen and reported to `log`.
        slice: each rank of a node keeps a slice of every streamed block (weights in host memory or on disk), and the
            ranks of the node gather a block together when they want it. None: where that is faster than bringing the
            whole block, by a measurement when the model is handed over, or where memory holds one copy only.
        timeout: seconds that a rank waits for others that are alive.
        device: where the ranks compute; None: a GPU each if there is one for each, else the CPU.
        evaluations: (probe, sign) pairs that a step will evaluate, if known (`Estimator.evaluations`): a mesh that does
            not suit them is refused now, and one that is chosen suits them.
        micro_batches: closures that a step will have, if known.
        interval: seconds between heartbeats.
        limit: seconds without a heartbeat after which a rank is given up.
        log: called on rank 0 with what was chosen: the mesh, slices.

    Raises:
        UsageError: the mesh is impossible; the message says what would fit.
        DistZO2Error: there is a mesh already, or the ranks cannot meet.
    """
    global _current
    if _current is not None:
        raise DistZO2Error(f"there is a mesh already ({_current}): call distzo2.parallel.shutdown() first")
    shape = resolve_mesh(_world_size(), pert, data, evaluations=evaluations, micro_batches=micro_batches)
    exchange = join(timeout=timeout, device=device, interval=interval, limit=limit)
    try:
        exchange.agree("distzo2.parallel.init", {"mesh": str(shape), "slice": slice})
        node = None if slice is False or (slice is None and shape.size == 1) else _node_of(exchange)
        kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
        names = ("data", "pert")
        device_mesh = exchange.start(lambda: init_device_mesh(kind, (shape.data, shape.pert), mesh_dim_names=names))
        _current = Mesh(shape, exchange, device_mesh, slice, node, log)
    except BaseException as error:
        shutdown(error)
        raise
    if pert is None and data is None and exchange.rank == 0 and shape.size > 1:
        log(f"mesh of {shape.size} ranks: {shape} (chosen; pert= and data= set it)")
    return _current


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else world_size_of_environment()


def _node_of(exchange: Exchange) -> SliceExchange:
    """The ranks of this node: what torchrun calls one, or else a machine."""
    names = exchange.gather_bytes(f"{host_name()} {os.environ.get('GROUP_RANK', '')}".encode())
    nodes = [[rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]
    node = SliceExchange(exchange, nodes)
    exchange.heartbeat.on_failure = node.abort
    return node


def join(
    *,
    timeout: float = TIMEOUT,
    device: str | torch.device | None = None,
    interval: float = INTERVAL,
    limit: float = LIMIT,
) -> Exchange:
    """Meets the other ranks and watches over them from then on; `init` does it too. Safe to call twice."""
    global _exchange, _owns_default_group
    if _exchange is not None:
        return _exchange
    _owns_default_group = not dist.is_initialized()
    if _owns_default_group:
        init_process_group(device, timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    session = store.add(f"distzo2/sessions of rank {rank}", 1)  # meshes come and go; each has keys of its own
    store = dist.PrefixStore(f"distzo2/{session}", store)
    heartbeat = Heartbeat(store.clone(), rank, world_size, interval=interval, limit=limit)
    _exchange = Exchange(rank, world_size, store, heartbeat, timeout)
    atexit.register(_at_exit)
    util.Finalize(None, _at_exit, exitpriority=100)  # of a process that multiprocessing started
    return _exchange


def _at_exit() -> None:
    """Tells the other ranks why this program ends."""
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    if isinstance(error, SystemExit):
        error = error.__context__ if error.code else None
    shutdown(error)


def shutdown(error: BaseException | None = None) -> None:
    """Leaves the mesh. Steps of this rank are its own afterwards, and the others' next ones fail.

    Args:
        error: why, if this rank has failed; all ranks get the first such cause.
    """
    global _current, _exchange
    exchange, node = _exchange, _current.node if _current is not None else None
    _exchange = _current = None
    leave_plain()
    if exchange is None:
        return
    heartbeat = exchange.heartbeat
    if error is not None and not is_known(error):
        heartbeat.post(f"rank {exchange.rank}: {describe(error)}")
    if node is not None and error is None:
        with suppress(DistZO2Error):
            node.leave(ends=True)  # the others may still want slices of this rank
    if exchange.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        heartbeat.wait_for_others()  # this process serves the store
    heartbeat.leave()
    for group in [exchange.group, *(node.groups.values() if node is not None else ())]:
        if exchange.broken is not None or heartbeat.failure is not None:
            # gloo's destructor waits for what is in flight, without end where a peer hangs: it is never called.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        else:
            with suppress(Exception):
                dist.destroy_process_group(group)
    if _owns_default_group:
        with suppress(Exception):
            dist.destroy_process_group()


def stats() -> dict[str, int]:
    """Counts collectives of this rank and the bytes of their payloads, since the mesh was made or since `reset_stats`.

    `collectives`, `bytes_sent`, `bytes_received` are of scalars, between all ranks: an all-gather of b bytes sends b,
    and receives b from each other rank; a broadcast sends or receives b. With slices there are also `slice_rounds` and
    `slice_gathers` between the ranks of the node, and `slice_bytes_sent`, `slice_bytes_received`.
    """
    if _exchange is None:
        raise DistZO2Error("there is no mesh: call distzo2.parallel.init() first")
    return dict(_exchange.counts)


def reset_stats() -> None:
    """Sets the counts of `stats` to zero."""
    if _exchange is not None:
        _exchange.counts.update({name: -count for name, count in _exchange.counts.items()})
