"""What a kill or a power cut may leave at the end of a journal, and how it is told from other damage.

A kill leaves a last line that is not whole. A power cut may also leave a file that is longer than what reached the
disk: of the lines since the last sync any part may be there, at the grain of sectors or of whole writes, and the rest
reads as zeros. A line is ASCII and has no zero byte, and what was synced has no hole, so such a file is cut where its
first bad line begins. Damage that zeros do not explain is not cut: it may be in lines that were on the disk.
"""

from __future__ import annotations

import re

from distzo2.record.line import crc_matches

SECTOR_BYTES = 512  # the least that a disk writes at once
MAX_TAIL_BYTES = 16 << 20  # some 50,000 steps without a sync; of more the file is refused, and not read

_BEGIN = b'{"step":'  # of each line but the header
_STEP = re.compile(_BEGIN + rb"(\d{1,10}),")
_HOLE = re.compile(rb"\0+")
_NEVER_WRITTEN = re.compile(rb"[^\0\n -~]")


def torn_line(line: bytes, step: int, path: str) -> str:
    """Says of a file's last line that it was being written when the run was killed."""
    reason = "its CRC does not match" if line.endswith(b"\n") else "it has no newline"
    return f"{path}: line {step + 2} (step {step}) was torn and left out: {len(line)} bytes, {reason}"


def torn_tail(tail: bytes, offset: int, step: int, path: str) -> str | None:
    """Says of a file's bytes from `offset` on, where the line of `step` begins, that a power cut has left them so; None
    if it cannot have."""
    hole = _HOLE.search(tail)
    if hole is None or _NEVER_WRITTEN.search(tail) or not _holes_are_unwritten(tail, offset):
        return None
    num_whole = _whole_lines(tail, step)
    if num_whole is None:
        return None
    return (
        f"{path}: line {step + 2} (step {step}) and what follows was torn and left out: {len(tail)} bytes, {num_whole} "
        f"whole lines among them, with zeros from byte {offset + hole.start()} on where a power cut came before the "
        "lines were on the disk"
    )


def _holes_are_unwritten(tail: bytes, offset: int) -> bool:
    """Whether each run of zeros begins and ends where a sector or a write does; a write begins and ends with a line."""
    for hole in _HOLE.finditer(tail):
        begin, end = hole.span()
        if end == len(tail):
            continue
        begins = begin == 0 or tail[begin - 1 : begin] == b"\n" or (offset + begin) % SECTOR_BYTES == 0
        following = tail[end : end + len(_BEGIN)].partition(b"\0")[0]  # the next hole may be as near
        ends = _BEGIN.startswith(following) or (offset + end) % SECTOR_BYTES == 0
        if not (begins and ends):
            return False
    return True


def _whole_lines(tail: bytes, step: int) -> int | None:
    """How many lines without a hole there are, the last one aside if it has no newline; None if one is damaged, or is
    not of a step that may be there."""
    num_whole, follows = 0, True
    for text in tail.split(b"\n")[:-1]:
        _, hole, line = text.rpartition(b"\0")
        found = _STEP.match(line) if crc_matches(line + b"\n") else None
        if hole:  # in place of one line at least
            step += 1
            follows = False
        if found is not None:
            number = int(found[1])
            if number < step or (follows and number != step):
                return None
            step = number + 1
            num_whole += 1
            follows = True
        elif not hole:
            return None
    return num_whole
