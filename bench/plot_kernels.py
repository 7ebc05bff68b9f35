"""Draws what bench_kernels.py measured, as a picture beside its JSON.

python bench/plot_kernels.py bench/results/kernels-NAME.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
COLOURS = {"float32": "#4477aa", "bfloat16": "#ccbb44", "float16": "#228833"}
# Baselines first; (op, noise) as in the rows, and what the axis says.
LABELS = {
    ("numpy_add", "normal"): "NumPy normal, +=",
    ("randn_add", "normal"): "torch randn, add_",
    ("mul_", ""): "torch mul_",
    ("normal", "normal"): "normal",
    ("rademacher", "rademacher"): "rademacher",
    ("perturb_", "normal"): "perturb_",
    ("perturb_", "rademacher"): "perturb_, signs",
    ("restore_", "normal"): "restore_",
    ("update_", "normal"): "update_",
    ("update_", "rademacher"): "update_, signs",
    ("visit", "normal"): "visit",
    ("visit", "rademacher"): "visit, signs",
    ("visit, float32", "normal"): "visit, float32",
    ("visit, float32", "rademacher"): "visit, float32, signs",
}
OURS = tuple(LABELS)[3:]
Row = dict[str, Any]


def title(result: dict[str, Any], device: str) -> str:
    """The machine and its software in one line."""
    info = result["machine"]
    if device == "cuda":
        return f"{info['gpu']}, torch {info['torch']}, CUDA {info.get('cuda')}, {info['commit']}"
    return f"{info['cpu']}, {info['cores']} cores, {info['capability']}, torch {info['torch']}, {info['commit']}"


def bars(axes: Any, rows: list[Row], ops: tuple, value: Callable[[Row], float | None], all_threads: list[Row]) -> None:
    """A bar with its number for each op and dtype; a mark where the same row on all threads is."""
    width = 0.8 / len(DTYPES)
    for index, dtype in enumerate(DTYPES):
        for position, op in enumerate(ops):
            at = position + (index - (len(DTYPES) - 1) / 2) * width
            found = [
                value(row)
                for some in (rows, all_threads)
                for row in some
                if (row["op"], row["noise"], row["dtype"]) == (*op, dtype)
            ]
            lengths = [length for length in found if length is not None]
            if not lengths:
                continue
            axes.barh(at, lengths[0], width, color=COLOURS[dtype], label=dtype if position == len(ops) - 1 else None)
            axes.plot(lengths[1:], [at] * len(lengths[1:]), "|", color="black", markersize=6)
            axes.annotate(
                f"{lengths[0]:.3g}", (max(lengths), at), (5, 0), textcoords="offset points", va="center", size=6
            )
    axes.set_yticks(range(len(ops)), [LABELS[op] for op in ops])
    axes.invert_yaxis()
    axes.margins(x=0.1)


def draw_device(grid: Any, figure: Any, result: dict[str, Any], device: str, backend: str) -> None:
    """Four panels: rate, share of the copy bandwidth, ratio to torch, and what bounds the device's arithmetic."""
    rows = [row for row in result["rows"] if row["device"] == device and (row["op"], row["noise"]) in LABELS]
    rows = [row for row in rows if row["backend"] in (backend, "torch", "numpy")]
    largest = max(row["numel"] for row in rows)
    rows = [row for row in rows if row["numel"] == largest]
    threads = sorted({row["threads"] for row in rows})
    one = [row for row in rows if row["threads"] == threads[0]]
    every = [row for row in rows if row["threads"] == threads[-1]] if len(threads) > 1 else []
    how = f"one thread; | {threads[-1]} threads" if every else ("one thread" if device == "cpu" else backend)
    log2 = largest.bit_length() - 1

    axes = figure.add_subplot(grid[0])
    there = tuple(op for op in LABELS if any((row["op"], row["noise"]) == op for row in rows))
    bars(axes, one, there, lambda row: row["giga_elements_per_s"], every)
    axes.set_xscale("log")
    axes.set_xlabel("G elements/s")
    axes.set_title(f"Rate over 2^{log2} elements ({how})")
    axes.legend(loc="lower right", frameon=False, bbox_to_anchor=(1.05, 0))

    axes = figure.add_subplot(grid[1])
    bars(axes, one, there, lambda row: 100 * row["of_copy_bandwidth"], every)
    axes.axvline(100, color="black", linewidth=0.8, linestyle="--")
    copies = [sorted(row["copy_gb_per_s"] for row in some) for some in (one, every) if some]
    rates = " and ".join(f"{some[len(some) // 2]:.1f}" for some in copies)
    axes.set_xlabel(f"% of torch's copy of {one[0]['copy_bytes'] / 2**20:.0f} MiB ({rates} GB/s)")
    axes.set_title("Bytes that must move, against a copy")

    axes = figure.add_subplot(grid[2])
    bars(axes, one, OURS, lambda row: row.get("speedup_over_randn_add"), every)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    if device == "cpu":
        axes.axvline(6, color="#ee6677", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    budget = " (red: budget of perturb_)" if device == "cpu" else ""
    axes.set_xlabel(f"times randn + add_ on as many threads{budget}")
    axes.set_title("Against plain torch")

    axes = figure.add_subplot(grid[3])
    if device == "cpu":
        draw_levels(axes, result["normals_per_core"])
    elif any("of_instruction_bound" in row for row in one):
        share: Callable[[Row], float] = lambda row: 100 * row["of_instruction_bound"]  # noqa: E731
        bound = [row for row in one if "of_instruction_bound" in row]
        bars(axes, bound, tuple(op for op in OURS if any((r["op"], r["noise"]) == op for r in bound)), share, [])
        axes.axvline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel("% of what the schedulers can issue at the highest clock")
        axes.set_title("Against the instruction bound")
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no instruction counts for this GPU and backend", ha="center", va="center")


def draw_levels(axes: Any, levels: list[Row]) -> None:
    """Normals a second on one core by instruction set, with the budgets."""
    names = [row["what"] for row in levels]
    rates = [row["giga_normals_per_s"] for row in levels]
    axes.barh(range(len(names)), rates, 0.6, color="#66ccee")
    budgets = {"avx2": 0.6, "avx512": 0.9}
    for position, (name, rate) in enumerate(zip(names, rates, strict=True)):
        budget = budgets.get(name, 0)
        axes.text(max(rate, budget), position, f"  {rate:.2f}", va="center")
        if budget:
            axes.plot([budget, budget], [position - 0.4, position + 0.4], color="#ee6677", linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([*rates, *(budgets[name] for name in names if name in budgets)], default=1))
    axes.set_xlabel("G normals/s on one core, in the caches (dashed: budget)")
    axes.set_title("Normals by instruction set")


def draw(path: Path) -> Path:
    """Draws the JSON file `path` and returns the PNG, which lies beside it; one figure a device and backend."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result = json.loads(path.read_text())
    pictures = []
    for device in ("cpu", "cuda"):
        ran = {row["backend"] for row in result["rows"] if row["device"] == device}
        pictures += [(device, backend) for backend in ("native", "triton") if backend in ran]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 10 * len(pictures)), layout="constrained")
        FigureCanvasAgg(figure)
        for part, (device, backend) in zip(
            figure.subfigures(len(pictures), 1, squeeze=False)[:, 0], pictures, strict=True
        ):
            part.suptitle(f"DistZO2 kernels, {backend}: {title(result, device)}")
            draw_device(part.add_gridspec(2, 2), part, result, device, backend)
        target = path.with_suffix(".png")
        figure.savefig(target, dpi=120)
    return target


def main() -> None:
    """Parse the options and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what bench_kernels.py wrote")
    print(f"wrote {draw(parser.parse_args().json)}")


if __name__ == "__main__":
    main()
