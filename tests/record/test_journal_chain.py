"""Chained hashes find what a CRC that was made anew hides; group commit counts only what was synced."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from journal_cases import ROOT, bits, make_entry, make_test_header, run_python, start_python

from distzo2.record import writer as journal_writer
from distzo2.record.journal import Journal, JournalError, read_journal
from distzo2.record.line import decode_line, encode_line, seal_line, stated_chain


def write_chained(path: Path, num_steps: int) -> Path:
    with Journal.create(path, make_test_header(chain=True)) as journal:
        for step in range(num_steps):
            journal.append(make_entry(step))
    return path


def test_a_chained_journal_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = write_chained(tmp_path / "journal.jsonl", 3)
    contents = read_journal(path)
    assert contents.header["journal"] == 2 and contents.chain == stated_chain(path.read_bytes().splitlines(True)[-1])
    assert [bits(e) for e in contents.entries] == [bits(make_entry(step)) for step in range(3)]
    with Journal.open(path) as journal:
        assert journal.chain == contents.chain
        journal.append(make_entry(3))
        journal.sync()
        assert journal.chain != contents.chain
    # Opened in between or not, and given the steps at once or one by one: the same bytes.
    whole = write_chained(tmp_path / "whole.jsonl", 4)
    assert whole.read_bytes() == path.read_bytes()
    at_once = tmp_path / "at_once.jsonl"
    Journal.create(at_once, make_test_header(chain=True), [make_entry(step) for step in range(4)]).close()
    assert at_once.read_bytes() == path.read_bytes()


def test_a_journal_without_a_chain_is_as_before(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal.create(path, make_test_header()) as journal:
        journal.append(make_entry(0))
        assert journal.chain is None
    first, second = path.read_bytes().splitlines(True)
    assert decode_line(first, 1 << 20)["journal"] == 1 and second == make_entry(0).to_line()
    assert stated_chain(first) is None and read_journal(path).chain is None


def unsealed(line: bytes) -> bytes:
    """A line's record, as `seal_line` takes it."""
    return line[: line.rindex(b',"chain":"')]


def forge(lines: list[bytes]) -> bytes:
    """The lines with the CRCs that they should have, and the hashes that they had."""
    out = []
    for line in lines:
        body, chain = unsealed(line), stated_chain(line)
        out.append(seal_line(body + b',"chain":"' + chain.encode() + b'"', None)[0])
    return b"".join(out)


def renumbered(line: bytes, old: int, new: int) -> bytes:
    return line.replace(b'{"step":%d,' % old, b'{"step":%d,' % new)


def test_what_a_new_crc_hides_the_chain_finds(tmp_path: Path) -> None:
    path = write_chained(tmp_path / "journal.jsonl", 5)
    lines = path.read_bytes().splitlines(True)
    assert forge(lines) == path.read_bytes()
    for what, forged, number in (
        ("header", [lines[0].replace(b'"eps":0.001', b'"eps":0.002'), *lines[1:]], 1),
        ("changed", [*lines[:3], lines[3].replace(b'"tokens":64', b'"tokens":65'), *lines[4:]], 4),
        ("removed", [*lines[:2], *(renumbered(x, s + 1, s) for s, x in enumerate(lines[3:], 1))], 3),
        ("swapped", [*lines[:2], renumbered(lines[3], 2, 1), renumbered(lines[2], 1, 2), *lines[4:]], 3),
        ("doubled", [*lines[:3], *(renumbered(x, s - 1, s) for s, x in enumerate(lines[2:], 2))], 4),
    ):
        path.write_bytes(forge(forged))
        reason = "line 1: not the header" if number == 1 else f"line {number}: the chained hash does not match"
        for reader in (read_journal, Journal.open):
            with pytest.raises(JournalError, match=reason):
                reader(path)
        # Without its hashes, the same forgery is a journal like any other.
        path.write_bytes(
            encode_line(make_test_header(), 1 << 20)
            + b"".join(seal_line(unsealed(line), None)[0] for line in forged[1:])
        )
        assert len(read_journal(path).entries) == len(forged) - 1, what


