"""Memory of a device: buffers apart from each other in one array of bytes, everything around them poisoned and out of
bounds. It also watches for races, which lanes that run in step would hide."""

from __future__ import annotations

import numpy as np

from .parser import PtxError

READ, WRITE = 1, 2
POISON = 0xA5
GAP = 256  # bytes between buffers; the residue of an address is modulo it
GRANULE = 1  # bytes that races are watched in: neighbouring codes of 8 bits are of different threads
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY, SEVERAL = -1, -2  # where a thread's number is expected
EVERYBODY = np.array([SEVERAL])


class Memory:
    """`base` is the address of the first byte, a multiple of GAP.

    Between two barriers, or two launches, what one thread writes no other may read, or write unless the value is the
    same; and what one thread has read no other may write.
    """

    def __init__(self, base: int, num_bytes: int) -> None:
        self.base = base
        self.bytes = np.full(num_bytes + -num_bytes % GAP + 2 * GAP, POISON, np.uint8)
        self.rights = np.zeros(self.bytes.size, np.uint8)
        self.writer = np.full(self.bytes.size // GRANULE, NOBODY, np.int32)
        self.reader = self.writer.copy()
        self._words = {size: self.bytes.view(kind) for size, kind in UNSIGNED.items()}
        self._next = GAP

    def place(self, data: np.ndarray | int, rights: int, residue: int = 0) -> int:
        """The address, `residue` modulo GAP, of a new buffer: a copy of these bytes, or as many poisoned ones."""
        begin = self._next + residue % GAP
        end = begin + (data if isinstance(data, int) else data.size)
        self._next = end + -end % GAP + GAP
        if self._next > self.bytes.size:
            raise MemoryError(f"{self.bytes.size} bytes are too few")
        if not isinstance(data, int):
            self.bytes[begin:end] = data
        self.rights[begin:end] = rights
        return self.base + begin

    def release(self, address: int, num_bytes: int) -> None:
        """Bytes that may not be touched from now on."""
        self.rights[address - self.base :][:num_bytes] = 0

    def read(self, address: int, num_bytes: int) -> np.ndarray:
        """Bytes as they are now."""
        return self.bytes[address - self.base :][:num_bytes]

    def order(self, begin: int = 0, num_bytes: int | None = None) -> None:
        """What was read and written so far, in these bytes, happened before what comes."""
        end = None if num_bytes is None else (begin + num_bytes) // GRANULE
        for seen in (self.writer, self.reader):
            seen[begin // GRANULE : end] = NOBODY

    def _index(self, addresses: np.ndarray, size: int, right: int) -> np.ndarray:
        """Positions of accesses of `size` bytes, each within one buffer and aligned."""
        index = addresses - np.uint64(self.base)  # what is below the base becomes very large
        if (addresses & np.uint64(size - 1)).any():
            raise PtxError(f"misaligned access of {size} bytes")
        first = np.where(index < np.uint64(self.bytes.size - size), index, 0).astype(np.int64)  # byte 0 is in no buffer
        # Buffers are farther apart than an access is long: between two bytes of one, all bytes are its own.
        allowed = self.rights[first] & self.rights[first + (size - 1)] & right
        if not allowed.all():
            at = int(addresses[np.flatnonzero(allowed == 0)[0]])
            raise PtxError(f"{'load' if right == READ else 'store'} of {size} bytes out of bounds, at {at:#x}")
        return first

    def _conflicts(self, seen: np.ndarray, granules: np.ndarray, threads: np.ndarray) -> np.ndarray:
        marks = seen[granules]
        return (marks != NOBODY) & ((marks != threads) | (threads == SEVERAL))

    def _mark(self, seen: np.ndarray, granules: np.ndarray, threads: np.ndarray) -> None:
        seen[granules] = np.where(self._conflicts(seen, granules, threads), SEVERAL, threads)
        seen[granules] = np.where(seen[granules] == threads, threads, SEVERAL)  # one of several in this access was kept

    def load(self, addresses: np.ndarray, threads: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """`count` neighbours of `width` bytes at each address, as one access of the thread."""
        first = self._index(addresses, width * count, READ)
        if (self.rights[first] & WRITE).any():
            granules = first[:, None] // GRANULE + np.arange(max(1, width * count // GRANULE))
            if self._conflicts(self.writer, granules, threads[:, None]).any():
                raise PtxError("race: a thread reads what another one wrote, without a barrier between")
            self._mark(self.reader, granules, threads[:, None])
        return [self._words[width][first // width + i] for i in range(count)]

    def store(self, addresses: np.ndarray, threads: np.ndarray, width: int, values: list[np.ndarray]) -> None:
        first = self._index(addresses, width * len(values), WRITE)
        granules = first[:, None] // GRANULE + np.arange(max(1, width * len(values) // GRANULE))
        if self._conflicts(self.reader, granules, threads[:, None]).any():
            raise PtxError("race: a thread writes what another one read, without a barrier between")
        others = self._conflicts(self.writer, granules, threads[:, None]).any(axis=1)
        for i, value in enumerate(values):
            words, index = self._words[width], first // width + i
            changed = others & (words[index] != value)
            words[index] = value
            if changed.any() or (words[index] != value).any():
                raise PtxError("race: two threads write to one place, without a barrier between")
        self._mark(self.writer, granules, threads[:, None])


class SharedMemory:
    """`num_bytes` for each block of the grid, poisoned."""

    def __init__(self, num_bytes: int, num_blocks: int) -> None:
        self.num_bytes = num_bytes
        self.memory = Memory(0, (num_bytes + 2 * GAP) * num_blocks)
        self.begins = np.array([self.memory.place(num_bytes, READ | WRITE) for _ in range(num_blocks)], np.uint64)

    def addresses(self, offsets: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Where the shared memory of threads of these blocks has these offsets."""
        if (offsets >= self.num_bytes).any():
            raise PtxError(f"shared memory has {self.num_bytes} bytes: offset {offsets.max()}")
        return offsets + self.begins[blocks]

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks have met."""
        for begin in self.begins[blocks]:
            self.memory.order(int(begin), self.num_bytes)
