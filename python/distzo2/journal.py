"""The journal: what a run is made of besides its base checkpoint, one line a step, never lost (docs/journal.md).

A :class:`Journal` owns one file, open for appending under an exclusive lock. ``append`` queues a line and returns;
one daemon thread writes what is queued, fsyncs once for all of it (group commit), and then says how far the file is
durable. The format itself is in :mod:`distzo2.journal_format`.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from distzo2.journal_format import (
    MAX_HEADER_BYTES,
    MAX_STEP_BYTES,
    JournalError,
    StepEntry,
    check_header,
    check_table,
    crc_matches,
    decode_line,
    encode_line,
    make_header,
    table_difference,
    table_row,
)

__all__ = [
    "Journal",
    "JournalContents",
    "JournalError",
    "JournalLockedError",
    "StepEntry",
    "check_header",
    "check_table",
    "make_header",
    "read_journal",
    "table_difference",
    "table_row",
]

_open_writers: weakref.WeakSet[_Writer] = weakref.WeakSet()


class JournalLockedError(JournalError):
    """Another process, or another Journal of this one, has the file open for appending."""


@dataclass(frozen=True)
class JournalContents:
    """What a journal file holds. ``torn`` is None, or one line that says what was cut from the end of the file;
    ``num_bytes`` is the length of the whole lines."""

    header: dict[str, Any]
    entries: list[StepEntry]
    torn: str | None
    num_bytes: int


def read_journal(path: str | os.PathLike[str]) -> JournalContents:
    """Reads and verifies a journal without locking or changing it; a run may be appending to it meanwhile.

    Every line's CRC is checked, steps must count from 0, and every step must have as many groups as the header. A last
    line that has no newline or a wrong CRC was being written when the run was killed: it is left out and told in
    ``torn``.

    Raises:
        JournalError: anything else is wrong; the message names file and line.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return _read(file, os.fspath(path))


