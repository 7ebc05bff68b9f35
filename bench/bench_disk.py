"""Sequential reads and writes of a file of blocks through the copy engine, beside fio on a file of the same size.

    python bench/bench_disk.py                        # the disk of the temporary directory
    python bench/bench_disk.py --directory /big/disk --total-mib 4096

The engine streams all blocks through a ring of three slots in memory: reads as a pass of a step with weights on disk
does, writes by giving back changed blocks. fio (or dd, in parallel, where there is no fio) reads and writes another
file on the same disk (the blocks' checksums would tell of its writes) with O_DIRECT, in chunks of the engine's size, as
many at a time as the engine has, and once more with four times as many (`deep`: what the disk would give to more).
`threads` are plain preads and pwrites of the same chunks by four threads into memory on huge pages, as the slots are: a
chunk is then one segment of a transfer and not a thousand, which fio's own memory cannot have. Turns are interleaved.
Without fio and dd the bench says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from bench_common import write_results

import distzo2_core

MIB = 2**20
SLOTS = 3
CHUNK = 4 * MIB  # of the engine's transfers
READERS = 4  # threads of raw transfers
DEPTH = {"read": 4, "write": 2}  # its threads


@contextmanager
def raw_disk(descriptor: int, num_bytes: int) -> Iterator[Callable[[str], None]]:
    """pread and pwrite of chunks over the whole file, by other threads for each direction."""
    # The same kind of memory as the slots': on huge pages a transfer has fewer segments.
    memory = distzo2_core.aligned_buffer(2 * READERS * CHUNK).random_(generator=torch.Generator().manual_seed(1))
    buffers = memory.view(2, READERS, CHUNK).numpy()

    def transfer(thread: int, write: bool) -> None:
        view = memoryview(buffers[int(write), thread])
        move = os.pwritev if write else os.preadv
        for start in range(thread * CHUNK, num_bytes, READERS * CHUNK):
            part, offset = view[: min(CHUNK, num_bytes - start)], start
            while part:  # transfers may be short; what is left stays aligned
                moved = move(descriptor, [part], offset)
                part, offset = part[moved:], offset + moved

    with ThreadPoolExecutor(2 * READERS) as threads:

        def run(direction: str) -> None:
            ways = {"up": [False], "down": [True], "both": [False, True]}[direction]
            for future in [threads.submit(transfer, t, write) for t in range(READERS) for write in ways]:
                future.result()

        yield run


class Engine:
    """A block file and an engine over it."""

    def __init__(self, path: Path, block_bytes: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.file = distzo2_core.BlockFile(str(path), [block_bytes] * num_blocks)
        self.slots = [distzo2_core.aligned_buffer(block_bytes) for _ in range(SLOTS)]
        for slot in self.slots:
            slot.random_(generator=torch.Generator().manual_seed(1))  # a disk that compresses must not see zeros
        for block in range(num_blocks):
            self.file.write(block, self.slots[0].data_ptr(), block_bytes)
        self.file.sync()
        self.engine = distzo2_core.CopyEngine("cpu", self.file, [s.data_ptr() for s in self.slots], block_bytes)

    def read(self) -> None:
        for ahead in range(SLOTS - 1):
            self.engine.prefetch(ahead)
        for block in range(self.num_blocks):
            self.engine.acquire(block)
            self.engine.release(block)
            if block + SLOTS - 1 < self.num_blocks:
                self.engine.prefetch(block + SLOTS - 1)
        for block in self.engine.present():
            self.engine.drop(block)

    def hold(self) -> None:
        """Makes the blocks present that `write` gives back."""
        for block in range(SLOTS):
            self.engine.acquire(block)
            self.engine.release(block)

    def write(self) -> None:
        """As many bytes as the file has, in rounds over the blocks that are present."""
        for _ in range(self.num_blocks // SLOTS):
            for block in range(SLOTS):
                self.engine.acquire(block)
                self.engine.release(block, dirty=True)
            self.engine.flush()  # else a download that has not begun would be put off

    def close(self) -> None:
        self.engine.close()
        self.file.close(unlink=True)


def seconds_of(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fio_rate(path: Path, direction: str, num_bytes: int, depth: int) -> float:
    """Bytes/s by fio's own clock, over the whole file."""
    command = ["fio", "--name=bench", f"--filename={path}", f"--rw={direction}", f"--bs={CHUNK}"]
    command += [f"--size={num_bytes}", f"--iodepth={depth}", "--ioengine=libaio", "--direct=1", "--invalidate=0"]
    command += ["--allow_file_create=0", "--overwrite=1", "--refill_buffers=0", "--output-format=json"]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        raise SystemExit(f"error: fio: {(out.stderr or out.stdout).strip()}")
    return json.loads(out.stdout[out.stdout.index("{") :])["jobs"][0][direction]["bw_bytes"]


