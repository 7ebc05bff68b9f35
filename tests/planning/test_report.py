"""The picture of a run, from files like those that runs write; one step of a trace, and a real run's."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny_text import choice_lines, make_checkpoint, write_jsonl

from distzo2.cli.main import main
from distzo2.cli.options import ReportOptions
from distzo2.errors import DistZO2Error, UsageError
from distzo2.planning.report import (
    draw_step,
    hidden_share,
    one_step,
    read_trace,
    run_report,
    step_figures,
    transfer_line,
)
from distzo2.run.metrics import Metrics, read_metrics
from distzo2.weights.timeline import Timeline


def step(i: int, **more) -> dict:
    return {
        "kind": "step", "step": i, "loss": 2.0 - 0.01 * i, "coefs": [0.1], "lr": 1e-3, "skipped": None, "tokens": 64,
        "seconds": 0.02, "compute_s": 0.012, "noise_s": 0.003, "exposed_wait_s": 0.001, "transfer_s": 0.01,
        "rss": 400 << 20, "peak": 500 << 20, **more,
    }  # fmt: skip


MOVED = {"bytes_up": 8 << 20, "bytes_down": 4 << 20, "up_bytes_per_s": 2e9, "down_bytes_per_s": 1e9}


def evaluation(i: int) -> dict:
    return {"kind": "eval", "step": i, "loss": 2.0 - 0.01 * i, "accuracy": 0.5 + 0.01 * i, "examples": 9, "tokens": 99}


def event(kind: str, begin: float, end: float, **args) -> dict:
    return {"ph": "X", "cat": kind, "name": "x", "ts": begin, "dur": end - begin, "tid": 0, "args": args}


def write_run(directory: Path, lines: list[dict], trace: bool | str = False) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"estimator": "spsa", "noise": "normal", "probes": 1, "lr": 1e-3, "eps": 1e-3, "weights": "disk"}
    options["device"] = "cpu"
    (directory / "run.json").write_text(json.dumps({"options": options, "model_bytes": 5 << 20}))
    if trace:
        events = [{"ph": "M", "name": "thread_name", "pid": 0, "tid": 1, "args": {}}]
        for i, kind in enumerate(("compute", "upload", "wait", "download")):
            events.append(event(kind, 1e3 + 10 * i, 1e3 + 10 * i + 8, bytes=3))
        if trace == "steps":
            events.append(event("step", 1e3, 1e3 + 40))
        (directory / "trace.json").write_text(json.dumps({"traceEvents": events}))
    return directory


def write_report(run: Path, out: str | Path | None = None) -> Path:
    assert run_report(ReportOptions(run_dir=str(run), out=out and str(out)), lambda line: None) == 0
    return Path(out or run / "report.png")


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
    height, width, _ = imread(path).shape
    rows = 2 + bool(trace) + any("up_bytes_per_s" in line for line in lines)
    assert width > 1000 and height > 390 * rows


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


def test_metrics_have_no_nan(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    metrics.write(kind="step", step=0, loss=float("nan"), coefs=[float("inf"), 1.0])
    metrics.close()
    with open(tmp_path / "m", "a") as file:
        file.write('{"kind": "st')
    assert read_metrics(tmp_path / "m") == [{"kind": "step", "step": 0, "loss": None, "coefs": [None, 1.0]}]


# ---- one step of a trace ------------------------------------------------------------------------------------------


STEP = [
    event("step", 0, 1000),
    event("step", 1000, 3000),
    event("step", 3000, 4000),
    event("upload", 500, 1500, bytes=4_000, slot=0),  # half of it in the middle step
    event("upload", 1400, 1800, bytes=1_000, slot=1),  # 100 of its 400 microseconds beside the other
    event("download", 1700, 2000, bytes=3_000, slot=1),
    event("download", 2900, 3100, bytes=2_000, slot=2),
    event("wait", 1500, 1600),
    event("wait", 2500, 2600),
    event("stall", 2550, 2650, bytes=9, slot=0),
    event("compute", 0, 4000),
]


def test_the_figures_of_a_step() -> None:
    assert [hidden_share(2.0, 0.5), hidden_share(1.0, 3.0), hidden_share(0.0, 0.0)] == [0.75, 0.0, None]
    assert one_step(STEP) == ("x", 1000, 3000)
    figures = step_figures(STEP)
    assert figures.seconds == pytest.approx(2e-3)
    assert (figures.bytes_up, figures.bytes_down) == (3_000, 4_000)
    assert figures.upload_s == pytest.approx(800e-6)  # 1000 to 1800
    assert figures.download_s == pytest.approx(400e-6)  # 1700 to 2000, 2900 to 3000
    assert figures.transfer_s == pytest.approx(1100e-6)  # 1000 to 2000, 2900 to 3000
    assert figures.exposed_wait_s == pytest.approx(250e-6)  # waits of host and device that overlap count once
    assert "2.0 ms; 2.93 KiB up at 0.00 GB/s; 3.91 KiB down" in figures.text() and "77% of the" in figures.text()


def test_a_step_without_transfers_and_a_trace_without_steps() -> None:
    figures = step_figures([event("step", 0, 10), event("compute", 1, 9), event("upload", 20, 30, bytes=5, slot=0)])
    assert (figures.bytes_up, figures.transfer_s) == (0, 0)
    assert figures.text() == "x, 0.0 ms"
    old = [event("compute", 100, 200), event("upload", 150, 5e6, bytes=10, slot=0)]
    assert one_step(old)[1:] == (100, 5e6)
    for events in (STEP, old):
        axes = Figure().add_subplot()
        draw_step(axes, events)
        kinds = {e["cat"] for e in events if e["cat"] != "step"}
        assert len(axes.get_yticks()) == len(kinds)
        assert axes.get_xlim()[1] == pytest.approx((one_step(events)[2] - one_step(events)[1]) / 1e3)


def test_rows_of_a_saved_trace(tmp_path: Path) -> None:
    trace = Timeline()
    trace.add("compute", "lost", 0, 1)  # not enabled yet
    trace.enable()
    trace.add("compute", "block 0", 1_000, 3_000)
    transfers = [("upload", 4, 2, 5_000, 1_000, 2_000), ("upload", 5, 0, 5_000, 1_500, 2_500), ("stall", 9, 1, 7, 1, 2)]
    trace.save(tmp_path / "t.json", transfers, {4: "layers.4"})
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    compute, upload, beside, stall = [e for e in events if e["ph"] == "X"]
    assert names[compute["tid"]] == "compute" and compute["dur"] == 2.0
    assert names[upload["tid"]] == "upload, slot 2" and upload["name"] == "layers.4"
    assert names[beside["tid"]] == "upload, slot 0"
    assert upload["args"] == {"bytes": 5_000, "slot": 2, "GB/s": 5.0}
    assert names[stall["tid"]] == "stall" and stall["name"] == "9" and "GB/s" not in stall["args"]


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_checkpoint(tmp_path / "model", layers=5)
    train = write_jsonl(tmp_path / "train.jsonl", choice_lines(20))
    options = ["--steps=6", "--batch-size=4", "--lr=1e-3", "--quiet", "--weights=disk", "--trace=t.json", "--save=none"]
    assert main(["finetune", f"--model={model}", f"--train={train}", "--out=out", *options]) == 0
    events = read_trace(Path("t.json"))
    steps = [e for e in events if e["cat"] == "step"]
    assert [e["name"] for e in steps] == ["step 2", "step 3", "step 4"]
    rows = defaultdict(list)
    for e in events:
        rows[e["tid"]].append(e)
    for same in rows.values():  # a viewer would nest what overlaps
        for a, b in pairwise(sorted(same, key=lambda e: e["ts"])):
            assert b["ts"] >= a["ts"] + a["dur"] - 1e-3, (a, b)
    lines = [line for line in read_metrics("out/metrics.jsonl") if line["kind"] == "step"]
    figures = step_figures(events)
    assert figures.name == "step 3" and figures.bytes_up > 0 and figures.bytes_down > 0
    # Prefetches cross the end of a step: a step's bytes in the trace are near the metrics', not equal to them.
    assert sum(e["args"]["bytes"] for e in events if e["cat"] == "upload") >= 2 * lines[3]["bytes_up"]
    assert figures.exposed_wait_s == pytest.approx(lines[3]["exposed_wait_s"], abs=1e-3)
    for line in lines[1:]:
        assert line["bytes_up"] > 0 and line["up_bytes_per_s"] == pytest.approx(line["bytes_up"] / line["upload_s"])
        assert line["transfer_s"] == pytest.approx(line["upload_s"] + line["download_s"])
    capsys.readouterr()
    assert main(["report", "out"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("a step: ") and out[1].startswith("trace: step 3, ") and out[2] == "wrote out/report.png"
