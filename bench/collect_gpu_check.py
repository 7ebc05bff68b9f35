"""Puts what gpu_check.sh left in its scratch folder into one JSON file.

With --draw it also prints a table and draws it, and the status is 1 if a row failed.

python bench/collect_gpu_check.py SCRATCH SECONDS FILE [--draw]

A row of the check is {"row", "status", "seconds", "figures"}, and a figure {"what", "measured", "unit", "beside",
"expected"}: `beside` names what it is held against, in the same unit; `expected` is what arithmetic says of an H200.
All that the benches measured is under "details". Imports no torch, since it runs after each row.
"""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
Row = dict[str, Any]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
PASSES = {"normal": 1, "rademacher": 1, "visit": 4}  # over the weights' bytes, as in bench_kernels.py; others 2
KERNELS = (
    ("normal", "normal"),
    ("perturb_", "normal"),
    ("perturb_", "rademacher"),
    ("update_", "normal"),
    ("visit", "normal"),
)
DTYPE = "bfloat16"  # of the kernels that are shown
# By (model, contender, batch, probes), at 2048 tokens a sequence.
EXPECTED = {
    ("opt-13b", "resident", 1, 1): "225",
    ("opt-13b", "streamed", 1, 1): "500 to 560, bound by the link",
    ("opt-13b", "streamed", 4, 1): "as resident (equal from about 5,600 tokens)",
}
NAMES = {0: "ok", 124: "out of time", 137: "out of time"}


def figure(what: str, measured: float, unit: str, beside: dict[str, float] | None = None, expected: str = "") -> Figure:
    """What stands in a line of the table."""
    return {"what": what, "measured": measured, "unit": unit, "beside": beside or {}, "expected": expected}


def of_tests(path: Path) -> list[Figure]:
    """Passed tests, beside failed ones (errors among them) and skipped ones; none where the tests did not end."""
    if not path.exists() or not path.stat().st_size:
        return []
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        for key in total:
            total[key] += int(suite.get(key, "0"))
    failed = total["failures"] + total["errors"]
    passed = total["tests"] - failed - total["skipped"]
    return [figure("tests passed", passed, "", {"failed": failed, "skipped": total["skipped"]}, "0 failed")]


def of_normals(rows: list[Row]) -> list[Figure]:
    return [
        figure(f"{row['family']} of {row['backend']}, bits that differ from the CPU's", row["differ"],
               f"of 2^{row['numel'].bit_length() - 1}", {}, "0")
        for row in rows
    ]  # fmt: skip


def of_ranks(rows: list[Row]) -> list[Figure]:
    """Seconds of each mesh, and in how much it differs from one rank."""
    return [figure(row["what"], row["seconds"], "s", {"faults": len(row["found"])}, "0 faults") for row in rows]


def of_signal(rows: list[Row]) -> list[Figure]:
    """The correlation of a step's differences with those in float32."""
    return [
        figure(f"signal in {row['dtype']} at eps {row['eps']:g}", row["correlation"] or 0.0, "",
               {"error": row["relative_error"] or 0.0, "s": row["seconds"]},
               "0.99 and more at 1e-3" if row["dtype"] == "tf32" else "")
        for row in rows if row["dtype"] != "float32"
    ]  # fmt: skip


def of_kernels(rows: list[Row]) -> list[Figure]:
    """G elements/s beside what memory and the schedulers allow."""
    found = []
    for op, noise in KERNELS:
        for row in rows:
            if (row["op"], row["noise"], row["dtype"]) != (op, noise, DTYPE) or row["backend"] not in (
                "native",
                "triton",
            ):
                continue
            beside = {"memory": row["copy_gb_per_s"] / ITEMSIZE[DTYPE] / PASSES.get(op, 2)}
            if "instruction_bound_giga_elements_per_s" in row:
                beside["instructions"] = row["instruction_bound_giga_elements_per_s"]
            if "speedup_over_randn_add" in row:
                beside["randn + add_"] = row["giga_elements_per_s"] / row["speedup_over_randn_add"]
            what = f"{op} {noise}" if op != noise else op
            threads = f" x{row['threads']}" if row["threads"] else ""
            expected = "300 and more" if (op, noise) == ("perturb_", "normal") and row["device"] == "cuda" else ""
            found.append(
                figure(
                    f"{what}, {DTYPE}, {row['backend']}{threads}", row["giga_elements_per_s"], "G/s", beside, expected
                )
            )
    return found


