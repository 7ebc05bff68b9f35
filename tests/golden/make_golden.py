"""Makes the golden runs: six small runs, each once to its end and once killed half-way by SIGKILL.

Made with commit db4b99d, the last one before the modules moved into rooms, on an AVX-512 machine. It patches that
commit's modules and need not run with later code. `test_golden.py` resumes and replays what it left.

    git worktree add OLD db4b99d
    PYTHONPATH=OLD/python:OLD:tests/helpers python tests/golden/make_golden.py

Everything is made in /tmp/golden, the directory that the runs' run.json name, and copied from there. Of each run stays:

    killed/         its directory as the kill left it
    journal.jsonl   the journal of its twin, which ran to its end
    golden.json     SHA-256 of each tensor of the twin, its losses and evaluations, inputs of some of its forward
                    passes, and what `forward_bits` made of them
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = Path("/tmp/golden")
BASE = WORK / "base"

LLAMA = [f"--model={BASE}/llama", f"--train={BASE}/choices.jsonl"]
OPT = [f"--model={BASE}/opt", f"--train={BASE}/completions.jsonl"]
COMMON = ["--threads=1", "--quiet", "--batch-size=4"]

# Name: options, where it is killed, number of ranks.
RUNS: dict[str, tuple[list[str], str, int]] = {
    "host": (
        [*LLAMA, f"--eval={BASE}/eval.jsonl", "--steps=9", "--lr=2e-3", "--seed=11", "--weight-decay=0.01",
         "--schedule=cosine", "--warmup=2", "--micro-batches=2", "--eval-every=3", "--fsync-every=4"],
        "in-line:5", 1,
    ),
    "disk": (
        [*OPT, "--steps=8", "--lr=1e-3", "--seed=12", "--probes=2", "--noise=rademacher", "--schedule=linear",
         "--weights=disk", "--memory-budget=250000"],
        "in-forward:4", 1,
    ),
    "snapshots": (
        [*LLAMA, "--steps=12", "--lr=1e-3", "--seed=13", "--estimator=fzoo", "--probes=3", "--weight-decay=0.02",
         "--snapshot-every=2", "--snapshot-pace=1", "--keep=2"],
        "in-snapshot:2", 1,
    ),
    "chain": (
        ["--branch-from=parent", "--at-step=3", "--journal-chain", "--steps=9", "--lr=3e-3", "--probes=2",
         "--noise=rademacher", "--weight-decay=0.05", "--micro-batches=2", "--save=last", "--fsync-every=64"],
        "in-line:6", 1,
    ),
    "ranks": (
        [*LLAMA, "--steps=8", "--lr=1e-3", "--seed=15", "--probes=2", "--micro-batches=2", "--parallel=pert=2,data=1",
         "--slice=on", "--verify-every=3", "--schedule=cosine"],
        "in-forward:5", 2,
    ),
    "bf16": (
        [f"--model={BASE}/llama-bf16", f"--train={BASE}/completions.jsonl", "--steps=10", "--lr=5e-3", "--seed=16",
         "--eps=5e-3", "--weight-decay=0.01", "--weights=disk", "--write-every=3", "--micro-batches=2"],
        "after-line:5", 1,
    ),
}  # fmt: skip
PARENT = [*OPT, *COMMON, "--steps=5", "--lr=2e-3", "--seed=14", "--train-mode", "--journal-chain", "--save=none"]


# ---- in the processes of a run ---------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_line(where: str, step: int) -> None:
    """As half of the step's line is in the journal, or all of it, unsynced."""
    from distzo2 import journal_writer

    write_all = journal_writer.write_all

    def write_and_die(descriptor: int, block: bytes, offset: int) -> None:
        start = block.find(b'{"step":%d,' % step)
        if start < 0:
            return write_all(descriptor, block, offset)
        end = block.index(b"\n", start) + 1
        write_all(descriptor, block[: end if where == "after-line" else (start + end) // 2], offset)
        die()

    journal_writer.write_all = write_and_die


def die_in_forward(step: int) -> None:
    """In the step's second evaluation on this rank."""
    from distzo2.optimizer import ZOSGD

    make_step = ZOSGD.step

    def step_and_die(self: ZOSGD, closures: Any, **options: Any) -> Any:
        if self.step_count != step:
            return make_step(self, closures, **options)
        calls = []

        def dying(closure: Any) -> Any:
            def call() -> Any:
                loss = closure()
                calls.append(loss)
                if len(calls) == 2:
                    die()
                return loss

            return call

        return make_step(self, [dying(c) for c in closures], **options)

    ZOSGD.step = step_and_die


def die_in_snapshot(number: int) -> None:
    """As the third file of the `number`-th snapshot is half written. Steps are slow, so that it is not the last."""
    from distzo2 import snapshot_writer
    from distzo2.optimizer import ZOSGD

    write_all, write_unit = snapshot_writer._write_all, snapshot_writer.SnapshotWriter._write_unit
    directories, files, make_step = [], [], ZOSGD.step

    def slow_step(self: ZOSGD, closures: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return make_step(self, closures, **options)

    ZOSGD.step = slow_step

    def note(self: Any, making: Any, *rest: Any) -> None:
        if making.directory not in directories:
            directories.append(making.directory)
            files.clear()
        files.append(rest[0].index)
        write_unit(self, making, *rest)

    def write_and_die(descriptor: int, data: memoryview, offset: int) -> None:
        if len(directories) == number and len(files) == 3:
            write_all(descriptor, data[: len(data) // 2], offset)
            die()
        write_all(descriptor, data, offset)

    snapshot_writer.SnapshotWriter._write_unit, snapshot_writer._write_all = note, write_and_die


def record_inputs(path: str) -> None:
    """Writes the first inputs of each shape that go through the model on rank 0."""
    from distzo2.objectives import Objective

    token_scores, seen = Objective._token_scores, {}

    def score(self: Objective, batch: Any) -> Any:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.position_ids is not None and self._takes_positions:
            inputs["position_ids"] = batch.position_ids
        if batch.keep is not None and self._takes_keep:
            inputs["logits_to_keep"] = batch.keep
        seen.setdefault(str({k: v.shape for k, v in inputs.items()}), {k: v.tolist() for k, v in inputs.items()})
        if os.environ.get("RANK", "0") == "0":
            Path(path).write_text(json.dumps(list(seen.values())))
        return token_scores(self, batch)

    Objective._token_scores = score


def run_command(point: str, arguments: list[str]) -> int:
    """`distzo2 ARGUMENTS`, killed at a point, or with its inputs recorded in the file of that name."""
    from distzo2.cli import main

    where, _, number = point.partition(":")
    if where in ("in-line", "after-line"):
        die_at_line(where, int(number))
    elif where == "in-forward":
        die_in_forward(int(number))
    elif where == "in-snapshot":
        die_in_snapshot(int(number))
    elif where:
        record_inputs(where)
    return main(arguments)


# ---- what makes all --------------------------------------------------------------------------------------------------


def make_bases() -> None:
    import torch
    from tiny_text import choice_lines, make_tokenizer, write_jsonl
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    tokenizer = make_tokenizer()
    common = {"vocab_size": len(tokenizer), "num_hidden_layers": 4, "num_attention_heads": 2, "eos_token_id": 0,
              "max_position_embeddings": 64, "bos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    llama = {"hidden_size": 28, "intermediate_size": 50, "num_key_value_heads": 1, **common}
    configs = {
        "llama": (LlamaForCausalLM, LlamaConfig(**llama, tie_word_embeddings=True)),
        "llama-bf16": (LlamaForCausalLM, LlamaConfig(**llama, tie_word_embeddings=False)),
        "opt": (OPTForCausalLM, OPTConfig(hidden_size=24, word_embed_proj_dim=24, ffn_dim=44, dropout=0.1, **common)),
    }
    for number, (name, (kind, config)) in enumerate(configs.items()):
        torch.manual_seed(number)
        model = kind(config)
        model = model.bfloat16() if name.endswith("bf16") else model.float()
        model.save_pretrained(BASE / name)
        tokenizer.save_pretrained(BASE / name)
    write_jsonl(BASE / "choices.jsonl", choice_lines(20))
    write_jsonl(BASE / "eval.jsonl", choice_lines(6))
    words = ["cat", "dog", "graph", "film", "matrix"]
    lines = ({"prompt": f"the {words[i % 5]} has", "completion": f" {i % 7} edges" + " and nodes" * (i % 4)}
             for i in range(20))  # fmt: skip
    write_jsonl(BASE / "completions.jsonl", lines)


def start(ranks: int, point: str, arguments: list[str], directory: Path) -> int:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, "run", point, "finetune", *arguments]
    return subprocess.run(command, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def golden(directory: Path, ranks: int) -> dict[str, Any]:
    import torch
    from forward_bits import forward_bits
    from safetensors.torch import load_file

    run = json.loads((directory / "twin/run.json").read_text())
    steps = [json.loads(line) for line in (directory / "twin/journal.jsonl").read_text().splitlines()[1:]]
    metrics = [json.loads(line) for line in (directory / "twin/metrics.jsonl").read_text().splitlines()]
    inputs = json.loads((directory / "inputs").read_text())
    model = Path(run["options"]["model"])
    tensors = load_file(directory / "twin/checkpoint/model.safetensors")
    return {
        "model": model.name,
        "num_ranks": ranks,
        "num_steps": len(steps),
        "tensors": {
            name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in sorted(tensors.items())
        },
        "losses": [step["losses"] for step in steps],
        "evaluations": [[m["step"], m["loss"], m["accuracy"]] for m in metrics if m["kind"] == "eval"],
        "inputs": inputs,
        "forward_bits": forward_bits(model, inputs),
    }


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    make_bases()
    for name, (options, point, ranks) in RUNS.items():
        directory = WORK / name
        directory.mkdir()
        if "--branch-from=parent" in options:
            assert start(1, "", [*PARENT, "--out=parent"], directory) == 0
        else:
            options = [*options, *COMMON]
        assert start(ranks, "inputs", [*options, "--out=twin"], directory) == 0
        assert start(ranks, point, [*options, "--out=killed"], directory) != 0
        kept = HERE / name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        shutil.copytree(directory / "killed", kept / "killed", symlinks=True)
        shutil.copy(directory / "twin/journal.jsonl", kept)
        record = golden(directory, ranks)
        lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in record.items()]
        (kept / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    shutil.rmtree(HERE / "base", ignore_errors=True)
    shutil.copytree(BASE, HERE / "base")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        sys.exit(run_command(sys.argv[2], sys.argv[3:]))
    main()