def test_lines_without_a_hash_do_not_follow_lines_with_one(tmp_path: Path) -> None:
    path = write_chained(tmp_path / "journal.jsonl", 2)
    data = path.read_bytes()
    path.write_bytes(data + make_entry(2).to_line())
    with pytest.raises(JournalError, match="line 4: it has no chained hash"):
        read_journal(path)
    plain = tmp_path / "plain.jsonl"
    Journal.create(plain, make_test_header()).close()
    plain.write_bytes(plain.read_bytes() + data.splitlines(True)[1])
    with pytest.raises(JournalError, match=r"line 2: a step lacks \[\] and has unknown \['chain'\]"):
        read_journal(plain)
    for header, chain in ((make_test_header(chain=True), None), (make_test_header(), "")):
        plain.write_bytes(seal_line(encode_line(header, 1 << 20)[:-19], chain)[0])
        with pytest.raises(JournalError, match="the header and its line do not agree"):
            read_journal(plain)


def test_a_shorter_journal_has_another_last_hash(tmp_path: Path) -> None:
    path = write_chained(tmp_path / "journal.jsonl", 3)
    last = read_journal(path).chain
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))
    assert len(read_journal(path).entries) == 2 and read_journal(path).chain != last


def test_documentation_follows_a_chain(tmp_path: Path) -> None:
    """The second piece of Python in docs/journal.md, on a journal and on one that was changed."""
    path = write_chained(tmp_path / "journal.jsonl", 3)
    code = (ROOT / "docs" / "journal.md").read_text().split("```python\n")[2].split("```", 1)[0]
    code = code.replace("run/journal.jsonl", os.fspath(path))
    done = run_python(code)
    assert done.stdout == f"{read_journal(path).chain}\n", done.stderr
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(forge([*lines[:2], lines[2].replace(b'"tokens":64', b'"tokens":65'), *lines[3:]]))
    assert "line 3, or one before it, was changed" in run_python(code).stderr


# Group commit


class Syncs:
    """Counts the calls of fsync, and the lines that the file had at each."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.lines = path, []
        self._fsync = os.fsync
        monkeypatch.setattr(journal_writer.os, "fsync", self._count)

    def _count(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self.lines.append(self.path.read_bytes().count(b"\n") - 1)


def wait_for_lines(path: Path, num_lines: int) -> None:
    while path.read_bytes().count(b"\n") < 1 + num_lines:
        pass


def test_lines_are_synced_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal.create(path, make_test_header(), fsync_every=4) as journal:
        syncs = Syncs(path, monkeypatch)
        told: list[int] = []
        journal.on_durable(told.append)
        for step in range(7):
            journal.append(make_entry(step))
            wait_for_lines(path, step + 1)  # written at once: a kill of the process costs nothing
            assert journal.durable <= step + 1
        while journal.durable < 4:
            pass
        assert journal.durable == 4 and told == syncs.lines == [4]
        journal.sync()
        assert journal.durable == 7 and told == syncs.lines == [4, 7]
        journal.sync()
        assert len(syncs.lines) == 2
        journal.append(make_entry(7))
    assert told == syncs.lines == [4, 7, 8]
    with Journal.open(path, fsync_every=100) as journal:
        assert journal.durable == 8


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("call", "kept"), [("pwrite", 2), ("fsync", 0)])
def test_a_failure_costs_what_was_not_synced_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, kept: int, code: int
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, make_test_header(), fsync_every=10)
    for step in range(2):
        journal.append(make_entry(step))
    wait_for_lines(path, 2)

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(journal_writer.os, call, fail)
    journal.append(make_entry(2))
    # Lines written before the one that failed are whole: they are made durable. Not so where that is what fails.
    with pytest.raises(OSError, match=rf"step {kept} and later") as caught:
        journal.sync()
    assert caught.value.errno == code
    monkeypatch.undo()
    assert journal.durable == kept
    with pytest.raises(OSError, match=rf"step {kept} and later"):
        journal.close()
    assert len(read_journal(path).entries) == kept


def test_a_kill_keeps_what_was_written_and_not_yet_synced(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    source = tmp_path / "source.jsonl"
    Journal.create(source, make_test_header(chain=True), [make_entry(step) for step in range(5)]).close()
    script = f"""
        import os, signal, time
        from distzo2.record.journal import Journal, read_journal
        source = read_journal({os.fspath(source)!r})
        journal = Journal.create({os.fspath(path)!r}, source.header, fsync_every=100)
        for entry in source.entries:
            journal.append(entry)
        while open({os.fspath(path)!r}, "rb").read().count(b"\\n") < 6:
            time.sleep(0.001)
        assert journal.durable == 0
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with start_python(script) as child:
        assert child.wait(60) == -9
    assert path.read_bytes() == source.read_bytes()
