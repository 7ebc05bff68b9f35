"""What a run computes in: settled once before its first step, kept by resumes, and free in a branch."""

from __future__ import annotations

import json
from pathlib import Path

import kill_cases
import numpy as np
import pytest
import torch
from cli_runs import assert_same_bits, finetune, one_line, record, resume, steps_in

from distzo2.cli.main import main
from distzo2.optim.signal import Signal, _signal
from distzo2.optim.zosgd import ZOSGD
from distzo2.record.journal import read_journal
from distzo2.run import preflight
from distzo2.run.options import FIXED

pytestmark = pytest.mark.usefixtures("own_directory")

HALF = ["--dtype=bfloat16", "--save=last"]


def computed(out: str = "out") -> tuple[str, str | None]:
    """What run.json and the journal say."""
    header = read_journal(Path(out, "journal.jsonl")).header
    dtype = header["options"].get("compute_dtype")
    assert header["compute_dtype"] == (dtype or header["table"][0]["dtype"])
    return record(out)["options"]["compute_dtype"], dtype


@pytest.mark.parametrize(
    ("options", "expected", "said"),
    [
        (["--eps=1e-5"], ("float32", "float32"), "computing in float32"),
        (["--eps=1e-5", "--no-signal"], ("stored", None), ""),
        (["--eps=1e-5", "--compute-dtype=stored"], ("stored", None), "try a larger --eps, or --compute-dtype float32"),
        (["--eps=1e-1"], ("stored", None), "correlation with float32"),
        (["--compute-dtype=float32"], ("float32", "float32"), ""),
        (["--dtype=float32"], ("stored", None), ""),
        (["--dtype=float32", "--compute-dtype=bfloat16", "--no-signal"], ("bfloat16", "bfloat16"), ""),
        (["--eps=1e-5", "--objective=error"], ("stored", None), "0, or not finite, in float32 too"),
    ],
)
def test_a_run_settles_it(files, capsys, monkeypatch, options: list[str], expected: tuple, said: str) -> None:
    """As far as the CPU leaves it open; run.json has it before there is a journal that --resume could find."""
    monkeypatch.setattr("distzo2.run.preflight._cpu_computes_in", lambda dtype: True)
    check, early = ZOSGD.check, []
    monkeypatch.setattr(ZOSGD, "check", lambda *a: early.append(record()["options"]["compute_dtype"]) or check(*a))
    assert finetune(files, *HALF, "--steps=1", "--noise=rademacher", *options) == 0
    text = "".join(capsys.readouterr())
    assert computed() == expected and early == [expected[0]]
    assert said in text and ("signal" in text) == bool(said), text
    if said == "correlation with float32":
        assert main(["report", "out"]) == 0


def test_budgets_have_room_for_what_is_looked_at(files, monkeypatch) -> None:
    monkeypatch.setattr("distzo2.run.preflight._cpu_computes_in", lambda dtype: True)
    placed, place = [], preflight.from_pretrained
    monkeypatch.setattr(
        preflight, "from_pretrained", lambda *a, **o: placed.append(o["compute_dtype"]) or place(*a, **o)
    )
    for options in ([], ["--resume", "--steps=2"], ["--no-signal", "--out=other"]):
        assert finetune(files, *HALF, "--eps=1e-1", "--steps=1", "--save=none", *options) == 0
    assert placed == [torch.float32, None, None] and computed() == computed("other") == ("stored", None)


def test_a_model_that_asserts_its_dtype(files, capsys, monkeypatch) -> None:
    """Its run computes as stored, whatever the look at the signal meets; another dtype is an error with the remedy."""

    def forward(self, x):
        assert self.gate_proj.weight.dtype == torch.bfloat16
        return self.down_proj(self.gate_proj(x))

    monkeypatch.setattr("distzo2.run.preflight._cpu_computes_in", lambda dtype: True)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    assert finetune(files, *HALF, "--steps=1") == 0 and computed() == ("stored", None)
    assert "no look at the signal, which computes in float32 too: assert" in "".join(capsys.readouterr())
    assert finetune(files, *HALF, "--compute-dtype=float32", "--out=other") == 1
    text = one_line(capsys)
    assert "model.layers.0.mlp, which computes in torch.float32" in text and "--compute-dtype stored" in text


