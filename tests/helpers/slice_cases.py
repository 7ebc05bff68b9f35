"""What the ranks of test_sliced_store and test_slice_rounds run: functions of (rank, world_size, ...)."""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import parallel_cases as cases
import torch
import torch.distributed as dist
from block_models import IDS, Blocks, adapted
from parallel_cases import Tower, batch, closures_of, joined, optimizer, started, state_of, tower
from parallel_ranks import mesh_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import distzo2
import distzo2.parallel
from distzo2.checkpoint import reading as parallel_read
from distzo2.parallel import node as slice_choice
from distzo2.parallel.sliced_store import SlicedStore


def train_with(rank: int, world_size: int, shape: tuple[int, int], directory: Path, what: str) -> Any:
    """As `cases.train`, with something about slices that must not change a bit."""
    options: dict[str, Any] = {"weights": "disk", "slices": True, "steps": 5}
    slicing = slice_choice.Slicing
    if what == "unequal slices":
        slice_choice.Slicing = lambda node, _, *rest: slicing(node, [1.0 + r for r in range(node.size)], *rest)
    if what == "write_every":
        cases.tower = functools.partial(tower, write_every=3)
    if what == "memory_budget":  # room for one of the five blocks beside what streaming needs
        cases.tower = functools.partial(tower, memory_budget=24_000, slots=2)
    if what == "waves":
        options["max_lanes"] = 1
    try:
        return cases.train(rank, world_size, shape, directory, **options)
    finally:
        cases.tower, slice_choice.Slicing = tower, slicing


def frozen(
    rank: int,
    world_size: int,
    directory: Path,
    shape: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
    computed: torch.dtype | None = None,
    every: int = 1,
    anchor: float = 0.0,
) -> Any:
    """Some parameters of each block are frozen."""
    joined(shape, slice=True)
    model = Tower(dtype)
    for i, block in enumerate(model.blocks):
        block[0].bias.requires_grad_(i % 2 == 0)
    model.blocks[3].requires_grad_(False)
    options = {"weights": "disk", "directory": directory / f"rank{rank}", "compute_dtype": computed}
    distzo2.offload(model, **options, write_every=every, train=True, keep_start=anchor > 0)
    opt = optimizer(model, anchor=anchor)
    for step in range(4):
        opt.step(closures_of(model, step, 2))
    return [opt.last.losses, state_of(model)]


def one_way(
    rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None, computed: torch.dtype | None
) -> Any:
    """Adapters of a frozen base, which is read and never written."""
    joined(shape, slice=True)
    model = adapted(torch.bfloat16, num_blocks=6)
    options = {"weights": "disk", "directory": directory / f"rank{rank}", "compute_dtype": computed}
    runtime = distzo2.runtime_of(distzo2.offload(model, **options))
    opt = distzo2.ZOSGD(model, lr=1e-1, seed=3, num_probes=2)
    for step in range(4):
        opt.step([lambda m=m, step=step: model((IDS + step + m) % 32) for m in range(2)])
    assert runtime.stats()["bytes_down"] == 0 < runtime.stats()["bytes_up"]
    opt.verify_replicas()
    return [opt.last.losses, state_of(model)]


