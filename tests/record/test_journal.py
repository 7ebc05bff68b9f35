"""A journal as a file: it only grows, damage is found wherever it is, and it has one writer."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from journal_cases import bits, make_entry, make_test_header, run_python, write_journal

from distzo2.record.journal import Journal, JournalError, JournalLockedError, read_journal
from distzo2.record.line import crc_matches
from distzo2_core.types import GroupScalars, Update


def test_create_append_open(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 3)
    before = path.read_bytes()
    with Journal.open(path) as journal:
        assert journal.torn is None and journal.durable == journal.next_step == 3
        assert journal.header == make_test_header()
        assert [bits(e) for e in journal.entries] == [bits(make_entry(step)) for step in range(3)]
        with pytest.raises(JournalError, match="expected step 3"):
            journal.append(make_entry(4))
        journal.append(make_entry(3))
    assert path.read_bytes() == before + make_entry(3).to_line()
    assert os.listdir(tmp_path) == ["journal.jsonl"]
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


def test_steps_must_follow_and_fit_the_header(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 1)
    for entry, reason in (
        (make_entry(2), "step 2 where step 1 must follow"),
        (make_entry(1, update=Update(1, (GroupScalars(0.0, 0.0),) * 2, ())), "2 groups, the header 1"),
    ):
        other = tmp_path / "other.jsonl"
        other.write_bytes(path.read_bytes() + entry.to_line())
        with pytest.raises(JournalError, match=f"other.jsonl: line 3: .*{reason}"):
            read_journal(other)


def test_torn_at_every_byte_of_the_last_line(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 3)
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(data)):
        path.write_bytes(data[:length])
        contents = read_journal(path)
        assert path.read_bytes() == data[:length]
        assert len(contents.entries) == 2
        with Journal.open(path) as journal:
            assert (journal.torn is None) == (length == last) and contents.torn == journal.torn
            if journal.torn is not None:
                assert "line 4 (step 2)" in journal.torn and f"{length - last} bytes" in journal.torn
            assert path.read_bytes() == data[:last]
            journal.append(make_entry(2))
        assert path.read_bytes() == data


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


def test_a_bad_middle_is_left_as_it_is(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:-5] + b"\n", lines[3]]))
    before = path.read_bytes()
    with pytest.raises(JournalError, match="line 3: the CRC does not match"):
        Journal.open(path)
    assert path.read_bytes() == before


def test_readers_see_a_prefix_while_a_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal.create(path, make_test_header()) as journal:
        for step in range(20):
            journal.append(make_entry(step))
            entries = read_journal(path).entries
            assert [entry.step for entry in entries] == list(range(len(entries)))
        journal.sync()
        assert len(read_journal(path).entries) == 20


# Lock


def test_second_writer_is_refused(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 1)
    with Journal.open(path):
        with pytest.raises(JournalLockedError, match=r"journal\.jsonl: another run"):
            Journal.open(path)
        script = f"from distzo2.record.journal import Journal; Journal.open({os.fspath(path)!r})"
        done = run_python(script)
        assert done.returncode != 0 and "JournalLockedError" in done.stderr
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