class Journal:
    """A journal open for appending; make one with :meth:`create` or :meth:`open`. Close it, or use it in a ``with``.

    Attributes:
        path: the file.
        header: the header line as a dict.
        entries: the entries that the file held when it was opened (an empty list for a new file).
        torn: None, or one line about the torn last line that :meth:`open` cut.
    """

    def __init__(self, path: Path, descriptor: int, contents: JournalContents) -> None:
        self.path = path
        self.header = contents.header
        self.entries = contents.entries
        self.torn = contents.torn
        self._writer = _Writer(os.fspath(path), descriptor, contents.num_bytes, len(contents.entries))
        # Also runs at interpreter exit, while the daemon thread still can write what is queued.
        self._finalizer = weakref.finalize(self, self._writer.close_quietly)

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Mapping[str, Any]) -> Journal:
        """Makes a new journal with this header (see :func:`make_header`), durable with its name when this returns.

        The file appears under its name with its whole header or not at all.

        Raises:
            FileExistsError: there is a file of that name; it is left as it was.
            JournalError: the header is not one that can be read back.
            OSError: the file cannot be written.
        """
        path = Path(path)
        check_header(header)
        line = encode_line(header, MAX_HEADER_BYTES)
        header = decode_line(line, MAX_HEADER_BYTES)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                _lock(descriptor, path)
                _write_all(descriptor, line, 0)
                os.fsync(descriptor)
                _publish(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            try:
                _sync_directory(path.parent)
            except OSError:
                os.unlink(path)  # ours, locked, and not yet known to be durable
                raise
            return cls(path, descriptor, JournalContents(header, [], None, len(line)))
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, f"cannot create the journal: {error.strerror}", os.fspath(path)) from error
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Journal:
        """Opens a journal to go on from its last whole line. A torn last line is cut from the file and told in
        ``torn``.

        Raises:
            JournalLockedError: it is open for appending elsewhere.
            JournalError: the file is damaged before its last line, or unknown; the message names file and line.
            OSError: the file cannot be read or cut.
        """
        path = Path(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(descriptor, path)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                contents = _read(file, os.fspath(path))
            if contents.torn is not None:
                os.ftruncate(descriptor, contents.num_bytes)
            # Lines that a killed run wrote but did not sync count as durable from here on, so they must be.
            os.fsync(descriptor)
            _sync_directory(path.parent)
            return cls(path, descriptor, contents)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def next_step(self) -> int:
        """Number of the step that the next entry must have: the number of entries appended so far."""
        return self._writer.queued

    @property
    def durable(self) -> int:
        """How many entries are on disk: every step below this number is."""
        return self._writer.durable

    def append(self, entry: StepEntry) -> None:
        """Queues the entry and returns at once; :attr:`durable` says when it is on disk.

        Raises:
            JournalError: the entry is not step :attr:`next_step`, has another number of groups than the header, or
            holds a
                value that a line cannot hold exactly. Nothing is queued then.
            OSError: an earlier entry could not be written; names the file. The journal takes no more entries.
        """
        if entry.step != self.next_step:
            raise JournalError(f"{self.path}: step {entry.step} cannot follow, expected step {self.next_step}")
        _check_groups(entry, self.header, os.fspath(self.path))
        try:
            line = entry.to_line()
        except JournalError as error:
            raise JournalError(f"{self.path}: step {entry.step}: {error}") from None
        self._writer.put(line)

    def on_durable(self, callback: Callable[[int], None]) -> None:
        """Calls ``callback(durable)`` from the journal's thread after each fsync from now on, in order. It must be
        quick, and must not call :meth:`sync` or :meth:`close`; what it raises is raised by the next :meth:`append` or
        :meth:`sync`."""
        self._writer.add_callback(callback)

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Calls ``callback(error)`` once from the journal's thread if entries can no longer be written."""
        self._writer.failure_callbacks += (callback,)

    def sync(self) -> None:
        """Waits until every entry appended so far is durable and the callbacks have been told.

        Raises:
            OSError: one could not be written; names the file.
        """
        self._writer.sync()

    def close(self) -> None:
        """Writes what is queued, ends the thread and unlocks the file. Safe to call twice.

        Raises:
            OSError: entries were lost because they could not be written; names the file.
        """
        self._finalizer.detach()
        self._writer.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:  # the exception in flight is the one to be seen
            self._finalizer.detach()
            self._writer.close_quietly()


class _Writer:
    """Owns the descriptor and the thread. Fields are guarded by ``_changed``; only the thread writes to the file."""

    def __init__(self, path: str, descriptor: int, num_bytes: int, num_entries: int) -> None:
        self.path = path
        self.durable = num_entries
        self._descriptor = descriptor
        self._num_bytes = num_bytes  # whole, durable lines; the file is never left longer than what it is known to hold
        self._queue: collections.deque[bytes] = collections.deque()
        self._taken = num_entries  # entries that the thread has taken from the queue, or found in the file
        self._told = num_entries
        self._callbacks: tuple[Callable[[int], None], ...] = ()
        self.failure_callbacks: tuple[Callable[[BaseException], None], ...] = ()
        self._error: BaseException | None = None
        self._closing = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="distzo2-journal", daemon=True)
        self._thread.start()
        _open_writers.add(self)

    @property
    def queued(self) -> int:
        with self._changed:
            return self._taken + len(self._queue)

    def put(self, line: bytes) -> None:
        with self._changed:
            self._raise_error()
            if self._closing:
                raise JournalError(f"{self.path}: the journal is closed")
            self._queue.append(line)  # and nothing else: an interrupt finds the entry appended or not
            self._changed.notify_all()

    def add_callback(self, callback: Callable[[int], None]) -> None:
        with self._changed:
            self._callbacks += (callback,)

    def sync(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("sync() would wait for itself in an on_durable callback")
        with self._changed:
            target = self._taken + len(self._queue)
            self._changed.wait_for(lambda: self._told >= target or self._error is not None or self._closed)
            self._raise_error()
            if self._told < target:
                raise JournalError(f"{self.path}: the journal was closed with entries unwritten")

    def close(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("close() would wait for itself in an on_durable callback")
        with self._changed:
            if self._closed:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            os.close(self._descriptor)
            self._raise_error()

    def close_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def forget(self) -> None:
        """In a forked child: lets go of the inherited descriptor, which would keep the lock after the parent's
        death."""
        self._changed = threading.Condition()
        self._queue.clear()
        if not self._closed:
            os.close(self._descriptor)
        self._closing = self._closed = True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                lines = list(self._queue)
                self._taken += len(lines)
                self._queue.clear()
                callbacks = self._callbacks
            try:
                self._commit(b"".join(lines))
                with self._changed:
                    self.durable += len(lines)
                for callback in callbacks:
                    callback(self.durable)
            except BaseException as error:  # a callback's too: kept for the next append or sync
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                for callback in self.failure_callbacks:
                    callback(error)
                return
            with self._changed:
                self._told = self.durable
                self._changed.notify_all()

    def _commit(self, block: bytes) -> None:
        try:
            _write_all(self._descriptor, block, self._num_bytes)
            # A failed fsync is final: the kernel may have dropped the pages, so a second try would prove nothing.
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._num_bytes)
                os.fsync(self._descriptor)
            reason = f"step {self.durable} and later could not be written to the journal: {error.strerror}"
            raise OSError(error.errno, reason, self.path) from error
        self._num_bytes += len(block)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)


