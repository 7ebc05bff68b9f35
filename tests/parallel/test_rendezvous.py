"""`distzo2 finetune` on two hosts of two ranks each, started by torchrun on both: the bits of one rank, only scalars on
the link, and what a link that is cut does. The hosts are namespaces of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from same_run import assert_same_run
from torchrun_cases import arguments, run_alone
from two_hosts import Host, NoNamespaces, TwoHosts

from distzo2.cli.main import main
from distzo2.parallel import rendezvous
from distzo2.parallel.rendezvous import interface_of

ENDLESS = 10**6  # steps
LIMIT = 12  # seconds without a heartbeat


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    try:
        hosts = TwoHosts(tmp_path)
    except NoNamespaces as error:
        pytest.skip(f"two hosts cannot be made of namespaces here: {error}")
    yield hosts
    hosts.close()


class Launch:
    """torchrun on both hosts, each with directories of its own."""

    def __init__(self, hosts: TwoHosts, directory: Path, name: str, command: list[str]) -> None:
        self.agents: dict[Host, subprocess.Popen] = {}
        self.directories: dict[str, Path] = {}
        self._logs: dict[Host, Path] = {}
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d",
            f"--rdzv-id={name}", f"--rdzv-endpoint={hosts.near.name}:29533",
        ]  # fmt: skip
        for host in (hosts.near, hosts.far):
            home = self.directories[host.name] = directory / host.name
            (home / "tmp").mkdir(parents=True, exist_ok=True)
            self._logs[host] = directory / f"{name} on {host.name}.log"
            variables = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp")}
            variables.pop("GLOO_SOCKET_IFNAME", None)
            with open(self._logs[host], "wb") as log:
                self.agents[host] = subprocess.Popen(
                    host.command([*torchrun, "-m", "distzo2", *command], home), env=variables, stdout=log, stderr=log
                )

    def log(self, host: Host) -> str:
        return self._logs[host].read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(f"== {host.name}\n{self.log(host)}" for host in self.agents)

    def num_steps(self) -> int:
        """Of the journal, which is on rank 0's host: the one whose name sorts first."""
        journal = self.directories["dzo-far"] / "out/journal.jsonl"
        return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0

    def wait(self, what: str, until: Callable[[], Any], seconds: float = 120.0) -> None:
        for _ in range(int(seconds / 0.05)):  # not by the clock: a machine that sleeps takes no time of it
            if until():
                return
            time.sleep(0.05)
        raise AssertionError(f"{what}: not within {seconds:g} s\n{self.logs()}")

    def ended(self) -> list[int | None]:
        return [agent.poll() for agent in self.agents.values()]

    def close(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.kill()  # nsenter: what it started ends with the host
            agent.wait()


def num_ranks(host: Host) -> int:
    """Ranks that run on a host; torchrun does not look at those that have ended while it waits for its store."""
    lines = host.run("ps", "-eo", "stat=,args=").splitlines()
    return sum("-m distzo2 finetune" in line and "distributed.run" not in line and line[0] != "Z" for line in lines)


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.201") is None


@pytest.mark.parametrize(
    ("device", "num_gpus", "num_ranks", "expected"),
    [
        (None, 4, 4, ("cpu:gloo,cuda:nccl", [2])),
        ("cuda:3", 4, 1, ("cpu:gloo,cuda:nccl", [3])),
        ("cuda", 1, 4, ("gloo", [])),  # they share it
        ("cuda:0", 4, 4, ("gloo", [])),
        ("cpu", 4, 4, ("gloo", [])),
    ],
)
def test_nccl_makes_no_communicator_before_it_is_used(device, num_gpus, num_ranks, expected, monkeypatch):
    made, gpus = [], []
    local_rank = 2 if num_ranks == 4 else 0
    for name, value in {"RANK": local_rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
    monkeypatch.setattr(rendezvous, "rendezvous", lambda *args, **options: iter([(dist.HashStore(),)]))
    monkeypatch.setattr(rendezvous, "_allow", lambda group, timeout: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.append((backend, options)))
    rendezvous.init_process_group(device, 60.0)
    ((backend, options),) = made
    assert (backend, gpus) == expected
    assert "device_id" not in options  # with it torch makes the communicator of all ranks, and splits it for each group


def test_gathers_of_gpus_have_a_stream_of_high_priority(monkeypatch):
    made = []

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(
        dist, "new_subgroups_by_enumeration", lambda ranks, **options: made.append(options) or (None, [])
    )
    monkeypatch.setattr(rendezvous, "_allow", lambda group, timeout: None)
    for backend in ("gloo", "nccl"):
        rendezvous.new_group([(0, 1), (2,)], backend)
    words, blocks = made
    assert words["pg_options"] is None
    assert blocks["pg_options"].is_high_priority_stream and blocks["pg_options"]._timeout == blocks["timeout"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("slice", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_a_cut_link_ends_both_hosts_and_the_run_goes_on(files, hosts, tmp_path, slice):
    options = ["--lr=1e-4", "--parallel=pert=2,data=2", f"--slice={slice}", f"--heartbeat-limit={LIMIT}"]
    weight_bytes = (files.model / "model.safetensors").stat().st_size
    with ExitStack() as stack:
        first = Launch(hosts, tmp_path, "first", arguments(files, ENDLESS, *options))
        stack.callback(first.close)

        def steps_made(number: int) -> bool:
            assert first.ended() == [None, None], first.logs()
            return first.num_steps() >= number

        first.wait("the first steps", lambda: steps_made(3))
        steps, link_bytes = first.num_steps(), hosts.near.link_bytes()
        first.wait("more steps", lambda: steps_made(steps + 40))
        link_bytes = hosts.near.link_bytes() - link_bytes
        assert link_bytes / (first.num_steps() - steps) < weight_bytes / 4  # scalars and heartbeats, no weights

        hosts.cut()
        first.wait("the end of all ranks", lambda: num_ranks(hosts.near) + num_ranks(hosts.far) == 0, 60.0)
        # The store is rank 0's.
        (told,) = re.findall(r"^distzo2: (.*)", first.log(hosts.far), re.MULTILINE)
        assert re.fullmatch(rf"error: rank [23] \(dzo-near\) .* {LIMIT} s: it hangs, or is cut off", told)
        told = re.findall(r"^distzo2: (.*)", first.log(hosts.near), re.MULTILINE)
        assert told and told[0].startswith("error: the rendezvous store on dzo-far has not answered")
        hosts.mend()
        first.wait("the end of torchrun", lambda: None not in first.ended(), 60.0)
        assert 0 not in first.ended()

        command = arguments(files, first.num_steps() + 4, "--lr=1e-4")
        with chdir(first.directories["dzo-far"]):
            assert main([*command, "--resume", "--parallel=pert=1,data=1"]) == 0
        assert_same_run(first.directories["dzo-far"] / "out", run_alone(tmp_path / "alone", command))