def of_copies(rows: list[Row]) -> list[Figure]:
    """The engine's rate in one direction beside raw copies."""
    found = []
    for row in rows:
        if row["pattern"] == "make_pool":
            *others, (how, rate) = row["gb_per_s"].items()
            expected = "8 and more" if row["device"] == "cuda" else ""
            found.append(figure(f"pool made, {how}", rate, "GB/s", dict(others), expected))
        elif row.get("source") == "host":
            beside = {"raw": row["raw_gb_per_s"]}
            what = f"engine {row['pattern']}, {row['block_mib']:.0f} MiB"
            found.append(figure(what, row["engine_gb_per_s"], "GB/s", beside, "0.97 of raw"))
    return found


def of_items(rows: list[Row]) -> list[Figure]:
    """Microseconds of a read beside the whole time of the downloads."""
    return [
        figure(
            f"{row['read']} beside {row['beside']}",
            1e6 * row["item_s"],
            "us",
            {"downloads": 1e6 * row["downloads_s"]} if row["beside"] != "nothing" else {},
        )
        for row in rows
    ]


def of_steps(rows: list[Row], contender: str) -> list[Figure]:
    """Milliseconds of a contender's steps beside max(compute, up, down) and the others; these three with "resident"."""
    links = {row["contender"]: 1e3 * row["seconds"] for row in rows if row["contender"] in ("up", "down", "both")}
    compute = {row["batch"]: 1e3 * row["seconds"] for row in rows if row["contender"] == "compute"}
    seconds = {(row["contender"], row.get("batch"), row.get("probes")): 1e3 * row["seconds"] for row in rows}
    found = []
    for row in rows:
        kind, batch, probes = row["contender"], row.get("batch"), row.get("probes")
        if kind not in (("compute", *links) if contender == "resident" else ()) and kind != contender:
            continue
        if kind in links:
            found.append(
                figure(f"raw copies of all blocks, {kind}", 1e3 * row["seconds"], "ms",
                       {"GB/s each way": row["num_bytes"] / row["seconds"] / 1e9})
            )  # fmt: skip
            continue
        beside: dict[str, float] = {}
        if kind == "compute":
            name = "two bare forwards"
        else:
            name = f"{kind}, {probes} probe{'s' if probes > 1 else ''}"
            bounds = [probes * compute[batch]] if batch in compute else []
            bounds += [links[way] for way in ("up", "down") if way in links and kind != "resident"]
            if bounds:
                beside["compute" if kind == "resident" else "max(compute, up, down)"] = max(bounds)
            for other in ("resident", "streamed", "zo2"):
                if other != kind and (other, batch, probes) in seconds and kind != "resident":
                    beside[other] = seconds[other, batch, probes]
            if "device_bytes" in row:
                name += f", {row['device_bytes'] / 1e9:.1f} GB of the GPU"
        expected = EXPECTED.get((row["model"], kind, batch, probes), "") if row["tokens"] == 2048 else ""
        what = f"{row['model']} {batch} x {row['tokens']}: {name}"
        found.append(figure(what, 1e3 * row["seconds"], "ms", beside, expected))
    return found


def figures_of(name: str, scratch: Path, details: dict[str, list[Row]]) -> list[Figure]:
    """The figures of a row of the check."""
    if name.endswith("-tests"):
        return of_tests(scratch / f"{name}.xml")
    if name.startswith("step-"):
        return of_steps(details.get("large_step", []), name.removeprefix("step-"))
    if name.startswith("ranks-"):
        return of_ranks(details.get(name, []))
    readers = {"normals": of_normals, "kernels": of_kernels, "copies": of_copies, "item": of_items, "signal": of_signal}
    return readers[name](details.get(name, [])) if name in readers else []


