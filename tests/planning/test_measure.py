"""`distzo2 measure`: every figure is there and real, what is wrong with a made machine is named, nothing is left."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distzo2.cli.main import main
from distzo2.errors import DistZO2Error
from distzo2.planning import measure_gather as gather_module
from distzo2.planning.machines import (
    Link,
    check_engine,
    check_file_system,
    check_governor,
    check_kernels,
    check_link,
    check_memlock,
    check_node,
    check_threads,
    cpu_quota,
    file_system,
    parse_list,
    read_link,
    simd_level,
)
from distzo2.planning.measure import FORMAT, table
from distzo2.planning.measure_gather import measure_gather
from distzo2.planning.measure_timing import Effort, interleaved_seconds
from distzo2.planning.plan_machine import machine_from
from distzo2.planning.transfers import measure_copies


def numbers(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON value with its path."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from numbers(child, f"{path}/{key}")
    elif isinstance(value, list):
        for child in value:
            yield from numbers(child, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A quick measurement by the command, and the directory whose disk it measured."""
    directory, out = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("out") / "m.json"
    threads = torch.get_num_threads()
    assert main(["measure", "--quick", f"--directory={directory}", f"--json={out}"]) == 0
    assert torch.get_num_threads() == threads
    return json.loads(out.read_text()), directory


FIGURES = ("copies", "disk", "noise", "matmul", "forward", "visits", "host", "steps", "gather", "seconds")


def codes(found: list) -> list[str]:
    return [finding.code for finding in found]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


# ---- the command ----------------------------------------------------------------------------------------------------


def test_every_figure_is_there(measured: tuple[dict, Path]) -> None:
    result, directory = measured
    assert result["format"] == FORMAT and result["quick"] is True
    for path, value in numbers({k: result[k] for k in FIGURES}):
        assert math.isfinite(value) and value > 0, path
    both = {"engine_bytes_per_s", "raw_bytes_per_s"}
    devices = [gpu["device"] for gpu in result["machine"]["gpus"]] or ["cpu"]
    assert [row["device"] for row in result["copies"]] == devices
    for row in result["copies"]:
        assert both == row["up"].keys() == row["down"].keys() == row["both"].keys()
    disk = result["disk"]
    assert both == disk["read"].keys() == disk["write"].keys() == disk["both"].keys()
    assert disk["directory"] == str(directory) and disk["fsync_s"] < 60 and disk["file_system"]
    native = [row for row in result["noise"] if row["device"] == "cpu" and row["backend"] == "native"]
    counts = {1, torch.get_num_threads()}
    whats = {"normal", "rademacher", "perturb_bfloat16"}
    assert {(row["what"], row["threads"]) for row in native} == {(what, count) for what in whats for count in counts}
    assert {row["dtype"] for row in result["matmul"]} == {"float32", "bfloat16"}
    for what in ("product", "attention", "stream"):
        found = {row["dtype"] for row in result["forward"] if (row["device"], row["what"]) == ("cpu", what)}
        assert found == {"float32", "bfloat16"}
    visits = {(row["what"], row["family"], row["dtype"]) for row in result["visits"] if row["device"] == "cpu"}
    assert len(visits) == 4 * 2 * 2
    assert {row["dtype"] for row in result["steps"]} == {"float32", "bfloat16"}
    assert machine_from(result).rates.compute_factor.keys() == {"float32", "bfloat16"}
    if not torch.cuda.is_available():
        assert (result["gather"]["backend"], result["gather"]["ranks"]) == ("gloo", 2)
    assert all(finding.keys() == {"code", "text"} for finding in result["findings"])
    assert result["machine"]["simd"] in ("portable", "avx2", "avx512")


def test_the_table_has_every_row(measured: tuple[dict, Path]) -> None:
    lines = "\n".join(table(measured[0]))
    for text in ("upload", "download", "both at once", "disk read", "durable", "normals", "float32", "bfloat16"):
        assert text in lines, text
    assert "nan" not in lines and "None" not in lines


def test_nothing_is_left_behind(measured: tuple[dict, Path]) -> None:
    assert list(measured[1].iterdir()) == []
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if children.is_file():
        for child in children.read_text().split():
            assert "measure_gather" not in Path(f"/proc/{child}/cmdline").read_text()


