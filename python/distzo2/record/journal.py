"""The journal: what a run is made of besides its base checkpoint, one line a step, never lost (docs/journal.md).

A :class:`Journal` is one file, open for appending under an exclusive lock. ``append`` queues an entry and returns;
:mod:`distzo2.record.writer` writes it behind the caller's work, and says how far the file is durable. What the lines
hold is in :mod:`distzo2.record.header` and :mod:`distzo2.record.entry`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from distzo2.record.entry import StepEntry
from distzo2.record.header import (
    check_header,
    check_table,
    is_chained,
    make_header,
    read_header,
    table_difference,
    table_row,
)
from distzo2.record.line import (
    MAX_HEADER_BYTES,
    MAX_STEP_BYTES,
    JournalError,
    crc_matches,
    decode_line,
    encode_record,
    seal_line,
    stated_chain,
)
from distzo2.record.tail import MAX_TAIL_BYTES, torn_line, torn_tail
from distzo2.record.writer import JournalWriter, write_all

__all__ = [
    "Journal",
    "JournalContents",
    "JournalError",
    "JournalLockedError",
    "StepEntry",
    "check_header",
    "check_table",
    "make_header",
    "num_groups_of",
    "read_journal",
    "table_difference",
    "table_row",
]


class JournalLockedError(JournalError):
    """Another process, or another Journal of this one, has the file open for appending."""


@dataclass(frozen=True)
class JournalContents:
    """What a journal file holds. ``torn`` is None, or one line that says what was cut from the end of the file;
    ``num_bytes`` is the length of the whole lines, ``chain`` the hash of the last of them where they are chained."""

    header: dict[str, Any]
    entries: list[StepEntry]
    torn: str | None
    num_bytes: int
    chain: str | None = None


def read_journal(path: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES) -> JournalContents:
    """Reads and verifies a journal without locking or changing it; a run may be appending to it meanwhile. A header
    longer than `max_header_bytes` is refused unread.

    Every line's CRC and chained hash is checked, steps must count from 0, and every step must have as many groups as
    the header. A last line that has no newline or a wrong CRC was being written when the run was killed: it is left out
    and told in ``torn``; so are all lines from the first one on of which a power cut has left zeros
    (:mod:`distzo2.record.tail`).

    Raises:
        JournalError: anything else is wrong; the message names file and line.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return _read(file, os.fspath(path), min(max_header_bytes, MAX_HEADER_BYTES))


def num_groups_of(path: str | os.PathLike[str]) -> int:
    """How many parameter groups a journal's run has; only the first line is read. Raises as `read_journal`."""
    with open(path, "rb") as file:
        return len(_read_first(file, os.fspath(path))[1]["groups"])


