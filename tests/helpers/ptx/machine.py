"""Executes a kernel: all threads of the grid at once, one lane of NumPy arrays each.

Every basic block is translated to a Python function once, when it is first reached. The lanes with the lowest program
counter go on, so that branches which part meet again, and lanes that come to a barrier have waited for the others of
their block. A block function works on the active lanes only: it gathers the registers that live across blocks and
scatters those that it changes. Registers that a lane has not written hold poison in it.
"""

from __future__ import annotations

import functools

import numpy as np

from .memory import EVERYBODY, GAP, POISON, READ, Memory, SharedMemory
from .parser import PtxError, parse, parse_kernel
from .translate import Function, Translator

PARAM_BASE = 0x4000
WARP = 32
MAX_STEPS = 200_000  # basic blocks of a run


class Lanes:
    """The active lanes during a basic block, and what the block's function reaches."""

    def __init__(self, grid: tuple[int, int, int], block: tuple[int, int, int], memory: Memory, params: Memory) -> None:
        self.block_size = int(np.prod(block))
        self.num = int(np.prod(grid)) * self.block_size
        self.memory, self.params = memory, params
        self.shared = SharedMemory(0, 0)
        self.registers: dict[str, np.ndarray] = {}
        self.rsqrt_ulps = 0
        thread, number = np.arange(self.num) % self.block_size, np.arange(self.num) // self.block_size
        self.block_of = number
        self.special = {"%laneid": thread % WARP}
        for i, axis in enumerate("xyz"):
            self.special[f"%tid.{axis}"] = thread // int(np.prod(block[:i])) % block[i]
            self.special[f"%ctaid.{axis}"] = number // int(np.prod(grid[:i])) % grid[i]
            self.special[f"%ntid.{axis}"] = np.array([block[i]])
            self.special[f"%nctaid.{axis}"] = np.array([grid[i]])
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.active = np.arange(self.num)

    def _pick(self, full: np.ndarray) -> np.ndarray:
        return full if full.size == 1 or self.active.size == self.num else full[self.active]

    def read(self, name: str, kind: np.dtype) -> np.ndarray:
        full = self.registers.get(name)
        if full is None:
            full = np.full(kind.itemsize, POISON, np.uint8).view(kind)
        return self._pick(full)

    def write(self, name: str, value: np.ndarray) -> None:
        if self.active.size == self.num:
            self.registers[name] = value
            return
        old = self.registers.get(name)
        full = np.full(value.itemsize, POISON, np.uint8).view(value.dtype) if old is None else old
        full = np.broadcast_to(full, self.num).copy()  # another register may be the same array
        full[self.active] = value
        self.registers[name] = full

    def sreg(self, name: str) -> np.ndarray:
        return self._pick(self.special[name])

    def _access(
        self, space: str, address: np.ndarray, guard: np.ndarray | None
    ) -> tuple[Memory, np.ndarray, np.ndarray]:
        """The memory, where it is accessed, and by which active lanes, as positions among them."""
        num = self.active.size
        lanes = np.arange(num) if guard is None else np.flatnonzero(np.broadcast_to(guard, num))
        address = np.broadcast_to(address, num)[lanes]
        if space == "shared":
            return self.shared.memory, self.shared.addresses(address, self.block_of[self.active[lanes]]), lanes
        return (self.params if space == "param" else self.memory), address, lanes

    def load(
        self, space: str, address: np.ndarray, kind: np.dtype, guard: np.ndarray | None, old: list[np.ndarray]
    ) -> list[np.ndarray]:
        """As many neighbours as there are `old` values, which stay where the guard is false."""
        if guard is None and address.size == 1 < self.active.size and space != "shared":
            memory = self.params if space == "param" else self.memory
            return memory.load(address, EVERYBODY, kind.itemsize, len(old))
        memory, address, lanes = self._access(space, address, guard)
        values = memory.load(address, self.active[lanes], kind.itemsize, len(old))
        if guard is None:
            return values
        merged = [np.broadcast_to(each, self.active.size).copy() for each in old]
        for each, value in zip(merged, values, strict=True):
            each[lanes] = value
        return merged

    def store(self, space: str, address: np.ndarray, values: list[np.ndarray], guard: np.ndarray | None) -> None:
        memory, address, lanes = self._access(space, address, guard)
        values = [np.broadcast_to(value, self.active.size)[lanes] for value in values]
        memory.store(address, self.active[lanes], values[0].itemsize, values)

    def barrier(self) -> None:
        met = np.bincount(self.block_of[self.active], minlength=self.num // self.block_size)
        if ((met != 0) & (met != self.block_size)).any():
            raise PtxError(f"a barrier meets {sorted(set(met) - {0})} of {self.block_size} threads of a block")
        self.shared.barrier(np.flatnonzero(met))

    def shuffle(self, value: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """shfl.sync.idx of whole warps: each lane gets the value of lane `source` of its warp."""
        met = np.bincount(self.active // WARP, minlength=self.num // WARP)
        if ((met != 0) & (met != WARP)).any() or (mask != 0xFFFFFFFF).any():
            raise PtxError(f"a shuffle meets {sorted(set(met) - {0})} of {WARP} lanes of a warp")
        full = np.zeros(self.num, value.dtype)
        full[self.active] = value
        return full[self.active // WARP * WARP + (source & np.uint32(WARP - 1))]


class Program:
    """A kernel made ready to run."""

    def __init__(self, name: str, text: str) -> None:
        self.kernel = parse_kernel(name, text)
        self.params = Memory(PARAM_BASE, sum(size + 2 * GAP for size, _ in self.kernel.params.values()))
        self.addresses = {each: self.params.place(size, READ) for each, (size, _) in self.kernel.params.items()}
        self.translator = Translator(self.kernel, self.addresses)
        self.functions: dict[int, Function] = {}
        self.executed = np.zeros(len(self.kernel.blocks), np.int64)  # lanes that came to each basic block
        self.lengths = np.array([len(block.instructions) for block in self.kernel.blocks])

    def coverage(self) -> tuple[int, int]:
        """How many of the kernel's instructions were executed so far, and how many it has."""
        return int(self.lengths[self.executed > 0].sum()), int(self.lengths.sum())

    def run(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: list[bytes],
        memory: Memory,
        num_shared: int = 0,
        rsqrt_ulps: int = 0,
    ) -> int:
        """Runs a grid to its end. Returns the number of instructions of all of its threads.

        Raises:
            PtxError: what the kernel does is not allowed, or an instruction is unknown; the text quotes it.
        """
        if int(np.prod(block)) > self.kernel.max_threads:
            raise PtxError(f"{self.kernel.name}: {block} threads, and {self.kernel.max_threads} are the most")
        for (size, _), address, argument in zip(
            self.kernel.params.values(), self.addresses.values(), arguments, strict=True
        ):
            self.params.read(address, size)[:] = np.frombuffer(argument, np.uint8, size)
        lanes = Lanes(grid, block, memory, self.params)
        lanes.shared, lanes.rsqrt_ulps = SharedMemory(num_shared, int(np.prod(grid))), rsqrt_ulps
        memory.order()
        end = len(self.kernel.blocks)
        counter = np.zeros(lanes.num, np.int64)
        passed = np.zeros(end, np.int64)
        with np.errstate(all="ignore"):
            for _ in range(MAX_STEPS):
                at = int(counter.min())
                if at == end:
                    self.executed += passed
                    return int(passed @ self.lengths)
                lanes.active = np.flatnonzero(counter == at)
                passed[at] += lanes.active.size
                counter[lanes.active] = self._step(at, lanes)
        raise PtxError(f"{self.kernel.name} does not end")

    def _step(self, at: int, lanes: Lanes) -> np.ndarray | int:
        """Runs one basic block. Returns where its lanes go."""
        block, end = self.kernel.blocks[at], len(self.kernel.blocks)
        if at not in self.functions:
            self.functions[at] = self.translator.function(block)
        function, sources = self.functions[at]
        try:
            taken = function(lanes)
        except PtxError as error:
            frame = error.__traceback__.tb_next
            raise PtxError(f"{self.kernel.name}: {sources[frame.tb_lineno - 1]!r}: {error}") from error
        last = block.instructions[-1].name[0]
        if last not in ("bra", "ret"):
            return at + 1
        target = end if last == "ret" else block.target
        return target if taken is None else np.where(taken, target, at + 1)


@functools.cache
def program(name: str, text: str) -> Program:
    """The program of one kernel's text, which is decoded once."""
    return Program(name, text)


class Module:
    """The kernels of a PTX text."""

    def __init__(self, text: str) -> None:
        self.texts = parse(text)

    def __getitem__(self, name: str) -> Program:
        return program(name, self.texts[name])