@pytest.mark.parametrize(
    ("correlations", "cost", "expected"),
    [
        ((0.9, 0.96), 0.9, "stored"), ((0.9, 0.96), 0.94, "float32"), ((0.9, 0.85), 0.5, "stored"),
        ((0.9, 0.995), 2.0, "stored"),
    ],
)  # fmt: skip
def test_where_the_edge_is_near_more_probes_and_then_seconds_decide(
    files, monkeypatch, correlations, cost, expected
) -> None:
    probes, asked = iter((4, 8)), []

    def found(correlation: float) -> Signal:
        count = next(probes)
        reference, other = np.eye(count)[:2]
        differences = correlation * reference + (1 - correlation**2) ** 0.5 * other
        return _signal(torch.bfloat16, 1e-3, np.append(0, np.stack([differences, 0 * other], 1)), 0.0, reference, cost)

    def signal_of(model, closures, *, is_open, probes, **more) -> list[Signal]:
        for correlation in correlations:
            asked.append(found(correlation))
            if not is_open(asked[-1:]):
                break
        return asked[-1:]

    monkeypatch.setattr("distzo2.run.preflight._cpu_computes_in", lambda dtype: True)
    monkeypatch.setattr("distzo2.run.loop.signal_of", signal_of)
    assert finetune(files, *HALF, "--steps=1") == 0
    assert len(asked) == len(correlations)
    assert computed()[0] == expected


def test_a_resumed_run_keeps_it_and_a_branch_may_change_it(files, capsys) -> None:
    settled = [*HALF, "--eps=1e-5"]  # auto: float32, on any CPU
    assert finetune(files, *settled, "--out=whole") == 0
    assert finetune(files, *settled, "--steps=2", "--save=none") == 0
    capsys.readouterr()
    assert resume("--compute-dtype=bfloat16") == 2
    assert "--compute-dtype was 'float32' and is 'bfloat16': start a new run for that, or a branch" in one_line(capsys)
    assert resume("--compute-dtype=auto", "--steps=3") == 0 and resume("--steps=4", "--save=last") == 0
    assert "signal" not in "".join(capsys.readouterr()) and computed() == ("float32", "float32")
    assert_same_bits("out/checkpoint", "whole/checkpoint")
    branch = ["finetune", "--branch-from=out", "--at-step=2", "--steps=4", "--quiet"]
    assert main([*branch, "--out=same", "--save=last"]) == 0 and computed("same") == ("float32", "float32")
    assert_same_bits("same/checkpoint", "whole/checkpoint")
    assert main([*branch, "--out=other", "--compute-dtype=stored"]) == 0 and computed("other") == ("stored", None)
    assert main(["replay", "other", "--out=again", "--quiet"]) == 0
    assert_same_bits("again", "other/checkpoint")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_command_that_names_what_is_stored_can_be_repeated(files, capsys, dtype: str) -> None:
    options = [f"--dtype={dtype}", f"--compute-dtype={dtype}", "--no-signal"]
    assert finetune(files, *options, "--steps=2") == 0 and computed() == (dtype, None)
    assert finetune(files, *options, "--resume") == 0 and steps_in() == 4
    capsys.readouterr()
    assert resume("--tf32", "--steps=5") == 2 and "--tf32: cpu multiplies float32 matrices" in one_line(capsys)


def test_tf32_is_refused_on_a_cpu_and_kept_by_a_resumed_run(files, capsys) -> None:
    for command in (["eval", f"--eval={files.eval}"], ["signal", f"--train={files.train}"]):
        assert main([*command, f"--model={files.model}", "--tf32"]) == 2
        assert "--tf32: cpu multiplies float32 matrices as they are; TF32 is a GPU's" in one_line(capsys)
    assert "tf32" in FIXED


def test_a_cpu_without_instructions_for_16_bits_computes_in_float32(files, tmp_path: Path) -> None:
    """Whatever the signal is, since float32 is faster there."""
    command = ["finetune", f"--model={files.model}", f"--train={files.train}", "--out=out", "--steps=1", *HALF]
    command += ["--eps=1e-1", "--batch-size=4", "--quiet"]
    script = f"""
        import os
        from distzo2.cli.main import main
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # read when oneDNN is first used
        raise SystemExit(main({command}))
    """
    assert kill_cases.run(tmp_path, script).status == 0
    assert computed() == ("float32", "float32")


def test_the_table_of_signals(files, capsys) -> None:
    command = ["signal", f"--model={files.model}", f"--train={files.train}", *HALF[:1], "--probes=2", "--batch-size=4"]
    assert main([*command, "--eps=1e-3,1e-6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:7]] == [
        [dtype, eps] for dtype in ("float32", "bfloat16", "float16") for eps in ("0.001", "1e-06")
    ]
    assert lines[7].startswith("cheapest with a correlation of surely 0.95 or more: --compute-dtype ")
    assert lines[7].endswith(" --eps 0.001") and lines[8] == "largest eps before curvature bends the loss: 0.001"
    assert main([*command, "--eps=1e-3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "float16"]
    assert all(len(row["differences"]) == 2 for row in rows) and rows[0]["floor"] is None
    assert main([*command, "--eps=1e-3", "--compute-dtype=stored", "--json"]) == 0
    assert [row["dtype"] for row in json.loads(capsys.readouterr().out)] == ["bfloat16"]
    assert main([*command, "--eps=1e-3,none"]) == 2
    assert "--eps 1e-3,none: positive numbers" in one_line(capsys)
