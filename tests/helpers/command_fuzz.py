"""Runs the program on mutated files and options, each time in a process of its own with little memory.

    python command_fuzz.py DIRECTORY FIRST COUNT

Example number i is a function of i alone. Prints one line of JSON for each that ended in a traceback, in a signal, in
more than one line, or not in time; then the number of examples by status.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tiny_text import choice_lines, make_checkpoint, write_jsonl

MEMORY_BYTES = 4 << 30
SECONDS = 60
VALUES = [
    0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, True, False, None, "", "x", "a b", "../..",
    "\ud800", "1e400", [], [1], [None], {}, {"a": 1}, "float16", "auto", "LlamaForCausalLM", "<eos>", "\u0000",
    "é" * 300,
]  # fmt: skip
NESTED = '{"a":' * 3000 + "1" + "}" * 3000
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[1," * 5000, NESTED.encode(), b"9" * 5000, b'{"prompt": 1}']
FLAGS = [
    "--steps", "--lr", "--eps", "--batch-size", "--micro-batches", "--probes", "--estimator", "--noise", "--seed",
    "--weights", "--schedule", "--warmup", "--weight-decay", "--max-length", "--truncate", "--objective",
    "--eval-every", "--save", "--score", "--memory-budget", "--write-every", "--max-lanes", "--dtype", "--threads",
    "--device", "--trace", "--config", "--max-coef", "--fsync-every", "--snapshot-every", "--weights-dir",
    "--branch-from", "--parallel", "--host-memory", "--no-such-option",
]  # fmt: skip
WORDS = [
    "0", "-1", "1", "2", "3", "1.5", "nan", "inf", "1e400", "x", "fzoo", "spsa", "rademacher", "disk", "device",
    "linear", "cosine", "left", "error", "lm", "choices", "best", "none", "accuracy", "auto", "bfloat16", "cuda:7",
    "meta", "2**3", "/dev/null", "/", ".", "config.yaml", "config.toml", "config.json", "pert=2", "é", "--", "~",
    "$HOME", "", " ", "9" * 400,
]  # fmt: skip


def mutate_json(value: Any, draw: random.Random) -> Any:
    """`value` with one member somewhere in it replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.5:
            return value | {key: mutate_json(value[key], draw)}
        if kind < 0.65:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.75:
            return {(k + "_" if k == key else k): v for k, v in value.items()}
        return value | {draw.choice([key, "quantization_config", "auto_map", "architectures"]): draw.choice(VALUES)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        i = draw.randrange(len(value))
        return draw.choice(
            [value[:i] + value[i + 1 :], [*value[:i], mutate_json(value[i], draw), *value[i + 1 :]], value * 2]
        )
    return draw.choice(VALUES)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    kind, i = draw.random(), draw.randrange(max(1, len(data)))
    if kind < 0.3:
        return data[:i]
    if kind < 0.6:
        return data[:i] + bytes([draw.randrange(256)]) + data[i + 1 :]
    return data[:i] + draw.choice(TEXTS) + data[i:]


def mutated(data: bytes, draw: random.Random) -> bytes:
    try:
        changed = json.loads(data)
    except ValueError:  # of a line that was mutated before
        changed = None
    if changed is None or draw.random() < 0.15:
        return mutate_bytes(data, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        changed = mutate_json(changed, draw)
    return json.dumps(changed).encode()


def make_example(number: int, root: Path, work: Path) -> list[str]:
    """Writes the files of an example to `work`, and returns its command line."""
    draw = random.Random(number)
    shutil.copytree(root / "model", work / "model")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copyfile(root / name, work / name)
    argv = ["finetune", "--model=model", "--train=train.jsonl", "--eval=eval.jsonl", "--out=out", "--quiet"]
    argv += ["--steps=2", "--batch-size=4", "--lr=1e-3"]
    kind = draw.choice(
        ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "lines", "options")
    )
    if kind == "lines":
        lines = (root / "train.jsonl").read_bytes().splitlines()
        for _ in range(draw.choice((1, 1, 5))):
            i = draw.randrange(len(lines))
            lines[i] = mutated(lines[i], draw) if lines[i].startswith(b"{") else mutate_bytes(lines[i], draw)
        (work / "train.jsonl").write_bytes(b"\n".join(lines))
    elif kind == "options":
        config = {draw.choice(FLAGS)[2:].replace("-", "_"): draw.choice([*VALUES, *WORDS]) for _ in range(3)}
        (work / "config.json").write_text(json.dumps(config))
        (work / "config.yaml").write_bytes(mutate_bytes(b"steps: 2\nlr: [1e-3]\nseed: 0x10\n", draw))
        (work / "config.toml").write_bytes(mutate_bytes(b'steps = 2\nlr = "1e-3"\n', draw))
        for _ in range(draw.choice((1, 2, 3))):
            argv.append(f"{draw.choice(FLAGS)}={draw.choice(WORDS)}" if draw.random() < 0.9 else draw.choice(WORDS))
        argv[0] = draw.choice(("finetune", "finetune", "finetune", "eval", "plan", "generate", "replay"))
    else:
        path = work / "model" / kind
        path.write_bytes(mutated(path.read_bytes(), draw))
        if draw.random() < 0.2:
            argv = ["generate", "--model=model", "--prompt=the cat", "--max-new-tokens=3"]
    return argv


def run_example(argv: list[str], work: Path) -> tuple[int, str]:
    """Runs the program in a forked process; returns its wait status and what it wrote to stderr."""
    from distzo2.cli.main import main

    child = os.fork()
    if child == 0:
        os.chdir(work)
        for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        status = 70
        try:
            status = main(argv)
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, (work / "stderr").read_text(errors="replace")
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1, "not in time"


def is_clear(status: int, text: str) -> bool:
    """Whether a run worked, or ended with the program's own status and one line, or a usage in front of it."""
    lines = [line for line in text.splitlines() if line.strip() and "Warning" not in line and not line.startswith("  ")]
    if status < 0 or not os.WIFEXITED(status) or "Traceback" in text or "DISTZO2_TRACEBACK" in text:
        return False
    if os.WEXITSTATUS(status) == 0:
        return True
    ours = [line for line in lines if line.startswith("distzo2")]
    return os.WEXITSTATUS(status) in (1, 2) and len(ours) == 1 and ours[0] == lines[-1]


def main() -> None:
    root, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    make_checkpoint(root / "model", layers=2)
    write_jsonl(root / "train.jsonl", choice_lines(12))
    write_jsonl(root / "eval.jsonl", choice_lines(4))
    import preloaded  # noqa: F401

    statuses: collections.Counter[str] = collections.Counter()
    for number in range(first, first + count):
        work = root / f"example-{number}"
        work.mkdir()
        argv = make_example(number, root, work)
        status, text = run_example(argv, work)
        statuses["status " + str(os.WEXITSTATUS(status)) if status >= 0 and os.WIFEXITED(status) else "killed"] += 1
        if not is_clear(status, text):
            print(json.dumps({"number": number, "argv": argv, "status": status, "stderr": text[-2000:]}), flush=True)
        shutil.rmtree(work)
    print(json.dumps({"examples": count, **statuses}))


if __name__ == "__main__":
    main()
