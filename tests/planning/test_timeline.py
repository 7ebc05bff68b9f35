"""A trace's rows, the figures of one step of it, and a real run's."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tiny_text import choice_lines, make_checkpoint, write_jsonl

from distzo2.cli.main import main
from distzo2.planning.timeline import draw_step, one_step, read_trace, step_figures
from distzo2.run.metrics import read_metrics
from distzo2.weights.trace import Trace


def event(kind: str, begin: float, end: float, **args) -> dict:
    return {"ph": "X", "cat": kind, "name": "x", "ts": begin, "dur": end - begin, "tid": 0, "args": args}


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
    assert one_step(STEP) == ("x", 1000, 3000)
    figures = step_figures(STEP)
    assert figures.seconds == pytest.approx(2e-3)
    assert (figures.bytes_up, figures.bytes_down) == (3_000, 4_000)
    assert figures.upload_s == pytest.approx(800e-6)  # 1000 to 1800
    assert figures.download_s == pytest.approx(400e-6)  # 1700 to 2000, 2900 to 3000
    assert figures.transfer_s == pytest.approx(1100e-6)  # 1000 to 2000, 2900 to 3000
    assert figures.exposed_wait_s == pytest.approx(250e-6)  # waits of host and device that overlap count once
    assert figures.hidden == pytest.approx(1 - 250 / 1100)
    assert "2.0 ms; 2.93 KiB up at 0.00 GB/s; 3.91 KiB down" in figures.text() and "77% of the" in figures.text()


def test_a_step_without_transfers_and_a_trace_without_steps() -> None:
    figures = step_figures([event("step", 0, 10), event("compute", 1, 9), event("upload", 20, 30, bytes=5, slot=0)])
    assert (figures.bytes_up, figures.transfer_s, figures.hidden) == (0, 0, None)
    assert figures.text() == "x, 0.0 ms"
    old = [event("compute", 100, 200), event("upload", 150, 5e6, bytes=10, slot=0)]
    assert one_step(old)[1:] == (100, 100 + 1e6)
    for events in (STEP, old):
        axes = Figure().add_subplot()
        draw_step(axes, events)
        kinds = {e["cat"] for e in events if e["cat"] != "step"}
        assert len(axes.get_yticks()) == len(kinds)
        assert axes.get_xlim()[1] == pytest.approx((one_step(events)[2] - one_step(events)[1]) / 1e3)


def test_rows_of_a_saved_trace(tmp_path: Path) -> None:
    trace = Trace()
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
