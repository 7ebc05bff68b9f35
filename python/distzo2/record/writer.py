"""The thread that writes a journal's lines to the disk, in order, and reports how far they are durable.

It owns the descriptor. Lines are written as they come; one fsync serves all lines written since the last one (group
commit), after every N-th line, or when somebody waits for it. Each time the file must still have its name and hold what
was written: otherwise the lines would be lost unnoticed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import weakref
from collections.abc import Callable

from distzo2.files import write_all
from distzo2.record.line import JournalError

_LONGEST_SLEEP = 1.0  # seconds; garbage may be collected, and end this thread, just before it waits

_open_writers: weakref.WeakSet[JournalWriter] = weakref.WeakSet()


class JournalWriter:
    """Owns the descriptor and the thread. `_changed` guards the fields; only the thread writes to the file."""

    def __init__(self, path: str, descriptor: int, num_bytes: int, num_entries: int, fsync_every: int) -> None:
        """
        Args:
            num_bytes, num_entries: what the file holds, all of it durable.
            fsync_every: lines that may be written before they are synced.
        """
        self.path, self._descriptor, self._fsync_every = path, descriptor, fsync_every
        self.durable, self._durable_bytes = num_entries, num_bytes
        self._written, self._written_bytes = num_entries, num_bytes  # in the file, durable or not
        self._queue: collections.deque[bytes] = collections.deque()
        self._taken = num_entries  # entries that the thread has taken from the queue, or found in the file
        self._place = os.path.abspath(path)  # wherever the process goes
        self._num_asked = self._num_answered = 0  # calls that wait for all entries, and those that were answered
        self.callbacks: tuple[Callable[[int], None], ...] = ()
        self.failure_callbacks: tuple[Callable[[BaseException], None], ...] = ()
        self._error: BaseException | None = None
        self._closing = False
        self._closed = False  # by the thread, which closes the descriptor at its end
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="distzo2-journal", daemon=True)
        self._thread.start()
        _open_writers.add(self)

    @property
    def queued(self) -> int:
        """Entries in the file and in the queue."""
        with self._changed:
            return self._taken + len(self._queue)

    def put(self, line: bytes) -> None:
        with self._changed:
            self._raise_error()
            if self._closing:
                raise JournalError(f"{self.path}: the journal is closed")
            self._queue.append(line)  # and nothing else: an interrupt finds the entry appended or not
            self._changed.notify_all()

    def sync(self) -> None:
        """Waits until every line queued so far is durable."""
        self._refuse_in_thread("sync()")
        with self._changed:
            target = self._taken + len(self._queue)
            self._num_asked += 1
            mine = self._num_asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_answered >= mine or self._error is not None or self._closed)
            self._raise_error()
            if self.durable < target:
                raise JournalError(f"{self.path}: the journal was closed with entries unwritten")

    def close(self) -> None:
        """Writes and syncs what is queued, ends the thread and closes the descriptor."""
        self._refuse_in_thread("close()")
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_error()

    def close_quietly(self) -> None:
        """Closes without raising, also in the thread itself, where a dropped journal may be collected as garbage."""
        if threading.current_thread() is self._thread:
            self._closing = True
            return
        with contextlib.suppress(Exception):
            self.close()

    def forget(self) -> None:
        """In a forked child: closes the inherited descriptor, which would keep the lock after the parent's death."""
        self._changed = threading.Condition()
        self._queue.clear()
        if not self._closed:
            os.close(self._descriptor)
        self._closing = self._closed = True

    # ---- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_last = False
        while not is_last:
            with self._changed:
                while not (self._queue or self._closing or self._num_asked > self._num_answered):
                    self._changed.wait(_LONGEST_SLEEP)
                lines = list(self._queue)
                self._taken += len(lines)
                self._queue.clear()
                asked, is_last = self._num_asked, self._closing
            try:
                self._write(lines)
                if is_last or asked > self._num_answered or self._written - self.durable >= self._fsync_every:
                    self._sync()
            except BaseException as error:  # a callback's too: kept for the next put, sync or close
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                for callback in self.failure_callbacks:
                    callback(error)
                break
            with self._changed:
                self._num_answered = asked
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            os.close(self._descriptor)
            self._changed.notify_all()

    def _write(self, lines: list[bytes]) -> None:
        if not lines:
            return
        self._check_file()  # a line written after the end of a file that was cut would leave a hole before it
        block = b"".join(lines)
        try:
            write_all(self._descriptor, block, self._written_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._written_bytes)
            failure = self._failure(error)
            # Lines that wait for their group are whole, and are kept where the disk can still do that.
            with contextlib.suppress(JournalError):
                self._sync()
            raise failure from error
        self._written += len(lines)
        self._written_bytes += len(block)

    def _sync(self) -> None:
        """Makes durable what was written, and calls the callbacks."""
        if self._written > self.durable:
            try:
                # A failed fsync is final: the kernel may have dropped the pages, so a second try would prove nothing.
                os.fsync(self._descriptor)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._durable_bytes)
                    os.fsync(self._descriptor)
                self._written = self.durable
                raise self._failure(error) from error
        self._check_file()
        if self._written == self.durable:
            return
        with self._changed:
            self.durable = self._written
            self._durable_bytes = self._written_bytes
        for callback in self.callbacks:
            callback(self.durable)

    def _check_file(self) -> None:
        """Raises JournalError unless the journal still has its name and the bytes that were written."""
        try:
            found = os.stat(self._place)
        except OSError as error:
            what = f"it is not there any more ({error.strerror})"
        else:
            if not os.path.samestat(found, os.fstat(self._descriptor)):
                what = "another file has its name"
            elif found.st_size != self._written_bytes:
                what = f"it has {found.st_size} bytes, and {self._written_bytes} were written"
            else:
                return
        raise JournalError(f"{self.path}: the journal was changed by another program during the run: {what}")

    def _failure(self, error: OSError) -> OSError:
        reason = f"step {self._written} and later could not be written to the journal: {error.strerror}"
        return OSError(error.errno, reason, self.path)

    def _refuse_in_thread(self, call: str) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{call} would wait for itself in an on_durable callback")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)


def _forget_after_fork() -> None:
    for writer in list(_open_writers):
        writer.forget()


os.register_at_fork(after_in_child=_forget_after_fork)
