"""What is wrong with a journal, all of it: every line is looked at, whatever came before it.

A reader that is to use a journal stops at the first thing that is wrong (`read_journal`). Here
the findings are gathered instead, one line each, with file and line number; also those of what a journal refers to: its
base checkpoint, the journal that it was branched from. run_audit.py looks at the directory of its run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from distzo2.cli.journal_diff import step_differences
from distzo2.errors import DistZO2Error
from distzo2.record.header import parents_of, read_header
from distzo2.record.journal import JournalError, StepEntry, read_journal, torn_line
from distzo2.record.line import MAX_HEADER_BYTES, MAX_STEP_BYTES, crc_matches, stated_chain, unchained
from distzo2.record.lineage import digest_lines, parent_groups, with_groups
from distzo2.run.audit import MAX_FINDINGS


@dataclass
class Audit:
    """What was found. `entries` are the steps that could be read; `chain` is the hash that the last line states;
    `header_bytes`, the length of the first line."""

    path: str
    header: dict[str, Any] | None = None
    header_bytes: int = 0
    entries: list[StepEntry] = field(default_factory=list)
    chain: str | None = None
    findings: list[str] = field(default_factory=list)

    def at(self, line: int, text: object) -> None:
        """Notes what is wrong with a line of the journal."""
        self.findings.append(f"{self.path}: line {line}: {text}")


def audit_journal(path: str | os.PathLike[str]) -> Audit:
    """Looks at every line of a journal.

    Raises:
        OSError: the file cannot be read.
    """
    audit = Audit(os.fspath(path))
    with open(path, "rb") as file:
        line = _next_line(file, MAX_HEADER_BYTES)
        audit.header_bytes = len(line)
        try:
            audit.header, audit.chain = read_header(line)
        except JournalError as error:
            audit.at(1, f"not the header of a journal: {error}")
            audit.chain = stated_chain(line)
        chained, previous = audit.chain is not None, audit.chain
        expected, number = 0, 2
        line = _next_line(file, MAX_STEP_BYTES)
        while line:
            following = _next_line(file, MAX_STEP_BYTES)
            whole = crc_matches(line)
            if not following and not whole:
                audit.findings.append(torn_line(line, number - 2, audit.path))
                break
            try:
                # After a line that is damaged, the hash before the next is not known: it is taken as stated.
                entry = StepEntry.from_line(line, previous) if previous or not chained else _step_alone(line)
            except JournalError as error:
                audit.at(number, error)
                entry = None
                if chained and whole:
                    entry = _readable(line)
            if entry is not None:
                if entry.step != expected:
                    audit.at(number, f"step {entry.step} where step {expected} must follow")
                num_groups = len(entry.update.groups)
                if audit.header is not None and num_groups != len(audit.header["groups"]):
                    audit.at(number, f"{num_groups} groups, the header has {len(audit.header['groups'])}")
                expected = entry.step
                audit.entries.append(entry)
            expected += 1
            number += 1
            previous = stated_chain(line) if chained and whole else None
            audit.chain = previous
            line = following
            if len(audit.findings) >= MAX_FINDINGS:
                audit.findings.append(f"{audit.path}: more than {MAX_FINDINGS} findings: the rest was not read")
                break
    return audit


def _next_line(file: BinaryIO, max_bytes: int) -> bytes:
    """The next line; of one that is too long its beginning, and the rest is passed over."""
    line = rest = file.readline(max_bytes + 1)
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(1 << 20)
        line = line[:max_bytes] + b"..." if rest else line
    return line


def _step_alone(line: bytes) -> StepEntry:
    """The entry of a line with a hash that cannot be checked."""
    if stated_chain(line) is None:
        return StepEntry.from_line(line, "")  # says that it lacks one
    if not crc_matches(line):
        return StepEntry.from_line(line)
    return StepEntry.from_line(unchained(line))


def _readable(line: bytes) -> StepEntry | None:
    try:
        return _step_alone(line)
    except JournalError:
        return None


def base_findings(directory: str | os.PathLike[str], base: Mapping[str, Any]) -> Iterator[str]:
    """What differs between a directory and the base checkpoint that a header records."""
    from distzo2.checkpoint.pretrained import checkpoint_differences

    if not base["files"]:
        yield f"{os.fspath(directory)}: the journal's run did not start from a checkpoint"
    yield from checkpoint_differences(directory, base)


def parent_findings(audit: Audit, path: str | os.PathLike[str]) -> Iterator[str]:
    """Whether a journal begins with the steps of its parent, whose journal is at `path`."""
    if audit.header is None:
        return
    parents = parents_of(audit.header)
    if not parents:
        yield f"{audit.path}: not branched from another run"
        return
    num_steps = parents[-1]["steps"]
    try:
        parent = read_journal(path)
    except DistZO2Error as error:
        yield str(error)
        return
    theirs = parent.entries
    if len(theirs) < num_steps:
        yield f"{os.fspath(path)}: {len(theirs)} steps, and its branch took over {num_steps}"
        return
    if digest_lines(os.fspath(path), 1 + num_steps)[0] != parents[-1]["sha256"]:
        yield f"{os.fspath(path)}: another SHA-256 up to step {num_steps} than the journal that was branched from"
    try:
        source = parent_groups(os.fspath(path), parent.header, audit.header)
    except (DistZO2Error, ValueError) as error:
        yield f"{os.fspath(path)}: not of the branch's model: {error}"
        return
    for mine, other in zip(audit.entries[:num_steps], theirs, strict=False):
        parts = step_differences(mine, with_groups(other, source))
        if parts:
            line = f"{audit.path}: line {mine.step + 2}: step {mine.step} is not the parent's"
            yield f"{line}: its own and the parent's {'; '.join(parts)}"
            return