def read_rows(path: Path) -> list[Row]:
    """The rows of a bench's JSON file; none of one that was cut short."""
    try:
        return json.loads(path.read_text()).get("rows", [])
    except (OSError, ValueError):
        return []


def collect(scratch: Path, seconds: int) -> dict[str, Any]:
    """All that there is so far."""
    names = ("normals", "ranks-nccl", "ranks-gloo", "large_step", "signal", "kernels", "copies", "item")
    details = {name: rows for name in names if (rows := read_rows(scratch / f"{name}.json"))}
    rows = []
    for line in (scratch / "rows").read_text().splitlines():
        name, status, taken = line.split()
        rows.append({"row": name, "status": int(status), "seconds": int(taken)})
    for row in rows:  # after all are known, since steps are shown beside each other
        row["figures"] = figures_of(row["row"], scratch, details)
    path = scratch / "machine.json"
    machine = json.loads(path.read_text() or "null") if path.exists() else None
    return {"machine": machine, "seconds": seconds, "rows": rows, "details": details}


# ---- table and picture ----------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, or all of an integer."""
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each figure."""
    lines = [
        "| row | status | s | figure | measured | beside | expected |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        head = [row["row"], NAMES.get(row["status"], f"FAILED ({row['status']})"), str(row["seconds"])]
        for item in row["figures"] or [None]:
            cells = ["", "", "", ""]
            if item is not None:
                beside = ", ".join(f"{name} {number(value)}" for name, value in item["beside"].items())
                cells = [item["what"], f"{number(item['measured'])} {item['unit']}".strip(), beside, item["expected"]]
            lines.append("| " + " | ".join([*head, *cells]) + " |")
            head = ["", "", ""]
    return "\n".join(lines)


def draw(result: dict[str, Any], target: Path) -> None:
    """A panel for each unit: bars, and a mark for each thing that a figure stands beside."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    panels = {
        "ms": "Steps, ms",
        "G/s": "Kernels, G elements/s",
        "GB/s": "Copies, GB/s each way",
        "us": "Reading a number, us",
    }
    info = result["machine"] or {}
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        canvas = Canvas(figsize=(16, 10), layout="constrained")
        FigureCanvasAgg(canvas)
        canvas.suptitle(
            f"gpu_check.sh: {info.get('gpu') or info.get('cpu')}, torch {info.get('torch')}, {info.get('commit')}"
        )
        for axes, (unit, title) in zip(canvas.subplots(2, 2).flat, panels.items(), strict=True):
            items = [item for row in result["rows"] for item in row["figures"] if item["unit"] == unit]
            axes.set_title(title, loc="left", pad=20)
            axes.set_yticks(range(len(items)), [item["what"] for item in items])
            axes.barh(range(len(items)), [item["measured"] for item in items], 0.6, color="#66ccee")
            marks: dict[str, list[tuple[float, int]]] = {}
            for at, item in enumerate(items):
                axes.text(item["measured"], at, f" {number(item['measured'])}", va="center")
                for name, value in item["beside"].items():
                    if "GB/s" not in name:  # another unit
                        marks.setdefault(name, []).append((value, at))
            for index, (name, points) in enumerate(marks.items()):
                axes.scatter(*zip(*points, strict=True), marker="|", s=150, color=f"C{index + 1}", label=name)
            axes.invert_yaxis()
            axes.margins(x=0.12)
            if unit == "us" and items:
                axes.set_xscale("log")
            if marks:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 0.99), ncols=len(marks), frameon=False)
        canvas.savefig(target, dpi=110)


def main() -> None:
    """Collect, write the JSON in one go, and print and draw if asked."""
    scratch, seconds, target = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    result = collect(scratch, seconds)
    written = target.with_suffix(f".{os.getpid()}")  # rows may end at once
    written.write_text(json.dumps(result, indent=1) + "\n")
    written.replace(target)
    if sys.argv[4:] == ["--draw"]:
        print(table(result))
        draw(result, target.with_suffix(".png"))
        print(f"{seconds} s in all; wrote {target} and {target.with_suffix('.png')}")
        sys.exit(any(row["status"] for row in result["rows"]))


if __name__ == "__main__":
    main()
