"""Layouts: random chains of operations on symbols against the same on tensors, read from files piece by piece."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distzo2.checkpoint import reading
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.reading import CheckpointFiles
from distzo2.checkpoint.symbols import LayoutTensor, Trace


def random_step(rng: random.Random, pool: list) -> tuple[torch.Tensor, LayoutTensor] | None:
    real, symbol = rng.choice(pool)
    dims = real.dim()
    kind = rng.choice(["transpose", "chunk", "cat", "stack", "reshape", "select", "slice", "permute"])
    if kind == "stack":
        other = rng.choice([pair for pair in pool if pair[0].shape == real.shape])
        dim = rng.randrange(dims + 1)
        if dims < 4 and real.numel() < 2000:
            return torch.stack([real, other[0]], dim), torch.stack([symbol, other[1]], dim)
        return None
    if kind == "reshape":
        sizes, rest = [], real.numel()
        while rest > 1 and len(sizes) < 4:
            sizes.append(rng.choice([d for d in range(2, rest + 1) if rest % d == 0]))
            rest //= sizes[-1]
        sizes.append(rest)
        rng.shuffle(sizes)
        return real.reshape(sizes), symbol.reshape(sizes)
    if not dims:
        return None
    dim = rng.randrange(dims)
    size = real.shape[dim]
    if kind == "transpose":
        other = rng.randrange(dims)
        return real.transpose(dim, other).contiguous(), symbol.transpose(dim, other).contiguous()
    if kind == "permute":
        order = rng.sample(range(dims), dims)
        return real.permute(order).contiguous(), symbol.permute(order).contiguous()
    if kind == "chunk":
        number = rng.randrange(len(real.chunk(3, dim)))
        return real.chunk(3, dim)[number], symbol.chunk(3, dim)[number]
    if kind == "select":
        index = rng.randrange(size)
        return real.select(dim, index), symbol.select(dim, index)
    if kind == "slice":
        begin = rng.randrange(size)
        end = rng.randrange(begin + 1, size + 1)
        return real.narrow(dim, begin, end - begin), symbol.narrow(dim, begin, end - begin)
    mates = [
        pair for pair in pool
        if pair[0].dim() == dims and all(pair[0].shape[d] == real.shape[d] for d in range(dims) if d != dim)
    ]  # fmt: skip
    other = rng.choice(mates)
    if real.numel() + other[0].numel() > 4000:
        return None
    return torch.cat([real, other[0]], dim), torch.cat([symbol, other[1]], dim)


@pytest.mark.parametrize("seed", range(40))
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
        made = random_step(rng, pool)
        if made is None:
            continue
        tensor, symbol = made
        assert symbol.shape == tensor.shape == symbol.where.shape
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(tensor.shape, dtype=dtype)
            files.read_pieces(symbol.to(dtype).where.pieces, out)
            assert torch.equal(out, tensor.to(dtype))
        assert trace.equal(symbol, symbol)
        pool.append((tensor, symbol))