class Journal:
    """A journal open for appending; make one with :meth:`create` or :meth:`open`. Close it, or use it in a ``with``.

    Attributes:
        path: the file.
        header: the header line as a dict.
        entries: the entries that the file held when it was opened (an empty list for a new file).
        torn: None, or one line about the torn end of the file that :meth:`open` cut.
    """

    def __init__(self, path: Path, descriptor: int, contents: JournalContents, fsync_every: int) -> None:
        self.path = path
        self.header = contents.header
        self.entries = contents.entries
        self.torn = contents.torn
        self._writer = JournalWriter(
            os.fspath(path), descriptor, contents.num_bytes, len(contents.entries), contents.chain, fsync_every
        )
        # Also runs at interpreter exit, while the daemon thread still can write what is queued.
        self._finalizer = weakref.finalize(self, self._writer.close_quietly)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        header: Mapping[str, Any],
        entries: Sequence[StepEntry] = (),
        *,
        fsync_every: int = 1,
    ) -> Journal:
        """Makes a new journal with this header (see :func:`make_header`) and these first steps, durable with its name
        when this returns.

        The file appears under its name with all of that or not at all. After so many lines as ``fsync_every`` says they
        are synced, or sooner where :meth:`sync` or :meth:`close` is called; what is written but not synced outlives the
        process, though not a power cut, and does not count as durable.

        Raises:
            FileExistsError: there is a file of that name; it is left as it was.
            JournalError: the header or an entry is not one that can be read back.
            OSError: the file cannot be written.
        """
        path = Path(path)
        check_header(header)
        line, chain = seal_line(encode_record(header, MAX_HEADER_BYTES), "" if is_chained(header) else None)
        header = decode_line(line, MAX_HEADER_BYTES, None if chain is None else "")
        block = bytearray(line)
        for step, entry in enumerate(entries):
            _check_follows(entry, step, header, os.fspath(path))
            line, chain = seal_line(entry.to_record(), chain)
            block += line
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                _lock(descriptor, path)
                write_all(descriptor, block, 0)
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
            contents = JournalContents(header, list(entries), None, len(block), chain)
            return cls(path, descriptor, contents, fsync_every)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, f"cannot create the journal: {error.strerror}", os.fspath(path)) from error
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, fsync_every: int = 1) -> Journal:
        """Opens a journal to go on from its last line with nothing torn before it. What is torn is cut from the file
        and told in ``torn`` (see :func:`read_journal`). ``fsync_every`` as for :meth:`create`.

        Raises:
            JournalLockedError: it is open for appending elsewhere.
            JournalError: the file is damaged in another way, or unknown; the message names file and line.
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
            return cls(path, descriptor, contents, fsync_every)
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

    @property
    def chain(self) -> str | None:
        """The hash over all durable lines, 64 hexadecimal digits; None where the journal's lines are not chained."""
        return self._writer.chain

    def append(self, entry: StepEntry) -> None:
        """Queues the entry and returns at once; :attr:`durable` says when it is on disk.

        Raises:
            JournalError: the entry is not step :attr:`next_step`, has another number of groups than the header, or
                holds a value that a line cannot hold exactly. Nothing is queued then. Or the file was removed, replaced
                or changed by another program; the journal takes no more entries.
            OSError: an earlier entry could not be written; names the file. The journal takes no more entries.
        """
        _check_follows(entry, self.next_step, self.header, os.fspath(self.path))
        try:
            record = entry.to_record()
        except JournalError as error:
            raise JournalError(f"{self.path}: step {entry.step}: {error}") from None
        self._writer.put(record)

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
            JournalError: the file was removed, replaced or changed by another program.
            OSError: one could not be written; names the file.
        """
        self._writer.sync()

    def close(self) -> None:
        """Writes what is queued, ends the thread and unlocks the file. Safe to call twice.

        Raises:
            JournalError: the file was removed, replaced or changed by another program.
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


def _read(file: BinaryIO, path: str, max_header_bytes: int = MAX_HEADER_BYTES) -> JournalContents:
    line, header, chain = _read_first(file, path, max_header_bytes)
    entries: list[StepEntry] = []
    num_bytes = len(line)
    line = file.readline(MAX_STEP_BYTES + 1)
    while line:
        following = file.readline(MAX_STEP_BYTES + 1)
        torn = None
        if not crc_matches(line):
            if not following:
                torn = torn_line(line, len(entries), path)
            elif b"\0" in line and os.fstat(file.fileno()).st_size - num_bytes <= MAX_TAIL_BYTES:
                torn = torn_tail(line + following + file.read(MAX_TAIL_BYTES), num_bytes, len(entries), path)
        if torn is not None:
            return JournalContents(header, entries, torn, num_bytes, chain)
        try:
            entry = StepEntry.from_line(line, chain)
            if entry.step != len(entries):
                raise JournalError(f"step {entry.step} where step {len(entries)} must follow")
        except JournalError as error:
            raise JournalError(f"{path}: line {len(entries) + 2}: {error}") from None
        _check_groups(entry, header, f"{path}: line {len(entries) + 2}")
        entries.append(entry)
        num_bytes += len(line)
        chain = None if chain is None else stated_chain(line)
        line = following
    return JournalContents(header, entries, None, num_bytes, chain)


def _read_first(
    file: BinaryIO, path: str, max_bytes: int = MAX_HEADER_BYTES
) -> tuple[bytes, dict[str, Any], str | None]:
    line = file.readline(max_bytes + 1)
    try:
        return line, *read_header(line, max_bytes)
    except JournalError as error:
        raise JournalError(f"{path}: line 1: not the header of a journal: {error}") from None


def _check_follows(entry: StepEntry, step: int, header: Mapping[str, Any], path: str) -> None:
    if entry.step != step:
        raise JournalError(f"{path}: step {entry.step} cannot follow, expected step {step}")
    _check_groups(entry, header, path)


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
