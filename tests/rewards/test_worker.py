"""Rewards in their process: what they do wrong is named in one line, and nothing of them outlives the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

import distzo2
from distzo2.errors import RewardError, UsageError
from distzo2.interrupts import DeferredInterrupt
from distzo2.rewards.functions import digest
from distzo2.rewards.worker import InlineReward, RewardWorker, open_reward, open_scores

CODE = """
import os, re, subprocess, sys, time

def good(prompts, completions, rows):
    print("to be seen on stderr")
    return [len(c) + len(p) + row["n"] for p, c, row in zip(prompts, completions, rows)]

def raises(prompts, completions, rows):
    return [1 / 0 for _ in completions]

def slow(prompts, completions, rows):
    if completions[0] != "slow":
        child = subprocess.Popen(["sleep", "1000"])
        open("children", "a").write(f"{os.getpid()} {child.pid} ")
    time.sleep(0 if completions[0] == "fast" else 1000)
    return [1.0 for _ in completions]

def hangs(prompts, completions, rows):
    open("children", "w").write("none")
    time.sleep(100)

def greedy(prompts, completions, rows):  # keeps the GIL
    child = subprocess.Popen(["sleep", "1000"])
    open("children", "a").write(f"{os.getpid()} {child.pid} ")
    re.match(r"(a+)+b", "a" * 40)

def dies(prompts, completions, rows):
    os._exit(3)

def forks(prompts, completions, rows):
    return [float(os.fork() > 0) for _ in completions]

