"""What is wrong with a made machine is named, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from distzo2.planning.findings import (
    Finding,
    check_file_system,
    check_governor,
    check_link,
    check_memlock,
    check_node,
    check_threads,
    cpu_quota,
    file_system,
    parse_list,
    read_link,
)


def codes(found: Iterable[Finding]) -> list[str]:
    return [finding.code for finding in found]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


PCI = "sys/bus/pci/devices/0000:3b:00.0/"
WHOLE_LINK = {
    "current_link_width": "16", "max_link_width": "16", "numa_node": "1",
    "current_link_speed": "32.0 GT/s PCIe", "max_link_speed": "32.0 GT/s PCIe",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"current_link_width": "8"}, ["pcie_width"]),
        ({"current_link_speed": "16.0 GT/s PCIe"}, ["pcie_speed"]),
        ({"current_link_width": "4", "current_link_speed": "2.5 GT/s PCIe"}, ["pcie_width", "pcie_speed"]),
        # A virtual machine tells nothing, or that it does not know.
        ({"current_link_width": "0", "max_link_width": "255", "current_link_speed": "Unknown"}, []),
    ],
)
def test_links(tmp_path: Path, changed: dict[str, str], expected: list[str]) -> None:
    write(tmp_path, {PCI + name: text for name, text in (WHOLE_LINK | changed).items()})
    link = read_link("0000:3b:00.0", tmp_path)
    found = list(check_link("cuda:0", link))
    assert codes(found) == expected and all("cuda:0: its" in finding.text for finding in found)
    if not changed:
        assert list(link.values()) == [16, 16, 32.0, 32.0, 1]
        unknown = read_link("0000:00:00.0", tmp_path)
        assert set(unknown.values()) == {None} and not codes(check_link("cuda:0", unknown))


def test_numa_nodes(tmp_path: Path) -> None:
    nodes = "sys/devices/system/node/"
    write(tmp_path, {f"{nodes}node0/cpulist": "0-3,8-11", f"{nodes}node1/cpulist": "4-7,12-15", PCI + "numa_node": "1"})
    node = read_link("0000:3b:00.0", tmp_path)["numa_node"]
    assert codes(check_node("cuda:0", node, {0, 9}, tmp_path)) == ["numa"]
    assert "--cpunodebind=1" in next(check_node("cuda:0", node, {0}, tmp_path)).text
    assert not any(codes(check_node("cuda:0", node, cpus, tmp_path)) for cpus in ({3, 4}, {12}))
    write(tmp_path, {PCI + "numa_node": "-1"})  # one node, or not known
    assert not codes(check_node("cuda:0", read_link("0000:3b:00.0", tmp_path)["numa_node"], {0}, tmp_path))
    assert parse_list("0-2,7") == {0, 1, 2, 7} and parse_list("") == set()


def test_file_systems(tmp_path: Path) -> None:
    lines = [
        "27 1 254:0 / / rw,relatime - overlay overlay rw",
        "28 27 0:40 / /data rw,relatime shared:3 - ext4 /dev/sdb rw",
        "29 27 0:41 / /data/fast\\040disk rw - xfs /dev/nvme0n1 rw",
        "30 27 0:42 / /data/home rw - nfs4 server:/home rw",
        "31 27 0:43 / /over rw - ext4 /dev/sdc rw",
        "32 27 0:44 / /over rw - tmpfs tmpfs rw",
    ]
    write(tmp_path, {"proc/self/mountinfo": "\n".join(lines)})
    kinds = {
        "/": "overlay", "/database": "overlay", "/data": "ext4", "/data/x/y": "ext4", "/data/fast disk/x": "xfs",
        "/data/home/me": "nfs4", "/over/x": "tmpfs",
    }  # fmt: skip
    for directory, kind in kinds.items():
        assert file_system(directory, tmp_path) == kind, directory
        wrong = kind in ("overlay", "nfs4", "tmpfs")
        assert codes(check_file_system(directory, kind)) == (["file_system"] if wrong else [])
    assert codes(check_file_system("/x", "fuse.sshfs")) and not codes(check_file_system("/x", None))
    assert file_system("/x", tmp_path / "nowhere") is None


def test_locked_memory() -> None:
    assert not codes(check_memlock(None, 1 << 40)) and not codes(check_memlock(1 << 40, 1 << 40))
    (found,) = check_memlock(8 << 20, 1 << 34)
    assert found.code == "memlock" and "8.00 MiB" in found.text


def test_governors(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_{}"
    assert not codes(check_governor(tmp_path))
    write(tmp_path, {cpu.format(0, "governor"): "performance", cpu.format(1, "governor"): "powersave"})
    (found,) = check_governor(tmp_path)
    assert found.code == "governor" and "cpu1" in found.text
    write(tmp_path, {cpu.format(1, "driver"): "intel_pstate"})
    assert not codes(check_governor(tmp_path))


def test_threads(tmp_path: Path) -> None:
    cpus = set(range(8))
    for num_threads, num_cpus, found in (
        (8, 8, []), (4, 8, []), (3, 8, ["threads"]), (9, 8, ["threads"]), (8, 64, ["affinity"])
    ):  # fmt: skip
        assert codes(check_threads(num_threads, cpus, num_cpus, tmp_path)) == found
    write(tmp_path, {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "250000 100000"})
    write(tmp_path, {"sys/fs/cgroup/a/b/cpu.max": "max 100000"})
    assert cpu_quota(tmp_path) == 2.5
    assert codes(check_threads(8, cpus, 8, tmp_path)) == ["cpu_quota"]
    write(tmp_path, {"proc/self/cgroup": "3:cpu,cpuacct:/c", "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1"})
    write(tmp_path, {"sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000"})
    assert cpu_quota(tmp_path) is None
    write(tmp_path, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
    assert cpu_quota(tmp_path) == 0.5