def _forget_after_fork() -> None:
    for writer in list(_open_writers):
        writer.forget()


os.register_at_fork(after_in_child=_forget_after_fork)


def _read(file: BinaryIO, path: str) -> JournalContents:
    line = file.readline(MAX_HEADER_BYTES + 1)
    try:
        header = decode_line(line, MAX_HEADER_BYTES)
        check_header(header)
    except JournalError as error:
        raise JournalError(f"{path}: line 1: not the header of a journal: {error}") from None
    entries: list[StepEntry] = []
    num_bytes = len(line)
    line = file.readline(MAX_STEP_BYTES + 1)
    while line:
        following = file.readline(MAX_STEP_BYTES + 1)
        if not following and not crc_matches(line):
            reason = "its CRC does not match" if line.endswith(b"\n") else "it has no newline"
            where = f"{path}: line {len(entries) + 2} (step {len(entries)})"
            torn = f"{where} was torn and left out: {len(line)} bytes, {reason}"
            return JournalContents(header, entries, torn, num_bytes)
        try:
            entry = StepEntry.from_line(line)
            if entry.step != len(entries):
                raise JournalError(f"step {entry.step} where step {len(entries)} must follow")
        except JournalError as error:
            raise JournalError(f"{path}: line {len(entries) + 2}: {error}") from None
        _check_groups(entry, header, f"{path}: line {len(entries) + 2}")
        entries.append(entry)
        num_bytes += len(line)
        line = following
    return JournalContents(header, entries, None, num_bytes)


def _check_groups(entry: StepEntry, header: Mapping[str, Any], where: str) -> None:
    if len(entry.update.groups) != len(header["groups"]):
        raise JournalError(
            f"{where}: step {entry.step} has {len(entry.update.groups)} groups, the header {len(header['groups'])}"
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalLockedError(f"{path}: another run is appending to this journal") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot lock the journal: {error.strerror}", os.fspath(path)) from error


def _write_all(descriptor: int, block: bytes, offset: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(descriptor, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "write() took no bytes")
        view = view[written:]
        offset += written


def _publish(temporary: Path, path: Path) -> None:
    """Gives the whole, synced file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "there is a journal already", os.fspath(path)) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links on this file system: between the look and the rename, another run could take the name.
        if path.exists():
            raise FileExistsError(errno.EEXIST, "there is a journal already", os.fspath(path)) from None
        os.rename(temporary, path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
