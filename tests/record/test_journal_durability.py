"""What a journal says is durable is on the disk, in order, whatever ends or hinders its writer."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from journal_cases import make_entry, make_test_header, run_python, start_python, write_journal

from distzo2.record import journal as journal_module
from distzo2.record.journal import Journal, read_journal
from distzo2.record.snapshot_writer import _Errand


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
        monkeypatch.setattr(journal_module.os, "fsync", slow_fsync)
        told: list[int] = []
        journal.on_durable(lambda durable: told.append(durable))
        journal.append(make_entry(0))
        while path.read_bytes().count(b"\n") < 2:
            time.sleep(0.001)
        for step in range(1, 5):  # queued behind the fsync of step 0, so they are one group
            journal.append(make_entry(step))
        assert journal.durable == 0 and told == []
        gate.release()
        gate.release()
        journal.sync()
        assert journal.durable == 5
        assert told == synced == [1, 5]
        gate.release(8)


def test_callback_errors_reach_the_caller(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", make_test_header())

    def fail(durable: int) -> None:
        journal.sync()

    journal.on_durable(fail)
    journal.append(make_entry(0))
    with pytest.raises(RuntimeError, match="wait for itself"):
        journal.sync()
    with pytest.raises(RuntimeError, match="wait for itself"):
        journal.append(make_entry(1))
    with pytest.raises(RuntimeError):
        journal.close()
    assert len(read_journal(journal.path).entries) == 1


def test_full_disk_is_told_and_leaves_whole_lines(tmp_path: Path) -> None:
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
    done = run_python(script)
    assert done.stdout == "done\n", done.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_write_errors_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 1)
    before = path.read_bytes()
    journal = Journal.open(path)
    told: list[int] = []
    journal.on_durable(told.append)

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(journal_module.os, call, fail)
    journal.append(make_entry(1))
    for again in (journal.sync, lambda: journal.append(make_entry(2)), journal.close):
        with pytest.raises(OSError, match="step 1 and later") as caught:
            again()
        assert caught.value.errno == code and caught.value.filename == os.fspath(path)
    journal.close()
    monkeypatch.undo()
    assert told == [] and journal.durable == 1 and path.read_bytes() == before


@pytest.mark.parametrize("fails", ["pwrite", "fsync", "link"])
def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_module.os, fails, fail)
    with pytest.raises(OSError, match=r"journal\.jsonl"):
        Journal.create(tmp_path / "journal.jsonl", make_test_header())
    assert os.listdir(tmp_path) == []


def test_the_end_of_the_process_keeps_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    source = os.fspath(write_journal(tmp_path / "source.jsonl", 50))
    done = run_python(f"""
        from distzo2.record.journal import Journal, read_journal
        source = read_journal({source!r})
        journal = Journal.create({os.fspath(path)!r}, source.header)
        for entry in source.entries:
            journal.append(entry)
    """)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == Path(source).read_bytes()


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
    held[0]._writer.put(make_entry(1).to_record())
    thread.join(timeout=60)
    assert not thread.is_alive() and not held
    with Journal.open(path) as journal:  # and the lock is free
        assert journal.durable == 2


@pytest.mark.parametrize("thread", ["journal", "snapshots"])
def test_garbage_that_is_collected_just_before_a_thread_waits(tmp_path: Path, monkeypatch, thread: str) -> None:
    """What ends the thread comes after its look whether to end, and before anybody can wake it: at the lock that a wait
    makes."""
    if thread == "journal":
        journal = Journal.create(tmp_path / "journal.jsonl", make_test_header())
        owner = journal._writer
        running, condition, end = owner._thread, owner._changed, owner.close_quietly
    else:
        owner = _Errand()
        running, condition, end = threading.Thread(target=owner.run, daemon=True), owner.changed, owner.close
        running.start()
    wait, ended = condition.wait, threading.Event()

    def wait_after_the_end(timeout: float | None = None) -> bool:
        if threading.current_thread() is running and not ended.is_set():
            end()
            ended.set()
        return wait(timeout)

    with condition:
        monkeypatch.setattr(condition, "wait", wait_after_the_end)
        condition.notify_all()
    assert ended.wait(60)
    running.join(timeout=60)
    assert not running.is_alive()


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
    with start_python(script, stdout=subprocess.PIPE) as child:
        try:
            durable = [int(child.stdout.readline()) for _ in range(20)]
        finally:
            child.kill()
        durable += [int(line) for line in child.stdout.read().split()]
    assert durable == sorted(set(durable))
    with Journal.open(path) as journal:
        assert journal.durable >= durable[-1]
        journal.append(make_entry(journal.next_step))


def test_an_error_is_told_to_entries_queued_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", make_test_header())
    gate = threading.Event()

    def fail(*_: Any) -> None:
        gate.wait(30)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal_module.os, "fsync", fail)
    for step in range(4):
        journal.append(make_entry(step))
    gate.set()
    for again in (journal.sync, lambda: journal.append(make_entry(4)), journal.close):
        with pytest.raises(OSError, match="step 0 and later"):
            again()


def test_append_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.create(tmp_path / "journal.jsonl", make_test_header()) as journal:
        gate = threading.Event()
        real_fsync = os.fsync
        monkeypatch.setattr(journal_module.os, "fsync", lambda fd: (gate.wait(30), real_fsync(fd))[1])
        for step in range(100):  # would take 100 times 30 s if any of them waited
            journal.append(make_entry(step))
        assert journal.durable == 0
        gate.set()
        journal.sync()
        assert journal.durable == 100
