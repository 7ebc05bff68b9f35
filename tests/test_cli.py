"""The command line: bad input is one line and leaves nothing behind; runs end well, and go on when interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text import choice_lines, make_checkpoint, write_jsonl

from distzo2 import checkpoint, preflight
from distzo2.cli import build_parser, main
from distzo2.errors import UsageError
from distzo2.journal import read_journal
from distzo2.metrics import read_metrics
from distzo2.options import parse_finetune
from distzo2.run_directory import RunDirectory

STEPS = ["--steps=4", "--batch-size=4", "--lr=1e-3", "--quiet"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("cli")
    return SimpleNamespace(
        model=make_checkpoint(root / "model", layers=5),
        train=write_jsonl(root / "train.jsonl", choice_lines(20)),
        eval=write_jsonl(root / "eval.jsonl", choice_lines(6)),
    )


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def finetune(files: SimpleNamespace, *options: str) -> int:
    return main(["finetune", f"--model={files.model}", f"--train={files.train}", "--out=out", *STEPS, *options])


def environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("distzo2") and text.count("\n") == 1, text
    return text


# ---- bad input ------------------------------------------------------------------------------------------------------


def _truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def _without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "model: "),
        (_truncated, "model.safetensors"),
        (_corrupt, "model.safetensors"),
        (_without_tokenizer, "no tokenizer"),
        (_without_weights, "expected model.safetensors"),
        (lambda model: (model / "config.json").write_text('{"model_type": "nobody"}'), "not a configuration"),
    ],
)
def test_a_bad_checkpoint(files: SimpleNamespace, tmp_path: Path, capsys, damage, reason: str) -> None:
    shutil.copytree(files.model, tmp_path / "model")
    damage(tmp_path / "model")
    assert finetune(files, f"--model={tmp_path / 'model'}") == 1
    assert reason in one_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "bad.jsonl:2: not valid JSON"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 2}', "bad.jsonl:2: label 2 is out of range"),
        (json.dumps({"prompt": "cat " * 80, "choices": ["b", "c"], "label": 0}), "bad.jsonl:2: "),
    ],
)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_bad_data(files: SimpleNamespace, capsys, line: str, reason: str, which: str) -> None:
    path = write_jsonl(Path("bad.jsonl"), [choice_lines(1)[0], line])
    assert finetune(files, f"--{which}={path}") == 1
    assert reason in one_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--train=nowhere.jsonl"], 1, "nowhere.jsonl: No such file"),
        (["--device=tpu"], 2, "--device tpu"),
        (["--device=cpux"], 2, "--device cpux"),
        (["--micro-batches=3"], 2, "does not divide"),
        (["--estimator=fzoo"], 2, "needs --probes 2"),
        (["--warmup=9"], 2, "--warmup 9"),
        (["--save=best"], 2, "needs --eval"),
        (["--resume"], 2, "holds no run"),
        (["--config=none.toml"], 2, "none.toml"),
        (["--objective=lm", "--max-length=4"], 1, "the limit is 4"),
    ],
)
def test_bad_options(files: SimpleNamespace, capsys, options: list[str], status: int, reason: str) -> None:
    assert finetune(files, *options) == status
    assert reason in one_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "option", ["--lr=-1", "--eps=0", "--seed=-1", "--steps=0", "--max-coef=0.5", "--nonsense", "--lr=x"]
)
def test_bad_values(files: SimpleNamespace, capsys, option: str) -> None:
    with pytest.raises(SystemExit) as error:
        finetune(files, option)
    assert error.value.code == 2
    assert option.split("=")[0] in one_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(files: SimpleNamespace, capsys) -> None:
    assert finetune(files, "--device=cuda") == 1
    assert "--device cuda" in one_line(capsys)
    assert not Path("out").exists()


def test_too_little_room(files: SimpleNamespace, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert finetune(files, "--weights=disk") == 1
    assert "are free on its disk" in one_line(capsys)
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    assert finetune(files, f"--out={Path.cwd() / 'out'}") == 1
    assert "of memory" in one_line(capsys)
    assert not Path("out").exists()


def test_a_run_is_not_overwritten(files: SimpleNamespace, capsys) -> None:
    Path("out").mkdir()
    Path("out/journal.jsonl").write_text("mine")
    assert finetune(files) == 2
    assert "already holds a run (journal.jsonl)" in one_line(capsys)
    assert Path("out/journal.jsonl").read_text() == "mine" and len(list(Path("out").iterdir())) == 1
    Path("file").write_text("")
    assert finetune(files, "--out=file") == 2
    assert "a directory was expected" in one_line(capsys)


def test_one_run_in_a_directory(files: SimpleNamespace, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from_pretrained = checkpoint.from_pretrained
    seen = []

    def while_the_first_loads(*args, **kwargs):  # it has no journal yet
        monkeypatch.setattr(checkpoint, "from_pretrained", from_pretrained)
        seen.append(finetune(files))
        seen.append(one_line(capsys))
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "from_pretrained", while_the_first_loads)
    assert finetune(files) == 0
    assert seen[0] == 2 and "out: another distzo2 finetune is at work there" in seen[1]
    assert len(read_journal("out/journal.jsonl").entries) == 4 and Path("out/checkpoint").is_dir()
    assert not Path("out/run.lock").exists()

    other = RunDirectory.resumed("out")
    other.claim()
    assert main(["finetune", "--resume", "--out=out", "--steps=5"]) == 2
    assert "at work there" in one_line(capsys) and Path("out/run.lock").exists()
    other.withdraw()  # not a run that it began
    other.release()
    assert {path.name for path in Path("out").iterdir()} == {"journal.jsonl", "run.json", "metrics.jsonl", "checkpoint"}


def test_a_claim_looks_again_and_takes_over_from_the_dead() -> None:
    first, second = RunDirectory.new("a/b"), RunDirectory.new("a/b")
    second.withdraw()
    assert not Path("a").exists()
    first.claim()
    Path("a/b/journal.jsonl").write_text("mine")
    first.release()
    with pytest.raises(UsageError, match="already holds a run"):
        second.claim()
    second.withdraw()
    assert [path.name for path in Path("a/b").iterdir()] == ["journal.jsonl"]

    Path("c").mkdir()
    Path("c/run.lock").write_text("")  # of a process that was killed
    third = RunDirectory.new("c")
    third.claim()
    third.withdraw()
    assert not list(Path("c").iterdir())
    fourth = RunDirectory.new("d/e")
    fourth.claim()
    fourth.withdraw()
    assert not Path("d").exists()


def test_a_journal_of_another_program_is_left_alone(files: SimpleNamespace, capsys, monkeypatch) -> None:
    from_pretrained = checkpoint.from_pretrained

    def meanwhile(*args, **kwargs):
        Path("out/journal.jsonl").write_text("mine")
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "from_pretrained", meanwhile)
    assert finetune(files) == 1
    assert "exists" in one_line(capsys)
    assert [path.name for path in Path("out").iterdir()] == ["journal.jsonl"]
    assert Path("out/journal.jsonl").read_text() == "mine"


def test_resuming_takes_the_room_that_the_run_had(files: SimpleNamespace, capsys, monkeypatch) -> None:
    assert finetune(files, "--weights=disk", "--steps=1") == 0
    size = sum(value.nbytes for value in weights("out/checkpoint").values())
    leftover = Path("out/weights-killed.dzo2")
    leftover.write_bytes(b"x" * size)

    def disk_usage(path):  # room for the block file, not for a second checkpoint
        return SimpleNamespace(free=0 if leftover.exists() else size * 3 // 2)

    monkeypatch.setattr(preflight, "shutil", SimpleNamespace(disk_usage=disk_usage))
    assert main(["finetune", "--resume", "--out=out", "--steps=2"]) == 0
    assert not leftover.exists() and len(read_journal("out/journal.jsonl").entries) == 2
    shutil.rmtree("out/checkpoint")
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out=out", "--steps=3"]) == 1
    assert "are free on its disk" in capsys.readouterr().err
    assert len(read_journal("out/journal.jsonl").entries) == 2 and not Path("out/run.lock").exists()


def test_a_loss_that_is_not_finite(files: SimpleNamespace, tmp_path: Path, capsys) -> None:
    model = shutil.copytree(files.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert finetune(files, f"--model={model}", "--max-skipped=2", "--no-check") == 1
    assert "non-finite loss" in one_line(capsys)
    entries = read_journal("out/journal.jsonl").entries
    assert [e.skipped for e in entries] == ["non-finite loss"] * 2
    assert all(not e.update.terms for e in entries)
    lines = read_metrics("out/metrics.jsonl")
    assert [line["loss"] for line in lines] == [None, None] and lines[0]["skipped"] == "non-finite loss"
    assert json.loads(Path("out/run.json").read_text())["status"].startswith("stopped: ")


# ---- options --------------------------------------------------------------------------------------------------------


def parse(*arguments: str):
    return parse_finetune(build_parser()[1]["finetune"], arguments)


def test_options_of_a_file_and_of_the_command_line() -> None:
    base = {"model": "m", "train": "t", "out": "o", "steps": 10, "lr": 2e-5, "batch-size": 8, "train_mode": True}
    Path("c.json").write_text(json.dumps({**base, "max-coef": None}))
    Path("c.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in base.items()))
    for name in ("c.json", "c.toml"):
        options = parse(f"--config={name}", "--lr=1e-4", "--eps", "2e-3")
        assert (options.model, options.steps, options.batch_size) == ("m", 10, 8)
        assert options.lr == 1e-4 and options.eps == 2e-3 and options.train_mode is True
    assert parse("--config=c.json").max_coef is None and parse("--config=c.toml").max_coef == 10.0

    for content, reason in [
        ({"learning-rate": 1}, "'learning-rate' is not an option"),
        ({"lr": "fast"}, "lr: invalid number value: 'fast'"),
        ({"lr": [1]}, "a string or a number was expected"),
        ({"steps": True}, "a string or a number was expected"),
        ({"steps": 1.5}, "steps: invalid integer value"),
        ({"noise": "pink"}, "noise: invalid choice: 'pink'"),
        ({"quiet": "yes"}, "true or false was expected"),
        ({"eps": 0}, "a positive number was expected"),
    ]:
        Path("bad.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match=r"^bad\.json: ") as error:
            parse("--config=bad.json")
        assert reason in str(error.value)
    Path("bad.toml").write_text("lr = ")
    with pytest.raises(UsageError, match=r"bad\.toml"):
        parse("--config=bad.toml")
    with pytest.raises(UsageError, match="--model is missing"):
        parse()


def test_help_names_every_option(capsys) -> None:
    _, commands = build_parser()
    for name, sub in commands.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        for action in sub._actions:
            assert action.help, action
            assert all(flag in text for flag in action.option_strings)
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    one_line(capsys)


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from distzo2.cli import main
try:
    main(["finetune", "--help"])
finally:
    assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True).returncode == 0


# ---- runs -----------------------------------------------------------------------------------------------------------


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def assert_same_bits(first: str | Path, second: str | Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), name


def test_a_run_and_what_comes_of_it(files: SimpleNamespace, capsys) -> None:
    options = [f"--eval={files.eval}", "--eval-every=2", "--micro-batches=2", "--trace=1", "--schedule=linear"]
    assert finetune(files, *options, "--weights=disk") == 0
    lines = read_metrics("out/metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 2, 4]
    assert [line["lr"] for line in lines if line["kind"] == "step"] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    step = next(line for line in lines if line["kind"] == "step")
    assert step["tokens"] > 0 and step["peak"] > 0 and step["bytes_up"] > 0 and len(step["coefs"]) == 1
    record = json.loads(Path("out/run.json").read_text())
    assert record["status"] == "finished" and record["checkpoint_step"] == 4 and record["best_step"] in (0, 2, 4)
    assert not list(Path("out").glob("*.dzo2")) and Path("out/trace.json").is_file()

    assert main(["replay", "out", "--out=again", "--quiet"]) == 0
    assert_same_bits("out/checkpoint", "again")
    capsys.readouterr()
    assert main(["eval", "--model=out/checkpoint", f"--eval={files.eval}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["examples"] == 6 and figures["objective"] == "choices"
    # The same weights and lanes, but other micro-batches a pass.
    assert figures["loss"] == pytest.approx([line for line in lines if line["kind"] == "eval"][-1]["loss"], rel=1e-6)
    assert main(["report", "out"]) == 0
    assert Path("out/report.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["generate", "--model=out/checkpoint", "--prompt=the cat", "--max-new-tokens=3"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["generate", "--model=out/checkpoint", "--prompt=the cat", "--max-new-tokens=99"]) == 1
    assert "64 positions" in one_line(capsys)


def test_the_best_step_is_rebuilt(files: SimpleNamespace) -> None:
    options = [f"--eval={files.eval}", "--eval-every=1", "--score=loss", "--save=best", "--lr=1e-2"]
    assert finetune(files, *options) == 0
    record = json.loads(Path("out/run.json").read_text())
    evals = [line for line in read_metrics("out/metrics.jsonl") if line["kind"] == "eval"]
    assert record["best_step"] == record["checkpoint_step"] == min(evals, key=lambda e: e["loss"])["step"]
    assert main(["replay", "out", "--out=again", f"--to-step={record['best_step']}", "--quiet"]) == 0
    assert_same_bits("out/checkpoint", "again")


def test_a_run_goes_on(files: SimpleNamespace, capsys) -> None:
    options = [f"--eval={files.eval}", "--eval-every=3", "--estimator=fzoo", "--noise=rademacher", "--probes=2"]
    assert finetune(files, *options, "--steps=6", "--out=whole") == 0
    assert finetune(files, *options, "--steps=4", "--out=out") == 0
    # As a run that was killed: a torn line in the journal, metrics that are behind or ahead, a leftover block file.
    with open("out/journal.jsonl", "ab") as file:
        file.write(b'{"step": 4, "gro')
    metrics = Path("out/metrics.jsonl").read_text().splitlines()
    kept = [*metrics[:2], *metrics[3:5], metrics[-1].replace('"step": 4', '"step": 9'), '{"ki']
    Path("out/metrics.jsonl").write_text("\n".join(kept))
    Path("out/weights-x.dzo2").write_bytes(b"x")
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out=out", "--steps=6"]) == 0
    text = capsys.readouterr().out
    assert "resume: steps 4 -> 6" in text and "resumed out at step 4 of 6" in text and "torn" in text
    assert_same_bits("whole/checkpoint", "out/checkpoint")
    assert not Path("out/weights-x.dzo2").exists()
    ours, theirs = (
        [(m["kind"], m["step"], m["loss"]) for m in read_metrics(f"{name}/metrics.jsonl")] for name in ("out", "whole")
    )
    assert ours == theirs

    assert main(["finetune", "--resume", "--out=out", "--seed=1"]) == 2
    assert "--seed was 0 and is 1" in one_line(capsys)
    other = write_jsonl(Path("other.jsonl"), choice_lines(21))
    assert main(["finetune", "--resume", "--out=out", f"--train={other}"]) == 2
    assert "the training file is not the one" in one_line(capsys)


def start(files: SimpleNamespace, out: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distzo2", "finetune", f"--model={files.model}", f"--train={files.train}"]
    return subprocess.Popen(
        [*command, f"--out={out}", *STEPS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run may be told to ignore it
    )


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_at_any_time(files: SimpleNamespace, signum: int, status: int) -> None:
    options = ["--steps=1000000", "--weights=disk", "--lr=1e-4"]
    process = start(files, "out", *options)
    journal = Path("out/journal.jsonl")
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.005)
    process.send_signal(signum)
    try:
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, stderr
    if signum != signal.SIGKILL:
        assert "steps are in the journal; go on with distzo2 finetune --resume --out out" in stderr
        assert stderr.count("\n") == 1 and "Traceback" not in stderr
    made = len(read_journal(journal).entries)
    assert made >= 3

    total = f"--steps={made + 2}"
    assert main(["finetune", "--resume", "--out=out", total]) == 0
    assert finetune(files, *options, total, "--out=whole") == 0
    assert_same_bits("whole/checkpoint", "out/checkpoint")
    entries, expected = (read_journal(f"{name}/journal.jsonl").entries for name in ("out", "whole"))
    assert [(e.update, e.losses) for e in entries] == [(e.update, e.losses) for e in expected]


def test_interrupted_before_the_first_step(files: SimpleNamespace, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("distzo2.train.evaluate_examples", interrupted)
    assert finetune(files, f"--eval={files.eval}") == 130
    assert "interrupted before the first step" in one_line(capsys)
    assert not Path("out").exists()
