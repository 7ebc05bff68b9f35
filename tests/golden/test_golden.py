"""Runs made and killed by an old commit are resumed and replayed to the bits of their undisturbed twins.

They were made by `tests/golden/make_golden.py` of commit d7b1529, which runs with the code of commit db4b99d alone, on
an AVX-512 machine, in the directory /tmp/golden that their run.json name. Of each there is

    killed/         its directory as a SIGKILL half-way left it
    journal.jsonl   the journal of its twin, which ran to its end
    golden.json     SHA-256 of each tensor of the twin, its losses and evaluations, inputs of some of its forward
                    passes, and what `forward_bits` made of them

Each test takes one of them:

* Replay makes no forward pass. The twin's journal leads to the twin's tensors on every machine.
* A resumed run makes forward passes, whose bits depend on the processor and on torch. Where transformers alone, without
  any of this project's code, gives the same bits on the run's inputs as on the machine that made the runs, the resumed
  run must have the twin's journal and tensors. A change of this project's code cannot turn that comparison off.
* On every machine the resumed run is also compared with an undisturbed one made here: a branch of the killed run's
  steps, alone and with its weights in host memory.

The parent of `chain` is not kept: a branch needs nothing of it. Old snapshots may be read or not: the bits are the
same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from forward_bits import forward_bits
from parallel_ranks import Ranks
from safetensors.torch import load_file
from torchrun_cases import command

from distzo2.cli.main import main

HERE = Path(__file__).parent
NAMES = ("host", "disk", "snapshots", "chain", "ranks", "bf16")
FIELDS = ("step", "groups", "terms", "eps", "losses", "skipped", "tokens")  # of a journal's line; not its seconds


def golden_of(name: str) -> dict[str, Any]:
    return json.loads((HERE / name / "golden.json").read_text())


def steps_of(journal: Path) -> list[list[Any]]:
    """The lines of a journal but its header, and but a torn one."""
    lines = journal.read_bytes().split(b"\n")[1:-1]
    return [[record[field] for field in FIELDS] for record in map(json.loads, lines)]


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    tensors = load_file(checkpoint / "model.safetensors")
    return {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def evaluations_of(run: Path) -> list[list[Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], line["loss"], line["accuracy"]] for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize("name", NAMES)
def test_replayed_it_has_its_bits(name: str, tmp_path: Path) -> None:
    golden = golden_of(name)
    base, journal = HERE / "base" / golden["model"], HERE / name / "journal.jsonl"
    assert [dict(zip(FIELDS, step, strict=True))["losses"] for step in steps_of(journal)] == golden["losses"]
    assert main(["replay", f"--base={base}", f"--journal={journal}", f"--out={tmp_path / 'out'}", "--quiet"]) == 0
    assert tensors_of(tmp_path / "out") == golden["tensors"]


@pytest.mark.parametrize("name", NAMES)
def test_resumed_it_ends_as_its_twin(name: str, tmp_path: Path) -> None:
    golden = golden_of(name)
    run, here = tmp_path / "run", tmp_path / "here"
    shutil.copytree(HERE / name / "killed", run)
    record = (run / "run.json").read_text().replace("/tmp/golden/base/", f"{HERE}/base/")
    (run / "run.json").write_text(record)
    done = steps_of(run / "journal.jsonl")
    assert 0 < len(done) < golden["num_steps"]

    branch = ["--branch-from", str(run), f"--at-step={len(done)}", f"--out={here}", "--weights=host", "--write-every=1"]
    assert main(["finetune", *branch]) == 0
    resume = ["finetune", "--resume", f"--out={run}"]
    if golden["num_ranks"] == 1:
        assert main(resume) == 0
    else:
        mesh = ["--parallel=pert=2,data=1", "--slice=on"]  # not taken from run.json: a run may change its ranks
        with closing(Ranks(golden["num_ranks"])) as ranks:
            ended = ranks.values(command, golden["num_ranks"], tmp_path, [*resume, *mesh])
        assert [each["status"] for each in ended] == [0] * len(ended), ended

    steps, tensors = steps_of(run / "journal.jsonl"), tensors_of(run / "checkpoint")
    assert steps[: len(done)] == done
    assert steps == steps_of(here / "journal.jsonl")
    assert tensors == tensors_of(here / "checkpoint")
    # AMX multiplies some 16-bit matrices, and not those of the inputs, to other bits than AVX-512.
    is_like = name != "bf16" or not torch.cpu._is_amx_tile_supported()
    if is_like and forward_bits(HERE / "base" / golden["model"], golden["inputs"]) == golden["forward_bits"]:
        assert steps == steps_of(HERE / name / "journal.jsonl")
        assert tensors == golden["tensors"]
        assert evaluations_of(run) == golden["evaluations"]
