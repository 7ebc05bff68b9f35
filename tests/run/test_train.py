"""What is refused before the first step: one line, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_runs import finetune, one_line, record, resume, steps_in, weights
from tiny_text import choice_lines, write_jsonl

from distzo2.checkpoint.writing import DISK_SLACK_BYTES
from distzo2.cli.main import main
from distzo2.weights import residency
from distzo2_core import BlockFile

pytestmark = pytest.mark.usefixtures("own_directory")


@pytest.mark.parametrize(
    ("which", "line", "reason"),
    [
        ("eval", "{", "bad.jsonl:2: not valid JSON"),
        ("train", json.dumps({"prompt": "cat " * 80, "choices": ["b", "c"], "label": 0}), "bad.jsonl:2: "),
    ],
)
def test_bad_data(files, capsys, which: str, line: str, reason: str) -> None:
    path = write_jsonl(Path("bad.jsonl"), [choice_lines(1)[0], line])
    assert finetune(files, f"--{which}={path}") == 1
    assert reason in one_line(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--train=nowhere.jsonl"], 1, "nowhere.jsonl: No such file"),
        (["--parallel=4"], 2, "--parallel 4: expected a mesh (such as pert=2,data=2)"),
        (["--device=tpu"], 2, "device tpu: expected cpu"),
        (["--trace=."], 2, "--trace .: expected a file"),
        (["--objective=choices", "--train=text.jsonl"], 2, "text.jsonl: objective 'choices' needs"),
        (["--resume"], 2, "holds no run"),
        (["--config=none.toml"], 2, "none.toml"),
        (["--objective=lm", "--max-length=4"], 1, "the limit is 4"),
        *([] if torch.cuda.is_available() else [(["--device=cuda"], 1, "device cuda cannot be used")]),
    ],
)
def test_bad_options(files, capsys, options: list[str], status: int, reason: str) -> None:
    write_jsonl(Path("text.jsonl"), ['{"text": "a cat"}'])
    assert finetune(files, *options) == status
    assert reason in one_line(capsys)
    assert [path.name for path in Path().iterdir()] == ["text.jsonl"]


def test_too_little_room(files, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert finetune(files, "--weights=disk") == 1
    assert "are free on its disk" in one_line(capsys)
    monkeypatch.setattr(residency.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 << 20))
    assert finetune(files) == 1  # refused before the first step, not when the checkpoint is to be written
    assert "to spare 64.00 MiB" in one_line(capsys)
    monkeypatch.setattr(residency.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(residency, "memory_budget", lambda: {"cgroup_bytes": None, "available_bytes": 1000})
    assert finetune(files) == 1
    assert re.search(r"of memory, and 1000 .*--host-memory sets what weights may take", one_line(capsys))
    assert finetune(files, "--host-memory=9KiB") == 1
    assert "of memory, and 9.00 KiB are" in one_line(capsys)
    assert not Path("out").exists()
    assert finetune(files, "--host-memory=1GiB") == 0


def test_fewer_steps_than_were_made(files, capsys) -> None:
    assert finetune(files, "--save=none") == 0
    record = Path("out/run.json").read_bytes()
    capsys.readouterr()
    assert resume("--steps=3") == 2
    assert "--steps 3: out has made 4 already; distzo2 replay out --to-step 3" in one_line(capsys)
    assert Path("out/run.json").read_bytes() == record
    for options in (["--at-step=4"], []):
        assert main(["finetune", "--branch-from=out", "--out=new", "--steps=3", *options]) == 2
        assert "--steps 3: the branch takes over 4 steps" in one_line(capsys)
        assert not Path("new").exists()


def test_resuming_takes_the_room_that_the_run_had(files, capsys, monkeypatch) -> None:
    assert finetune(files, "--weights=disk", "--steps=1") == 0
    size = sum(value.nbytes for value in weights("out/checkpoint").values())
    BlockFile("out/weights.dzo2", [4096], durable=True).close()  # of a killed process

    def disk_usage(path):  # no room for another block file
        return SimpleNamespace(free=DISK_SLACK_BYTES + size // 2)

    monkeypatch.setattr(residency, "shutil", SimpleNamespace(disk_usage=disk_usage))
    assert resume("--steps=2") == 0
    assert steps_in() == 2 and not list(Path("out").glob("weights*"))
    shutil.rmtree("out/checkpoint")
    capsys.readouterr()
    assert resume("--steps=3") == 1
    assert "are free on its disk" in capsys.readouterr().err
    assert steps_in() == 2 and not Path("out/run.lock").exists()


def test_a_relative_directory_of_weights_stays_where_it_was(files, monkeypatch) -> None:
    Path("scratch").mkdir()
    assert finetune(files, "--steps=2", "--save=none", "--weights=disk", "--weights-dir=scratch") == 0
    out = Path("out").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["finetune", "--resume", f"--out={out}", "--quiet", "--steps=3"]) == 0
    assert not list(Path().iterdir())
    shutil.rmtree(out)


# ---- what a resumed run learns from ------------------------------------------------------------------------------

MESSAGES = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}


@pytest.fixture
def chat(files) -> SimpleNamespace:
    """A model whose chat template writes the time to the microsecond, and conversations."""
    shutil.copytree(files.model, "chat")
    write = "{% for m in messages %}{{ m.role }}[{{ m.content }}]<eos>{% endfor %}"
    Path("chat/chat_template.jinja").write_text("{{ strftime_now('%Y %H:%M:%S.%f') }}" + write)
    return SimpleNamespace(model="chat", train=write_jsonl(Path("chat.jsonl"), [MESSAGES] * 5))


def edited(path: str, change) -> None:
    Path(path).write_text(json.dumps(change(json.loads(Path(path).read_text()))))


def test_a_resumed_run_sees_the_time_of_its_beginning(chat, caplog) -> None:
    assert finetune(chat, "--steps=2") == 0
    assert "asks for the time" in caplog.text
    before = record()
    assert resume("--steps=4") == 0 and record()["examples_sha256"] == before["examples_sha256"]
    assert finetune(chat, "--steps=4", "--out=other") == 0  # of another time
    assert record("other")["examples_sha256"] != before["examples_sha256"]


@pytest.mark.parametrize("change", ["template", "tokenizer", "time", "file", "lines"])
def test_other_tokens_are_refused(chat, capsys, change: str) -> None:
    assert finetune(chat, "--steps=2", "--save=none") == 0
    if change == "template":
        Path("chat/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    elif change == "tokenizer":
        edited("chat/tokenizer.json", lambda t: t | {"normalizer": {"type": "Lowercase"}})
        Path("chat.jsonl").write_text(json.dumps(MESSAGES).replace("cat", "CAT") + "\n")
    elif change == "time":
        edited("out/run.json", lambda r: r | {"clock": "2001-02-03T04:05:06"})
    elif change == "file":
        write_jsonl(chat.train, [MESSAGES] * 4)
    else:  # read to the same tokens
        write_jsonl(chat.train, ["", *[MESSAGES | {"id": 7}] * 5])
    capsys.readouterr()
    status = resume("--steps=4")
    if change == "lines":
        assert status == 0 and steps_in() == 4
        return
    other = {"template", "time"} & {change}
    reason = "becomes other tokens than when the run began" if other else "the training file is not the one"
    assert status == 2 and reason in one_line(capsys) and steps_in() == 2


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_another_forward_is_refused(chat, capsys, weights: str) -> None:
    assert finetune(chat, "--steps=2", "--save=none", f"--weights={weights}", "--snapshot-every=1") == 0
    capsys.readouterr()
    edited("chat/config.json", lambda config: config | {"rms_norm_eps": 0.5})
    assert resume("--steps=4") == 2
    assert "config.json of the model: rms_norm_eps was 1e-06 and is 0.5: start a new run" in one_line(capsys)
    assert steps_in() == 2


def test_a_run_of_an_earlier_version_continues(chat, capsys) -> None:
    """It recorded neither tokens nor configuration, and is held to the bytes of its file."""
    Path("chat/chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}[{{ m.content }}] {% endfor %}")
    assert finetune(chat, "--steps=2", "--save=none") == 0
    new = ("examples_sha256", "config", "clock", "legacy", "split_special_tokens", "skip_bad_lines")
    edited("out/run.json", lambda r: {k: v for k, v in r.items() if k not in new} | {
        "options": {k: v for k, v in r["options"].items() if k not in new}})  # fmt: skip
    assert resume("--steps=4") == 0 and steps_in() == 4
    write_jsonl(chat.train, [MESSAGES] * 4)
    capsys.readouterr()
    assert resume("--steps=5") == 2 and "the training file is not the one" in one_line(capsys)


def test_options_that_change_tokens(chat, capsys, caplog) -> None:
    bad = write_jsonl(Path("bad.jsonl"), [MESSAGES, "{", MESSAGES, '{"text": 3}'])
    assert finetune(chat, "--steps=1", f"--train={bad}", "--skip-bad-lines=1") == 1
    assert "bad.jsonl:4: text: expected a valid string (and 1 bad lines before it were skipped)" in one_line(capsys)
    assert finetune(chat, "--steps=1", f"--train={bad}", "--skip-bad-lines=2", "--save=none") == 0
    assert "bad.jsonl: 2 bad lines skipped, the first: bad.jsonl:2: not valid JSON" in caplog.text
    capsys.readouterr()
    assert resume("--steps=2", "--split-special-tokens") == 2
    assert "--split-special-tokens was False and is True: start a new run" in one_line(capsys)
    assert resume("--steps=2") == 0