def none(prompts, completions, rows): return None
def short(prompts, completions, rows): return [1.0]
def text(prompts, completions, rows): return ["1.0"] * len(completions)
def nan(prompts, completions, rows): return [float("nan")] * len(completions)
def huge(prompts, completions, rows): return [10**400] * len(completions)
def mapping(prompts, completions, rows): return dict.fromkeys(range(len(completions)), 1.0)
def distinct(prompts, completions, rows): return {1.0, 2.0}
def interrupts(prompts, completions, rows): raise KeyboardInterrupt
def leaves(prompts, completions, rows): raise GeneratorExit
def order(prompts, completions, rows): return [hash(c) % 1000 for c in completions]
"""
CALL = (["ab", "c"], ["x", "yz"], [{"n": 1}, {"n": 2}])


@pytest.fixture
def code(own_directory: None) -> Path:
    path = Path("mine.py")
    path.write_text(CODE)
    return path


@pytest.mark.parametrize("inline", [False, True])
def test_values_and_output(code: Path, inline: bool, capfd: pytest.CaptureFixture[str]) -> None:
    reward = open_reward("mine.py:good", inline=inline)
    try:
        assert reward(*CALL) == [4.0, 5.0] and reward.sha256 == digest("mine.py:good")
    finally:
        reward.close()
    assert type(reward) is (InlineReward if inline else RewardWorker)
    found = capfd.readouterr()
    assert found.out == "" and "to be seen on stderr" in found.err


@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("raises", RewardError.RAISED, "ZeroDivisionError: division by zero ("),
        ("none", RewardError.NO_NUMBERS, "a list was expected, it returned None"),
        ("short", RewardError.NO_NUMBERS, "2 were expected, it returned 1"),
        ("text", RewardError.NO_NUMBERS, "it returned '1.0' for a completion"),
        ("nan", RewardError.NO_NUMBERS, "it returned nan for a completion"),
        ("huge", RewardError.NO_NUMBERS, "OverflowError: int too large to convert to float"),
        ("mapping", RewardError.NO_NUMBERS, "a list was expected, it returned a dict"),
        ("distinct", RewardError.NO_NUMBERS, "a list was expected, it returned a set"),
        ("leaves", RewardError.RAISED, "GeneratorExit"),
        ("interrupts", RewardError.RAISED, "KeyboardInterrupt"),
    ],
)
def test_wrong_values(code: Path, name: str, reason: str, text: str) -> None:
    for inline in (False, True)[: 1 + (name != "interrupts")]:  # inline, that is a Ctrl-C
        reward = open_reward(f"mine.py:{name}", inline=inline)
        for _ in range(2):  # it goes on afterwards
            with pytest.raises(RewardError) as caught:
                reward(*CALL)
            assert caught.value.reason == reason and text in caught.value.text
        reward.close()


def gone(pid: int) -> bool:
    """Whether a process has ended, or waits for someone to read its status."""
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_slow_one_is_ended_with_its_children(code: Path) -> None:
    reward = RewardWorker("mine.py:slow", 60.0)
    for _ in range(2):  # the second is another process
        assert reward([""], ["fast"], [{}]) == [1.0]
        reward.timeout = 0.5
        with pytest.raises(RewardError, match=r"took too long: mine.py:slow took more than 0.5 seconds"):
            reward([""], ["slow"], [{}])
        reward.timeout = 60.0
    pids = [int(pid) for pid in Path("children").read_text().split()]
    assert len(set(pids)) == 4
    deadline = time.monotonic() + 60
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


@pytest.mark.parametrize("runs", ["in a lane", "beside lanes", "in a lane, inline"])
def test_an_interrupt_ends_a_slow_one(code: Path, runs: str) -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where pytest was started to ignore it
    model, asked = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)), []
    inline = "inline" in runs
    reward = InlineReward("mine.py:hangs") if inline else RewardWorker("mine.py:slow", 60.0)

    def loss() -> float:
        asked.append(model(torch.ones(1, 2)))
        return sum(reward(*CALL))

    def interrupt() -> None:
        while not Path("children").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    try:
        opt = distzo2.ZOSGD(distzo2.offload(model, units=["0", "1"], device="cpu"), lr=0.1)
        with pytest.raises(KeyboardInterrupt):
            if runs != "beside lanes":
                opt.step(loss)
            with DeferredInterrupt():
                reward(*CALL)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - start < 20 and opt.step_count == 0 and (inline or reward._process is None)
    assert len(asked) == (runs != "beside lanes")


def test_a_process_that_ends(code: Path) -> None:
    dies = RewardWorker("mine.py:dies", 60.0)
    with pytest.raises(RewardError, match="the reward failed: its process ended with status 3"):
        dies(*CALL)
    dies.close()


@pytest.mark.parametrize("inline", [False, True])
def test_copies_by_fork_do_not_continue(code: Path, inline: bool) -> None:
    own, (told, tells) = os.getpid(), os.pipe()
    forks = open_reward("mine.py:forks", inline=inline)
    try:
        assert [forks(*CALL) for _ in range(3)] == [[1.0, 1.0]] * 3
    finally:
        if os.getpid() != own:
            os.write(tells, b"continued")
            os._exit(0)
    forks.close()
    os.close(tells)
    assert os.read(told, 9) == b""  # once every copy has ended
    os.close(told)


@pytest.mark.parametrize("name", ["slow", "greedy"])
def test_a_trainer_that_is_killed_leaves_none(code: Path, name: str) -> None:
    child = os.fork()
    if child == 0:
        RewardWorker(f"mine.py:{name}", 60.0)(*CALL)
    deadline = time.monotonic() + 120
    while not (Path("children").exists() and len(Path("children").read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    while not all(gone(int(pid)) for pid in Path("children").read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sets_have_one_order(code: Path) -> None:
    found = []
    for _ in range(2):
        worker = RewardWorker("mine.py:order", 60.0)
        found.append(worker(*CALL))
        worker.close()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere.py:f", "nowhere.py: No such file"),
        ("mine.py:absent", "mine.py: has no function absent"),
        ("broken.py:f", "broken.py: cannot be loaded: SyntaxError"),
        ("leaves.py:f", "leaves.py: cannot be loaded: SystemExit"),
        ("regex:(", "reward regex:(: not a regular expression"),
    ],
)
def test_what_cannot_be_loaded(code: Path, name: str, text: str) -> None:
    Path("broken.py").write_text("def f(")
    Path("leaves.py").write_text("raise SystemExit")
    for inline in (False, True):
        with pytest.raises(UsageError) as caught:
            open_reward(name, inline=inline)
        assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_changes_while_it_runs(code: Path) -> None:
    worker = RewardWorker("mine.py:good", 60.0)
    code.write_text(CODE + "\n")
    assert worker(*CALL) == [4.0, 5.0]
    worker.close()
    with pytest.raises(UsageError, match=r"mine.py: has changed since the run began"):
        worker(*CALL)


def test_a_score_beside_a_reward(code: Path) -> None:
    with closing(open_reward("mine.py:good", inline=True)) as reward:
        for same in ("mine.py:good", str(Path("mine.py:good").absolute()), "reward", None):
            assert open_scores(same, reward, inline=True) == {"reward": reward}
        found = open_scores("mine.py:order", reward, inline=True)
        assert found["reward"] is reward and found["mine.order"].name == "mine.py:order"
    assert list(open_scores("mine.py:order", inline=True)) == ["reward"]
    words = InlineReward("f1")
    assert list(open_scores("mine.py:order", words, inline=True)) == ["reward", "mine.order"]
