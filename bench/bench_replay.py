"""Replaying many steps over OPT-125M, beside `update_` of every parameter, step by step, as a live run would do it.

    python bench/bench_replay.py --dtype bfloat16    # a random checkpoint is made where there is none

Turns, interleaved: a replay of --few steps, one of --many, and --few steps of `update_` in memory. A thousand steps
are reckoned from the two replays, as what a replay takes at all and what each step adds; --whole makes them, both ways:
a replay of all, all steps of `update_`, and a replay again. The weights that `update_` leaves must have the bits of the
replay. Memory is the peak (VmHWM) of a process that does nothing but replay: two steps, or with --whole all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_common import write_results
from random_checkpoint import write_random_checkpoint

from distzo2.checkpoint.reading import digest_checkpoint
from distzo2.models.pretrained import open_checkpoint
from distzo2.models.replay import open_map, replay
from distzo2.record.entry import StepEntry
from distzo2.record.header import make_header, table_row
from distzo2.record.journal import Journal, JournalContents
from distzo2_core import GroupScalars, Term, Update, update_

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STEPS = 1000  # of the figure that is asked for
SEED = 7


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def make_journal(path: Path, base: Path, num_steps: int, family: int) -> None:
    """A run of that many steps, each of one probe."""
    _, checkpoint_map = open_checkpoint(base)
    checkpoint_map.close()
    table = []
    for index, name in enumerate(checkpoint_map.names):
        mapped = checkpoint_map.mapped[name]
        stride = torch.empty(mapped.shape, device="meta").stride()
        table.append(table_row(index, name, mapped.shape, mapped.dtype, stride, True, 0, "normal"))
    header = make_header(seed=SEED, base=digest_checkpoint(base), table=table, groups=[{}])
    entries = []
    for step in range(num_steps):
        update = Update(step, (GroupScalars(f32(1e-4), 0.0),), (Term(family, step, 0, 0, f32(0.1 + step % 7)),))
        entries.append(StepEntry(step, update, f32(1e-3), [[1.0], [1.0]]))
    Journal.create(path, header, entries).close()


def load(base: Path, header: dict) -> dict[str, torch.Tensor]:
    """The base's parameters, in the order of the index table."""
    checkpoint_map = open_map(base, header, "the journal")
    weights = {}
    for name in checkpoint_map.names:
        mapped = checkpoint_map.mapped[name]
        weights[name] = torch.empty(mapped.shape, dtype=mapped.dtype)
        checkpoint_map.read(name, weights[name])
    checkpoint_map.close()
    return weights


def live(weights: dict[str, torch.Tensor], entries: list[StepEntry]) -> float:
    """Applies the steps one after another; returns seconds."""
    start = time.perf_counter()
    for entry in entries:
        ((scalars,), (term,)) = entry.update.groups, entry.update.terms
        for index, weight in enumerate(weights.values()):
            update_(
                weight, scalars.lr, term.c, seed=SEED, step=term.step, param=index,
                family=["normal", "rademacher"][term.family],
            )  # fmt: skip
    return time.perf_counter() - start


def same_bits(weights: dict[str, torch.Tensor], out: Path, base: Path, header: dict) -> bool:
    found = load(out, header | {"map": None})
    return all(torch.equal(found[name].view(torch.uint8), w.view(torch.uint8)) for name, w in weights.items())


def timed_replay(base: Path, journal: Path, out: Path, num_steps: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    replay(base, journal, out, to_step=num_steps, progress=False)
    return time.perf_counter() - start


def peak_of_a_replay(base: Path, journal: Path, out: Path, num_steps: int) -> int:
    """VmHWM of a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    code = (
        "import sys\nfrom distzo2.models.replay import replay\nfrom distzo2.run.metrics import peak_bytes\n"
        "replay(*sys.argv[1:4], to_step=int(sys.argv[4]), progress=False)\nprint(peak_bytes())"
    )
    command = [sys.executable, "-c", code, str(base), str(journal), str(out), str(num_steps)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def whole(base: Path, journal: Path, out: Path, contents: JournalContents) -> dict:
    """What --whole puts in the place of figures from a few steps."""
    peak = peak_of_a_replay(base, journal, out, STEPS)
    weights = load(base, contents.header)
    before = timed_replay(base, journal, out, STEPS)
    update = live(weights, contents.entries)
    after = timed_replay(base, journal, out, STEPS)
    return {
        "peak_bytes": peak,
        "update_1000_s": update,
        "replay_1000_s": (before + after) / 2,
        "same_bits": same_bits(weights, out, base, contents.header),
    }


def bench(base: Path, work: Path, args: argparse.Namespace) -> dict:
    journal, out = work / "journal.jsonl", work / "out"
    family = ("normal", "rademacher").index(args.noise)
    make_journal(journal, base, STEPS, family)
    from distzo2.record.journal import read_journal

    contents = read_journal(journal)
    few = contents.entries[: args.few]
    row: dict = {"dtype": args.dtype, "noise": args.noise, "few": args.few, "many": args.many}
    row["peak_bytes"] = peak_of_a_replay(base, journal, out, 2)
    weights = load(base, contents.header)
    row["num_elements"] = sum(weight.numel() for weight in weights.values())
    row["largest_tensor_bytes"] = max(weight.numel() * weight.itemsize for weight in weights.values())
    live(weights, few)
    timed_replay(base, journal, out, args.few)
    row["same_bits"] = same_bits(weights, out, base, contents.header)
    times: dict[str, list[float]] = {"update_": [], "few": [], "many": []}
    for _ in range(args.rounds):
        times["few"].append(timed_replay(base, journal, out, args.few))
        times["update_"].append(live(weights, few))
        times["many"].append(timed_replay(base, journal, out, args.many))
    figures = {name: statistics.median(values) for name, values in times.items()}
    update = figures["update_"] / args.few
    step = (figures["many"] - figures["few"]) / (args.many - args.few)
    row |= {"update_s": update, "replay_step_s": step, "replay_alone_s": figures["few"] - args.few * step}
    row |= {"whole": args.whole, "update_1000_s": STEPS * update, "replay_1000_s": row["replay_alone_s"] + STEPS * step}
    if args.whole:
        row |= whole(base, journal, out, contents)
    row["rate_of_update"] = row["update_1000_s"] / row["replay_1000_s"]
    row["elements_per_s"] = STEPS * row["num_elements"] / row["replay_1000_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where the random checkpoint is kept")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--noise", choices=("normal", "rademacher"), default="normal")
    parser.add_argument("--few", type=int, default=8, help="steps of the shorter replay, and of update_")
    parser.add_argument("--many", type=int, default=40, help="steps of the longer replay")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help=f"replay {STEPS} steps instead of reckoning them")
    parser.add_argument("--json", type=Path, help="file of results that the row is added to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        base = args.checkpoint or Path(work) / "base"
        write_random_checkpoint(base, "opt-125m", DTYPES[args.dtype])
        row = bench(base, Path(work), args)
    print(json.dumps(row))
    print(
        f"{row['dtype']} {row['noise']}: 1000 steps in {row['replay_1000_s']:.1f} s, "
        f"{row['rate_of_update']:.2f} of update_'s rate; peak {row['peak_bytes'] / 1e6:.0f} MB, largest tensor "
        f"{row['largest_tensor_bytes'] / 1e6:.0f} MB; bits {'equal' if row['same_bits'] else 'DIFFER'}"
    )
    if args.json:
        rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        write_results(args.json, "replay", [*rows, row])
    sys.exit(0 if row["same_bits"] else 1)


if __name__ == "__main__":
    main()
