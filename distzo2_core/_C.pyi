# Written by tools/stubs.py (make stubs); edit csrc/bindings instead.
"""
Compiled core of distzo2: torch ops (torch.ops.distzo2), HostPool, CopyEngine, BlockFile, ThreadState
"""

from __future__ import annotations
import collections.abc
import torch
import typing

__all__: list[str] = [
    "BlockFile",
    "CopyEngine",
    "HostPool",
    "RangeFiles",
    "ThreadState",
    "aligned_buffer",
    "arenas_made",
    "build_info",
    "cuda_available",
    "hide_parameters",
    "memory_budget",
    "show_parameters",
    "walk_modules",
]

class HostPool:
    """
    Host memory for blocks: one arena of zeros.

    Its pages are touched in parallel, on the device's NUMA node where there is a choice. For a CUDA device they
    are pinned in chunks of at most 1 GiB.

    Args:
        sizes: bytes of each block; each block starts at a multiple of 4096.
        device: "cpu", "cuda" or "cuda:N", the device that the blocks travel to.
        pin: whether to pin; None pins for CUDA devices.
        allow_pageable: whether to use plain memory where pinning fails; stats()["pin_error"] then says
            why.
        num_ranks: processes on this machine that make such a pool; each may take its share of the memory.
        cgroup_bytes, available_bytes: what memory_budget() said before any of them made its pool; None reads it
            now.
        host_memory: bytes that all these processes may take together, in place of nine tenths of what is
            available. What a control group does not leave is refused all the same.

    Raises:
        ValueError: no block, or an unknown device.
        RuntimeError: the memory budget or the pinning refuses the pool (each number is named), or the device is
            missing.
    """
    def __init__(
        self,
        sizes: collections.abc.Sequence[int],
        device: str = "cpu",
        pin: bool | None = None,
        allow_pageable: bool = False,
        num_ranks: int = 1,
        cgroup_bytes: int | None = None,
        available_bytes: int | None = None,
        host_memory: int | None = None,
    ) -> None: ...
    def __len__(self) -> int:
        """
        The number of blocks.
        """
    def address(self, block: int) -> int:
        """
        The address of the block's first byte, a multiple of 4096.

        Raises IndexError for an unknown block, RuntimeError after close().
        """
    def close(self) -> None:
        """
        Releases the memory. It is freed when no engine and no tensor holds it.
        """
    def nbytes(self, block: int) -> int:
        """
        Bytes of the block. Raises IndexError.
        """
    def stats(self) -> dict:
        """
        What the pool takes.

        bytes_used, bytes_padded, bytes_pinned; chunks: registrations; pin_error: "" or why it is not pinned;
        numa_node: -1 where there is no choice; huge_pages: whether they were asked for; touch_s, pin_s: seconds in
        which its pages were made present and pinned, which overlap.
        """
    def tensor(self, block: int) -> torch.Tensor:
        """
        A uint8 CPU tensor [nbytes(block)] over the block's memory, which it keeps alive after close().

        Raises IndexError for an unknown block, RuntimeError after close().
        """

class BlockFile:
    """
    Weights on disk: one preallocated file of blocks, with checksums.

    The file is read and written with O_DIRECT where its file system allows that. A block is replaced as a
    whole: its new bytes go to a spare slot of the file, which then becomes the block. New blocks are zeros at
    version 0. One process uses a file at a time; its threads may all call.

    Args:
        path: of the file. One that exists must be a block file; create=True replaces it.
        sizes: bytes of each block; each slot starts at a multiple of 4096.
        create: True makes the file; False opens a durable one with the same sizes.
        direct: True demands O_DIRECT, False does without, None tries it and falls back
            (stats()["direct_fallback"]).
        durable: True commits each replacement with syncs, so that a crash at any byte leaves the block before
            or after it, and the file can be opened again. False makes a scratch file, which ends with this
            process.

    Raises:
        RuntimeError: names the path, the offset and the cause: in use by another process, no space, another
            layout, damage.
    """
    @staticmethod
    def file_bytes(sizes: collections.abc.Sequence[int], durable: bool = False) -> int:
        """
        Bytes that a file of such blocks takes on the disk.
        """
    def __init__(
        self,
        path: str,
        sizes: collections.abc.Sequence[int],
        create: bool = True,
        direct: bool | None = None,
        durable: bool = False,
    ) -> None: ...
    def __len__(self) -> int:
        """
        The number of blocks.
        """
    def close(self, unlink: bool = False) -> None:
        """
        Closes the file, and removes its name with unlink=True. An engine that uses the file keeps it open.
        """
    def read(self, block: int, address: int, nbytes: int, offset: int = 0) -> None:
        """
        Reads bytes [offset, offset + nbytes) of a block to memory at `address`, of any alignment.

        Raises IndexError for a range outside the block, RuntimeError for a failed read or a checksum that differs.
        """
    def stats(self) -> dict:
        """
        What the file takes and has done.

        direct, direct_fallback: whether O_DIRECT is in use, and why not; durable; preallocated; spare_slots;
        bytes_used and bytes_padded: of the blocks, and of the file; bytes_read, bytes_written, map_bytes_written,
        syncs: since it was opened.
        """
    def sync(self) -> None:
        """
        Returns when all that was written is on the disk (fdatasync). Raises RuntimeError.
        """
    def verify(self) -> int:
        """
        Reads every block against its checksums; returns the bytes read. Raises RuntimeError naming the first damage.
        """
    def version(self, block: int) -> int:
        """
        The version that the block was last replaced with. Raises IndexError.
        """
    def write(self, block: int, address: int, nbytes: int, offset: int = 0, version: int | None = None) -> None:
        """
        Replaces bytes [offset, offset + nbytes) of a block from memory at `address`; the rest is copied.

        The block gets `version`; None keeps its version. In a durable file the block is on the disk on return. A
        block that an engine has on its way must not be written. Raises IndexError, RuntimeError.
        """
    @property
    def path(self) -> str:
        """
        The path that the file was opened with.
        """