def packed(
    rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None, weights: str, how: str, **more: Any
) -> Any:
    """Norms beside blocks that are packed as the files of a GGUF model have them, or gains over these, or codes."""
    joined(shape, slice=True)

    def prepare(model: nn.Module, checkpoint_map: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return model, checkpoint_map

    options = {"frozen": {"prepare": prepare}, "gains": {"prepare": distzo2.gains}}.get(how, {"store": how})
    path = directory / ("raw" if "store" in options else "model.gguf")
    options |= {"weights": weights, "directory": directory / f"rank{rank}", **more}
    model = distzo2.from_pretrained(path, **options)
    opt = distzo2.ZOSGD(model, lr=1.0 if how == "gains" else 1e-2, seed=3, num_probes=2)
    for step in range(3):
        ids = [(torch.arange(12).view(2, 6) + step + m) % 60 for m in range(2)]
        opt.step([lambda i=i: model(input_ids=i, labels=i).loss for i in ids])
    opt.verify_replicas()
    return [opt.last.losses, {name: value.float().numpy() for name, value in model.state_dict().items()}]


class Tiny(nn.Module):
    """Units of 256 bytes, so that the slices of all ranks but the first hold no element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.mean()


def tiny(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None) -> Any:
    joined(shape, slice=True)
    model = distzo2.offload(Tiny(), weights="disk", directory=directory / f"rank{rank}")
    opt, x = distzo2.ZOSGD(model, lr=1e-2), torch.arange(8.0).reshape(2, 4)
    for _ in range(4):
        opt.step([lambda: model(x), lambda: model(x + 1)])
    return [opt.last.losses, state_of(model)]


def odd_ranks(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """Between steps each rank does what it likes: rank 0 evaluates and saves, forwards are of unequal number."""
    model, opt = started(rank, directory, (1, world_size) if world_size > 1 else None, slices=True)
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


def no_lanes(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None) -> Any:
    """Rank 0 has no closures of its own."""
    model, opt = started(rank, directory, shape, slices=True)
    for step in range(3):
        closures = closures_of(model, step, 3)
        opt.step(closures if shape is None or rank == 1 else [], sharded=shape is not None)
    return [opt.last.losses, state_of(model)]


def replaced(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None, how: str) -> Any:
    """The weights are replaced between two steps, on every rank alike. Rank 1 is still in forwards, whole or in part,
    when rank 0 does so."""
    joined(shape, slice=True)
    model = tower("disk", directory / f"rank{rank}", keep_start=True)
    opt = optimizer(model, anchor=0.5)  # to what they are replaced by
    opt.step(closures_of(model, 0, 2))
    for _ in range(3 * rank):
        loss_of(model)
    if rank == 1:
        with torch.no_grad():
            model.blocks[0](torch.zeros(2, 24))  # what follows it is expected
    if how == "load_state_dict":
        model.load_state_dict(Tower(seed=9).state_dict())
    else:
        with distzo2.edit(model), torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
    seen = loss_of(model)
    model.train()
    for step in (1, 2):
        opt.step(closures_of(model, step, 2))
    return [(seen, opt.last.losses), state_of(model)]


def anchored(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None, weights: str) -> Any:
    """A run with an anchor that continues from its weight file, of which slices in memory are no part."""
    joined(shape, slice=True)
    run, history = directory / f"{world_size}", []
    for until in (4, 6):
        file = distzo2.WeightFile(run / "weights.dzo2", run / "journal", every=1, pace=1.0)
        model = tower(weights, None, keep_start=True, weight_file=file)
        opt = optimizer(model, anchor=0.5, journal=run / "journal", resume=until == 6)
        while opt.step_count < until:
            opt.step(closures_of(model, opt.step_count, 2))
            history.append(opt.last.losses)
        state = state_of(model)
        opt.close()
        distzo2.runtime_of(model).close()
    return [history, state]


def with_reference(rank: int, world_size: int, directory: Path, shape: tuple[int, int] | None) -> Any:
    """Closures call another model in slices too, and gather metrics as trainers do."""
    joined(shape, slice=True)
    model = tower("disk", directory / f"rank{rank}")
    reference = Tower(seed=9).requires_grad_(False)
    distzo2.offload(reference, weights="disk", directory=directory / f"reference{rank}")

    def closure(inputs: torch.Tensor) -> torch.Tensor:
        first = reference(inputs)
        if shape is not None:
            dist.all_gather_object([None] * world_size, first)
        with distzo2.present(reference.head), distzo2.present(model.blocks[1]):
            x = reference.embedding(inputs) @ reference.head.weight.T + model.blocks[1][0].weight.sum()
            return (model(inputs) - first + reference(inputs.flip(0)) * x.square().mean()).square()

    opt = optimizer(model)
    for step in range(4):
        opt.step([functools.partial(closure, batch(100 * step + m)) for m in range(2)])
    return [opt.last.losses, state_of(model)]


WAITS = {
    "mesh.barrier": lambda rank: distzo2.parallel.current().barrier(),
    "parallel.barrier": lambda rank: distzo2.parallel.barrier(),
    "barrier": lambda rank: dist.barrier(),
    "all_gather_object": lambda rank: dist.all_gather_object([None, None], rank),
    "all_reduce": lambda rank: dist.all_reduce(torch.ones(1), group=dist.group.WORLD),
    "broadcast": lambda rank: dist.broadcast(torch.ones(3), 0),
}


def waits(rank: int, world_size: int, directory: Path, how: str) -> Any:
    """Rank 1 waits for rank 0, which evaluates, alone, on the weights of both."""
    plain = dist.barrier
    model, opt = started(rank, directory, (1, 2) if world_size > 1 else None, slices=True)
    seen = []
    for step in range(3):
        opt.step(closures_of(model, step, 2))
        for i in range(2 * (1 - rank)):
            time.sleep(0.05)  # the other rank waits already
            seen.append(loss_of(model, i))
        if world_size > 1:
            WAITS[how](rank)
        model.train()
    if how == "barrier" and world_size > 1:
        assert dist.barrier is not plain
        distzo2.parallel.shutdown()
        assert dist.barrier is plain is dist.distributed_c10d.barrier
    return seen, opt.last.losses


def waits_for_another(rank: int, world_size: int, directory: Path) -> None:
    """Rank 1 waits in a barrier of torch.distributed for a rank that makes a step."""
    model, opt = started(rank, directory, (1, 2), slices=True)
    dist.barrier() if rank else opt.step(closures_of(model, 0, 2))


def broken_slice(rank: int, world_size: int, directory: Path) -> None:
    """A bit of every page of rank 1's block file, whose name is gone, flips after step 1."""
    model, opt = started(rank, directory, (1, world_size), slices=True)
    for step in range(3):
        if step == 2 and rank == 1:
            names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            path = next(name for name in names if ".dzo2 (deleted)" in os.path.realpath(name))
            with open(path, "r+b", buffering=0) as file:
                for offset in range(0, os.fstat(file.fileno()).st_size, 512):
                    byte = os.pread(file.fileno(), 1, offset)
                    os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), offset)
        opt.step(closures_of(model, step, world_size))


