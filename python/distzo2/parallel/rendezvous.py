"""How ranks meet: at the store of the rendezvous first, then by gloo's connections of each with each, and NCCL's.

gloo takes the interface of the address that this machine's name stands for. On many machines that is 127.0.1.1, and the
ranks of another machine would connect to themselves. Ranks on several machines therefore find out by the store which
interface leads to the others.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distzo2.errors import DistZO2Error

CONNECTING = timedelta(seconds=50)  # for ranks that have met at the store; a rank that dies meanwhile is not waited for
INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915


def init_process_group(device: str | torch.device | None, timeout: float) -> None:
    """Initializes torch.distributed as torchrun's environment says; with one rank where there is none.

    Args:
        device: where the ranks compute; None: a GPU each if there is one for each, else the CPU.
        timeout: seconds to wait for the other ranks, and that the group's collectives may take.

    Raises:
        DistZO2Error: they cannot meet.
    """
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return
    local, num_local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = torch.device("cuda" if device is None else device)
    one_each = torch.cuda.is_available() and torch.cuda.device_count() >= num_local and dist.is_nccl_available()
    wait = timedelta(seconds=timeout)
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = next(iter(rendezvous("env://", rank, world_size, timeout=wait)))[0]
        # torchrun's store outlives its ranks: those that it starts anew must not find the addresses of the dead.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        if num_local < world_size and INTERFACE not in os.environ:
            interface = _interface_to_others(store, rank, world_size)
            if interface is not None:
                os.environ[INTERFACE] = interface
        backend, options = "gloo", {"store": store, "rank": rank, "world_size": world_size, "timeout": CONNECTING}
        if place.type != "cpu" and one_each and (place.index is None or num_local == 1):  # not a GPU that ranks share
            # Without device_id, NCCL makes a communicator at a group's first collective: unused ones cost no memory.
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local if place.index is None else place.index)
        dist.init_process_group(backend, **options)
        _allow(None, wait)
    except (RuntimeError, ValueError, KeyError) as error:
        raise DistZO2Error(f"the ranks could not meet: {' '.join(str(error).split())}") from error


def new_group(nodes: Sequence[Sequence[int]], backend: str) -> Any:
    """Makes a group of the ranks of each node, and returns this rank's; all ranks call it. Its collectives have no time
    limit: `Exchange.wait` has one. Those of NCCL run on a stream of high priority, so that they do not wait for the
    blocks of a matrix product that has begun."""
    options = None
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = CONNECTING  # torch warns where it is not the group's
    ranks = [list(node) for node in nodes]
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=CONNECTING, backend=backend, pg_options=options)
    _allow(group, timedelta(days=365))
    return group


def _allow(group: Any, timeout: timedelta) -> None:
    dist.distributed_c10d._set_pg_timeout(timeout, group)


# ---- interfaces ----------------------------------------------------------------------------------------------------


def _interface_to_others(store: Any, rank: int, world_size: int) -> str | None:
    """The interface by which this machine reaches the others; None where none is found, or all ranks are on this one.

    Ranks on other machines than the store's post the address from which they reach it. Those on the store's machine
    look for the way to one of these, since their own way to the store shows nothing.
    """
    mine = _source_of(os.environ["MASTER_ADDR"])
    store.set(f"address/{rank}", mine or "")
    posted = [value.decode() for value in store.multi_get([f"address/{r}" for r in range(world_size)])]
    if mine is None:
        mine = next((source for address in posted if address and (source := _source_of(address))), None)
    return None if mine is None else interface_of(mine)


def _source_of(host: str) -> str | None:
    """The address from which this machine reaches `host`; None if it cannot, or `host` is this machine."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                source = probe.getsockname()[0]
                return None if source == probe.getpeername()[0] or source.startswith("127.") else source
    return None


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address; None if none has, or only as one of several."""
    return next((name for _, name in socket.if_nameindex() if address in _addresses(name)), None)


def _addresses(name: str) -> Iterator[str]:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        yield socket.inet_ntoa(answer[20:24])
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, interface = line.split()
            if interface == name:
                yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
