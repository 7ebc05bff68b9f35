"""The journal: a file of one line a step which, with the base checkpoint, is all of a run (docs/journal.md).

A :class:`Journal` is one file, open for appending under an exclusive lock. `append` queues an entry and returns;
:mod:`distzo2.record.writer` writes it behind the caller's work and reports how far the file is durable.
"""

from __future__ import annotations

import errno
import os
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from distzo2.files import lock, sync, write_all
from distzo2.record.entry import StepEntry
from distzo2.record.header import ANCHOR_VERSION, has_older_rules, read_header
from distzo2.record.line import MAX_HEADER_BYTES, MAX_STEP_BYTES, JournalError, crc_matches, encode_line, whole
from distzo2.record.writer import JournalWriter

MAX_FINDINGS = 100  # of one journal


class JournalLockedError(JournalError):
    """Another process, or another Journal of this one, has the file open for appending."""


@dataclass(frozen=True)
class JournalContents:
    """What a journal file holds.

    Attributes:
        torn: None, or one line on what a kill or a power cut left at the end of the file; it is left out here.
        num_bytes: length of the file without its torn end.
    """

    header: dict[str, Any]
    entries: list[StepEntry]
    torn: str | None
    num_bytes: int


def read_journal(
    path: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES, findings: list[str] | None = None
) -> JournalContents:
    """Reads and checks a journal without locking or changing it; a run may be appending to it meanwhile.

    Every line must have its CRC, steps must count from 0, and every step must have as many groups as the header. A last
    line that is not whole is left out, and so is everything from the first bad line with a zero byte on, which a power
    cut leaves; `torn` describes both.

    Args:
        max_header_bytes: a longer header is refused unread.
        findings: if given, what is wrong with steps is appended to it, at most 100 lines, and reading continues.

    Raises:
        JournalError: anything else is wrong; the message names file and line.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return _read(file, os.fspath(path), min(max_header_bytes, MAX_HEADER_BYTES), findings)


def num_groups_of(path: str | os.PathLike[str]) -> int:
    """How many parameter groups a journal's run has. Reads the first line alone; raises as `read_journal`."""
    with open(path, "rb") as file:
        return len(_read_first(file, os.fspath(path))[0]["groups"])


