"""The Countdown example: its tasks, its reward, and all of it in a small form."""

from __future__ import annotations

from pathlib import Path

import countdown
import pytest
from reward import FORMAT, evaluated, reward_of
from reward import countdown as score
from tasks import all_tasks

from distzo2.cli.main import main

SMALL = countdown.Recipe(hidden=16, layers=2, base_steps=2, base_batch=4, num_held_out=6, steps=2)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("2*3+4", 1), (" 4+(2*3)\n", 1), ("2+3+4", FORMAT), ("10", 0), ("2*5", 0), ("2*3+4+0", 0), ("2*3+", 0),
        ("__import__('os')", 0), ("2**3+4", 0), ("2*3+4.0", 0), ("True*10", 0), ("(" * 90, 0), ("9*" * 60 + "9", 0),
        ("", 0), ("2*3+4 # yes", 1), ("\0", 0),
    ],
)  # fmt: skip
def test_the_reward(text: str, reward: float) -> None:
    assert reward_of(text, [4, 3, 2], 10) == reward
    assert score(["", ""], [text, "1"], [{"numbers": [4, 3, 2], "target": 10}] * 2) == [reward, 0.0]


def test_the_tasks() -> None:
    tasks = all_tasks(0, largest=5)
    assert tasks == all_tasks(0, largest=5) != all_tasks(1, largest=5)
    assert len({(tuple(sorted(t.numbers)), t.target) for t in tasks}) == len(tasks) > 100
    for task in tasks[:50]:
        assert task.solutions and all(evaluated(text)[0] == task.target for text in task.solutions)
        assert {reward_of(text, task.numbers, task.target) for text in task.solutions} == {1.0}


def test_the_whole_example_in_small(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(countdown, "distzo2", lambda *arguments: main([*map(str, arguments)]))
    assert countdown.run(tmp_path, SMALL)
    text = capsys.readouterr().out
    assert "before  0." in text and "2 steps, 16 members x 128 prompts" in text and "give the checkpoint" in text
    assert (tmp_path / "run/report.png").is_file()
