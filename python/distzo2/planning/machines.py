"""What this machine is, read from /proc and /sys, and what about it makes streaming slower than it should be.

Every function takes the root of the file system that it reads, so that a made tree can stand for another machine. A
file that is not there means that nothing is known, never that nothing is wrong: such checks are silent.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distzo2.text import gib

ROOT = Path("/")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs")
SLOW_SHARE = 0.9  # of the raw rate; an engine below it is named
_LEVELS = {  # what the compiled kernels ask of a processor; the last one that it has is used
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
}


@dataclass(frozen=True)
class Finding:
    """Something that is below what it should be: a word to search for, and one line for people."""

    code: str
    text: str

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "text": self.text}


@dataclass(frozen=True)
class Link:
    """A PCIe device's link. Speeds are in GT/s a lane; None where the system does not tell."""

    address: str
    width: int | None
    width_max: int | None
    speed: float | None
    speed_max: float | None
    numa_node: int | None


def read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def _speed(path: Path) -> float | None:
    """Of "16.0 GT/s PCIe", 16.0; None of "Unknown"."""
    words = (read_text(path) or "").split()
    try:
        return float(words[0])
    except (IndexError, ValueError):
        return None


def read_link(address: str, root: Path = ROOT) -> Link:
    """The link of the PCI device at `address`, such as 0000:01:00.0. A link that is idle may run slower than it can."""
    device = root / "sys/bus/pci/devices" / address.lower()
    node = _number(device / "numa_node")
    width, width_max = _number(device / "current_link_width"), _number(device / "max_link_width")
    return Link(
        address.lower(),
        width or None,
        width_max if width_max and width_max < 255 else None,  # 255: not known
        _speed(device / "current_link_speed"),
        _speed(device / "max_link_speed"),
        node if node is not None and node >= 0 else None,
    )


def check_link(name: str, link: Link) -> list[Finding]:
    """Whether a device's link is as wide and as fast as both of its ends allow."""
    found = []
    where = f"{name} ({link.address})"
    if link.width and link.width_max and link.width < link.width_max:
        found.append(
            Finding("pcie_width", f"{where}: its PCIe link is x{link.width}, and x{link.width_max} is possible")
        )
    if link.speed and link.speed_max and link.speed < link.speed_max:
        found.append(
            Finding(
                "pcie_speed",
                f"{where}: its PCIe link runs at {link.speed:g} GT/s under load, and {link.speed_max:g} are possible",
            )
        )
    return found


def parse_list(text: str) -> set[int]:
    """Of the kernel's "0-3,8", {0, 1, 2, 3, 8}."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def nodes_of(cpus: Collection[int], root: Path = ROOT) -> set[int]:
    """The NUMA nodes of these CPUs; empty where the system does not tell."""
    nodes = set()
    for directory in (root / "sys/devices/system/node").glob("node[0-9]*"):
        if parse_list(read_text(directory / "cpulist") or "") & set(cpus):
            nodes.add(int(directory.name.removeprefix("node")))
    return nodes


def check_node(name: str, link: Link, cpus: Collection[int], root: Path = ROOT) -> list[Finding]:
    """Whether a device hangs on a NUMA node on which this process may run."""
    nodes = nodes_of(cpus, root)
    if link.numa_node is None or not nodes or link.numa_node in nodes:
        return []
    own = ", ".join(map(str, sorted(nodes)))
    return [
        Finding(
            "numa",
            f"{name} ({link.address}) is on NUMA node {link.numa_node}, and this process runs on node {own}: start it "
            f"with numactl --cpunodebind={link.numa_node} --membind={link.numa_node}",
        )
    ]


def file_system(directory: str | os.PathLike, root: Path = ROOT) -> str | None:
    """The type of the file system that holds `directory`, such as ext4: that of the longest mount point above it."""
    place = os.path.realpath(directory)
    found: tuple[int, str] | None = None
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        fields, separator, rest = line.partition(" - ")
        if not separator or len(fields.split()) < 5 or not rest.split():
            continue
        mount = fields.split()[4].encode().decode("unicode_escape")  # a space is \040
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and (found is None or len(mount) >= found[0]):  # of mounts on one another, the last is seen
            found = (len(mount), rest.split()[0])
    return found[1] if found else None


def check_file_system(directory: str | os.PathLike, kind: str | None) -> list[Finding]:
    """Whether the file system is one to stream weights from."""
    if kind is None:
        return []
    if kind in ("tmpfs", "ramfs"):
        why = "its files are memory, so that weights on it save none"
    elif kind in ("overlay", "overlayfs", "aufs"):
        why = "a layer of a container, slower than the disk below it; a volume or a bind mount is not"
    elif kind in NETWORK or kind.startswith("fuse"):
        why = "weights would come over the network or through another process; use a local disk"
    else:
        return []
    return [Finding("file_system", f"{directory} is on {kind}: {why}")]


def check_memlock(limit: int | None, wanted: int) -> list[Finding]:
    """Whether so many bytes may be pinned. `limit` is RLIMIT_MEMLOCK, None where it does not bind."""
    if limit is None or limit >= wanted:
        return []
    return [
        Finding(
            "memlock",
            f"the limit of locked memory (ulimit -l) is {gib(limit)}, under the {gib(wanted)} of memory that may be "
            "taken: pinning more fails on drivers that count it; raise it in /etc/security/limits.conf",
        )
    ]


def cpu_model(root: Path = ROOT) -> str | None:
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def simd_level(compiled: Sequence[str], environment: Mapping[str, str], root: Path = ROOT) -> str:
    """Which of the compiled levels the noise kernels use here: DISTZO2_SIMD, or the best that the processor has."""
    if environment.get("DISTZO2_SIMD"):
        return environment["DISTZO2_SIMD"]
    flags: set[str] = set()
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    usable = [level for level, needs in _LEVELS.items() if level in compiled and flags.issuperset(needs)]
    return usable[-1] if usable else "portable"


def check_kernels(native: bool, level: str) -> list[Finding]:
    """Whether the CPU's noise comes from vector instructions."""
    if not native:
        return [Finding("noise_portable", "the noise kernels were not compiled: the reference in NumPy is used")]
    if level == "portable":
        return [Finding("noise_portable", "the noise kernels run at their portable level, without vector instructions")]
    return []


