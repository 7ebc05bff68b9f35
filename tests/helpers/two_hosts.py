"""Two "hosts" on one machine: namespaces of network, names, mounts and processes, joined by a veth pair.

A host lives as long as the standard input of its first process is open: when the test ends, however it ends, the kernel
ends every process of the host, and takes its network away.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

LINK = "dzo-link"  # the interface's name on both hosts
SECONDS = 20.0  # that making a host may take


class NoNamespaces(Exception):
    """This machine does not let us make them; the message says why."""


class Host:
    """A machine as Debian would set it up: its own name stands for 127.0.1.1 in /etc/hosts."""

    def __init__(self, name: str, address: str, peers: dict[str, str], directory: Path) -> None:
        self.name, self.address = name, address
        hosts = directory / f"hosts of {name}"
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *(f"{where} {peer}" for peer, where in peers.items())]
        hosts.write_text("".join(line + "\n" for line in lines))
        setup = 'mount --bind "$1" /etc/hosts && hostname "$2" && ip link set lo up && echo ready && exec cat'
        self._process = subprocess.Popen(
            [
                "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                "sh", "-c", setup, "sh", str(hosts), name,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if self._process.stdout.readline() != b"ready\n":
            self._process.stdin.close()
            raise NoNamespaces(f"unshare: {self._process.communicate(timeout=SECONDS)[1].decode().strip()}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text().split()[0])

    def command(self, arguments: list[str], directory: Path | None = None) -> list[str]:
        """What runs `arguments` on this host."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid"]
        return [*enter, *([f"--wd={directory}"] if directory else []), "--", *arguments]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(self.command(list(arguments)), capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise NoNamespaces(f"{' '.join(arguments)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def link_bytes(self) -> int:
        """Bytes that the link has carried both ways, headers included."""
        (link,) = json.loads(self.run("ip", "-json", "-statistics", "link", "show", LINK))
        return link["stats64"]["rx"]["bytes"] + link["stats64"]["tx"]["bytes"]

    def close(self) -> None:
        """Ends all its processes."""
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # and, by --kill-child, the host's first process
            self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()


class TwoHosts:
    """Hosts `near` and `far`, each knowing the other's name and address."""

    def __init__(self, directory: Path) -> None:
        for program in ("unshare", "nsenter", "ip", "mount", "hostname"):
            if shutil.which(program) is None:
                raise NoNamespaces(f"there is no program {program}")
        addresses = {"dzo-near": "10.77.0.1", "dzo-far": "10.77.0.2"}
        self._hosts: list[Host] = []
        try:
            for name, address in addresses.items():
                peers = {peer: where for peer, where in addresses.items() if peer != name}
                self._hosts.append(Host(name, address, peers, directory))
            self.near, self.far = self._hosts
            link = ["ip", "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", str(self.far.pid)]
            enter = ["nsenter", f"--target={self.near.pid}", "--net", "--"]  # process ids are this machine's
            done = subprocess.run([*enter, *link], capture_output=True, text=True, timeout=SECONDS)
            if done.returncode:
                raise NoNamespaces(f"{' '.join(link)}: {done.stderr.strip()}")
            for host in self._hosts:
                host.run("ip", "address", "add", f"{host.address}/24", "dev", LINK)
                host.run("ip", "link", "set", LINK, "up")
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            raise NoNamespaces(str(error)) from error
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        self.far.run("ip", "link", "set", LINK, "down")

    def mend(self) -> None:
        self.far.run("ip", "link", "set", LINK, "up")

    def close(self) -> None:
        for host in self._hosts:
            host.close()
