"""Speed of decoding packed weights, beside a copy of as many bytes as it writes and a step's visit, in the same run.

    python bench/bench_decode.py                        # every instruction set that the machine has
    python bench/bench_decode.py --levels avx2 --quick

Each row is G weights/s of one thread's own time, which leaves out other work on the machine: a matrix of ROWS x COLS
decoded from random codes and scales of a model's size, the medians and the best of interleaved rounds, each row first
checked bit for bit against the reference. `copy` is torch's copy_ of the output's bytes, `visit` a step's visit with
signs to as many bf16 weights (read, update, write back, write two copies). An instruction set is chosen when the
kernels are first used, so that each has a process, a copy and a visit of its own. `--small` decodes what stays in the
caches. A format followed by γ has a gain for each group of its scale.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import interleaved_seconds, write_results
from bench_kernels import visit_arguments

import distzo2_core
from distzo2_core import PackedSegment, PackedTable

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from packed_cases import make_case

ROWS, COLS, SMALL_ROWS = 4096, 4096, 32
LEVELS = ("avx512", "avx2", "portable")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NAMES = (
    "q4_0",
    "q4_1",
    "q4_k",
    "q5_k",
    "q6_k",
    "q8_0",
    "gptq",
    "int4",
    "nf4",
    "mxfp4",
    "nvfp4",
    "e4m3, blocks",
    "int16",
)
SHORT = ("q4_0", "q4_k", "q8_0", "gptq")  # the formats that are decoded to every dtype
CHECKED = 4  # rows


def call_of(name: str, dtype: torch.dtype, rows: int, out: torch.Tensor, gained: bool) -> Callable[[], object]:
    """Decodes one matrix to `out`, after a comparison of its first rows with the reference."""
    rng = np.random.default_rng(0)
    stored, layout = make_case(rng, name, rows, COLS, usual=True)
    layout = layout.with_gain() if gained else layout
    table = PackedTable([PackedSegment(layout, 0, dtype)])
    gains = torch.from_numpy(rng.normal(1, 0.01, table.gain_bytes // 4)).float() if gained else None
    written = out[: table.out_bytes]
    distzo2_core.decode(stored, table, written, gains)
    first = PackedTable([PackedSegment(type(layout)(**{**vars(layout), "rows": CHECKED}), 0, dtype)])
    expected = torch.empty(first.out_bytes, dtype=torch.uint8)
    distzo2_core.decode(stored, first, expected, gains, backend="reference")
    assert torch.equal(written[: first.out_bytes], expected), f"{name} to {dtype}: other bits than the reference's"
    return lambda: distzo2_core.decode(stored, table, written, gains)


def measure(level: str, rows: int, rounds: int, dtypes: list[str]) -> list[dict[str, Any]]:
    """The rows of one instruction set, in this process."""
    torch.set_num_threads(1)
    numel, found = rows * COLS, []
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        num_bytes = numel * dtype.itemsize
        out, source = torch.zeros(num_bytes, dtype=torch.uint8), torch.ones(num_bytes, dtype=torch.uint8)
        visit = visit_arguments(numel, torch.bfloat16, "rademacher", torch.bfloat16)
        weights = torch.full((numel,), 0.02, dtype=torch.bfloat16).view(torch.uint8)
        copies = [torch.zeros(2 * numel, dtype=torch.uint8) for _ in range(2)]
        contenders: dict[str, Callable[[], object]] = {
            "copy": lambda out=out, source=source: out.copy_(source),
            "visit": lambda visit=visit, weights=weights, outs=copies: distzo2_core.materialize(
                weights, outs=outs, **visit
            ),
        }
        names = NAMES if dtype_name == "bfloat16" else SHORT
        every = [(name, gained) for name in names for gained in (False, True)]
        contenders |= {f"{name} {gained}": call_of(name, dtype, rows, out, gained) for name, gained in every}
        seconds = interleaved_seconds(contenders, "cpu", rounds, clock=time.thread_time)
        for name, gained in every:
            row = {"format": name, "gains": gained, "simd": level, "out_dtype": dtype_name, "rows": rows, "cols": COLS}
            taken = seconds[f"{name} {gained}"]
            row["g_weights_per_s"] = numel / taken["median"] / 1e9
            row["best_g_weights_per_s"] = numel / taken["min"] / 1e9
            for other in ("copy", "visit"):
                row[f"time_over_{other}"] = taken["median"] / seconds[other]["median"]
                row[f"best_time_over_{other}"] = taken["min"] / seconds[other]["min"]
            row["copy_gb_per_s"] = num_bytes / seconds["copy"]["min"] / 1e9
            found.append(row)
    return found


def main() -> None:
    """Run each instruction set in a process, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(distzo2_core.build_info()["simd"][::-1]))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="3 rounds in place of 9")
    parser.add_argument("--small", action="store_true", help="matrices that stay in the caches")
    parser.add_argument("--json", type=Path, help="default: bench/results/decode-<CPU>.json")
    parser.add_argument("--measure", choices=LEVELS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    rows = SMALL_ROWS if args.small else ROWS
    if args.measure:
        print(json.dumps(measure(args.measure, rows, 3 if args.quick else 9, args.dtypes)))
        return
    found: list[dict[str, Any]] = []
    for level in args.levels:
        command = [sys.executable, __file__, "--measure", level, "--dtypes", *args.dtypes]
        command += [flag for flag in ("--quick", "--small") if vars(args)[flag[2:]]]
        environment = os.environ | {"DISTZO2_SIMD": level}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        for row in json.loads(done.stdout):
            found.append(row)
            label = row["format"] + " γ" * row["gains"]
            print(
                f"{row['simd']:>8} {row['out_dtype']:>8} {label:<14} {row['g_weights_per_s']:6.2f} G/s "
                f"(best {row['best_g_weights_per_s']:6.2f}), {row['time_over_copy']:5.2f} of a copy, "
                f"{row['time_over_visit']:5.2f} of a visit (best {row['best_time_over_copy']:5.2f}, "
                f"{row['best_time_over_visit']:5.2f})"
            )
    write_results(args.json, "decode", found)


if __name__ == "__main__":
    main()