def check_governor(root: Path = ROOT) -> list[Finding]:
    """Whether a governor holds the clocks down. With the pstate drivers `powersave` follows the load, and is fine."""
    slow = []
    for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        governor, driver = read_text(cpu / "scaling_governor"), read_text(cpu / "scaling_driver") or ""
        if governor == "powersave" and "pstate" not in driver:
            slow.append(cpu.parent.name)
    if not slow:
        return []
    return [Finding("governor", f"{len(slow)} CPUs ({slow[0]} first) are held at their lowest clock by powersave")]


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many CPUs' time the control groups allow this process; None: all."""
    quotas = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # A container sees its own group as the mount's root, although it is named by the path outside.
        levels = [mount]
        for part in Path(path.lstrip("/")).parts:
            levels.append(levels[-1] / part)
        quotas += [quota for level in levels if (quota := _quota(level)) is not None]
    return min(quotas, default=None)


def _quota(group: Path) -> float | None:
    words = (read_text(group / "cpu.max") or "").split()  # "max 100000" or "150000 100000"
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")  # version 1; -1: none
    return quota / period if quota is not None and quota > 0 and period else None


def check_threads(num_threads: int, cpus: Collection[int], num_cpus: int, root: Path = ROOT) -> list[Finding]:
    """Whether the computing threads and the CPUs that they may use agree."""
    found = []
    allowed = len(cpus)
    quota = cpu_quota(root)
    if allowed < num_cpus:
        found.append(Finding("affinity", f"this process may run on {allowed} of the machine's {num_cpus} CPUs"))
    if quota is not None and quota < min(allowed, num_threads):
        found.append(
            Finding("cpu_quota", f"a control group allows {quota:g} CPUs' time, and {num_threads} threads compute")
        )
    if num_threads > allowed:
        found.append(
            Finding("threads", f"{num_threads} threads compute on {allowed} CPUs: they get in each other's way")
        )
    elif 2 * num_threads < min(allowed, quota or allowed):  # half is usual: one for each core of two threads
        found.append(
            Finding("threads", f"{num_threads} threads compute, and {allowed} CPUs are there (OMP_NUM_THREADS)")
        )
    return found


def check_engine(what: str, engine: float, raw: float) -> list[Finding]:
    """Whether the copy engine reaches `SLOW_SHARE` of the raw rate (bytes/s)."""
    if engine >= SLOW_SHARE * raw:
        return []
    return [
        Finding(
            "engine_slow",
            f"{what}: the copy engine moves {engine / 1e9:.2f} GB/s, {engine / raw:.1%} of raw copies' {raw / 1e9:.2f}",
        )
    ]
