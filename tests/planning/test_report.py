"""The picture of a run, from files like those that runs write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from distzo2.errors import DistZO2Error, UsageError
from distzo2.planning.report import hidden_share, transfer_line, write_report
from distzo2.run.metrics import Metrics, read_metrics


def step(i: int, **more) -> dict:
    return {
        "kind": "step", "step": i, "loss": 2.0 - 0.01 * i, "coefs": [0.1], "lr": 1e-3, "skipped": None, "tokens": 64,
        "seconds": 0.02, "compute_s": 0.012, "noise_s": 0.003, "exposed_wait_s": 0.001, "transfer_s": 0.01,
        "rss": 400 << 20, "peak": 500 << 20, **more,
    }  # fmt: skip


MOVED = {"bytes_up": 8 << 20, "bytes_down": 4 << 20, "up_bytes_per_s": 2e9, "down_bytes_per_s": 1e9}


def evaluation(i: int) -> dict:
    return {"kind": "eval", "step": i, "loss": 2.0 - 0.01 * i, "accuracy": 0.5 + 0.01 * i, "examples": 9, "tokens": 99}


def write_run(directory: Path, lines: list[dict], trace: bool | str = False) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        "estimator": "spsa",
        "noise": "normal",
        "probes": 1,
        "lr": 1e-3,
        "eps": 1e-3,
        "weights": "disk",
        "device": "cpu",
    }
    (directory / "run.json").write_text(json.dumps({"options": options, "model_bytes": 5 << 20}))
    if trace:
        events = [{"ph": "M", "name": "thread_name", "pid": 0, "tid": 1, "args": {}}]
        for i, kind in enumerate(("compute", "upload", "wait", "download")):
            events.append(
                {"ph": "X", "cat": kind, "name": "block", "ts": 1e3 + 10.0 * i, "dur": 8.0, "pid": 0, "tid": i}
            )
        if trace == "steps":
            events.append({"ph": "X", "cat": "step", "name": "step 3", "ts": 1e3, "dur": 40.0, "pid": 0, "tid": 9})
        (directory / "trace.json").write_text(json.dumps({"traceEvents": events}))
    return directory


@pytest.mark.parametrize(
    ("lines", "trace"),
    [
        ([evaluation(0), *(step(i) for i in range(40)), evaluation(40)], True),
        ([step(0)], False),
        ([step(0, loss=None, skipped="non-finite loss"), step(1)], False),
        # Lines made from the journal after a kill have no times of their parts.
        ([{k: v for k, v in step(0).items() if k not in ("compute_s", "rss", "peak")}], False),
        ([step(i, device_peak=1 << 30) for i in range(3)], False),
        ([step(i, **MOVED) for i in range(9)], "steps"),
        # A model of which no block streams, then a resumed run that downloads nothing.
        ([step(0), step(1, **MOVED), step(2, **MOVED | {"bytes_down": 0, "down_bytes_per_s": None})], False),
    ],
)
def test_a_picture(tmp_path: Path, lines: list[dict], trace: bool | str) -> None:
    run = write_run(tmp_path / "run", lines, trace)
    path = write_report(run)
    assert path == run / "report.png"
    height, width, _ = imread(path).shape
    rows = 2 + bool(trace) + any("up_bytes_per_s" in line for line in lines)
    assert width > 1000 and height > 390 * rows
    other = write_report(run, tmp_path / "other.png")
    assert other.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_any_name_is_a_png(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(0)])
    assert imread(write_report(run, tmp_path / "loss.txt"), format="png").size > 0
    with pytest.raises(IsADirectoryError):
        write_report(run, run)
    assert not (tmp_path / "run.png").exists()


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(DistZO2Error, match="no step yet"):
        write_report(write_run(tmp_path / "run", [evaluation(0)]))
    run = write_run(tmp_path / "other", [step(0)])
    (run / "trace.json").write_text("{")
    with pytest.raises(DistZO2Error, match=r"trace\.json: not a trace"):
        write_report(run)


def test_the_transfers_of_a_step_in_one_line() -> None:
    assert transfer_line([step(0)]) is None
    steps = [step(0, **MOVED), step(1, **MOVED | {"up_bytes_per_s": 3e9}), step(2, **MOVED | {"up_bytes_per_s": 9e9})]
    line = "a step: 8.00 MiB up at 3.00 GB/s, 4.00 MiB down at 1.00 GB/s, exposed wait 1.0 ms of 20.0 ms"
    assert transfer_line(steps) == line
    only_up = [step(0, **MOVED | {"bytes_down": 0, "down_bytes_per_s": None})]
    assert transfer_line(only_up) == "a step: 8.00 MiB up at 2.00 GB/s, exposed wait 1.0 ms of 20.0 ms"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(0)])
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_report(run, "/dev/full")
    metrics = Metrics(run / "metrics.jsonl")
    metrics._file.close()
    metrics._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        metrics.write(**step(1))
    metrics.close()  # the unwritten line fails again here, which must not hide the first error


def test_hidden_share() -> None:
    assert hidden_share(2.0, 0.5) == 0.75
    assert hidden_share(1.0, 3.0) == 0.0
    assert hidden_share(0.0, 0.0) is None


def test_metrics_have_no_nan(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    metrics.write(kind="step", step=0, loss=float("nan"), coefs=[float("inf"), 1.0])
    metrics.close()
    with open(tmp_path / "m", "a") as file:
        file.write('{"kind": "st')
    assert read_metrics(tmp_path / "m") == [{"kind": "step", "step": 0, "loss": None, "coefs": [None, 1.0]}]