class RangeFiles:
    """
    Blocks that are ranges of files as they lie there, which are only read.

    So a frozen model streams from its checkpoint's own files. Files are read with O_DIRECT where their file
    system allows that, through a buffer of 1 MiB a thread.

    Args:
        paths: of the files.
        sizes: bytes of each block.
        ranges: for each block, in the order of their places, (index of the file, offset in it, bytes, place in
            the block). What is between them is zeros.
        direct: True demands O_DIRECT, False does without, None tries it and falls back
            (stats()["direct_fallback"]).

    Raises:
        ValueError: a range does not fit its block, or names no file.
        RuntimeError: names a file that cannot be opened, or that is shorter than its ranges.
    """
    def __init__(
        self,
        paths: collections.abc.Sequence[str],
        sizes: collections.abc.Sequence[int],
        ranges: collections.abc.Sequence[collections.abc.Sequence[tuple[int, int, int, int]]],
        direct: bool | None = None,
    ) -> None: ...
    def __len__(self) -> int:
        """
        The number of blocks.
        """
    def close(self) -> None:
        """
        Closes the files. An engine that uses them keeps them open.
        """
    def read(self, block: int, address: int, nbytes: int, offset: int = 0) -> None:
        """
        Reads bytes [offset, offset + nbytes) of a block to memory at `address`, of any alignment.

        Raises IndexError for a range outside the block, RuntimeError for a failed read.
        """
    def stats(self) -> dict:
        """
        What the files give.

        direct, direct_fallback: whether O_DIRECT is in use for all of them, and why not; bytes_used: of the blocks;
        bytes_read: since they were opened.
        """

