"""Crash-safe file operations, each in one place: write all bytes, sync, lock, write a whole file or none.

Every OSError that leaves this module names the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `data` at byte `offset`, in as many calls as that takes. An OSError does not name the file."""
    rest = memoryview(data).cast("B")
    while rest:
        num_bytes = os.pwrite(descriptor, rest, offset)
        if num_bytes == 0:
            raise OSError(errno.EIO, "write() took no bytes")
        rest = rest[num_bytes:]
        offset += num_bytes


def sync(path: str | os.PathLike[str]) -> None:
    """Makes a file durable, or the names in a directory: those that were created, renamed and removed."""
    with _naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces the file at `path` by one that holds `data`: after a crash it is the old file or the new one, and after
    the return it is durably the new one.

    The bytes are first written to `path` + ".tmp", which only a killed process leaves behind. Two processes must not
    write the same path at once.
    """
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with _naming(temporary):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o666)
            try:
                write_all(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(os.path.dirname(os.path.abspath(path)))


def lock(path: str | os.PathLike[str], flags: int = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) -> int:
    """Opens a file, or a directory, and locks it for this process until the descriptor is closed.

    Args:
        flags: of `open`; by default a missing file is created, and a link is refused.

    Returns:
        The descriptor. It holds the lock of the file that has the name `path`, also where another process removed or
        replaced the file during the call.

    Raises:
        BlockingIOError: another process, or another descriptor of this one, holds the lock.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    while True:
        with _naming(path):
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            with _naming(path, "cannot be locked: "):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str], prefix: str = "") -> Iterator[None]:
    """Gives an OSError of the block the name of the file, and `prefix` before its reason."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{prefix}{error.strerror}", os.fspath(path)) from error