def test_where_it_is_saved_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("distzo2.planning.measure.measure", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr("distzo2.planning.measure.table", lambda result: [])
    assert main(["measure"]) == 0
    assert json.loads((tmp_path / "cache/distzo2/measure.json").read_text()) == {"seconds": 1.0}
    assert [p.name for p in (tmp_path / "cache/distzo2").iterdir()] == ["measure.json"]


@pytest.mark.parametrize("which", ["absent", "file"])
def test_a_bad_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str) -> None:
    (tmp_path / "file").touch()
    assert main(["measure", "--quick", f"--directory={tmp_path / which}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--directory {tmp_path / which}: a directory" in error
    assert main(["measure", "--quick", f"--json={tmp_path}/no/m.json"]) == 2
    assert "its directory is not there" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main(["measure", "--quick", f"--directory={tmp_path}"]) == 2
    assert "no file can be made there" in capsys.readouterr().err


def test_turns_are_interleaved() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = interleaved_seconds(calls, Effort(quick=True), prepare=lambda key: order.append("|"))
    assert seconds.keys() == {"a", "b"} and all(value > 0 for value in seconds.values())
    turns = [set(turn) for turn in "".join(order).split("|") if turn]
    assert turns == [{"a"}, {"a"}, {"b"}, {"b"}, {"a"}, {"b"}, {"b"}, {"a"}]


@pytest.mark.cuda
def test_copies_to_a_gpu() -> None:
    row = measure_copies(torch.device("cuda", 0), Effort(quick=True))
    assert row["device"] == "cuda:0" and all(value > 0 for _, value in numbers(row))


# ---- the gather's processes -----------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_that_fail_or_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(code: str):
        def run(command: list[str], **options):
            rank = command[-1]
            started.append(popen([sys.executable, "-c", code, rank], **options))
            return started[-1]

        return run

    monkeypatch.setattr(gather_module.subprocess, "Popen", start("import time; time.sleep(600)"))
    with pytest.raises(DistZO2Error, match=r"did not end within 0\.2 s"):
        measure_gather("gloo", 2, 1 << 20, 1, time_limit_s=0.2)
    fails = "import sys, time; 'rank=1' in sys.argv[1] and sys.exit('no such interface'); time.sleep(600)"
    monkeypatch.setattr(gather_module.subprocess, "Popen", start(fails))
    with pytest.raises(DistZO2Error, match="rank 1 of the gather failed: no such interface"):
        measure_gather("gloo", 2, 1 << 20, 1)
    assert len(started) == 4 and not any(is_running(process.pid) for process in started)


def test_a_rank_ends_with_its_parent(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "distzo2.planning.measure_gather",
        f"--meet={tmp_path}/m",
        "--backend=gloo",
        "--ranks=2",
    ]
    rank = subprocess.Popen([*command, "--rank=0", "--bytes=16", "--rounds=1"], stdin=subprocess.PIPE)
    try:
        rank.stdin.close()  # as when the parent dies; rank 1 never comes
        assert rank.wait(60) == 1
    finally:
        rank.kill()
        rank.wait()


# ---- what is wrong with a machine -----------------------------------------------------------------------------------

PCI = "sys/bus/pci/devices/0000:3b:00.0/"
WHOLE_LINK = {
    "current_link_width": "16",
    "max_link_width": "16",
    "current_link_speed": "32.0 GT/s PCIe",
    "max_link_speed": "32.0 GT/s PCIe",
    "numa_node": "1",
}


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
    link = read_link("0000:3B:00.0", tmp_path)
    found = check_link("cuda:0", link)
    assert codes(found) == expected
    assert all("cuda:0 (0000:3b:00.0)" in finding.text for finding in found)
    if "current_link_width" not in changed:
        assert (link.width, link.width_max, link.numa_node) == (16, 16, 1)


def test_a_link_that_nothing_is_known_of(tmp_path: Path) -> None:
    assert read_link("0000:00:00.0", tmp_path) == Link("0000:00:00.0", None, None, None, None, None)
    assert check_link("cuda:0", read_link("0000:00:00.0", tmp_path)) == []


def test_numa_nodes(tmp_path: Path) -> None:
    nodes = "sys/devices/system/node/"
    write(tmp_path, {f"{nodes}node0/cpulist": "0-3,8-11", f"{nodes}node1/cpulist": "4-7,12-15", PCI + "numa_node": "1"})
    link = read_link("0000:3b:00.0", tmp_path)
    assert codes(check_node("cuda:0", link, {0, 9}, tmp_path)) == ["numa"]
    assert "--cpunodebind=1" in check_node("cuda:0", link, {0}, tmp_path)[0].text
    assert check_node("cuda:0", link, {3, 4}, tmp_path) == [] == check_node("cuda:0", link, {12}, tmp_path)
    write(tmp_path, {PCI + "numa_node": "-1"})  # one node, or not known
    assert check_node("cuda:0", read_link("0000:3b:00.0", tmp_path), {0}, tmp_path) == []
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
    assert check_file_system("/x", "fuse.sshfs") and not check_file_system("/x", None)
    assert file_system("/x", tmp_path / "nowhere") is None


def test_locked_memory() -> None:
    assert check_memlock(None, 1 << 40) == [] == check_memlock(1 << 40, 1 << 40)
    assert codes(check_memlock(8 << 20, 1 << 34)) == ["memlock"]
    assert "8.00 MiB" in check_memlock(8 << 20, 1 << 34)[0].text


def test_kernels(tmp_path: Path) -> None:
    every = ("portable", "avx2", "avx512")
    avx2 = "flags\t\t: fpu sse2 avx2 fma f16c"
    write(tmp_path, {"proc/cpuinfo": f"model name\t: x\n{avx2}"})
    assert simd_level(every, {}, tmp_path) == "avx2"
    assert simd_level(("portable",), {}, tmp_path) == "portable"
    assert simd_level(every, {"DISTZO2_SIMD": "portable"}, tmp_path) == "portable"
    write(tmp_path, {"proc/cpuinfo": f"{avx2} avx512f avx512bw avx512vl avx512dq"})
    assert simd_level(every, {}, tmp_path) == "avx512" and simd_level(every[:2], {}, tmp_path) == "avx2"
    write(tmp_path, {"proc/cpuinfo": "flags : avx2"})  # without fma
    assert simd_level(every, {}, tmp_path) == "portable"
    assert codes(check_kernels(True, "portable")) == ["noise_portable"] == codes(check_kernels(False, "avx2"))
    assert check_kernels(True, "avx2") == []


def test_governors(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_{}"
    assert check_governor(tmp_path) == []
    write(tmp_path, {cpu.format(0, "governor"): "performance", cpu.format(1, "governor"): "powersave"})
    assert codes(check_governor(tmp_path)) == ["governor"] and "cpu1" in check_governor(tmp_path)[0].text
    write(tmp_path, {cpu.format(1, "driver"): "intel_pstate"})
    assert check_governor(tmp_path) == []


def test_threads(tmp_path: Path) -> None:
    cpus = set(range(8))
    assert check_threads(8, cpus, 8, tmp_path) == [] == check_threads(4, cpus, 8, tmp_path)
    assert codes(check_threads(3, cpus, 8, tmp_path)) == ["threads"] == codes(check_threads(9, cpus, 8, tmp_path))
    assert codes(check_threads(8, cpus, 64, tmp_path)) == ["affinity"]
    write(tmp_path, {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "250000 100000"})
    write(tmp_path, {"sys/fs/cgroup/a/b/cpu.max": "max 100000"})
    assert cpu_quota(tmp_path) == 2.5
    assert codes(check_threads(8, cpus, 8, tmp_path)) == ["cpu_quota"]
    write(tmp_path, {"proc/self/cgroup": "3:cpu,cpuacct:/c", "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1"})
    write(tmp_path, {"sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000"})
    assert cpu_quota(tmp_path) is None
    write(tmp_path, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
    assert cpu_quota(tmp_path) == 0.5


def test_a_slow_engine() -> None:
    assert check_engine("cpu up", 9.0e9, 10.0e9) == []
    (finding,) = check_engine("cpu up", 8.9e9, 10.0e9)
    assert finding.code == "engine_slow" and "8.90 GB/s, 89.0%" in finding.text
