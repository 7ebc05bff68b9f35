"""CRC-32 of a file, read in a stream, or found while the file is written in pieces, in any order."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

CHUNK_BYTES = 4 << 20  # of a read or a write
_POLYNOMIAL = 0xEDB88320  # of CRC-32 without its x^32; the highest bit is the coefficient of x^0


@dataclass(frozen=True)
class FileChecksum:
    """Length and CRC-32 (that of zlib, gzip and PNG) of a file."""

    num_bytes: int
    crc32: int


def open_plain(path: Path) -> Any:
    """A plain file opened for reading, unbuffered.

    Raises:
        OSError: it cannot be opened, or is a link or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a plain file")
    return os.fdopen(descriptor, "rb", buffering=0)


def file_checksum(path: Path) -> FileChecksum:
    """Reads a plain file through, a piece at a time.

    Raises:
        OSError: it cannot be read, or is a link or a device.
    """
    crc, num_bytes = 0, 0
    with open_plain(path) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        buffer = memoryview(bytearray(min(CHUNK_BYTES, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            num_bytes += count
    return FileChecksum(num_bytes, crc)


class WriteChecksum:
    """The CRC-32 of a file that is being written. Pieces that follow one another are one to it, whichever came first;
    what was written twice, or was not noted, is read back at the end."""

    def __init__(self) -> None:
        self._extents: dict[int, tuple[int, int]] = {}  # end -> where it begins, CRC

    def note(self, data: memoryview, offset: int) -> None:
        """`data` was written at byte `offset`."""
        if len(data):
            begin, crc = self._extents.pop(offset, (offset, 0))
            self._extents[offset + len(data)] = begin, zlib.crc32(data, crc)

    def finish(self, num_bytes: int, read_into: Callable[[memoryview, int], None]) -> FileChecksum:
        """Of the whole file; `read_into` fills memory with the file's bytes from an offset on."""

        def read(begin: int, end: int, crc: int) -> int:
            buffer = memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
            while begin < end:
                part = buffer[: min(len(buffer), end - begin)]
                read_into(part, begin)
                crc = zlib.crc32(part, crc)
                begin += len(part)
            return crc

        crc, done = 0, 0
        for begin, end, part in sorted((begin, end, crc) for end, (begin, crc) in self._extents.items()):
            if begin < done or end > num_bytes:
                return FileChecksum(num_bytes, read(0, num_bytes, 0))
            crc = joined(read(done, begin, crc), part, end - begin)
            done = end
        return FileChecksum(num_bytes, read(done, num_bytes, crc))


def joined(first: int, second: int, num_bytes: int) -> int:
    """The CRC-32 of bytes with CRC `first` followed by `num_bytes` with CRC `second`: as polynomials modulo 2,
    first · x^(8·num_bytes) + second."""
    return _product(first, _power(8 * num_bytes)) ^ second if first else second


@lru_cache(maxsize=256)  # the pieces of a file are of few lengths
def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial."""
    power, square = 1 << 31, 1 << 30  # x^0, x^1
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square = _product(square, square)
        exponent >>= 1
    return power


def _product(a: int, b: int) -> int:
    """a · b modulo the polynomial."""
    result = 0
    for place in range(31, -1, -1):
        if a >> place & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
