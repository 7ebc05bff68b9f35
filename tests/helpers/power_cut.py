"""What a power cut leaves of a directory: plays the record of file_shim.cpp on a disk that keeps what was synced.

A file's bytes are kept from its last fsync, a name from the last fsync of its directory. Of what came after, a disk may
keep any part: `some` takes names up to a random instant, in their order, as a journaling file system does, and of each
file a random choice of its writes' pages, the last of them torn; what is missing before them reads as zeros, and at
times so does what is missing after them, up to the size that the file had.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PAGE_BYTES = 4096  # that a file's data reaches the disk by


@dataclass(eq=False)
class File:
    kept: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (size, None)

    def write(self, at: int, data: bytes) -> None:
        while data:
            room = PAGE_BYTES - at % PAGE_BYTES
            self.pending.append((at, data[:room]))
            at, data = at + room, data[room:]

    def sync(self) -> None:
        for at, data in self.pending:
            _apply(self.kept, at, data)
        self.pending.clear()

    def some(self, rng: random.Random) -> bytes:
        """What a disk may hold of it."""
        content, size = bytearray(self.kept), len(self.kept)
        for at, data in self.pending:
            size = at if data is None else max(size, at + len(data))
        taken = [call for call in self.pending if rng.random() < 0.5]
        for i, (at, data) in enumerate(taken):
            if data is not None and i == len(taken) - 1:
                data = data[: rng.randrange(len(data) + 1)]
            _apply(content, at, data)
        if rng.random() < 0.25:
            content.extend(b"\0" * (size - len(content)))
        return bytes(content)


@dataclass(eq=False)
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    kept: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[int, str, File | Folder | None]] = field(default_factory=list)  # (time, name, node or gone)

    def change(self, time: int, name: str, node: File | Folder | None) -> None:
        self.pending.append((time, name, node))
        _change(self.now, name, node)

    def sync(self) -> None:
        self.kept = dict(self.now)
        self.pending.clear()


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        content.extend(b"\0" * (at - len(content)))
        return
    content.extend(b"\0" * (at - len(content)))
    content[at : at + len(data)] = data


def _change(names: dict[str, File | Folder], name: str, node: File | Folder | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def read_record(path: Path) -> list[tuple[list[str], bytes]]:
    """(fields, bytes of a write) of each call."""
    calls, data, begin = [], path.read_bytes(), 0
    while begin < len(data):
        end = data.index(b"\n", begin)
        fields = data[begin:end].decode().split("\t")
        begin = end + 1
        num_bytes = int(fields[3]) if fields[0] == "W" else 0
        calls.append((fields, data[begin : begin + num_bytes]))
        begin += num_bytes
    return calls


class Disk:
    """The directory `root` and what is in it; its parent keeps every name at once."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.top = Folder()
        self._files: dict[str, File] = {}
        self._time = 0

    def play(self, fields: list[str], data: bytes) -> None:
        self._time += 1
        kind, *rest = fields
        if kind == "C":
            ino, is_new, truncated, path = rest
            if is_new == "1":
                self._files[ino] = File()
                self._set(path, self._files[ino])
            if truncated == "1":
                self._files[ino].pending.append((0, None))
        elif kind == "W":
            self._files[rest[0]].write(int(rest[1]), data)
        elif kind == "T":
            self._files[rest[0]].pending.append((int(rest[1]), None))
        elif kind == "S":
            self._files[rest[0]].sync()
        elif kind == "D":
            self._folder(rest[0]).sync()
        elif kind == "M":
            self._set(rest[0], Folder())
        elif kind in "RU":
            self._set(rest[0], None)
        elif kind == "L":
            self._set(rest[1], self._files[rest[0]])
        elif kind == "N":
            parent, name = self._place(rest[0])
            node = parent.now[name]
            parent.change(self._time, name, None)
            self._set(rest[1], node)
        else:
            raise ValueError(fields)

    def _place(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.removeprefix(self._root).strip("/").rpartition("/")
        return self._folder(self._root + "/" + parent), name

    def _folder(self, path: str) -> Folder:
        folder = self.top
        for name in filter(None, path.removeprefix(self._root).split("/")):
            folder = folder.now[name]
        return folder

    def _set(self, path: str, node: File | Folder | None) -> None:
        if path.rstrip("/") != self._root:
            folder, name = self._place(path)
            folder.change(self._time, name, node)

    def leave(self, directory: Path, some: random.Random | None = None) -> None:
        """Writes what is left after a cut now into `directory`, a new one."""
        until = 0 if some is None else some.randrange(self._time + 1)
        for path, node in self._left(self.top, directory, until):
            if isinstance(node, Folder):
                path.mkdir()
                continue
            path.write_bytes(bytes(node.kept) if some is None else node.some(some))

    def _left(self, folder: Folder, path: Path, until: int) -> Iterator[tuple[Path, File | Folder]]:
        yield path, folder
        names = dict(folder.kept)
        for time, name, node in folder.pending:
            if time <= until:
                _change(names, name, node)
        for name, node in names.items():
            if isinstance(node, Folder):
                yield from self._left(node, path / name, until)
            else:
                yield path / name, node