class CopyEngine:
    """
    Brings blocks to slots and back.

    A block comes from a HostPool or from files into a slot: memory of the caller's on `device`. acquire()
    gives the block's slot; release() ends the use and, if the block was changed, stores it. On a CPU the
    calling thread is the stream, and calls wait. On CUDA nothing but flush() waits: `stream`, a handle such as
    torch.cuda.current_stream().cuda_stream, waits in the host's place. The first transfer that fails is raised
    (RuntimeError) by every later call. Any thread may call.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        source: where the blocks are: a HostPool, a BlockFile, or a pair of a BlockFile or None and RangeFiles,
            whose blocks follow those of the first and are never released dirty. It may be closed afterwards; the
            engine keeps what it needs.
        slot_addresses: addresses on `device`, at least two, which must stay valid until close(). For a CPU over
            a file they must be multiples of 4096 (aligned_buffer).
        slot_bytes: bytes of a slot, at least those of the largest block.
        staging: for CUDA over a file, a pinned pool to copy through; None makes one.
        stream: on CUDA, transfers wait for what is on it now, which may still use the slots' memory.

    Raises:
        ValueError: too few slots, slots that are too small or misaligned, an unknown device.
        RuntimeError: the device is missing, or a thread, stream or event cannot be made.
    """
    @typing.overload
    def __init__(
        self,
        device: str,
        source: HostPool,
        slot_addresses: collections.abc.Sequence[int],
        slot_bytes: int,
        staging: HostPool | None = None,
        stream: int = 0,
    ) -> None: ...
    @typing.overload
    def __init__(
        self,
        device: str,
        source: BlockFile,
        slot_addresses: collections.abc.Sequence[int],
        slot_bytes: int,
        staging: HostPool | None = None,
        stream: int = 0,
    ) -> None: ...
    @typing.overload
    def __init__(
        self,
        device: str,
        source: tuple[BlockFile | None, RangeFiles],
        slot_addresses: collections.abc.Sequence[int],
        slot_bytes: int,
        staging: HostPool | None = None,
        stream: int = 0,
    ) -> None: ...
    def acquire(self, block: int, stream: int = 0) -> int:
        """
        The index of the slot that holds the block until release().

        On a CPU the block is there on return; on CUDA `stream` waits for it. A block may be acquired several times;
        each needs its release. Raises IndexError, and RuntimeError where every slot is acquired or a transfer has
        failed.
        """
    def close(self) -> None:
        """
        Ends what is under way, and stores what was released dirty as far as set_durable() allows.

        Later calls that move blocks raise RuntimeError.
        """
    def drop(self, block: int) -> None:
        """
        Forgets the block's copy in a slot, so that the next acquire() uploads it again.

        For a block that was written in its source. Raises IndexError, and RuntimeError where the block is acquired.
        """
    def events(self) -> list:
        """
        The trace, oldest first.

        A tuple for each transfer: (kind, block, slot, bytes, start_ns, end_ns), kind being "upload", "download" or
        "wait" (compute stood still for the block), times as of time.monotonic_ns().
        """
    def fail(self, reason: str) -> None:
        """
        Makes every call that waits, and every later one, raise RuntimeError(reason).
        """
    def flush(self) -> None:
        """
        Waits until every block that was released dirty is stored. Raises RuntimeError where that fails.
        """
    def prefetch(self, block: int) -> bool:
        """
        Starts an upload of the block, unless it is present or on its way.

        Returns False where no slot can be taken now. Raises IndexError, RuntimeError.
        """
    def present(self) -> list[int]:
        """
        The blocks whose upload is complete, ascending.
        """
    def release(self, block: int, stream: int = 0, dirty: bool = False, version: int = 0) -> None:
        """
        Ends a use of the block by what was issued on `stream` so far.

        dirty: the block was changed, and is stored after its last release. In a file that happens once
        set_durable() has been called with at least `version`, which becomes the block's version there. Raises
        IndexError, and RuntimeError where the block is not acquired or a transfer has failed.
        """
    def reset_stats(self) -> None:
        """
        Sets all counters to 0.
        """
    def set_durable(self, version: int) -> None:
        """
        Lets blocks with versions up to `version` reach the file (the write-ahead rule).

        Call it when the journal lines before `version` are on disk. Blocks in a HostPool do not wait for it.
        """
    def set_tails(self, num_bytes: collections.abc.Sequence[int]) -> None:
        """
        Says how many bytes at the end of each block of a HostPool are only read, and so never stored.

        To be called before blocks are released. Raises ValueError unless there is one for each block, and none is longer.
        """
    def stats(self) -> dict:
        """
        Counters since the start or reset_stats().

        uploads, downloads, bytes_up, bytes_down: begun; acquires; hits: of those, blocks that were present or on
        their way; recalled_uploads, recalled_downloads: taken back before they began; dropped_events: of the trace.
        Seconds: upload_s and download_s over the transfers, wait_s that the host was blocked in acquire(), stall_s
        that streams waited for uploads (CUDA).
        """
    def trace(self, enable: bool) -> None:
        """
        Starts an empty trace of transfers, of the last 65536, or stops it.
        """

class ThreadState:
    """
    The calling thread's torch modes, for another thread to run under.

    Grad mode, autocast, and function and dispatch modes, as they are when the object is made.
    """
    def __init__(self) -> None: ...
    def enter(self) -> None:
        """
        Gives the modes to the calling thread. Raises RuntimeError when called twice without exit().
        """
    def exit(self) -> None:
        """
        Gives the thread that entered its own modes back.
        """

def aligned_buffer(nbytes: int) -> torch.Tensor:
    """
    A uint8 CPU tensor [nbytes] of zeros whose memory starts at a multiple of 4096: a slot of a CopyEngine.
    """

def arenas_made() -> int:
    """
    How often this process has mapped memory for a pool or a buffer.

    In the steady state of a training it does not rise.
    """

def build_info() -> dict:
    """
    What this build holds.

    torch: the version it was built against; cuda: whether it has CUDA kernels; cuda_version, cuda_archs; simd:
    its variants of the CPU kernels; compiler.
    """

def cuda_available() -> tuple[bool, str]:
    """
    Whether there is a CUDA driver with a device, and why not: (True, an empty text) or (False, reason).
    """

def hide_parameters(
    params: list, absent: typing.Any, placeholders: list, versions: collections.abc.Sequence[int]
) -> list[int]:
    """
    Points parameters at placeholders, of class `absent`.

    Args:
        versions: what show_parameters returned, or nothing.

    Returns:
        The places of the parameters that were written since.
    """

def memory_budget() -> dict:
    """
    Host memory that this process may still take.

    allowed_bytes: 90% of the least of cgroup_bytes (what its control groups leave) and available_bytes (what
    the machine has available); memlock_bytes: what it may pin; text: all of them in words. Bytes; None where
    there is no limit.
    """

def show_parameters(params: list, classes: list, weights: list) -> list[int]:
    """
    Gives each parameter its class and points it at its weights; returns torch's counters of writes.
    """

def walk_modules(model: typing.Any) -> tuple:
    """
    Looks at every module of a model once.

    Returns:
        The (module, name) of each buffer, in the order of model.modules(); the objects that modules have as `config`, each
        once; and whether any module is in training mode.
    """
