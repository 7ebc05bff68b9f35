"""Crash-safe file operations."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import distzo2.files as files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    files.write_whole(path, b"first")
    files.write_whole(path, b"2nd")
    assert path.read_bytes() == b"2nd" and os.listdir(tmp_path) == ["run.json"]

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("pwrite", "fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(files.os, call, fail)
            files.write_whole(path, b"third")
        assert path.read_bytes() == b"2nd" and os.listdir(tmp_path) == ["run.json"]


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", fail)
    for call in (lambda: files.sync(tmp_path), lambda: files.write_whole(tmp_path / "x", b"")):
        with pytest.raises(OSError, match=str(tmp_path)) as caught:
            call()
        assert caught.value.errno == errno.EIO


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(files.os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    with open(tmp_path / "x", "wb") as file:
        files.write_all(file.fileno(), b"0123456789", 2)
    assert (tmp_path / "x").read_bytes() == b"\0\0" + b"0123456789"
    monkeypatch.setattr(files.os, "pwrite", lambda *_: 0)
    with open(tmp_path / "x", "wb") as file, pytest.raises(OSError, match="took no bytes"):
        files.write_all(file.fileno(), b"0", 0)


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    descriptor = files.lock(path)
    with pytest.raises(BlockingIOError, match=r"run\.lock"):
        files.lock(path)
    os.close(descriptor)
    os.close(files.lock(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    with pytest.raises(FileNotFoundError, match="none"):
        files.lock(tmp_path / "none", os.O_RDWR)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="link"):
        files.lock(tmp_path / "link")


def test_a_lock_is_that_of_the_file_which_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes the file after it is opened and before it is locked."""
    path, flock, removed = tmp_path / "run.lock", files.fcntl.flock, []

    def after_removal(descriptor: int, how: int) -> None:
        if not removed:
            path.unlink()
            removed.append(True)
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", after_removal)
    descriptor = files.lock(path)
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)
