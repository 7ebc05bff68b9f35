"""Layouts: random chains of operations on symbols against the same on tensors, read from files piece by piece."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distzo2.checkpoint import reading
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.reading import CheckpointFiles
from distzo2.checkpoint.symbols import LayoutTensor, Trace


def random_step(rng: random.Random, pool: list) -> Callable | None:
    """An operation on a tensor or the symbol of it, and which of the pool it is made of."""
    number = rng.randrange(len(pool))
    shape = pool[number][0].shape
    numel, dims = shape.numel(), len(shape)
    kind = rng.choice(["transpose", "chunk", "cat", "stack", "reshape", "select", "slice", "permute"])
    if kind == "stack":
        other = rng.choice([i for i, pair in enumerate(pool) if pair[0].shape == shape])
        dim = rng.randrange(dims + 1)
        return (lambda ts: torch.stack([ts[number], ts[other]], dim)) if dims < 4 and numel < 2000 else None
    if kind == "reshape":
        sizes, rest = [], numel
        while rest > 1 and len(sizes) < 4:
            sizes.append(rng.choice([d for d in range(2, rest + 1) if rest % d == 0]))
            rest //= sizes[-1]
        sizes.append(rest)
        rng.shuffle(sizes)
        return lambda ts: ts[number].reshape(sizes)
    if not dims:
        return None
    dim = rng.randrange(dims)
    if kind == "transpose":
        other = rng.randrange(dims)
        return lambda ts: ts[number].transpose(dim, other).contiguous()
    if kind == "permute":
        order = rng.sample(range(dims), dims)
        return lambda ts: ts[number].permute(order).contiguous()
    if kind == "chunk":
        part = rng.randrange(len(pool[number][0].chunk(3, dim)))
        return lambda ts: ts[number].chunk(3, dim)[part]
    begin = rng.randrange(shape[dim])
    if kind == "select":
        return lambda ts: ts[number].select(dim, begin)
    if kind == "slice":
        end = rng.randrange(begin + 1, shape[dim] + 1)
        return lambda ts: ts[number].narrow(dim, begin, end - begin)
    fixed = [size for d, size in enumerate(shape) if d != dim]
    mates = [
        i for i, (t, _) in enumerate(pool)
        if t.dim() == dims and [size for d, size in enumerate(t.shape) if d != dim] == fixed
    ]  # fmt: skip
    mate = rng.choice(mates)
    return (lambda ts: torch.cat([ts[number], ts[mate]], dim)) if numel + pool[mate][0].numel() <= 4000 else None


@pytest.mark.parametrize("seed", range(25))
def test_symbols_follow_tensors_and_files_follow_symbols(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    # Small reads, so that pieces are cut into many.
    monkeypatch.setattr(reading, "CHUNK_BYTES", rng.choice([8, 64, 500]))
    shapes = [(4, 6), *(tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randrange(4))) for _ in range(2))]
    names = ["a", "b", "c"]
    generator = torch.Generator().manual_seed(seed)
    real = [torch.randn(shape, generator=generator) for shape in shapes]
    save_file(dict(zip(names, real, strict=True)), tmp_path / "model.safetensors")
    files = CheckpointFiles(tmp_path)
    trace = Trace([e.name for e in files.entries], files.equal)
    pool: list = []
    for number, e in enumerate(files.entries):
        pool.append((real[names.index(e.name)], LayoutTensor(Layout.leaf(number, e.shape), e.dtype, trace)))
    for _ in range(12):
        step = random_step(rng, pool)
        if step is None:
            continue
        tensor, symbol = (step(list(each)) for each in zip(*pool, strict=True))
        assert symbol.shape == tensor.shape == symbol.where.shape
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(tensor.shape, dtype=dtype)
            files.read_pieces(symbol.to(dtype).where.pieces, out)
            assert torch.equal(out, tensor.to(dtype))
        assert trace.equal(symbol, symbol)
        pool.append((tensor, symbol))
