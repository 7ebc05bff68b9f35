"""`finetune --report-to`: curves in TensorBoard and Weights & Biases, each step once."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from cli_runs import finetune, one_line, record, resume

from distzo2.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("own_directory")


def curves(run: str = "out") -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, by tag."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_metrics(kind: str, key: str, run: str = "out") -> list[tuple[int, float]]:
    lines = [line for line in read_metrics(f"{run}/metrics.jsonl") if line["kind"] == kind]
    return [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]


def assert_all_is_shown() -> None:
    shown = curves()
    for tag, kind, key in (("train/loss", "step", "loss"), ("train/lr", "step", "lr"), ("eval/loss", "eval", "loss"),
                           ("train/difference", "step", "difference"), ("eval/accuracy", "eval", "accuracy"),
                           ("train/tokens_per_second", "step", "tokens_per_second")):  # fmt: skip
        assert shown[tag] == in_metrics(kind, key), tag
    coefs = [line["coefs"][0] for line in read_metrics("out/metrics.jsonl") if line["kind"] == "step"]
    assert [value for _, value in shown["train/coef_0"]] == pytest.approx(coefs, rel=1e-6)


def test_tensorboard_shows_each_step_once_however_a_run_ended(files) -> None:
    options = ["--report-to=tensorboard", f"--eval={files.eval}", "--eval-every=2"]
    assert finetune(files, *options) == 0
    assert_all_is_shown()
    assert resume("--steps=6") == 0
    assert_all_is_shown()
    last = max(Path("out/tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes()[:-700])  # what a power cut left: steps that the journal has are missing
    assert len(curves()["train/loss"]) < 6
    assert resume("--steps=7", "--lr=1e-4") == 0
    assert_all_is_shown()
    assert len(curves()["train/loss"]) == 7


def test_a_report_may_begin_later_and_takes_in_what_was_before(files) -> None:
    assert finetune(files, f"--eval={files.eval}", "--steps=2") == 0
    assert not Path("out/tensorboard").exists()
    Path("out/tensorboard").mkdir()
    Path("out/tensorboard/events.out.tfevents.0.foreign").write_bytes(b"no event")
    assert resume("--steps=3", "--report-to=tensorboard") == 0
    assert_all_is_shown()


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """A stub of the package, which is not installed, that keeps what it is told as the server would."""
    told = SimpleNamespace(init=[], rows=[], metrics=[], finished=0, summary={}, fails=False)

    def log(row: dict[str, float]) -> None:
        if told.fails:
            raise ConnectionError("no route")
        told.rows.append(row)
        told.summary.update(row)

    def init(**options) -> SimpleNamespace:
        told.init.append(options)
        return SimpleNamespace(summary=dict(told.summary), log=log, define_metric=define, finish=finish)

    def define(name: str, step_metric: str | None = None) -> None:
        told.metrics.append((name, step_metric))

    def finish() -> None:
        told.finished += 1

    module = ModuleType("wandb")
    module.__spec__, module.init = ModuleSpec("wandb", None), init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_gets_each_step_once_in_one_run(files, wandb) -> None:
    assert finetune(files, "--report-to=wandb", f"--eval={files.eval}", "--eval-every=2") == 0
    assert resume("--steps=6") == 0
    first, second = wandb.init
    assert first["id"] == second["id"] == record()["reports"]["wandb"] and first["resume"] == "allow"
    assert first["config"]["lr"] == 1e-3 and first["project"] == "distzo2" and wandb.finished == 2
    assert {("train/step", None), ("train/*", "train/step"), ("eval/*", "eval/step")} < set(wandb.metrics)
    assert [row["train/step"] for row in wandb.rows if "train/step" in row] == list(range(6))
    assert [row["eval/step"] for row in wandb.rows if "eval/step" in row] == [0, 2, 4, 6]
    losses = [(row["train/step"], row["train/loss"]) for row in wandb.rows if "train/step" in row]
    assert losses == in_metrics("step", "loss")


def test_a_report_that_fails_does_not_end_the_run_and_is_caught_up(files, wandb, capsys) -> None:
    wandb.fails = True
    assert finetune(files, "--report-to=wandb") == 0
    out = capsys.readouterr().out
    assert out.count("--report-to: ConnectionError: no route; nothing more is reported from here") == 1
    wandb.fails = False
    assert resume("--steps=5") == 0
    assert [row["train/step"] for row in wandb.rows] == list(range(5))


@pytest.mark.parametrize(("kind", "advice"), [("wandb", "pip install wandb"), ("tensorboard", "'.[report]'")])
def test_a_missing_package_is_named_before_anything_is_loaded(files, capsys, monkeypatch, kind, advice) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    assert finetune(files, f"--report-to={kind}") == 2
    text = one_line(capsys)
    assert f"--report-to {kind}: the package {kind} is not installed" in text and advice in text
    assert not Path("out").exists()
