"""The GPU check: its table from what the rows leave, and, slow, all of it in its form for a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from collect_gpu_check import collect, draw, table

ROOT = Path(__file__).parents[2]


def test_table_of_a_run_that_was_cut_short(tmp_path: Path) -> None:
    common = {"model": "opt-13b", "tokens": 2048}
    steps = [("compute", 1, None, 0.2), ("resident", 1, 1, 0.225), ("streamed", 1, 1, 0.53), ("zo2", 1, 1, 0.9),
             ("compute", 4, None, 0.8), ("streamed", 4, 1, 0.95)]  # fmt: skip
    rows = [{"contender": way, "seconds": 0.5, "num_bytes": int(25e9), **common} for way in ("up", "down", "both")]
    rows += [dict(zip(("contender", "batch", "probes", "seconds"), step, strict=True)) | common for step in steps]
    (tmp_path / "large_step.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "kernels.json").write_text('{"rows": [{"op"')
    signal = {"dtype": "tf32", "eps": 1e-3, "correlation": 0.999, "relative_error": 0.05, "seconds": 2.0}
    (tmp_path / "signal.json").write_text(json.dumps({"rows": [signal | {"dtype": "float32"}, signal]}))
    (tmp_path / "rows").write_text(
        "build 0 80\nstep-resident 0 40\nstep-streamed 1 40\nstep-zo2 0 30\nsignal 0 9\nkernels 124 60\n"
    )
    result = collect(tmp_path, 250)
    lines = table(result).splitlines()
    for start in (
        "| build | ok | 80 |  |",
        "| step-resident | ok | 40 | raw copies of all blocks, up | 500 ms | GB/s each way 50 |",
        "|  |  |  | opt-13b 1 x 2048: resident, 1 probe | 225 ms | compute 200 | 225 |",
        "| step-streamed | FAILED (1) | 40 | opt-13b 1 x 2048: streamed, 1 probe | 530 ms |"
        " max(compute, up, down) 500, resident 225, zo2 900 | 500 to 560, bound by the link |",
        "|  |  |  | opt-13b 4 x 2048: streamed, 1 probe | 950 ms | max(compute, up, down) 800 | as resident",
        "| signal | ok | 9 | signal in tf32 at eps 0.001 | 0.999 | error 0.05, s 2 | 0.99 and more at 1e-3 |",
        "| kernels | out of time | 60 |  |",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)
    draw(result, tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_row_gives_a_figure_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench/gpu_check.sh"), "--cpu", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    result = json.loads((tmp_path / "out/gpu-check.json").read_text())
    assert len(result["rows"]) == 11 and all(row["figures"] for row in result["rows"])
    assert (tmp_path / "out/gpu-check.png").exists()