def kept(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """What a rank keeps of a model in host memory whose blocks have a mebibyte."""
    mesh_of(1, world_size, slice=True)
    model = distzo2.offload(Blocks(width=512, num_blocks=6), weights="host")
    optimizer(model).step([lambda: model(batch(0))] * world_size)
    runtime = distzo2.runtime_of(model)
    return {**runtime.stats(), "slices": runtime.weights.ring.source.stats()}


def chosen(rank: int, world_size: int, directory: Path, weights: str, free: int | None) -> list[str]:
    """What is said of slices where nothing was asked; `free`: bytes that there seem to be on the disk."""
    lines: list[str] = []
    mesh = mesh_of(1, world_size, log=lines.append)
    disk = nullcontext() if free is None else mock.patch.object(slice_choice, "free_disk_bytes", lambda _: free)
    with disk:
        model = tower(weights, directory / f"rank{rank}")
        optimizer(model).step(closures_of(model, 0, world_size))
    sliced = isinstance(distzo2.runtime_of(model).weights.ring, SlicedStore)
    assert ("gloo" in mesh.node.groups) is sliced  # the group that was measured and is not used has ended
    return [*lines, str(sliced)]


def on_cpus_beside_gpus(rank: int, world_size: int, directory: Path) -> Any:
    """The ranks seem to have a GPU each, and torch.distributed to have NCCL; the model is on the CPU."""
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(dist, "is_nccl_available", lambda: True),
        mock.patch.object(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl"),
    ):
        return cases.train(rank, world_size, (1, world_size), directory, weights="host", slices=True)


def load(rank: int, world_size: int, directory: Path, checkpoint: Path, dtype: str | None) -> tuple[int, int, Any]:
    """Bytes read of a checkpoint's files, bytes that the rank keeps, and the weights."""
    mesh_of(1, world_size, slice=True)
    read: list[int] = []
    start = parallel_read.ParallelReader.start

    def counted(self: Any, ranges: Any) -> Any:
        ranges = list(ranges)
        read.extend(r.num_bytes for r in ranges)
        return start(self, ranges)

    with mock.patch.object(parallel_read.ParallelReader, "start", counted):
        model = distzo2.from_pretrained(checkpoint, weights="host", dtype=dtype)
    copies = distzo2.runtime_of(model).weights.copies
    kept = sum(len(c.elements_of(p)) * p.dtype.itemsize for c in copies for p in c.unit.params)
    return sum(read), kept, {name: value.float().numpy() for name, value in model.state_dict().items()}


def train_with_nccl(directory: Path, port: int, weights: str) -> Any:
    """One rank on a GPU, as torchrun would start it: its gathers go through NCCL."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mesh = distzo2.parallel.init(1, 1, slice=True, device="cuda")
    cases.mesh_of = lambda *shape, **options: mesh
    result = cases.train(0, 1, (1, 1), directory, weights=weights, slices=True, device="cuda:0")
    assert distzo2.parallel.stats()["slice_gathers"] > 0 and mesh.node.groups.keys() == {"words", "nccl"}
    distzo2.parallel.shutdown()
    return result


def loss_of(model: nn.Module, index: int = 0) -> float:
    with torch.no_grad():
        return float(model.eval()(batch(index)))


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


def hand_over(rank: int, world_size: int, directory: Path, what: str) -> None:
    """Something is wrong with rank 1 while all hand over their model."""
    mesh = mesh_of(1, 2, slice=None if what == "alone" else True)
    place = directory / f"rank{rank}"
    with mesh.together("loading"):
        if what == "directory" and rank == 1:
            place.write_text("a file")
        if what == "alone" and rank == 0:
            return
        budget = {"memory_budget": (24_000, 80_000)[rank], "slots": 2}
        tower("disk", place, **(budget if what == "memory_budget" else {}))


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

    with mock.patch.object(parallel_read.ParallelReader, "finish", failing), mesh.together("loading"):
        distzo2.from_pretrained(directory / f"checkpoint{rank}", weights="host")


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
    if rank == 2:
        distzo2.parallel.shutdown()
    if rank:
        return None
    time.sleep(0.3)
    result = state_of(model)
    if how == "step":
        opt.step(closures_of(model, 1, world_size))
    return result


def interrupted(rank: int, world_size: int, directory: Path) -> bool:
    """Ctrl-C on rank 0, which waits for a rank that does not come before it has ended. Whether it did."""
    mesh_of(1, 2, slice=True)
    model, ended = tower("disk", directory / f"rank{rank}"), directory / "ended"
    if rank == 1:
        while not ended.exists():
            time.sleep(0.01)
        return True
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        loss_of(model)
    except KeyboardInterrupt:
        ended.touch()
    return ended.exists()


def on_nodes(rank: int, world_size: int, directory: Path, numbers: tuple[int, ...]) -> Any:
    """Slices within each node, as torchrun numbers them: this rank's node, and the run."""
    with mock.patch.dict(os.environ, {"GROUP_RANK": str(numbers[rank])}):
        model, opt = started(rank, directory, (1, world_size), slices=True, verify_every=2)
        for step in range(4):
            opt.step(closures_of(model, step, 4))
        if rank == world_size - 1:
            loss_of(model)
        return distzo2.parallel.current().node.ranks, opt.last.losses, state_of(model)


def ahead(rank: int, world_size: int, directory: Path) -> tuple[int, int]:
    """How many of a step's gathers had begun before they were wanted, and how many there were, also when a rank has
    evaluated alone: the most of a few steps, since on a busy machine some wait for the other rank."""
    mesh_of(1, world_size, slice=True)
    model = Blocks(num_blocks=8)
    for block in model.blocks:  # compute takes its time, and nothing of the processor's
        block.register_forward_hook(lambda *_: time.sleep(0.02))
    distzo2.offload(model, weights="disk", directory=directory / f"rank{rank}")
    opt = optimizer(model, lr=1e-6)
    closures = [lambda: model(batch(0))] * world_size
    for _ in range(2):
        opt.step(closures)
    if rank == 0:
        distzo2.evaluate(model, closures[:1])
    counts = []
    for _ in range(5):
        distzo2.parallel.current().barrier()
        distzo2.runtime_of(model).reset_stats()
        distzo2.parallel.reset_stats()
        opt.step(closures)
        counts.append((distzo2.runtime_of(model).stats()["gathers_ahead"], distzo2.parallel.stats()["slice_gathers"]))
    return max(counts)
