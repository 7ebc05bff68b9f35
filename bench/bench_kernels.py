"""Speed of the noise and of the fused kernels, beside plain torch, NumPy and a copy on the same device in the same run.

    python bench/bench_kernels.py                      # CPU, and CUDA where there is a GPU
    python bench/bench_kernels.py --device cuda --quick

Every row is checked bit for bit against the reference before anything is timed; then all of one size and dtype are
timed in turn, on one thread and on all, and the medians kept. `visit` is what a ZO step does to a block: read the
weights, apply one update, write them back, and write the +eps and the -eps copy; `visit, float32` emits the two in
float32 from 16-bit weights. Ratios to torch and NumPy are to one
perturbation by them, whatever the op; NumPy has one thread. Bytes are those that must move: reads and writes of
weights, and of the copies. The copy that they are set against is torch's copy_ of COPY_BYTES by as many threads, its
bandwidth reads plus writes; what fits in a cache can exceed it. `normal` and `rademacher` write to a buffer that is
there. Beside what an op gains by threads stands what SHA-256 in registers gains by as many in the same rounds: cores
that share a clock, a power budget or a host give less than their number.
`update of 8` is an update of 8 probes to a matrix of COLS columns, one visit; low-rank noise depends on them.
`codes, visit` is a visit of weights stored as integer codes with a scale for each 64, or as bfloat16, emitted in
bfloat16; `codes, emit` the same without the update.
On CUDA the instruction bound is what the schedulers can issue: multiprocessors * 128 lanes * highest clock over the
instructions an element of bench/results/sass_counts.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_common import RESULTS, hash_in_registers, interleaved_seconds, machine, write_results

import distzo2_core
from distzo2_core import Emit, GroupScalars, Segment, SegmentTable, Term, Update
from distzo2_core.types import FAMILIES

SEED, STEP, PARAM, PROBE = 2**63 + 5, 11, 7, 1
PLACE = {"seed": SEED, "step": STEP, "param": PARAM, "probe": PROBE}
EPS, LR, COEF = 1e-3, 1e-6, 0.7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED = 2048  # elements compared at each place
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far beyond the caches
OPS = (  # op, noise
    ("normal", "normal"),
    ("rademacher", "rademacher"),
    ("perturb_", "normal"),
    ("perturb_", "rademacher"),
    ("restore_", "normal"),
    ("update_", "normal"),
    ("update_", "rademacher"),
    ("visit", "normal"),
    ("visit", "rademacher"),
    ("visit, float32", "normal"),
    ("visit, float32", "rademacher"),
    *(("update of 8", noise) for noise in FAMILIES),
    *(("visit", noise) for noise in FAMILIES if noise not in ("normal", "rademacher")),
)
# Passes over the weights' bytes: reads plus writes.
PASSES = {"normal": 1, "rademacher": 1, "visit": 4, "visit, float32": 6}
COLS = 4096  # of the matrix that visits and updates of 8 probes are of
SASS_KERNELS = {  # names of tools/sass_counts.py
    ("perturb_", "normal"): "perturb",
    ("perturb_", "rademacher"): "perturb, signs",
    ("restore_", "normal"): "perturb",
    ("update_", "normal"): "update",
    ("visit", "normal"): "visit",
    ("visit", "rademacher"): "visit, signs",
}
EMBEDDING_COLS, EMBEDDING_ELEMENTS = (64, 1024), 2**21
CODES = {"int8": torch.int8, "int16": torch.int16}
SCALE_GROUP, SCALE = 64, 2.0**-14


class Key(NamedTuple):
    """What is timed: an op of a backend, or a baseline of torch or NumPy; threads are 0 on a GPU."""

    op: str
    noise: str
    backend: str
    threads: int


def visit_arguments(
    numel: int, dtype: torch.dtype, noise: str, out_dtype: torch.dtype, element_offset: int = 0, probes: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `materialize` for one segment: an update of step STEP, then emits +eps and -eps; with
    `probes`, an update of so many and no emits."""
    family = FAMILIES[noise]
    end = element_offset + numel
    segment = Segment(0, numel, dtype, PARAM, element_offset, 0, -(-end // COLS), COLS, out_dtype=out_dtype)
    if dtype in CODES.values():
        segment = segment._replace(scale_offset=numel * dtype.itemsize, scale_group=SCALE_GROUP)
    return {
        "segments": SegmentTable([segment]),
        "seed": SEED,
        "updates": (
            Update(
                STEP,
                (GroupScalars(LR, 0.0),),
                tuple(Term(family, STEP, PROBE + k, 0, COEF) for k in range(probes or 1)),
            ),
        ),
        "emits": tuple(
            Emit((Term(family, STEP + 1, 0, 0, sign * EPS),), (1.0,)) for sign in ((1.0, -1.0) if not probes else ())
        ),
        "write_back": True,
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits on the CPU, as integers."""
    return tensor.cpu().view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16)


class Case:
    """One dtype and size on one device: the buffers, and a call per op and backend."""

    def __init__(self, dtype: torch.dtype, numel: int, device: str) -> None:
        self.dtype, self.numel, self.device = dtype, numel, device
        generator = torch.Generator(device).manual_seed(0)
        self.clean = torch.empty(numel, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        self.weights = self.clean.clone()
        self.outs = [torch.empty_like(self.weights) for _ in range(2)]
        self.wide = [] if dtype == torch.float32 else [torch.empty_like(out, dtype=torch.float32) for out in self.outs]

    def outs_of(self, op: str) -> list[torch.Tensor]:
        """What the op emits to."""
        return [] if op == "update of 8" else self.wide if op == "visit, float32" else self.outs

    def call(self, op: str, noise: str, backend: str) -> Callable[[], object]:
        """A call of the op on all elements; in-place ops work on `weights`."""
        common: dict[str, Any] = {**PLACE, "backend": backend}
        if op in ("normal", "rademacher"):
            function = getattr(distzo2_core, op)
            return lambda: function(self.numel, out=self.outs[0], **common)
        if op in ("perturb_", "restore_"):
            function = getattr(distzo2_core, op)
            return lambda: function(self.weights, EPS, family=noise, **common)
        if op == "update_":
            return lambda: distzo2_core.update_(self.weights, LR, COEF, family=noise, **common)
        weights, outs = self.weights.view(torch.uint8), [out.view(torch.uint8) for out in self.outs_of(op)]
        out_dtype = torch.float32 if op == "visit, float32" else self.dtype
        visit = visit_arguments(self.numel, self.dtype, noise, out_dtype, probes=8 if op == "update of 8" else 0)
        return lambda: distzo2_core.materialize(weights, outs=outs, backend=backend, **visit)

    def check(self, op: str, noise: str, backend: str) -> None:
        """Run the op once on clean weights and compare its first, a middle and its last elements with the reference."""
        self.weights.copy_(self.clean)
        for out in (*self.outs, *self.wide):
            out.fill_(float("nan"))
        result = self.call(op, noise, backend)()
        for first in {0, self.numel // 2 - 3, self.numel - CHECKED}:
            first = max(0, first)
            part = slice(first, min(self.numel, first + CHECKED))
            expected = self.reference(op, noise, part)
            got = [self.weights, *self.outs_of(op)] if op in ("visit", "visit, float32", "update of 8") else [result]
            for index, (one, other) in enumerate(zip(got, expected, strict=True)):
                if not torch.equal(bits(one[part]), bits(other)):
                    what = f"{op} ({noise}) of {backend} on {self.device}, {self.dtype}"
                    raise AssertionError(f"{what}: result {index} differs from the reference's at {first}")
        self.weights.copy_(self.clean)

    def reference(self, op: str, noise: str, part: slice) -> list[torch.Tensor]:
        """What the op must give for the elements of `part`, on the CPU."""
        numel = part.stop - part.start
        weights = self.clean[part].cpu().clone()
        common: dict[str, Any] = {**PLACE, "offset": part.start, "backend": "reference"}
        if op in ("normal", "rademacher"):
            return [getattr(distzo2_core, op)(numel, dtype=self.dtype, **common)]
        if op in ("perturb_", "restore_"):
            return [getattr(distzo2_core, op)(weights, EPS, family=noise, **common)]
        if op == "update_":
            return [distzo2_core.update_(weights, LR, COEF, family=noise, **common)]
        outs = [torch.empty_like(weights, dtype=out.dtype) for out in self.outs_of(op)]
        distzo2_core.materialize(
            weights.view(torch.uint8),
            outs=[out.view(torch.uint8) for out in outs],
            backend="reference",
            **visit_arguments(
                numel,
                self.dtype,
                noise,
                torch.float32 if op == "visit, float32" else self.dtype,
                part.start,
                8 if op == "update of 8" else 0,
            ),
        )
        return [weights, *outs]

    def numpy_add(self) -> Callable[[], object]:
        """What NumPy does to perturb: float32 normals, scaled and added in place; 16-bit weights by way of float32."""
        generator, z = np.random.default_rng(0), np.empty(self.numel, np.float32)
        is_bf16 = self.dtype == torch.bfloat16
        w = self.weights.view(torch.int16).numpy().view(np.uint16) if is_bf16 else self.weights.numpy()

        def perturb() -> None:
            generator.standard_normal(out=z, dtype=np.float32)
            np.multiply(z, np.float32(EPS), out=z)
            if not is_bf16:
                np.add(z, w, out=z if self.dtype == torch.float16 else w)
                if self.dtype == torch.float16:
                    w[:] = z
                return
            np.add(z, (w.astype(np.uint32) << 16).view(np.float32), out=z)
            rounded = z.view(np.uint32)
            w[:] = (rounded + (0x7FFF + (rounded >> 16 & 1))) >> 16

        return perturb


class Copy:
    """torch's copy_ of COPY_BYTES on a device: the bandwidth that the rows are set against."""

    def __init__(self, device: str) -> None:
        self.num_bytes = COPY_BYTES[device]
        self.source = torch.randn(self.num_bytes // 4, device=device)  # ones would take less power
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> object:
        return self.target.copy_(self.source)


class Bench:
    """One device: its backends and numbers of threads, the copy, and the rows so far."""

    def __init__(self, device: str, backends: list[str], threads: list[int], rounds: int) -> None:
        self.device, self.backends, self.threads, self.rounds = device, backends, threads, rounds
        self.copy = Copy(device)
        self.rows: list[dict[str, Any]] = []
        self.bounds = instruction_bounds() if device == "cuda" else {}

    def run(self, dtype: str, numel: int) -> None:
        """All ops at one dtype and size."""
        case = Case(DTYPES[dtype], numel, self.device)
        calls: dict[tuple[str, str, str], Callable[[], object]] = {}
        calls["randn_add", "normal", "torch"] = lambda: case.weights.add_(torch.randn_like(case.weights), alpha=EPS)
        for op, noise in OPS:
            if op == "visit, float32" and not case.wide:
                continue
            if (op, noise) == ("perturb_", "rademacher"):  # next to each other, on the same tensor
                calls["mul_", "", "torch"] = lambda: case.weights.mul_(1.0)
            for backend in self.backends:
                case.check(op, noise, backend)
                calls[op, noise, backend] = case.call(op, noise, backend)
        contenders = self.on_all_threads(calls)
        if self.device == "cpu":
            contenders[Key("numpy_add", "normal", "numpy", 1)] = case.numpy_add()
        seconds = self.measure(contenders)
        for key in contenders:
            if key.op == "registers":
                continue
            row = self.row(key, seconds, dtype, numel, PASSES.get(key.op, 2))
            time = seconds[key]["median"]
            row["speedup_over_randn_add"] = seconds[Key("randn_add", "normal", "torch", key.threads)]["median"] / time
            if self.device == "cpu":
                row["speedup_over_numpy"] = seconds[Key("numpy_add", "normal", "numpy", 1)]["median"] / time
            if key.op == "perturb_":
                row["time_over_mul_"] = time / seconds[Key("mul_", "", "torch", key.threads)]["median"]
            self.add(row)

    def run_embedding(self, dtype: str, numel: int, cols: int) -> None:
        """Lookups in a table of numel elements, beside plain ones, and those in a table that is perturbed first."""
        rows = numel // cols
        generator = torch.Generator(self.device).manual_seed(0)
        table = torch.empty(rows, cols, dtype=DTYPES[dtype], device=self.device)
        table.normal_(0, 0.02, generator=generator)
        ids = torch.randint(rows, (EMBEDDING_ELEMENTS // cols,), device=self.device, generator=generator)
        scratch = torch.empty_like(table)
        lookup = torch.nn.functional.embedding

        def perturb_first(noise: str, backend: str) -> torch.Tensor:
            distzo2_core.perturb_(scratch.copy_(table), EPS, **PLACE, family=noise, backend=backend)
            return lookup(ids, scratch)

        def perturbed(noise: str, backend: str) -> torch.Tensor:
            return distzo2_core.embedding(table, ids, EPS, **PLACE, family=noise, backend=backend)

        calls: dict[tuple[str, str, str], Callable[[], object]] = {}
        calls["embedding", "", "torch"] = lambda: lookup(ids, table)
        for backend in self.backends:
            for noise in FAMILIES:
                if not torch.equal(bits(perturbed(noise, backend)), bits(perturb_first(noise, backend))):
                    what = f"embedding ({noise}) of {backend} on {self.device}, {dtype}"
                    raise AssertionError(f"{what}: not the perturbed table's rows")
                calls["embedding", noise, backend] = partial(perturbed, noise, backend)
            calls["perturb_table_first", "normal", backend] = partial(perturb_first, "normal", backend)
        contenders = self.on_all_threads(calls)
        seconds = self.measure(contenders)
        for key in contenders:
            if key.op in ("registers", "copy"):
                continue
            row = self.row(key, seconds, dtype, ids.numel() * cols, 2) | {"table_rows": rows, "cols": cols}
            time = seconds[key]["median"]
            row["time_over_plain_embedding"] = time / seconds[Key("embedding", "", "torch", key.threads)]["median"]
            if key.op == "embedding" and key.noise == "normal":
                first = key._replace(op="perturb_table_first")
                row["speedup_over_perturbed_table"] = seconds[first]["median"] / time
            self.add(row)

    def run_codes(self, numel: int) -> None:
        """Emission of two copies, and the whole visit, of codes and of bfloat16."""
        generator = torch.Generator(self.device).manual_seed(0)
        outs = [torch.empty(numel, dtype=torch.bfloat16, device=self.device).view(torch.uint8) for _ in range(2)]
        calls: dict[tuple[str, str, str], Callable[[], object]] = {}
        formats = {"bfloat16": torch.bfloat16} | CODES
        for name, dtype in formats.items():
            weights = torch.empty(numel, device=self.device).normal_(0, 0.02, generator=generator)
            if dtype in CODES.values():
                largest = torch.iinfo(dtype).max
                scales = torch.full((numel // SCALE_GROUP,), SCALE, device=self.device)
                codes = (weights / SCALE).clamp(-largest, largest).to(dtype)
                stored = torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)])
            else:
                stored = weights.to(dtype).view(torch.uint8)
            for noise, backend, updates in itertools.product(FAMILIES, self.backends, (0, 1)):
                visit = visit_arguments(numel, dtype, noise, torch.bfloat16)
                if not updates:
                    visit |= {"updates": (), "write_back": False}
                calls["codes, visit" if updates else "codes, emit", f"{noise}, {name}", backend] = partial(
                    distzo2_core.materialize, stored, outs=outs, backend=backend, **visit
                )
        contenders = self.on_all_threads(calls)
        seconds = self.measure(contenders)
        for key in contenders:
            if key.op in ("registers", "copy"):
                continue
            noise, name = key.noise.split(", ")
            itemsize, passes = formats[name].itemsize, 2 if key.op == "codes, visit" else 1
            row = self.row(key, seconds, name, numel, passes + 4 / itemsize) | {"noise": noise}  # two copies of 2 bytes
            plain = key._replace(noise=f"{noise}, bfloat16")
            self.add(row | {"time_over_bfloat16": seconds[key]["median"] / seconds[plain]["median"]})

    def on_all_threads(self, calls: dict[tuple[str, str, str], Callable[[], object]]) -> dict[Key, Callable]:
        """The calls and the copy, each on all numbers of threads, in the order in which they take turns."""
        every = {("copy", "", "torch"): self.copy, **calls}
        if self.device == "cpu":
            every["registers", "", "hashlib"] = hash_in_registers
        return {Key(*what, threads): call for what, call in every.items() for threads in self.threads}

    def measure(self, contenders: dict[Key, Callable]) -> dict[Key, dict[str, float]]:
        """Seconds of a call of each."""
        woken = torch.zeros(2**18)

        def prepare(key: Key) -> None:
            if key.threads and key.threads != torch.get_num_threads():
                torch.set_num_threads(key.threads)
                woken.add_(1)  # starts or ends the pool's threads before the clock runs

        return interleaved_seconds(contenders, self.device, self.rounds, prepare=prepare)

    def row(self, key: Key, seconds: dict[Key, dict[str, float]], dtype: str, numel: int, passes: float) -> dict:
        """What every row has; for the copy, elements are those of COPY_BYTES."""
        itemsize = (DTYPES | CODES)[dtype].itemsize
        if key.op == "copy":
            numel = self.copy.num_bytes // itemsize
        rate = numel / seconds[key]["median"] / 1e9
        copy = 2 * self.copy.num_bytes / seconds[Key("copy", "", "torch", key.threads)]["median"] / 1e9
        row = {
            "device": self.device,
            **key._asdict(),
            "dtype": dtype,
            "numel": numel,
            "seconds": seconds[key],
            "giga_elements_per_s": rate,
            "gb_per_s": rate * itemsize * passes,
            "copy_gb_per_s": copy,
            "copy_bytes": self.copy.num_bytes,
            "of_copy_bandwidth": rate * itemsize * passes / copy,
        }
        if key.backend == "native" and (key.op, key.noise, dtype) in self.bounds:
            row["instruction_bound_giga_elements_per_s"] = self.bounds[key.op, key.noise, dtype]
            row["of_instruction_bound"] = rate / self.bounds[key.op, key.noise, dtype]
        if key.threads > 1 and key._replace(threads=1) in seconds:
            for name, what in (
                ("speedup_over_one_thread", key),
                ("registers_over_one_thread", Key("registers", "", "hashlib", key.threads)),
            ):
                row[name] = seconds[what._replace(threads=1)]["median"] / seconds[what]["median"]
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        where = f"cpu x{row['threads']}" if self.device == "cpu" else self.device
        what = row["op"] if row["op"] == row["noise"] else f"{row['op']} {row['noise']}"
        what += f", {row['cols']} cols" if "cols" in row else ""
        parts = [
            f"{where:7} {what:31} {row['backend']:9} {row['dtype']:8} {row['numel']:>10}",
            f"{row['giga_elements_per_s']:9.3f} G/s {row['gb_per_s']:8.1f} GB/s",
            f"{100 * row['of_copy_bandwidth']:6.1f}% of copy",
        ]
        for key, text in (
            ("of_instruction_bound", "{:6.1%} of issue"),
            ("speedup_over_randn_add", "{:7.2f}x torch"),
            ("speedup_over_numpy", "{:7.2f}x numpy"),
            ("time_over_mul_", "{:6.2f} of mul_"),
            ("time_over_plain_embedding", "{:6.2f} of plain"),
            ("speedup_over_perturbed_table", "{:7.2f}x table first"),
            ("time_over_bfloat16", "{:6.2f} of bfloat16"),
            ("speedup_over_one_thread", "{:5.2f}x one thread"),
            ("registers_over_one_thread", "(registers {:.2f}x)"),
        ):
            if key in row and row["op"] != "copy":
                parts.append(text.format(row[key]))
        print(" ".join(parts), flush=True)


def instruction_bounds() -> dict[tuple[str, str, str], float]:
    """10^9 elements a second by (op, noise, dtype) if the first GPU's schedulers never idle; empty if not known."""
    path, info = RESULTS / "sass_counts.json", machine()
    major, minor = info["gpu_capability"]
    counts = json.loads(path.read_text())["counts"] if path.exists() else {}
    table = counts.get(f"sm_{major}{minor}", {}).get("loops", {})
    if not table or not info["gpu_max_clock_mhz"]:
        return {}
    lanes_per_s = info["gpu_multiprocessors"] * 128 * info["gpu_max_clock_mhz"] * 1e6
    return {
        (*op, dtype): lanes_per_s / table[kernel][dtype]["instructions"] / 1e9
        for op, kernel in SASS_KERNELS.items()
        for dtype in DTYPES
        if dtype in table.get(kernel, {})
    }


def run_device(
    device: str,
    backends: list[str],
    threads: list[int],
    options: argparse.Namespace,
    save: Callable[[list[dict]], object],
) -> list[dict]:
    """All rows of one device; those so far are saved after each dtype."""
    if device == "cpu":
        sizes = [2**22] if options.quick else [2**20, 2**25]
    else:
        sizes = [2**28] if options.quick else [2**20, 2**24, 2**28]
    bench = Bench(device, backends, threads, 3 if options.quick else options.rounds)
    for dtype in options.dtypes.split(","):
        for numel in sizes:
            bench.run(dtype, numel)
        for cols in EMBEDDING_COLS:
            bench.run_embedding(dtype, min(sizes[-1], 2**26), cols)
        save(bench.rows)
    bench.run_codes(sizes[-1])
    save(bench.rows)
    return bench.rows


def main() -> None:
    """Parse the options, run, and write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "all"], default="all", help="default: what there is")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median is reported")
    parser.add_argument("--quick", action="store_true", help="one size a device, three rounds")
    parser.add_argument("--json", type=Path, help="where the results go; the picture goes beside them")
    options = parser.parse_args()
    info = distzo2_core.build_info()
    rows: list[dict] = []
    levels: list[dict] = []

    def save(more: list[dict]) -> Path:
        return write_results(options.json, "kernels", rows + more, normals_per_core=levels)

    if options.device != "cuda":
        if not info["native"]:
            raise SystemExit("error: distzo2_core._C is not built: python setup.py build_ext --inplace")
        from bench_levels import normals_per_core

        levels = normals_per_core(3 if options.quick else 2 * options.rounds)
        all_threads = torch.get_num_threads()
        rows += run_device("cpu", ["native"], sorted({1, all_threads}), options, save)
        torch.set_num_threads(all_threads)
    if options.device == "cuda" or (options.device == "all" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise SystemExit("error: --device cuda, but torch sees no GPU")
        rows += run_device("cuda", (["native"] if info["cuda"] else []) + ["triton"], [0], options, save)
    path = save([])
    from plot_kernels import draw

    print(f"wrote {draw(path)}")


if __name__ == "__main__":
    main()
