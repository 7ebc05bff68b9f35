"""A journal that another program removes, replaces or changes while a run appends to it: the run ends with an error."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from journal_cases import make_entry, make_test_header

from distzo2.record.journal import Journal, JournalError


def remove(path: Path) -> str:
    path.unlink()
    return "it is not there any more (No such file or directory)"


def move_directory(path: Path) -> str:
    path.parent.rename(path.parent.with_name("moved"))
    return "it is not there any more (No such file or directory)"


def replace(path: Path) -> str:
    path.with_name("other").write_bytes(path.read_bytes())  # the same bytes: not a file that later lines go to
    path.with_name("other").rename(path)
    return "another file has its name"


def truncate(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size - 10)
    return f"it has {size - 10} bytes, and {size} were written"


def append_to(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"x\n")
    return f"it has {size + 2} bytes, and {size} were written"


CHANGES = [remove, move_directory, replace, truncate, append_to]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    (tmp_path / "run").mkdir()
    journal = Journal.create(tmp_path / "run/journal.jsonl", make_test_header())
    journal.append(make_entry(0))
    journal.sync()
    return journal


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("call", ["append", "sync", "close"])
def test_the_next_call_tells_it(journal: Journal, change: Callable[[Path], str], call: str) -> None:
    told: list[BaseException] = []
    durable: list[int] = []
    journal.on_failure(told.append)
    journal.on_durable(durable.append)
    what = change(journal.path)
    message = f"{journal.path}: the journal was changed by another program while the run goes on: {what}"
    with pytest.raises(JournalError) as caught:
        if call == "append":  # that line is lost, and the next is not taken
            journal.append(make_entry(1))
            deadline = time.monotonic() + 30
            while not told and time.monotonic() < deadline:
                time.sleep(0.001)
            journal.append(make_entry(2))
        else:
            getattr(journal, call)()
    assert str(caught.value) == message
    assert told == [caught.value] and durable == [] and journal.durable == 1
    with pytest.raises(JournalError, match="another program"):
        if call == "close":
            raise caught.value
        journal.close()
    journal.close()


def test_lines_that_wait_for_their_group(tmp_path: Path) -> None:
    """No line is written after the end of a file that was cut."""
    journal = Journal.create(tmp_path / "journal.jsonl", make_test_header(), fsync_every=100)
    journal.append(make_entry(0))
    journal.sync()
    os.truncate(journal.path, 50)
    with pytest.raises(JournalError, match=r"it has 50 bytes, and \d+ were written"):
        for step in range(1, 1000):
            journal.append(make_entry(step))
            time.sleep(0.01)
    assert journal.path.stat().st_size == 50


def test_a_process_that_changes_its_directory_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Journal.create("journal.jsonl", make_test_header()) as journal:
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        journal.append(make_entry(0))
        journal.sync()
        assert journal.durable == 1
