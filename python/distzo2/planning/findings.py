"""What about this machine makes streaming slower than it should be, read from /proc and /sys.

Every function takes the root of the file system that it reads, so that a made tree can stand for another machine. A
file that is missing means that nothing is known, never that something is wrong: such checks find nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distzo2.text import gib

ROOT = Path("/")
_NETWORK = "nfs nfs4 cifs smb3 smbfs 9p ceph lustre gpfs beegfs glusterfs afs fuse"
_FILE_SYSTEMS = {  # why weights should not be on them
    "tmpfs ramfs": "its files are memory, so that weights on it save none",
    "overlay overlayfs aufs": "a layer of a container, slower than the disk below it; a volume or a bind mount is not",
    _NETWORK: "weights would come over the network or through another process; use a local disk",
}


class Finding(NamedTuple):
    """Something that is below what it should be: a word to search for, and one line for people."""

    code: str
    text: str


def _text(path: Path) -> str:
    """The content of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_link(address: str, root: Path = ROOT) -> dict[str, Any]:
    """The PCIe link of the device at `address`, such as 0000:01:00.0: widths, speeds in GT/s a lane, NUMA node; None
    where the system does not say. A link that is idle may run slower than it can."""

    def number(name: str, *unknown: int) -> float | None:
        found = re.match(r"-?\d+(\.\d+)?", _text(root / "sys/bus/pci/devices" / address / name))  # "16", "16.0 GT/s"
        value = found and (float(found[0]) if found[1] else int(found[0]))
        return None if value in unknown else value

    return {
        "pcie_width": number("current_link_width", 0),
        "pcie_width_max": number("max_link_width", 0, 255),
        "pcie_gt_per_s": number("current_link_speed"),
        "pcie_gt_per_s_max": number("max_link_speed"),
        "numa_node": number("numa_node", -1),
    }


def check_link(name: str, link: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a device's link is as wide and as fast as both of its ends allow."""
    width, speed = "is x{}, and x{} is possible", "runs at {:g} GT/s under load, and {:g} are possible"
    for code, key, text in (("pcie_width", "pcie_width", width), ("pcie_speed", "pcie_gt_per_s", speed)):
        now, most = link[key], link[f"{key}_max"]
        if now and most and now < most:
            yield Finding(code, f"{name}: its PCIe link {text.format(now, most)}")


def check_node(name: str, node: int | None, cpus: Collection[int], root: Path = ROOT) -> Iterator[Finding]:
    """Whether a device on NUMA node `node` is on one on which this process may run."""
    nodes = {
        int(directory.name.removeprefix("node"))
        for directory in (root / "sys/devices/system/node").glob("node[0-9]*")
        if parse_list(_text(directory / "cpulist")) & set(cpus)
    }
    if node is not None and nodes and node not in nodes:
        own = ", ".join(map(str, sorted(nodes)))
        how = f"start it with numactl --cpunodebind={node} --membind={node}"
        yield Finding("numa", f"{name} is on NUMA node {node}, and this process runs on node {own}: {how}")


def parse_list(text: str) -> set[int]:
    """Reads a list of the kernel's: "0-3,8" is {0, 1, 2, 3, 8}."""
    ends = [part.split("-") for part in text.split(",") if part]
    return {number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)}


def file_system(directory: str | os.PathLike, root: Path = ROOT) -> str | None:
    """The type of the file system that holds `directory`, such as ext4: that of the longest mount point above it."""
    place = os.path.realpath(directory)
    longest, kind = 0, None
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        mount = fields.split()[4].encode().decode("unicode_escape")  # a space is \040
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:  # of mounts on one another, the last is seen
            longest, kind = len(mount), rest.split()[0]
    return kind


def check_file_system(directory: str | os.PathLike, kind: str | None) -> Iterator[Finding]:
    """Whether the file system is one to stream weights from."""
    for kinds, why in _FILE_SYSTEMS.items():
        if kind and kind.partition(".")[0] in kinds.split():  # fuse.sshfs is fuse
            yield Finding("file_system", f"{directory} is on {kind}: {why}")


def check_memlock(limit: int | None, wanted: int) -> Iterator[Finding]:
    """Whether `wanted` bytes may be pinned. `limit` is RLIMIT_MEMLOCK, None where it does not bind."""
    if limit is not None and limit < wanted:
        yield Finding(
            "memlock",
            f"the limit of locked memory (ulimit -l) is {gib(limit)}, under the {gib(wanted)} of memory that may be "
            "taken: pinning more fails on drivers that count it; raise it in /etc/security/limits.conf",
        )


def check_governor(root: Path = ROOT) -> Iterator[Finding]:
    """Whether a governor holds the clocks down. With the pstate drivers `powersave` follows the load, and is fine."""
    slow = [
        cpu.parent.name
        for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
        if _text(cpu / "scaling_governor") == "powersave" and "pstate" not in _text(cpu / "scaling_driver")
    ]
    if slow:
        yield Finding("governor", f"{len(slow)} CPUs ({slow[0]} first) are held at their lowest clock by powersave")


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many CPUs' time the control groups allow this process; None: all."""
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container sees its own group as the mount's root, although it is named by the path outside.
        group = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for part in ("", *Path(path.lstrip("/")).parts):
            group = group / part
            words = _text(group / "cpu.max").split()  # "max 100000" or "150000 100000"
            if not words:  # version 1; -1: none
                words = [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            if all(word.isdigit() for word in words):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def check_threads(num_threads: int, cpus: Collection[int], num_cpus: int, root: Path = ROOT) -> Iterator[Finding]:
    """Whether the computing threads and the CPUs that they may use agree."""
    allowed, quota = len(cpus), cpu_quota(root) or num_cpus
    usual = min(allowed, quota) / 2  # one thread for each core of two
    if allowed < num_cpus:
        yield Finding("affinity", f"this process may run on {allowed} of the machine's {num_cpus} CPUs")
    if quota < min(allowed, num_threads):
        yield Finding("cpu_quota", f"a control group allows {quota:g} CPUs' time, and {num_threads} threads compute")
    if num_threads > allowed:
        yield Finding("threads", f"{num_threads} threads compute on {allowed} CPUs: they get in each other's way")
    if num_threads < usual:
        yield Finding("threads", f"{num_threads} threads compute, and {allowed} CPUs are there (OMP_NUM_THREADS)")
