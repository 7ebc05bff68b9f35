"""What the looks at a run's directory have in common: lines of what was found, and names that lead nowhere else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_FINDINGS = 100  # of one file or directory that are told one by one

FILE, DIRECTORY, LINK, OTHER = "a file", "a directory", "a link", "neither a file nor a directory"


@dataclass
class Report:
    """`findings` are what is wrong, `notes` what is worth telling and is not, `checked` what was looked at; a line or a
    few words each. Of `num_snapshots`, `num_whole` are as they were made."""

    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    num_snapshots: int = 0
    num_whole: int = 0

    def find(self, where: os.PathLike[str] | str, findings: Iterable[str]) -> int:
        """Adds the findings of one file or directory, the first of them if they are too many; returns how many."""
        count = 0
        for finding in findings:
            if count == MAX_FINDINGS:
                self.findings.append(f"{where}: more than {MAX_FINDINGS} findings: the rest was not looked at")
                break
            self.findings.append(finding)
            count += 1
        return count

    def note(self, where: os.PathLike[str] | str, notes: Iterable[str]) -> None:
        """Adds notes in the same way."""
        for count, text in enumerate(notes):
            if count == MAX_FINDINGS:
                self.notes.append(f"{where}: and more like these")
                break
            self.notes.append(text)


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """FILE, DIRECTORY, LINK (whatever it leads to) or OTHER; None: there is nothing of that name."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    for is_kind, kind in ((stat.S_ISREG, FILE), (stat.S_ISDIR, DIRECTORY), (stat.S_ISLNK, LINK)):
        if is_kind(mode):
            return kind
    return OTHER


def entries_of(directory: Path) -> list[Path]:
    """What is in a directory, sorted by name.

    Raises:
        OSError: it cannot be read.
    """
    return [directory / name for name in sorted(os.listdir(directory))]


def tree_of(directory: Path) -> Iterator[tuple[str, str]]:
    """Everything below a directory: its name, relative to it, and its kind. No link is followed."""
    todo = [""]
    while todo:
        parent = todo.pop()
        for path in entries_of(directory / parent):
            name, kind = os.path.join(parent, path.name), kind_of(path)
            if kind == DIRECTORY:
                todo.append(name)
            if kind is not None:
                yield name, kind
