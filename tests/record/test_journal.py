"""A journal as a file: it only grows, damage is found wherever it is, and it has one writer."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import kill_cases
import pytest
from journal_cases import bits, make_entry, make_test_header, write_journal

from distzo2.record.journal import Journal, JournalLockedError, read_journal
from distzo2.record.line import JournalError, crc_matches
from distzo2_core.types import GroupScalars, Update


def test_create_append_open(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 3)
    before = path.read_bytes()
    with Journal.open(path) as journal:
        assert journal.torn is None and journal.durable == journal.next_step == 3
        assert journal.header == make_test_header()
        assert [bits(e) for e in journal.entries] == [bits(make_entry(step)) for step in range(3)]
        with pytest.raises(JournalError, match=r"journal\.jsonl: step 4: step 4 where step 3 must follow"):
            journal.append(make_entry(4))
        journal.append(make_entry(3))
    assert path.read_bytes() == before + make_entry(3).to_line()
    at_once = tmp_path / "at_once.jsonl"
    Journal.create(at_once, make_test_header(), [make_entry(step) for step in range(4)]).close()
    assert at_once.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["at_once.jsonl", "journal.jsonl"]
    with pytest.raises(JournalError, match="closed"):
        journal.append(make_entry(4))


def test_create_never_overwrites(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 1)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"journal\.jsonl"):
        Journal.create(path, make_test_header())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["journal.jsonl"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Journal.create(tmp_path / "nowhere" / "journal.jsonl", make_test_header())


@pytest.mark.parametrize("fails", ["pwrite", "fsync", "link"])
def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match=r"journal\.jsonl"):
        Journal.create(tmp_path / "journal.jsonl", make_test_header())
    assert os.listdir(tmp_path) == []


def test_steps_must_follow_and_fit_the_header(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 1)
    for entry, reason in (
        (make_entry(2), "step 2 where step 1 must follow"),
        (make_entry(1, update=Update(1, (GroupScalars(0.0, 0.0),) * 2, ())), "2 groups, the header has 1"),
    ):
        other = tmp_path / "other.jsonl"
        other.write_bytes(path.read_bytes() + entry.to_line())
        with pytest.raises(JournalError, match=f"other.jsonl: line 3: {reason}"):
            read_journal(other)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 2)
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        assert crc_matches(line)
        for bit in range(8 * len(line)):
            damaged = bytearray(line)
            damaged[bit // 8] ^= 1 << bit % 8
            assert not crc_matches(bytes(damaged))
    # And what the reader makes of it, with one bit of each byte.
    last = data.rindex(b"\n", 0, -1) + 1
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            contents = read_journal(path)
        except JournalError as error:
            line_number = data.count(b"\n", 0, position) + 1
            assert position < last - 1 and str(error).startswith(f"{path}: line {line_number}: ")
        else:
            # A newline lost between the last two lines makes one bad line of them, at the end of the file.
            assert position >= last - 1 and contents.torn is not None
            assert len(contents.entries) == (1 if position >= last else 0)


def test_readers_see_a_prefix_while_a_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal.create(path, make_test_header()) as journal:
        for step in range(20):
            journal.append(make_entry(step))
            entries = read_journal(path).entries
            assert [entry.step for entry in entries] == list(range(len(entries)))
        journal.sync()
        assert len(read_journal(path).entries) == 20


# ---- the lock


def test_second_writer_is_refused(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 1)
    with Journal.open(path):
        with pytest.raises(JournalLockedError, match=r"journal\.jsonl: another run"):
            Journal.open(path)
        script = f"from distzo2.record.journal import Journal; Journal.open({os.fspath(path)!r})"
        ended = kill_cases.run(tmp_path, script)
        assert ended.status == 1 and "JournalLockedError" in ended.text
        assert len(read_journal(path).entries) == 1
    Journal.open(path).close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_neither_keeps_the_lock_nor_writes(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 1)
    journal = Journal.open(path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            journal.append(make_entry(1))
            os.write(writing, b"appended")
        except JournalError:
            os.write(writing, b"refused")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reading, 100) == b"refused"
        journal.close()
        Journal.open(path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