class Journal:
    """A journal open for appending; make one with :meth:`create` or :meth:`open`. Close it, or use it in a `with`.

    Attributes:
        path: the file.
        header: the header line as a dict.
        entries: the entries that the file held when it was opened, or was created with.
        torn: None, or one line on the torn end that :meth:`open` cut off the file.
    """

    def __init__(self, path: Path, descriptor: int, contents: JournalContents, fsync_every: int) -> None:
        self.path = path
        self.header, self.entries, self.torn = contents.header, contents.entries, contents.torn
        num_bytes, num_entries = contents.num_bytes, len(contents.entries)
        self._writer = JournalWriter(os.fspath(path), descriptor, num_bytes, num_entries, fsync_every)
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
        """Makes a new journal. The file appears under its name with its header and first steps, durable, or not at all.

        Args:
            header: from `make_header`.
            entries: the first steps.
            fsync_every: lines are synced after every N-th, and by :meth:`sync` and :meth:`close`. A line that is
                written and not synced outlives the process but not a power cut, and does not count as durable.

        Raises:
            FileExistsError: there is a file of that name; it is left as it was.
            JournalError: the header or an entry could not be read back.
            OSError: the file cannot be written.
        """
        path = Path(path)
        line = encode_line(header, MAX_HEADER_BYTES)
        header = read_header(line)
        block = bytearray(line)
        for step, entry in enumerate(entries):
            block += _line_of(entry, step, header, path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = lock(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            try:
                write_all(descriptor, block, 0)
                os.fsync(descriptor)
                _publish(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            try:
                sync(path.parent)
            except OSError:
                os.unlink(path)  # ours, locked, and not yet known to be durable
                raise
            contents = JournalContents(header, list(entries), None, len(block))
            return cls(path, descriptor, contents, fsync_every)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, f"cannot create the journal: {error.strerror}", os.fspath(path)) from error
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, fsync_every: int = 1) -> Journal:
        """Opens a journal for appending. A torn end is cut off the file (see :func:`read_journal`).

        Raises:
            JournalLockedError: it is open for appending elsewhere.
            JournalError: the file is damaged in another way, or unknown; the message names file and line.
            OSError: the file cannot be read or cut.
        """
        path = Path(path)
        try:
            descriptor = lock(path, os.O_RDWR)
        except BlockingIOError:
            raise JournalLockedError(f"{path}: another run is appending to this journal") from None
        try:
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                contents = _read(file, os.fspath(path))
            if contents.torn is not None:
                os.ftruncate(descriptor, contents.num_bytes)
            # Lines that a killed run wrote but did not sync count as durable from here on, so they must be.
            os.fsync(descriptor)
            sync(path.parent)
            return cls(path, descriptor, contents, fsync_every)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def next_step(self) -> int:
        """Number of the step that the next entry must have: the number of entries so far."""
        return self._writer.queued

    @property
    def durable(self) -> int:
        """How many entries are on the disk: every step below this number is."""
        return self._writer.durable

    def append(self, entry: StepEntry) -> None:
        """Queues the entry and returns at once; :attr:`durable` says when it is on the disk.

        Raises:
            JournalError: the entry is not step :attr:`next_step`, has another number of groups than the header, or
                holds a value that a line cannot hold exactly; nothing is queued then. Or another program removed,
                replaced or changed the file: the journal takes no more entries.
            OSError: an earlier entry could not be written; names the file. The journal takes no more entries.
        """
        self._writer.put(_line_of(entry, self.next_step, self.header, self.path))

    def on_durable(self, callback: Callable[[int], None]) -> None:
        """Calls `callback(durable)` from the journal's thread after each fsync from now on, in order.

        It must be quick, and must not call :meth:`sync` or :meth:`close`. What it raises, the next :meth:`append` or
        :meth:`sync` raises.
        """
        self._writer.callbacks += (callback,)

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Calls `callback(error)` once from the journal's thread if entries can no longer be written."""
        self._writer.failure_callbacks += (callback,)

    def sync(self) -> None:
        """Waits until every entry appended so far is durable and the callbacks have returned.

        Raises:
            JournalError: another program removed, replaced or changed the file.
            OSError: an entry could not be written; names the file.
        """
        self._writer.sync()

    def close(self) -> None:
        """Writes what is queued, ends the thread and unlocks the file. Safe to call twice.

        Raises:
            JournalError: another program removed, replaced or changed the file.
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


def _read(
    file: BinaryIO, path: str, max_header_bytes: int = MAX_HEADER_BYTES, findings: list[str] | None = None
) -> JournalContents:
    header, num_bytes = _read_first(file, path, max_header_bytes)
    entries: list[StepEntry] = []
    next_line = partial(file.readline, MAX_STEP_BYTES + 1)
    step, line = 0, next_line()
    while line:
        following = next_line()
        if not crc_matches(line) and (b"\0" in line or not following):
            is_last, num_torn, num_whole = not following, 0, 0
            while line:  # no more than two at a time, since a hole of zeros may be longer than any line
                num_torn += len(line)
                num_whole += crc_matches(line[line.rfind(b"\0") + 1 :])
                line = following
                following = next_line()
            torn = f"{path}: line {step + 2} (step {step})" + (
                f" was torn and left out: {num_torn} bytes" if is_last else
                f" and all after it were torn and left out: {num_torn} bytes, {num_whole} whole lines among them; the "
                "line has zero bytes, as a power cut leaves them where lines had not reached the disk"
            )  # fmt: skip
            return JournalContents(header, entries, torn, num_bytes)
        try:
            entry = StepEntry.from_line(line)
            _check_follows(entry, step, header)
            entries.append(entry)
        except JournalError as error:
            finding = f"{path}: line {step + 2}: {error}"
            if findings is None:
                raise JournalError(finding) from None
            findings.append(finding)
            if len(findings) == MAX_FINDINGS:
                findings.append(f"{path}: more than {MAX_FINDINGS} findings: the rest was not read")
                break
        num_bytes += len(line)
        step, line = step + 1, following
    return JournalContents(header, entries, None, num_bytes)


def _read_first(file: BinaryIO, path: str, max_bytes: int = MAX_HEADER_BYTES) -> tuple[dict[str, Any], int]:
    """The header, and the length of its line."""
    line = file.readline(max_bytes + 1)
    try:
        return read_header(line, max_bytes), len(line)
    except JournalError as error:
        raise JournalError(f"{path}: line 1: not the header of a journal: {error}") from None


def _line_of(entry: StepEntry, step: int, header: Mapping[str, Any], path: Path) -> bytes:
    """The line of an entry that is appended as step `step`."""
    try:
        _check_follows(entry, step, header)
        return entry.to_line()
    except JournalError as error:
        raise JournalError(f"{path}: step {entry.step}: {error}") from None


def _check_follows(entry: StepEntry, step: int, header: Mapping[str, Any]) -> None:
    if entry.step != step:
        raise JournalError(f"step {entry.step} where step {step} must follow")
    num_groups, expected = len(entry.update.groups), len(header["groups"])
    if num_groups != expected:
        raise JournalError(f"{num_groups} groups, the header has {expected}")
    if has_older_rules(header) and (entry.counts is not None or entry.unused):
        raise JournalError(f"counts and unused are not members of version {header['journal']}")
    if header["journal"] < ANCHOR_VERSION and any(group.anchor for group in entry.update.groups):
        raise JournalError(f"an anchor is no member of version {header['journal']}: the run began without one")
    if entry.unused:
        whole(entry.unused[-1][1], 0, len(header["table"]) - 1, "unused")


def _publish(temporary: Path, path: Path) -> None:
    """Gives the whole, synced file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "there is a journal already", os.fspath(path)) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links: another run could take the name between the look and the rename.
        if path.exists():
            raise FileExistsError(errno.EEXIST, "there is a journal already", os.fspath(path)) from None
        os.rename(temporary, path)
