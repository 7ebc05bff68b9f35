"""`distzo2 measure`: every figure is there and real, and nothing is left behind."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distzo2.cli.main import main
from distzo2.errors import DistZO2Error
from distzo2.planning.machines import MEASURED, machine_from
from distzo2.planning.measure import measure_matmul, measure_memory, table
from distzo2.planning.transfers import QUICK, measure_copies, measure_gather


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
    assert main(["measure", "--quick", f"--directory={directory}", f"--json={out}"]) == 0
    return json.loads(out.read_text()), directory


def test_every_figure_is_there(measured: tuple[dict, Path]) -> None:
    result, directory = measured
    assert result["format"] == MEASURED and result["quick"] is True
    for path, value in numbers(
        {k: result[k] for k in ("copies", "disk", "noise", "matmul", "memory", "decode", "gather")}
    ):
        assert math.isfinite(value) and value > 0, path
    devices = [gpu["device"] for gpu in result["machine"]["gpus"]]
    assert [row["device"] for row in result["copies"]] == (devices or ["cpu"])
    for row in (*result["copies"], result["disk"]):
        assert {"up_bytes_per_s", "down_bytes_per_s", "both_bytes_per_s"} < row.keys()
    assert result["disk"]["directory"] == str(directory) and result["disk"]["file_system"]
    rows = {(row["device"], row["family"]) for row in result["noise"]}
    families = ("normal", "rademacher", "sign-r1", "sign-r4", "normal-r1", "normal-r4")
    assert rows == {(device, family) for device in ("cpu", *devices) for family in families}
    assert {row["dtype"] for row in result["matmul"]} == {"float32", "bfloat16"}
    assert [row["device"] for row in result["memory"]] == ["cpu", *devices]
    rows = {(row["codes"], row["dtype"]) for row in result["decode"] if row["device"] == "cpu"}
    assert rows == {(codes, dtype) for codes in ("nibbles", "int8", "int16") for dtype in ("float32", "bfloat16")}
    if not devices:
        assert (result["gather"]["backend"], result["gather"]["ranks"]) == ("gloo", 2)
    assert all(finding.keys() == {"code", "text"} for finding in result["findings"])
    assert result["machine"]["simd"] in ("portable", "avx2", "avx512")
    assert machine_from(result).num_devices >= 1 and len(machine_from(result).rates.decode_per_s) == 6
    assert not machine_from({key: value for key, value in result.items() if key != "decode"}).rates.decode_per_s
    lines = "\n".join(table(result))
    for text in ("copies", "disk (", "durable", "memory", "normal", "rademacher", "float32", "bfloat16"):
        assert text in lines, text
    assert "nan" not in lines and "None" not in lines
    assert list(directory.iterdir()) == []


def test_where_it_is_saved_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("distzo2.planning.measure.measure", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr("distzo2.planning.measure.table", lambda result: [])
    assert main(["measure"]) == 0
    assert json.loads((tmp_path / "cache/distzo2/measure.json").read_text()) == {"seconds": 1.0}


@pytest.mark.parametrize("which", ["absent", "file", *["sealed"] * (os.geteuid() != 0)])  # root may write anywhere
def test_a_bad_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "sealed").mkdir(0o500)
    assert main(["measure", "--quick", f"--directory={tmp_path / which}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--directory {tmp_path / which}: expected a directory" in error
    assert main(["measure", "--quick", f"--json={tmp_path}/no/m.json"]) == 2
    assert "expected a file in a directory that exists" in capsys.readouterr().err


def test_what_is_multiplied_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, and bits that do not change, are up to 13% faster on a GPU."""
    calls = []
    monkeypatch.setattr("distzo2.planning.measure.seconds_of", lambda call, *rest: calls.append(call) or 1.0)
    measure_matmul(torch.device("cpu"), QUICK)
    measure_memory(torch.device("cpu"), QUICK)
    operands = [x for call in calls for x in call.args if isinstance(x, torch.Tensor)]
    assert len(operands) == 5 and all(len(x.unique()) > 1000 and x.mean().abs() < 0.1 for x in operands)


@pytest.mark.cuda
def test_copies_to_a_gpu() -> None:
    row = measure_copies(torch.device("cuda", 0), QUICK)
    assert row["device"] == "cuda:0" and all(value > 0 for _, value in numbers(row))


def test_ranks_that_fail_or_hang_are_ended() -> None:
    with pytest.raises(DistZO2Error, match=r"did not end within 0\.2 s"):
        measure_gather("gloo", 2, 1 << 20, 1, time_limit_s=0.2)
    with pytest.raises(DistZO2Error, match=r"rank [01] of the gather failed: .*nowhere"):
        measure_gather("nowhere", 2, 1 << 20, 1)
    assert not torch.multiprocessing.active_children()
