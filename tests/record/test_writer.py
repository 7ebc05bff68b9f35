"""What a journal reports as durable is on the disk, in order, whatever ends or hinders its writer."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_cases
import pytest
from journal_cases import make_entry, make_test_header, write_journal

from distzo2.record.journal import Journal, JournalError, read_journal


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def wait_for_lines(path: Path, num_lines: int) -> None:
    while path.read_bytes().count(b"\n") < 1 + num_lines:
        time.sleep(0.001)


# ---- durable


def test_durable_counts_what_was_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    gate = threading.Semaphore(0)
    synced: list[int] = []
    real_fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        assert gate.acquire(timeout=30)
        real_fsync(descriptor)
        synced.append(path.read_bytes().count(b"\n") - 1)

    with Journal.create(path, make_test_header()) as journal:
        monkeypatch.setattr(os, "fsync", slow_fsync)
        durable: list[int] = []
        journal.on_durable(durable.append)
        journal.append(make_entry(0))
        wait_for_lines(path, 1)
        for step in range(1, 100):  # behind the fsync of step 0: no append waits for it, and they are one group
            journal.append(make_entry(step))
        assert journal.durable == 0 and durable == []
        gate.release()
        gate.release()
        journal.sync()
        assert journal.durable == 100
        assert durable == synced == [1, 100]
        gate.release(8)


def test_lines_are_synced_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    synced: list[int] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        synced.append(path.read_bytes().count(b"\n") - 1)

    with Journal.create(path, make_test_header(), fsync_every=4) as journal:
        monkeypatch.setattr(os, "fsync", fsync)
        durable: list[int] = []
        journal.on_durable(durable.append)
        for step in range(7):
            journal.append(make_entry(step))
            wait_for_lines(path, step + 1)  # written at once: a kill of the process costs nothing
        while journal.durable < 4:
            time.sleep(0.001)
        assert journal.durable == 4 and durable == synced == [4]
        journal.sync()
        assert journal.durable == 7 and durable == synced == [4, 7]
        journal.sync()
        assert len(synced) == 2
        journal.append(make_entry(7))
    assert durable == synced == [4, 7, 8]
    with Journal.open(path, fsync_every=100) as journal:
        assert journal.durable == 8


def test_callback_errors_reach_the_caller(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", make_test_header())
    journal.on_durable(lambda durable: journal.sync())
    journal.append(make_entry(0))
    with pytest.raises(RuntimeError, match="wait for itself"):
        journal.sync()
    with pytest.raises(RuntimeError, match="wait for itself"):
        journal.append(make_entry(1))
    with pytest.raises(RuntimeError):
        journal.close()
    assert len(read_journal(journal.path).entries) == 1


# ---- what cannot be written


def test_full_disk_is_reported_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 2)
    before = path.read_bytes()
    source = os.fspath(write_journal(tmp_path / "source.jsonl", 4))
    # A limit on the file's size is a real short write (then EFBIG), at every place in the line.
    script = f"""
        import resource, signal
        from distzo2.record.journal import Journal, read_journal
        entries = read_journal({source!r}).entries
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for room in (0, 1, 100, len(entries[2].to_line()) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)} + room, resource.RLIM_INFINITY))
            journal = Journal.open({os.fspath(path)!r})
            assert journal.torn is None
            journal.append(entries[2])
            for again in (journal.sync, lambda: journal.append(entries[3]), journal.close):
                try:
                    again()
                except OSError as error:
                    assert error.filename == {os.fspath(path)!r} and "step 2" in str(error), error
                else:
                    raise AssertionError(again)
            assert journal.durable == 2
        print("done")
    """
    ended = kill_cases.run(tmp_path, script)
    assert ended.text == "done\n", ended.text
    assert path.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("call", "fsync_every", "kept"), [("pwrite", 1, 2), ("fsync", 1, 2), ("pwrite", 10, 4),
                                                           ("fsync", 10, 2)])  # fmt: skip
def test_a_failure_costs_what_was_not_synced_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fsync_every: int, kept: int, code: int
) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 2)
    journal = Journal.open(path, fsync_every=fsync_every)
    durable: list[int] = []
    journal.on_durable(durable.append)
    for step in (2, 3) if fsync_every > 1 else ():  # written, and not synced
        journal.append(make_entry(step))
        wait_for_lines(path, step + 1)
    gate = threading.Event()
    monkeypatch.setattr(os, call, lambda *_: (gate.wait(30), failing(code)()))
    for step in range(journal.next_step, 6):  # one that fails, and others behind it
        journal.append(make_entry(step))
    gate.set()
    # Lines written before the one that failed are whole: they are made durable, unless it is the sync that fails.
    for again in (journal.sync, lambda: journal.append(make_entry(journal.next_step)), journal.close):
        with pytest.raises(OSError, match=f"step {kept} and later") as caught:
            again()
        assert caught.value.errno == code and caught.value.filename == os.fspath(path)
    journal.close()
    monkeypatch.undo()
    assert journal.durable == kept and durable == ([4] if kept == 4 else [])
    assert len(read_journal(path).entries) == kept and read_journal(path).torn is None


# ---- the end of the process, and of the journal


def test_the_end_of_the_process_keeps_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    source = os.fspath(write_journal(tmp_path / "source.jsonl", 50))
    script = f"""
        from distzo2.record.journal import Journal, read_journal
        source = read_journal({source!r})
        journal = Journal.create({os.fspath(path)!r}, source.header)
        for entry in source.entries:
            journal.append(entry)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    assert path.read_bytes() == Path(source).read_bytes()


