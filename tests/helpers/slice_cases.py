"""What the ranks of test_sliced_store and test_slice_rounds run: functions of (rank, world_size, ...)."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import parallel_cases as cases
import torch
from parallel_cases import Tower, batch, closures_of, optimizer, started, state_of, tower
from parallel_ranks import mesh_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import distzo2
import distzo2.parallel
from distzo2.checkpoint import reading as parallel_read
from distzo2.parallel import node as slice_choice
from distzo2.parallel.sliced_store import SlicedStore


def sliced_tower(rank: int, directory: Path, weights: str = "disk", **options: Any) -> nn.Module:
    return tower(weights, directory / f"rank{rank}", **options)


def train_with(rank: int, world_size: int, shape: tuple[int, int], directory: Path, what: str) -> Any:
    """As `cases.train`, with something about slices that must not change a bit."""
    options: dict[str, Any] = {"weights": "disk", "slices": True, "steps": 5}
    shares = slice_choice._shares
    if what == "unequal slices":
        slice_choice._shares = lambda mesh, *_: [1.0 + r for r in range(mesh.node.size)]
    if what == "write_every":
        cases.tower = lambda *args, **kwargs: tower(*args, **kwargs, write_every=3)
    if what == "memory_budget":  # room for two of the five blocks beside what streaming needs
        cases.tower = lambda *args, **kwargs: tower(*args, **kwargs, memory_budget=36_000)
    if what == "waves":
        options["max_lanes"] = 1
    try:
        return cases.train(rank, world_size, shape, directory, **options)
    finally:
        cases.tower, slice_choice._shares = tower, shares


def frozen(rank: int, world_size: int, shape: tuple[int, int] | None, directory: Path) -> Any:
    """Some parameters of each block are frozen."""
    if shape is not None:
        mesh_of(*shape, slice=True)
    model = Tower()
    for i, block in enumerate(model.blocks):
        block[0].bias.requires_grad_(i % 2 == 0)
    model.blocks[3].requires_grad_(False)
    distzo2.offload(model, weights="disk", directory=directory / f"rank{rank}", train=True)
    opt = optimizer(model)
    for step in range(4):
        opt.step(closures_of(model, step, 2))
    return [opt.last.losses, state_of(model)]


# ---- ranks that want different things ---------------------------------------------------------------------------


def odd_ranks(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """Between steps each rank does what it likes: rank 0 evaluates and saves, forwards are of unequal number."""
    model, opt = started(rank, directory, (1, world_size), slices=True)
    seen: list[float] = []
    for step in range(4):
        opt.step(closures_of(model, step, 5))
        if rank == 0:
            seen += [float(v) for v in distzo2.evaluate(model.eval(), [lambda m=m: model(batch(m)) for m in range(3)])]
        for i in range(3 * rank):
            with torch.no_grad():
                seen.append(float(model.eval()(batch(i % 3))))
        model.train()
    if rank == world_size - 1:
        distzo2.save_pretrained(model, directory / "saved")
    state = state_of(model) if rank == 1 else {}
    opt.step(closures_of(model, 4, 5))
    return {"losses": opt.last.losses, "seen": seen, "state": state}


def forwards(directory: Path) -> list[list[float]]:
    """Losses of three batches after each step of `odd_ranks`, of one rank."""
    model = tower("device", directory)
    opt = optimizer(model)
    seen = []
    for step in range(4):
        opt.step(closures_of(model, step, 5))
        with torch.no_grad():
            seen.append([float(model.eval()(batch(m))) for m in range(3)])
        model.train()
    return seen


def no_lanes(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None) -> Any:
    """Rank 0 has no closures of its own."""
    model, opt = started(rank, directory, shape, slices=True)
    for step in range(3):
        closures = closures_of(model, step, 3)
        if shape is None:
            opt.step(closures)
        else:
            opt.step(closures[world_size * (rank - 1) :][: 3 if rank == 1 else 0], sharded=True)
    return [opt.last.losses, state_of(model)]


def replaced(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None, how: str) -> Any:
    """The weights are replaced between two steps, on every rank alike."""
    model, opt = started(rank, directory, shape, slices=True)
    opt.step(closures_of(model, 0, 2))
    if how == "load_state_dict":
        model.load_state_dict(Tower(seed=9).state_dict())
    else:
        with distzo2.edit(model), torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
    for step in (1, 2):
        opt.step(closures_of(model, step, 2))
    return [opt.last.losses, state_of(model)]


# ---- errors ---------------------------------------------------------------------------------------------------------


def broken_slice(rank: int, world_size: int, directory: Path) -> None:
    """A bit of rank 1's block file flips after step 1."""
    model, opt = started(rank, directory, (1, world_size), slices=True)
    for step in range(3):
        if step == 2 and rank == 1:
            _flip_bits()
        opt.step(closures_of(model, step, world_size))


def _flip_bits() -> None:
    """One bit of every page of the block file, whose name is gone."""
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if ".dzo2 (deleted)" not in os.path.realpath(path):
            continue
        with open(path, "r+b", buffering=0) as file:
            for offset in range(0, os.fstat(file.fileno()).st_size, 512):
                byte = os.pread(file.fileno(), 1, offset)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), offset)
        return
    raise AssertionError("no block file")


