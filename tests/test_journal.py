"""The journal: lines round-trip, damage is found wherever it is, and what was appended is on disk in order."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distzo2 import journal as journal_module
from distzo2.journal import (
    Journal,
    JournalError,
    JournalLockedError,
    StepEntry,
    check_table,
    make_header,
    read_journal,
    table_row,
)
from distzo2.journal_line import MAX_STEP_BYTES, crc_matches, encode_line
from distzo2_core.types import GroupScalars, Term, Update

ROOT = Path(__file__).resolve().parent.parent

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def step_entries(draw: st.DrawFn) -> StepEntry:
    step = draw(st.integers(0, 2**32 - 1))
    skipped = draw(st.none() | st.text())
    lrs = float32s if skipped is None else st.sampled_from([0.0, -0.0])
    group = st.builds(GroupScalars, lrs, float32s, float32s, float32s)
    term = st.builds(
        Term, st.sampled_from([0, 1]), st.integers(0, 2**32 - 1), st.integers(0, 2**20 - 1), st.just(0), float32s
    )
    return StepEntry(
        step=step,
        update=Update(
            step, tuple(draw(st.lists(group, min_size=1, max_size=3))), tuple(draw(st.lists(term, max_size=4)))
        ),
        eps=draw(float32s),
        losses=draw(st.lists(st.lists(st.floats(), max_size=3), max_size=3)),
        skipped=skipped,
        tokens=draw(st.integers(0, 2**63 - 1)),
        seconds=draw(st.floats(0, 1e9)),
        extra=draw(st.dictionaries(st.text(), json_values, max_size=3)),
    )


def make_entry(step: int, **changes: Any) -> StepEntry:
    coef = struct.unpack("<f", struct.pack("<f", 0.1 * (step + 1)))[0]
    fields: dict[str, Any] = {
        "step": step,
        "update": Update(step, (GroupScalars(2.0**-10, 0.0),), (Term(0, step, 0, 0, coef),)),
        "eps": 2.0**-10,
        "losses": [[1.5 + step], [1.25]],
        "tokens": 64,
        "seconds": 0.1,
    }
    return StepEntry(**(fields | changes))


def make_test_header(**changes: Any) -> dict[str, Any]:
    table = [
        table_row(0, "embed.weight", (8, 4), torch.bfloat16, (4, 1), False, None, "normal"),
        table_row(1, "layer.weight", (4, 4), torch.bfloat16, (4, 1), True, 0, "normal"),
    ]
    fields: dict[str, Any] = {
        "seed": 2**64 - 1,
        "base": {"name": "base", "files": {"model.safetensors": {"sha256": "0" * 64, "num_bytes": 12}}},
        "table": table,
        "groups": [{"name": "all", "lr": 0.001}],
        "options": {"eps": 1e-3},
    }
    return make_header(**(fields | changes))


def write_journal(path: Path, num_steps: int) -> Path:
    with Journal.create(path, make_test_header()) as journal:
        for step in range(num_steps):
            journal.append(make_entry(step))
    return path


def bits(entry: StepEntry) -> Any:
    """The entry as a value that compares by bits (nan equals nan, -0.0 is not 0.0)."""

    def walk(value: Any) -> Any:
        if isinstance(value, float):
            return "nan" if math.isnan(value) else struct.pack("<d", value)
        if isinstance(value, dict):
            return {key: walk(child) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(child) for child in value]
        return value

    return walk(list(vars(entry).values()))


# Lines


@given(step_entries())
@settings(deadline=None, max_examples=200)
def test_line_round_trip(entry: StepEntry) -> None:
    line = entry.to_line()
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and line.isascii()
    again = StepEntry.from_line(line)
    assert bits(again) == bits(entry)
    assert again.to_line() == line


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    # With and without a right CRC, so that the parser behind it is reached too.
    for line in (data + b"\n", data + b',"crc":"%08x"}\n' % zlib.crc32(data)):
        with pytest.raises(JournalError):
            StepEntry.from_line(line)


@given(st.sampled_from(sorted(json.loads(make_entry(0).to_line()))), json_values)
@settings(deadline=None, max_examples=300)
def test_arbitrary_json_is_refused_or_kept(key: str, value: Any) -> None:
    record = json.loads(make_entry(0).to_line())
    del record["crc"]
    line = encode_line(record | {key: value}, MAX_STEP_BYTES)
    try:
        entry = StepEntry.from_line(line)
    except JournalError as error:
        assert "\n" not in str(error)
    else:
        assert entry.to_line() == line


def reencoded(**changes: Any) -> bytes:
    record = json.loads(make_entry(3).to_line())
    del record["crc"]
    return encode_line(record | changes, MAX_STEP_BYTES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"terms": [[2, 0, 0, 0, "0x0.0p+0"]]}, "unknown family 2"),
        ({"terms": [[0, 0, 0, 1, "0x0.0p+0"]]}, "unknown sub 1"),
        ({"terms": [[0, 0, 1 << 20, 0, "0x0.0p+0"]]}, "probe"),
        ({"terms": [[0, 0, 0, 0, "nan"]]}, "finite"),
        ({"terms": [[0, 0, 0, 0, 0.5]]}, "in hex"),
        ({"terms": [[0, 0, 0, 0, (0.1).hex()]]}, "float32"),
        ({"eps": "inf"}, "finite"),
        ({"eps": "0x1p+0"}, "spelled"),
        ({"eps": "0x1p+99999"}, "in hex"),
        ({"groups": []}, "at least one group"),
        ({"groups": [["0x0.0p+0"]]}, "a list of 4"),
        ({"skipped": "loss is nan"}, "lr must be 0"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"momentum": 1}, "unknown ['momentum']"),
        ({"extra": {"deep": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]}}, "nested deeper"),
    ],
)
def test_line_refused_with_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(JournalError) as caught:
        StepEntry.from_line(reencoded(**changes))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_hostile_lines_are_refused() -> None:
    def with_crc(body: bytes) -> bytes:
        return body + b',"crc":"%08x"}\n' % zlib.crc32(body)

    good = make_entry(0).to_line()[:-19]
    for body in (
        b'{"step":' + b"[" * 100_000 + b"]" * 100_000,
        good + b',"step":0',
        good[:-2] + b'{"a":NaN}',
        good[:-2] + b'{"a":1e999}',
        b"[1",
        b'{"step":' + b"9" * 5000,
        good.replace(b'"tokens":64', b'"tokens":' + b"9" * 4000),
    ):
        with pytest.raises(JournalError):
            StepEntry.from_line(with_crc(body))
    for body in (  # they say the same as the good one
        b" " + good,
        good.replace(b'"tokens":64', b'"tokens": 64'),
        good.replace(b'"step":0,', b"") + b',"step":0',
        good.replace(b'"step"', b'"st\\u0065p"'),
    ):
        with pytest.raises(JournalError, match="not spelled as"):
            StepEntry.from_line(with_crc(body))
    assert StepEntry.from_line(with_crc(good)).to_line() == with_crc(good)
    with pytest.raises(JournalError, match="longer than"):
        StepEntry.from_line(b"x" * (MAX_STEP_BYTES + 1))


def test_values_that_a_line_cannot_hold_are_refused() -> None:
    update = make_entry(0).update
    with pytest.raises(JournalError, match="float32"):
        make_entry(0, update=update._replace(groups=(GroupScalars(1e-3, 0.0),))).to_line()
    with pytest.raises(JournalError, match="finite"):
        make_entry(0, update=update._replace(terms=(Term(0, 0, 0, 0, math.nan),))).to_line()
    with pytest.raises(JournalError, match="1e\\+39"):
        make_entry(0, eps=1e39).to_line()
    with pytest.raises(JournalError, match="update of step 1"):
        make_entry(0, update=update._replace(step=1)).to_line()
    with pytest.raises(JournalError, match="JSON"):
        make_entry(0, extra={"x": math.nan}).to_line()
    with pytest.raises(JournalError, match="keys"):
        make_entry(0, extra={1: 2}).to_line()
    with pytest.raises(JournalError, match="at most"):
        make_entry(0, extra={"x": "y" * MAX_STEP_BYTES}).to_line()


# Header


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 2**64}, "seed"),
        ({"base": {"name": "b", "files": {"../x": {"sha256": "0" * 64, "num_bytes": 0}}}}, "plain file name"),
        ({"base": {"name": "b", "files": {"x": {"sha256": "0" * 63, "num_bytes": 0}}}}, "SHA-256"),
        ({"table": [table_row(1, "w", (2,), "float32", (1,), True, 0, "normal")]}, "index 1"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, 1, "normal")]}, "group"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, None, "normal")]}, "group"),
        ({"table": [table_row(0, "w", (2,), "float32", (1,), True, 0, "lowrank")]}, "lowrank"),
        ({"table": [table_row(0, "w", (-2,), "float32", (1,), True, 0, "normal")]}, "shape"),
    ],
)
def test_header_refused_with_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(JournalError, match=reason):
        make_test_header(**changes)


@pytest.mark.parametrize(
    "change",
    [
        {"journal": 3},
        {"journal": 2},
        {"journal": True},
        {"noise": "n0"},
        {"rounding": ""},
        {"purposes": {"lowrank": 4}},
        {"purposes": {"normal": 1}},
        {"map": []},
        {"new": 1},
        {"seed": "0"},
    ],
)
def test_unknown_header_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(encode_line(make_test_header() | change, 1 << 20))
    for reader in (read_journal, Journal.open):
        with pytest.raises(JournalError, match=r"journal.jsonl: line 1: not the header"):
            reader(path)


@pytest.mark.parametrize("data", [b"", b"\n", b"\x00" * 100, b"\x80\x04K\x01.", b'{"journal":1}\n'])
def test_no_journal_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    with pytest.raises(JournalError, match="line 1"):
        Journal.open(path)
    assert path.read_bytes() == data


def test_check_table_names_the_first_difference() -> None:
    header = make_test_header()
    check_table(header, header["table"])
    other = [dict(row) for row in header["table"]]
    other[1]["shape"] = [4, 8]
    other[1]["dtype"] = "float32"
    with pytest.raises(JournalError) as caught:
        check_table(header, other)
    assert "parameter 1 'layer.weight': shape is [4, 4] in the journal and [4, 8] in the model" in str(caught.value)
    with pytest.raises(JournalError, match=r"'layer.weight': only the journal has it"):
        check_table(header, header["table"][:1])


# The file


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
        script = f"from distzo2.journal import Journal; Journal.open({os.fspath(path)!r})"
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


def start_python(script: str, **options: Any) -> subprocess.Popen[str]:
    paths = os.pathsep.join([os.fspath(ROOT), os.fspath(ROOT / "python"), *sys.path[1:]])
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, text=True, **options)


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    with start_python(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        out, err = child.communicate(timeout=120)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


# Durability


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
        from distzo2.journal import Journal, read_journal
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
        from distzo2.journal import Journal, read_journal
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


def test_killed_at_any_instant_what_was_durable_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    source = os.fspath(write_journal(tmp_path / "source.jsonl", 1))
    script = f"""
        import dataclasses, os
        from distzo2.journal import Journal, read_journal
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


def test_documentation_example_reads_a_journal(tmp_path: Path) -> None:
    """The Python in docs/journal.md is run on the example line in docs/journal.md."""
    text = (ROOT / "docs" / "journal.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith('{"')]
    assert [json.loads(line).get("journal", json.loads(line).get("step")) for line in lines] == [1, 0]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert len(read_journal(path).entries) == 1
    code = text.split("```python\n", 1)[1].split("```", 1)[0].replace("run/journal.jsonl", os.fspath(path))
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 ")