def test_a_kill_keeps_what_was_written_and_not_yet_synced(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    source = write_journal(tmp_path / "source.jsonl", 5)
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
    assert kill_cases.run(tmp_path, script).status == -signal.SIGKILL
    assert path.read_bytes() == source.read_bytes()


def test_killed_at_any_instant_what_was_durable_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    source = os.fspath(write_journal(tmp_path / "source.jsonl", 1))
    script = f"""
        import dataclasses, os
        from distzo2.record.journal import Journal, read_journal
        source = read_journal({source!r})
        journal = Journal.create({os.fspath(path)!r}, source.header)
        journal.on_durable(lambda durable: os.write(1, b"%d\\n" % durable))
        while True:
            step = journal.next_step
            update = source.entries[0].update._replace(step=step)
            journal.append(dataclasses.replace(source.entries[0], step=step, update=update))
    """

    def told() -> list[int]:
        return [int(line) for line in (tmp_path / "log").read_text().split()] if (tmp_path / "log").exists() else []

    assert kill_cases.run(tmp_path, script, 0.0, lambda: len(told()) >= 20).killed
    durable = told()
    assert durable == sorted(set(durable))
    with Journal.open(path) as journal:
        assert journal.durable >= durable[-1]
        journal.append(make_entry(journal.next_step))


def test_a_journal_that_is_dropped_keeps_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, make_test_header())
    for step in range(50):
        journal.append(make_entry(step))
    del journal
    gc.collect()
    with Journal.open(path) as journal:
        assert journal.durable == 50


def test_a_journal_that_is_dropped_in_its_own_thread_ends(tmp_path: Path) -> None:
    """Garbage is collected in whatever thread is running, and the journal's must not wait for itself."""
    path = tmp_path / "journal.jsonl"
    held = [Journal.create(path, make_test_header(), fsync_every=1)]
    thread = held[0]._writer._thread

    def drop(durable: int) -> None:
        if durable == 2:
            held.clear()
            gc.collect()

    held[0].on_durable(drop)
    held[0].append(make_entry(0))
    held[0].sync()
    held[0]._writer.put(make_entry(1).to_line())
    thread.join(timeout=60)
    assert not thread.is_alive() and not held
    with Journal.open(path) as journal:  # and the lock is free
        assert journal.durable == 2


def test_garbage_that_is_collected_just_before_the_thread_waits(tmp_path: Path, monkeypatch) -> None:
    """What ends the thread comes after its look whether to end, and before anybody can wake it: at the lock that a wait
    makes."""
    journal = Journal.create(tmp_path / "journal.jsonl", make_test_header())
    writer, ended = journal._writer, threading.Event()
    wait = writer._changed.wait

    def wait_after_the_end(timeout: float | None = None) -> bool:
        if threading.current_thread() is writer._thread and not ended.is_set():
            writer.close_quietly()
            ended.set()
        return wait(timeout)

    with writer._changed:
        monkeypatch.setattr(writer._changed, "wait", wait_after_the_end)
        writer._changed.notify_all()
    assert ended.wait(60)
    writer._thread.join(timeout=60)
    assert not writer._thread.is_alive()


# ---- another program


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


@pytest.mark.parametrize("change", [remove, move_directory, replace, truncate, append_to])
@pytest.mark.parametrize("call", ["append", "sync", "close"])
def test_the_next_call_reports_a_change_by_another_program(
    tmp_path: Path, change: Callable[[Path], str], call: str
) -> None:
    (tmp_path / "run").mkdir()
    journal = Journal.create(tmp_path / "run/journal.jsonl", make_test_header())
    journal.append(make_entry(0))
    journal.sync()
    failed = threading.Event()
    errors: list[BaseException] = []
    durable: list[int] = []
    journal.on_failure(lambda error: (errors.append(error), failed.set()))
    journal.on_durable(durable.append)
    what = change(journal.path)
    with pytest.raises(JournalError) as caught:
        if call == "append":  # that line is lost, and the next is not taken
            journal.append(make_entry(1))
            assert failed.wait(30)
            journal.append(make_entry(2))
        else:
            getattr(journal, call)()
    message = f"{journal.path}: the journal was changed by another program during the run: {what}"
    assert str(caught.value) == message
    assert errors == [caught.value] and durable == [] and journal.durable == 1
    if call != "close":
        with pytest.raises(JournalError, match="another program"):
            journal.close()
    journal.close()


def test_no_line_is_written_after_the_end_of_a_file_that_was_cut(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", make_test_header(), fsync_every=100)
    journal.append(make_entry(0))
    journal.sync()
    os.truncate(journal.path, 50)
    with pytest.raises(JournalError, match=r"it has 50 bytes, and \d+ were written"):
        for step in range(1, 1000):
            journal.append(make_entry(step))
            time.sleep(0.01)
    assert journal.path.stat().st_size == 50


def test_a_process_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Journal.create("journal.jsonl", make_test_header()) as journal:
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        journal.append(make_entry(0))
        journal.sync()
        assert journal.durable == 1