# ---- figures --------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Blocks of a mebibyte."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(512, 512) for _ in range(6))
        self.head = nn.Linear(512, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).square().mean()


def kept(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """What a rank keeps of a model in host memory."""
    mesh_of(1, world_size, slice=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = distzo2.offload(Wide(), weights="host")
    optimizer(model).step([lambda: model(torch.ones(2, 512))] * world_size)
    runtime = distzo2.runtime_of(model)
    return {**runtime.stats(), "slices": runtime.weights.ring.source.stats()}


def chosen(rank: int, world_size: int, directory: Path, weights: str, free: int | None) -> list[str]:
    """What is said of slices where nothing was asked; `free`: memory or disk that there seems to be."""
    lines: list[str] = []
    mesh_of(1, world_size, log=lines.append)
    with ExitStack() as stack:
        if free is not None:
            stack.enter_context(mock.patch.object(slice_choice, "free_disk_bytes", lambda directory: free))
            stack.enter_context(mock.patch.object(slice_choice, "available_memory", lambda: free))
        model = sliced_tower(rank, directory, weights)
        optimizer(model).step(closures_of(model, 0, world_size))
    lines.append(str(isinstance(distzo2.runtime_of(model).weights.ring, SlicedStore)))
    return lines


def load(rank: int, world_size: int, directory: Path, checkpoint: Path, dtype: str | None) -> tuple[int, int, Any]:
    """Bytes read of a checkpoint's files, bytes that the rank keeps, and the weights."""
    mesh_of(1, world_size, slice=True)
    read = [0]
    start = parallel_read.ParallelReader.start

    def counted(self: Any, ranges: Any) -> Any:
        ranges = list(ranges)
        read[0] += sum(r.num_bytes for r in ranges)
        return start(self, ranges)

    parallel_read.ParallelReader.start = counted
    try:
        model = distzo2.from_pretrained(checkpoint, weights="host", dtype=dtype)
    finally:
        parallel_read.ParallelReader.start = start
    runtime = distzo2.runtime_of(model)
    kept = sum(len(c.elements_of(p)) * p.dtype.itemsize for c in runtime.weights.copies for p in c.unit.params)
    return read[0], kept, {name: value.float().numpy() for name, value in model.state_dict().items()}


def train_with_nccl(directory: Path, port: int, weights: str) -> Any:
    """One rank on a GPU, as torchrun would start it: its gathers go through NCCL."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mesh = distzo2.parallel.init(1, 1, slice=True, device="cuda")
    assert mesh.node.backend == "nccl"
    cases.mesh_of = lambda *shape, **options: mesh
    result = cases.train(0, 1, (1, 1), directory, weights=weights, slices=True, device="cuda:0")
    assert distzo2.parallel.stats()["slice_gathers"] > 0
    distzo2.parallel.shutdown()
    return result


# ---- ranks that differ, fail, leave or want different things ----------------------------------------------------


@contextmanager
def nodes(*numbers: int) -> Iterator[int]:
    """The ranks are on nodes of these numbers, as torchrun says it."""
    rank = torch.distributed.get_rank()
    os.environ["GROUP_RANK"] = str(numbers[rank])
    try:
        yield rank
    finally:
        del os.environ["GROUP_RANK"]


def loss_of(model: nn.Module, index: int = 0) -> float:
    with torch.no_grad():
        return float(model.eval()(batch(index)))


# ---- replacing weights ------------------------------------------------------------------------------------------


def forward_and_load(rank: int, world_size: int, directory: Path, how: str) -> tuple[list[float], list[float]]:
    """Rank 1 is still in forwards, whole or in part, when rank 0 replaces the weights. Losses before and after."""
    mesh_of(1, 2, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    before, after = [], []
    if rank == 1:
        before = [loss_of(model) for _ in range(3)]
        with torch.no_grad():
            model.blocks[0](torch.zeros(2, 24))  # what follows it is expected
    if how == "load_state_dict":
        model.load_state_dict(Tower(seed=9).state_dict())
    else:
        with distzo2.edit(model), torch.no_grad():
            for name, value in Tower(seed=9).named_parameters():
                model.get_parameter(name).copy_(value)
    distzo2.parallel.current().barrier()
    after = [loss_of(model) for _ in range(2)]
    opt = optimizer(model)
    opt.step(closures_of(model, 0, 2))
    return before, after


def edit_fails(rank: int, world_size: int, directory: Path) -> tuple[str, bool]:
    """What `edit` ends with where its body raises on rank 1; whether the weights are as they were."""
    mesh_of(1, 2, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    told = ""
    try:
        with distzo2.edit(model), torch.no_grad():
            model.blocks[1][0].weight.zero_()
            if rank == 1:
                raise ValueError("not like this")
    except (ValueError, distzo2.DistZO2Error) as error:
        told = f"{type(error).__name__}: {error}"
    return told, loss_of(model) == loss_of(Tower().eval())


def other_weights(rank: int, world_size: int, directory: Path, how: str) -> None:
    """Rank 1 hands over or loads a model with other weights in one block."""
    mesh_of(1, 2, slice=True)
    other = Tower()
    with torch.no_grad():
        other.blocks[2][0].weight[1, 1] += 1e-6 * rank
    if how == "hand over":
        distzo2.offload(other, weights="disk", directory=directory / f"rank{rank}")
    else:
        tower("disk", directory / f"rank{rank}").load_state_dict(other.state_dict())


# ---- handing over and loading -----------------------------------------------------------------------------------


def hand_over(rank: int, world_size: int, directory: Path, what: str) -> None:
    """Something is wrong with rank 1 while all hand over their model."""
    mesh = mesh_of(1, 2, slice=None if what == "alone" else True)
    place = directory / f"rank{rank}"
    with mesh.together("loading"):
        if what == "directory" and rank == 1:
            place.write_text("a file")
        if what == "alone" and rank == 0:
            return
        tower("disk", place, **({"memory_budget": (36_000, 80_000)[rank]} if what == "memory_budget" else {}))


def small_llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=96,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load_checkpoint(rank: int, world_size: int, directory: Path, what: str) -> None:
    """Rank 1 cannot read the checkpoint, or reads another one."""
    mesh = mesh_of(1, 2, slice=True)
    finish, calls = parallel_read.ParallelReader.finish, []

    def failing(self: Any, futures: Any) -> None:
        calls.append(futures)
        if what == "EIO" and rank == 1 and len(calls) == 2:
            raise OSError(5, "Input/output error")
        finish(self, futures)

    parallel_read.ParallelReader.finish = failing
    try:
        with mesh.together("loading"):
            distzo2.from_pretrained(directory / f"checkpoint{rank}", weights="host")
    finally:
        parallel_read.ParallelReader.finish = finish


# ---- coming and going -------------------------------------------------------------------------------------------


def two_models(rank: int, world_size: int, directory: Path) -> Any:
    """Rank 0 closes one model and goes on with the other; rank 1 only goes on."""
    mesh_of(1, 2, slice=True)
    first, second = (tower("disk", directory / f"{name}{rank}") for name in "ab")
    opt = optimizer(second)
    opt.step(closures_of(second, 0, 2))
    if rank == 0:
        distzo2.runtime_of(first).close()
        loss_of(second)
        second.train()
    opt.step(closures_of(second, 1, 2))
    return opt.last.losses, state_of(second)


def ends_first(rank: int, world_size: int, directory: Path, how: str) -> Any:
    """Rank 1's program ends while rank 0 still reads all weights; its model may be garbage by then."""
    model, opt = started(rank, directory, (1, world_size), slices=True)
    opt.step(closures_of(model, 0, world_size))
    if rank == 1:
        del model, opt
        gc.collect()
        return None
    if rank == 2:
        distzo2.parallel.shutdown()
        return None
    time.sleep(0.3)
    result = state_of(model)
    if how == "step":
        opt.step(closures_of(model, 1, world_size))
    return result


def interrupted(rank: int, world_size: int, directory: Path) -> float:
    """Ctrl-C on rank 0, which waits for a rank that does not come. Seconds that it took."""
    mesh_of(1, 2, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    if rank == 1:
        time.sleep(12)
        return 0.0
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        loss_of(model)
    except KeyboardInterrupt:
        return time.monotonic() - start
    return 1e9


def on_nodes(rank: int, world_size: int, directory: Path, numbers: tuple[int, ...]) -> Any:
    """Slices within each node; rank 0's node, its traffic, and the run."""
    with nodes(*numbers):
        mesh = mesh_of(1, world_size, slice=True)
        model = tower("disk", directory / f"rank{rank}")
        opt = optimizer(model, verify_every=2)
        for step in range(4):
            opt.step(closures_of(model, step, 4))
        if rank == world_size - 1:
            loss_of(model)
        return mesh.node.ranks, distzo2.parallel.stats()["slice_gathers"], opt.last.losses, state_of(model)


class Slow(nn.Module):
    """Blocks whose compute takes its time, and nothing of the processor's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
            time.sleep(0.02)
        return x.square().mean()


def ahead(rank: int, world_size: int, directory: Path, evaluates: bool) -> tuple[int, int]:
    """How many of a step's gathers had begun before they were wanted, and how many there were: the most of a few steps,
    since on a busy machine some wait for the other rank."""
    mesh_of(1, world_size, slice=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = distzo2.offload(Slow(), weights="disk", directory=directory / f"rank{rank}")
    opt = optimizer(model, lr=1e-6)
    closures = [lambda: model(torch.ones(2, 64))] * world_size
    for _ in range(2):
        opt.step(closures)
    if rank == 0 and evaluates:
        distzo2.evaluate(model, closures[:1])
    counts = []
    for _ in range(5):
        distzo2.parallel.current().barrier()
        distzo2.runtime_of(model).reset_stats()
        distzo2.parallel.reset_stats()
        opt.step(closures)
        counts.append((distzo2.runtime_of(model).stats()["gathers_ahead"], distzo2.parallel.stats()["slice_gathers"]))
    return max(counts)
