"""The hidden directories that a checkpoint is written in before it has its name.

`.distzo2-checkpoint-<16 hex digits>` holds what is not published yet, and is locked (flock) while its writer is alive;
`.distzo2-replaced-<16 hex digits>` holds what is being replaced. What a killed writer left of the first is removed by
the next writer in that place.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from distzo2.checkpoint.weight_files import sync_directory

_TMP_PREFIX, _REPLACED_PREFIX = ".distzo2-checkpoint-", ".distzo2-replaced-"
_HEX_DIGITS = 16


def can_take_name_of(directory: Path) -> bool:
    """Whether another directory beside this one can take its name: it is not there yet, or empty and no more than a
    directory in its parent's file system."""
    if not directory.exists():
        return not directory.is_symlink()
    target = Path(os.path.realpath(directory))
    if any(target.iterdir()) or os.path.ismount(target) or Path.cwd().is_relative_to(target):
        return False
    return os.access(target.parent, os.W_OK | os.X_OK)


def make_hidden(home: Path) -> tuple[Path, int | None]:
    """A new hidden directory in `home`, and a descriptor that holds its lock; None where there are no locks."""
    while True:
        path = home / f"{_TMP_PREFIX}{secrets.token_hex(_HEX_DIGITS // 2)}"
        path.mkdir()
        descriptor = None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                return path, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass  # before it was locked, someone took it for a leftover
        except OSError:
            if descriptor is not None:
                os.close(descriptor)
            return path, None
        if descriptor is not None:
            os.close(descriptor)


def make_place_for_replaced(home: Path) -> Path:
    """A new hidden directory in `home` for files that are being replaced."""
    path = home / f"{_REPLACED_PREFIX}{secrets.token_hex(_HEX_DIGITS // 2)}"
    path.mkdir()
    return path


def is_hidden(name: str) -> bool:
    """Whether a writer of checkpoints gives such a name to a directory that is no checkpoint yet, or no more."""
    return bool(
        re.fullmatch(f"({re.escape(_TMP_PREFIX)}|{re.escape(_REPLACED_PREFIX)})[0-9a-f]{{{_HEX_DIGITS}}}", name)
    )


def remove_leftovers(directory: Path) -> None:
    """What killed writers left there: their unpublished files, and the place for replaced ones if it is empty. Only
    names that a writer gives are looked at."""
    try:
        names = [name for name in os.listdir(directory) if is_hidden(name)]
    except OSError:  # it may be written, and not be listed
        return
    for path in (directory / name for name in names):
        with suppress(OSError):
            if path.name.startswith(_REPLACED_PREFIX):
                path.rmdir()
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer is alive
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def sync_tree(directory: Path) -> None:
    """Makes all files below a directory durable, and their names, and it and its own directories."""
    for parent, _, names in os.walk(directory):
        for name in names:
            fd = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(parent)
