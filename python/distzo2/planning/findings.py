"""What about this machine makes streaming slower than it should be, read from /proc and /sys.

Every function takes the root of the file system that it reads, so that a made tree can stand for another machine. A
file that is missing means that nothing is known, never that something is wrong: such checks find nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distzo2.run.preflight import gib

ROOT = Path("/")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs")
_LEVELS = {  # what the compiled kernels ask of a processor; the last level that it has is used
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
}


@dataclass(frozen=True)
class Finding:
    """Something that is below what it should be: a word to search for, and one line for people."""

    code: str
    text: str


@dataclass(frozen=True)
class Link:
    """A PCIe device's link. Speeds are in GT/s a lane; None where the system does not say."""

    address: str
    width: int | None
    width_max: int | None
    speed: float | None
    speed_max: float | None
    numa_node: int | None


def _text(path: Path) -> str:
    """The content of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _speed(path: Path) -> float | None:
    """Of "16.0 GT/s PCIe", 16.0; None of "Unknown"."""
    try:
        return float(_text(path).split()[0])
    except (IndexError, ValueError):
        return None


def read_link(address: str, root: Path = ROOT) -> Link:
    """The link of the PCI device at `address`, such as 0000:01:00.0. A link that is idle may run slower than it can."""
    device = root / "sys/bus/pci/devices" / address.lower()
    node = _number(device / "numa_node")
    width_max = _number(device / "max_link_width")
    return Link(
        address.lower(),
        _number(device / "current_link_width") or None,
        width_max if width_max and width_max < 255 else None,  # 255: not known
        _speed(device / "current_link_speed"),
        _speed(device / "max_link_speed"),
        node if node is not None and node >= 0 else None,
    )


def check_link(name: str, link: Link) -> list[Finding]:
    """Whether a device's link is as wide and as fast as both of its ends allow."""
    found = []
    where = f"{name} ({link.address}): its PCIe link"
    if link.width and link.width_max and link.width < link.width_max:
        found.append(Finding("pcie_width", f"{where} is x{link.width}, and x{link.width_max} is possible"))
    if link.speed and link.speed_max and link.speed < link.speed_max:
        text = f"{where} runs at {link.speed:g} GT/s under load, and {link.speed_max:g} are possible"
        found.append(Finding("pcie_speed", text))
    return found


def parse_list(text: str) -> set[int]:
    """Of the kernel's "0-3,8", {0, 1, 2, 3, 8}."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def check_node(name: str, link: Link, cpus: Collection[int], root: Path = ROOT) -> list[Finding]:
    """Whether a device is attached to a NUMA node on which this process may run."""
    nodes = {
        int(directory.name.removeprefix("node"))
        for directory in (root / "sys/devices/system/node").glob("node[0-9]*")
        if parse_list(_text(directory / "cpulist")) & set(cpus)
    }
    if link.numa_node is None or not nodes or link.numa_node in nodes:
        return []
    text = (
        f"{name} ({link.address}) is on NUMA node {link.numa_node}, and this process runs on node "
        f"{', '.join(map(str, sorted(nodes)))}: start it with numactl --cpunodebind={link.numa_node} "
        f"--membind={link.numa_node}"
    )
    return [Finding("numa", text)]


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


def check_file_system(directory: str | os.PathLike, kind: str | None) -> list[Finding]:
    """Whether the file system is one to stream weights from."""
    if kind in ("tmpfs", "ramfs"):
        why = "its files are memory, so that weights on it save none"
    elif kind in ("overlay", "overlayfs", "aufs"):
        why = "a layer of a container, slower than the disk below it; a volume or a bind mount is not"
    elif kind is not None and (kind in NETWORK or kind.startswith("fuse")):
        why = "weights would come over the network or through another process; use a local disk"
    else:
        return []
    return [Finding("file_system", f"{directory} is on {kind}: {why}")]


def check_memlock(limit: int | None, wanted: int) -> list[Finding]:
    """Whether `wanted` bytes may be pinned. `limit` is RLIMIT_MEMLOCK, None where it does not bind."""
    if limit is None or limit >= wanted:
        return []
    text = (
        f"the limit of locked memory (ulimit -l) is {gib(limit)}, under the {gib(wanted)} of memory that may be "
        "taken: pinning more fails on drivers that count it; raise it in /etc/security/limits.conf"
    )
    return [Finding("memlock", text)]


def cpu_info(name: str, root: Path = ROOT) -> str | None:
    """A field of the first processor, such as `model name` or `flags`."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def simd_level(compiled: Sequence[str], environment: Mapping[str, str], root: Path = ROOT) -> str:
    """Which of the compiled levels the noise kernels use here: DISTZO2_SIMD, or the best that the processor has."""
    if environment.get("DISTZO2_SIMD"):
        return environment["DISTZO2_SIMD"]
    flags = set((cpu_info("flags", root) or "").split())
    usable = [level for level, needs in _LEVELS.items() if level in compiled and needs <= flags]
    return usable[-1] if usable else "portable"


def check_kernels(level: str) -> list[Finding]:
    """Whether the CPU's noise comes from vector instructions."""
    if level != "portable":
        return []
    return [Finding("noise_portable", "the noise kernels run at their portable level, without vector instructions")]


def check_governor(root: Path = ROOT) -> list[Finding]:
    """Whether a governor holds the clocks down. With the pstate drivers `powersave` follows the load, and is fine."""
    slow = [
        cpu.parent.name
        for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
        if _text(cpu / "scaling_governor") == "powersave" and "pstate" not in _text(cpu / "scaling_driver")
    ]
    if not slow:
        return []
    return [Finding("governor", f"{len(slow)} CPUs ({slow[0]} first) are held at their lowest clock by powersave")]


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


def check_threads(num_threads: int, cpus: Collection[int], num_cpus: int, root: Path = ROOT) -> list[Finding]:
    """Whether the computing threads and the CPUs that they may use agree."""
    found = []
    allowed, quota = len(cpus), cpu_quota(root)
    if allowed < num_cpus:
        found.append(Finding("affinity", f"this process may run on {allowed} of the machine's {num_cpus} CPUs"))
    if quota is not None and quota < min(allowed, num_threads):
        text = f"a control group allows {quota:g} CPUs' time, and {num_threads} threads compute"
        found.append(Finding("cpu_quota", text))
    if num_threads > allowed:
        text = f"{num_threads} threads compute on {allowed} CPUs: they get in each other's way"
        found.append(Finding("threads", text))
    elif 2 * num_threads < min(allowed, quota or allowed):  # half is usual: one for each core of two threads
        text = f"{num_threads} threads compute, and {allowed} CPUs are there (OMP_NUM_THREADS)"
        found.append(Finding("threads", text))
    return found
