"""Speed of the noise and of the fused kernels, beside torch.randn + add_ on the same device in the same run.

    python bench/bench_kernels.py                      # CPU, and CUDA where there is a GPU
    python bench/bench_kernels.py --device cuda --quick

Every row is checked bit for bit against the reference before it is timed. `visit` is what a ZO step does to a block:
read the weights, apply one update, write them back, and write the +eps and the -eps copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import interleaved_seconds, write_results

import distzo2_core
from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update

SEED, STEP, PARAM, PROBE = 2**63 + 5, 11, 7, 1
PLACE = {"seed": SEED, "step": STEP, "param": PARAM, "probe": PROBE}
EPS, LR, COEF = 1e-3, 1e-6, 0.7
OPS = ("normal", "rademacher", "perturb_", "update_", "visit")
# Passes over the weights' bytes: reads plus writes.
PASSES = {"normal": 1, "rademacher": 1, "perturb_": 2, "update_": 2, "visit": 4, "randn_add": 2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED = 2048  # elements compared at each place


def visit_arguments(numel: int, dtype: torch.dtype, element_offset: int = 0) -> dict[str, Any]:
    """Keyword arguments of `materialize` for one segment: an update of step STEP, then emits +eps and -eps."""
    segment = Segment(0, numel, dtype, PARAM, element_offset, 0, 1, element_offset + numel)
    return {
        "segments": SegmentTable([segment], num_bytes=numel * dtype.itemsize),
        "seed": SEED,
        "updates": (Update(STEP, (GroupScalars(LR, 0.0),), (Term(0, STEP, PROBE, 0, COEF),)),),
        "emits": tuple(Emit((Term(0, STEP + 1, 0, 0, sign * EPS),), (1.0,)) for sign in (1.0, -1.0)),
        "write_back": True,
    }


class Case:
    """One dtype and size on one device: the buffers, and a call per op and backend."""

    def __init__(self, dtype: torch.dtype, numel: int, device: str) -> None:
        self.dtype, self.numel, self.device = dtype, numel, device
        generator = torch.Generator(device).manual_seed(0)
        self.clean = torch.empty(numel, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        self.weights = self.clean.clone()
        self.outs = [torch.empty_like(self.weights) for _ in range(2)]
        self.visit = visit_arguments(numel, dtype)

    def call(self, op: str, backend: str) -> Callable[[], object]:
        """A call of the op on all elements; in-place ops work on `weights`."""
        common: dict[str, Any] = {**PLACE, "backend": backend}
        if op in ("normal", "rademacher"):
            function = getattr(distzo2_core, op)
            return lambda: function(self.numel, dtype=self.dtype, device=self.device, **common)
        if op == "perturb_":
            return lambda: distzo2_core.perturb_(self.weights, EPS, **common)
        if op == "update_":
            return lambda: distzo2_core.update_(self.weights, LR, COEF, **common)
        weights, outs = self.weights.view(torch.uint8), [out.view(torch.uint8) for out in self.outs]
        return lambda: distzo2_core.materialize(weights, outs=outs, backend=backend, **self.visit)

    def randn_add(self) -> Callable[[], object]:
        """What a plain torch loop does to perturb: draw, then add."""
        return lambda: self.weights.add_(torch.randn_like(self.weights), alpha=EPS)

    def check(self, op: str, backend: str) -> None:
        """Run the op once on clean weights and compare its first, a middle and its last elements with the reference."""
        self.weights.copy_(self.clean)
        for out in self.outs:
            out.fill_(float("nan"))
        result = self.call(op, backend)()
        for first in {0, self.numel // 2 - 3, self.numel - CHECKED}:
            first = max(0, first)
            part = slice(first, min(self.numel, first + CHECKED))
            expected = self.reference(op, part)
            got = [self.weights, *self.outs] if op == "visit" else [result]
            for index, (one, other) in enumerate(zip(got, expected, strict=True)):
                bits = torch.int32 if self.dtype.itemsize == 4 else torch.int16
                if not torch.equal(one[part].cpu().view(bits), other.view(bits)):
                    raise AssertionError(
                        f"{op} of {backend} on {self.device}, {self.dtype}: result {index} is wrong at {first}"
                    )
        self.weights.copy_(self.clean)

    def reference(self, op: str, part: slice) -> list[torch.Tensor]:
        """What the op must give for the elements of `part`, on the CPU."""
        numel = part.stop - part.start
        weights = self.clean[part].cpu().clone()
        common: dict[str, Any] = {**PLACE, "offset": part.start, "backend": "reference"}
        if op in ("normal", "rademacher"):
            return [getattr(distzo2_core, op)(numel, dtype=self.dtype, **common)]
        if op == "perturb_":
            return [distzo2_core.perturb_(weights, EPS, **common)]
        if op == "update_":
            return [distzo2_core.update_(weights, LR, COEF, **common)]
        outs = [torch.empty_like(weights) for _ in range(2)]
        distzo2_core.materialize(
            weights.view(torch.uint8),
            outs=[out.view(torch.uint8) for out in outs],
            backend="reference",
            **visit_arguments(numel, self.dtype, part.start),
        )
        return [weights, *outs]


def bench(device: str, backends: list[str], dtypes: list[str], numel: int, threads: int, rounds: int) -> list[dict]:
    """Rows of all ops, dtypes and backends at one size and number of CPU threads."""
    torch.set_num_threads(threads)
    rows: list[dict] = []
    for dtype in dtypes:
        case = Case(DTYPES[dtype], numel, device)
        contenders: dict[str, Callable[[], object]] = {"randn_add torch": case.randn_add()}
        for op in OPS:
            for backend in backends:
                case.check(op, backend)
                contenders[f"{op} {backend}"] = case.call(op, backend)
        seconds = interleaved_seconds(contenders, device, rounds)
        baseline = seconds["randn_add torch"]["median"]
        for name, times in seconds.items():
            op, backend = name.split()
            speedup = baseline / times["median"]
            row = {
                "device": device,
                "threads": threads if device == "cpu" else None,
                "op": op,
                "backend": backend,
                "dtype": dtype,
                "numel": numel,
                "seconds": times,
                "giga_elements_per_s": numel / times["median"] / 1e9,
                "gb_per_s": numel * case.dtype.itemsize * PASSES[op] / times["median"] / 1e9,
                "speedup_over_randn_add": speedup,
            }
            rows.append(row)
            where = f"{device} x{threads}" if device == "cpu" else device
            print(
                f"{where:8} {op:10} {backend:9} {dtype:8} {numel:>10} "
                f"{row['giga_elements_per_s']:8.3f} G/s {row['gb_per_s']:8.1f} GB/s {speedup:6.2f}x",
                flush=True,
            )
    return rows


def main() -> None:
    """Parse the options, run, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "all"], default="all", help="default: what there is")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; the median is reported")
    parser.add_argument("--quick", action="store_true", help="one size a device, three rounds")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    dtypes = options.dtypes.split(",")
    rounds = 3 if options.quick else options.rounds
    info = distzo2_core.build_info()
    rows: list[dict] = []
    if options.device != "cuda":
        if not info["native"]:
            raise SystemExit("error: distzo2_core._C is not built: python setup.py build_ext --inplace")
        all_threads = torch.get_num_threads()
        for threads in sorted({1, all_threads}):
            for numel in [2**22] if options.quick else [2**20, 2**24]:
                rows += bench("cpu", ["native"], dtypes, numel, threads, rounds)
        torch.set_num_threads(all_threads)
    if options.device == "cuda" or (options.device == "all" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise SystemExit("error: --device cuda, but torch sees no GPU")
        backends = (["native"] if info["cuda"] else []) + ["triton"]
        for numel in [2**28] if options.quick else [2**20, 2**24, 2**28]:
            rows += bench("cuda", backends, dtypes, numel, torch.get_num_threads(), rounds)
    write_results(options.json, "kernels", rows)


if __name__ == "__main__":
    main()