def dd_rate(path: Path, direction: str, num_bytes: int, depth: int) -> float:
    """Bytes/s of `depth` dd at once, each on a part of the file; they count in bytes."""
    part = num_bytes // depth // CHUNK * CHUNK
    commands = []
    for number in range(depth):
        skip = number * part
        if direction == "read":
            where = [f"if={path}", "of=/dev/null", f"skip={skip}", "iflag=direct,skip_bytes"]
        else:
            where = [f"of={path}", "if=/dev/zero", f"seek={skip}", "oflag=direct,seek_bytes", "conv=notrunc"]
        commands.append(["dd", *where, f"bs={CHUNK}", f"count={part // CHUNK}", "status=none"])

    def run() -> None:
        processes = [subprocess.Popen(command) for command in commands]
        if any([process.wait() for process in processes]):
            raise SystemExit("error: dd failed")

    return depth * part / seconds_of(run)


def take_turn(
    engine: Engine,
    path: Path,
    direction: str,
    num_bytes: int,
    depth: int,
    rate_of: Callable[[Path, str, int, int], float],
    who: str,
) -> float:
    """Bytes/s of one contender, once over the file."""
    if who == "threads":
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            with raw_disk(descriptor, num_bytes) as run:
                return num_bytes / seconds_of(lambda: run("up" if direction == "read" else "down"))
        finally:
            os.close(descriptor)
    if who != "engine":
        return rate_of(path, direction, num_bytes, 4 * depth if who.endswith("deep") else depth)
    if direction == "read":
        return num_bytes / seconds_of(engine.read)
    engine.hold()
    rate = num_bytes / seconds_of(engine.write)
    for block in engine.engine.present():
        engine.engine.drop(block)
    return rate


def main() -> None:
    """Parse the options, run, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--mib", default="16,64", help="block sizes in MiB, comma-separated")
    parser.add_argument("--total-mib", type=int, default=2048, help="bytes moved in a turn, in MiB")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; the median is reported")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    tool = next((name for name in ("fio", "dd") if shutil.which(name)), None)
    if tool is None:
        raise SystemExit("error: neither fio nor dd is installed: there is nothing to measure the engine beside")
    if tool == "dd":
        print("fio is not installed: its place is taken by dd, as many at once as the engine has threads")
    rate_of = {"fio": fio_rate, "dd": dd_rate}[tool]
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-disk-") as directory:
        path = Path(directory) / "raw"
        for mib in map(int, options.mib.split(",")):
            num_blocks = max(1, options.total_mib // mib // SLOTS) * SLOTS
            num_bytes = num_blocks * mib * MIB
            engine = Engine(path.with_name("blocks"), mib * MIB, num_blocks)
            direct = engine.file.stats()["direct"]
            if not direct:
                raise SystemExit(f"error: {directory}: refuses O_DIRECT, which this bench compares")
            path.touch()
            take_turn(engine, path, "write", num_bytes, DEPTH["write"], rate_of, "threads")
            for direction, depth in DEPTH.items():
                rates: dict[str, list[float]] = {name: [] for name in ("engine", "threads", tool, f"{tool} deep")}
                turn = partial(take_turn, engine, path, direction, num_bytes, depth, rate_of)
                turn("engine")
                for number in range(options.rounds):
                    whose = list(rates)
                    for who in whose if number % 2 == 0 else reversed(whose):
                        os.sync()
                        rates[who].append(turn(who))
                medians = {who: statistics.median(values) / 1e9 for who, values in rates.items()}
                row = {
                    "direction": direction,
                    "block_mib": mib,
                    "num_blocks": num_blocks,
                    "chunk_mib": CHUNK // MIB,
                    "depth": depth,
                    "beside": tool,
                    "gb_per_s": {who: {"median": medians[who], "all": [v / 1e9 for v in rates[who]]} for who in rates},
                    "engine_over_tool": medians["engine"] / medians[tool],
                    "engine_over_deep": medians["engine"] / medians[f"{tool} deep"],
                    "engine_over_threads": medians["engine"] / medians["threads"],
                }
                rows.append(row)
                figures = "  ".join(f"{who} {value:5.2f}" for who, value in medians.items())
                print(
                    f"{direction:5} {mib:4} MiB blocks  {figures} GB/s  engine/{tool} {row['engine_over_tool']:.2f}"
                    f"  engine/threads {row['engine_over_threads']:.2f}",
                    flush=True,
                )
            engine.close()
            path.unlink()
    write_results(options.json, "disk", rows)


if __name__ == "__main__":
    main()
