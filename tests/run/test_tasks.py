"""Published tasks through `finetune`, `eval` and `tasks`, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import assert_same_bits, one_line, record, resume, steps_in
from published import rows, write_split, write_task
from tiny_text import make_checkpoint, uneven_lines, write_jsonl

from distzo2.cli.main import main, parse
from distzo2.errors import UsageError

pytestmark = pytest.mark.usefixtures("own_directory")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tasks") / "m", positions=128)


def finetune(model: Path, task: str, *options: str) -> int:
    small = ["--num-dev=4", "--steps=4", "--batch-size=4", "--lr=1e-2", "--eval-every=2", "--quiet", "--out=out"]
    return main(["finetune", f"--model={model}", f"--task={task}", "--data=data", *small, *options])


def evaluate(capsys, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", "--data=data", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def evaluations(out: str = "out") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize(
    ("task", "form", "options"),
    [
        ("sst2", "tsv", ["--weights=disk"]),
        ("squad", "parquet", ["--score=f1", "--max-new-tokens=6"]),
        ("record", "arrow", []),
    ],
)
def test_a_run(task: str, form: str, options: list[str], model: Path, capsys) -> None:
    """Resumed it has the same draw and bits; the checkpoint of the best step is evaluated at its end, as by `eval`."""
    write_task(Path("data"), task, form)
    assert finetune(model, task, *options, "--save=best", "--out=whole") == 0
    shown = capsys.readouterr().out
    assert finetune(model, task, *options, "--steps=2", "--save=none") == 0
    assert resume("--steps=4", "--save=best") == 0 and steps_in() == 4
    assert_same_bits("out/checkpoint", "whole/checkpoint")
    assert [line["loss"] for line in evaluations()] == [line["loss"] for line in evaluations("whole")]
    assert len(evaluations()) == 3 and evaluations()[0]["examples"] == 4
    found = evaluate(capsys, f"--task={task}", "--model=out/checkpoint", *[o for o in options if "new-tokens" in o])
    assert json.loads(Path("out/task.json").read_text()) == {"task": task} | found
    assert found["examples"] == 6 and f"task {task}: loss {found['loss']:.4f}" in shown
    best = max(evaluations(), key=lambda line: line["f1"]) if task == "squad" else record()["best"]
    assert record()["best"].get("f1") == best.get("f1")
    assert finetune(model, task, "--resume") == 0  # it had finished
    write_split(Path("data"), "train", rows(task, 11), form)
    capsys.readouterr()
    assert resume("--steps=5") == 2
    assert f"not the one that the run began with: {Path('data').absolute()} (task {task})" in one_line(capsys)


@pytest.mark.parametrize(("task", "form", "method"), [("sst2", "tsv", "prompt"), ("squad", "parquet", "prefix")])
def test_an_adapter_is_evaluated_on_the_task(task: str, form: str, method: str, model: Path, capsys) -> None:
    write_task(Path("data"), task, form)
    assert finetune(model, task, f"--peft={method}", "--max-new-tokens=6") == 0
    more = [f"--model={model}", "--adapter=out/adapter", "--max-new-tokens=6"]
    found = evaluate(capsys, f"--task={task}", *more)
    assert json.loads(Path("out/task.json").read_text()) == {"task": task} | found


def test_shots_and_calibration(model: Path, capsys) -> None:
    write_task(Path("data"), "copa")
    common = ["--task=COPA", f"--model={model}"]
    plain, shots = evaluate(capsys, *common), evaluate(capsys, *common, "--shots=2")
    assert plain["objective"] == "lm" and plain["loss"] == shots["loss"]  # of the text itself
    assert evaluate(capsys, *common, "--shots=2", "--objective=choices")["loss"] != pytest.approx(
        evaluate(capsys, *common, "--objective=choices")["loss"], rel=1e-6
    )
    assert evaluate(capsys, *common, "--calibrate")["examples"] == 6
    assert evaluate(capsys, *common, "--num-eval=3", "--task-seed=7")["examples"] == 3


def test_written_answers_of_lines(model: Path, capsys) -> None:
    """What the model writes behind a prompt is compared with the completion, or with a list of answers."""
    write_jsonl(Path("lines.jsonl"), uneven_lines(3))
    common = ["eval", f"--model={model}", "--eval=lines.jsonl", "--json", "--max-new-tokens=8"]
    capsys.readouterr()
    assert main([*common, "--score=em"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"loss", "accuracy", "f1", "em", "examples", "objective"}
    assert main(["generate", f"--model={model}", "--prompt=a film", "--max-new-tokens=8"]) == 0
    text = capsys.readouterr().out.strip()
    write_jsonl(Path("lines.jsonl"), [{"prompt": "a film", "completion": " x", "answers": ["no", f"The {text}!"]}] * 2)
    assert main([*common, "--score=f1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["f1"], found["em"]) == (1.0, 1.0)
    write_jsonl(Path("lines.jsonl"), [{"prompt": "a film", "completion": text, "answer": "of another kind"}] * 2)
    assert main([*common, "--score=f1"]) == 0
    assert json.loads(capsys.readouterr().out)["em"] == 1.0
    write_jsonl(Path("lines.jsonl"), [{"text": "the cat"}])
    assert main([*common, "--score=f1"]) == 2
    assert "lines.jsonl:1: --score of what is written needs lines with prompt and completion" in one_line(capsys)


def test_a_task_of_a_users_own(model: Path, capsys) -> None:
    lines = ["[mine]", 'prompt = "{text}"', 'options = [" yes", " no"]', 'label = "good"', "labels = [true, false]"]
    Path("mine.toml").write_text("\n".join(lines))
    data = [{"text": f"is it {i % 3}?", "good": i % 2 == 0} for i in range(9)]
    write_split(Path("data"), "train", data)
    write_split(Path("data"), "validation", data)
    assert finetune(model, "mine", "--task-file=mine.toml", "--save=none") == 0
    assert main(["tasks", "--task-file=mine.toml"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].startswith("mine ") and shown[-1].endswith("text, good")
    assert [line.split()[0] for line in shown[-12:-1]][:2] == ["sst2", "rte"]


def test_the_protocol() -> None:
    def options(*more: str) -> Any:
        return parse(["finetune", "--model=m", "--out=o", "--protocol=mezo", *more])[1]

    task = options("--task=sst2", "--data=d")
    assert (task.steps, task.batch_size, task.lr, task.eps, task.max_length) == (20_000, 16, 1e-7, 1e-3, 2048)
    assert (task.eval_every, task.save, task.score, task.schedule) == (4000, "best", "loss", "constant")
    assert options("--task=sst2", "--data=d", "--lr=1e-6").lr == 1e-6 and options("--train=t").eval_every == 0
    prefix, prompt = (options("--train=t", f"--peft={method}") for method in ("prefix", "prompt"))
    assert (prefix.lr, prompt.lr) == (1e-3, 1e-2)  # of the protocol; it has no prompts, which keep their own


def test_what_the_protocol_sets_is_printed(model: Path, capsys) -> None:
    write_task(Path("data"), "sst2", train=6)
    few = ["--num-train=2", "--save=none", "--steps=1", "--eval-every=1"]
    assert finetune(model, "sst2", "--protocol=mezo", *few) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("protocol mezo: batch-size 16 (4 was given), steps 20000 (1 was given), lr 1e-07 (0.01 was")
    assert ", schedule constant, " in shown and ", score loss, save best (none was given)" in shown


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--task=sst2"], "--task needs --data"),
        (["--data=d", "--train=t"], "--data needs --task"),
        (["--task-file=f", "--train=t"], "--task-file needs --task"),
        (["--task=sst2", "--data=d", "--train=t"], "--task and --train: give one of them"),
        (["--task=sst2", "--data=d", "--eval=e"], "--task and --eval: give one of them"),
        ([], "--train is missing"),
    ],
)
def test_options_that_do_not_go_together(given: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(["finetune", "--model=m", "--out=o", "--steps=1", *given])


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--task=sst3"], 2, "--task sst3: no such task; known are sst2, rte, cb,"),
        (["--task=rte"], 1, "data/train.jsonl: no field 'premise'; there are sentence, label, idx"),
        (["--task=sst2", "--score=f1"], 2, "--score: the answers of task sst2 are options"),
        (["--task=sst2", "--skip-bad-lines=1"], 2, "--skip-bad-lines: rows of a task are drawn by a seed"),
        (["--task=sst2", "--task-seed=4294967296"], 2, "--task-seed"),
    ],
)
def test_bad_input_is_one_line(options: list[str], status: int, reason: str, model: Path, capsys) -> None:
    write_task(Path("data"), "sst2")
    capsys.readouterr()
    try:
        assert finetune(model, *[o.removeprefix("--task=") for o in options[:1]], *options[1:]) == status
    except SystemExit as error:
        assert error.code == status
    assert reason in one_line(capsys)
    assert not Path("out").exists()
