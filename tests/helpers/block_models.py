"""A small model of blocks, with room for mischief, and its hand-over."""

from __future__ import annotations

import torch
from torch import nn

import distzo2


def offloaded(model, directory=None, **options):
    weights = "host" if directory is None else "disk"
    return distzo2.offload(model, weights=weights, directory=directory, **options)


def stepping(model, directory=None, *, lr=1e-2, **options):
    """The model, handed over, and an optimizer of it."""
    offloaded(model, directory)
    return model, distzo2.ZOSGD(model, lr=lr, **options)


class Blocks(nn.Module):
    """Embedding, a list of blocks and a head, with room for mischief."""

    def __init__(self, dropout: float = 0.0, *, width: int = 8, num_blocks: int = 4, seed: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(32, width)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(num_blocks)
            )
            self.head = nn.Linear(width, 32, bias=False)
        self.depth = num_blocks  # how many blocks a forward enters

    def forward(self, ids):
        ids = ids.to(self.embedding.weight.device)
        x = self.embedding(ids)
        for block in self.blocks[: self.depth]:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), ids.flatten())


class Adapter(nn.Module):
    """A frozen linear layer, and a trained detour of rank 2 in float32."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)


def adapted(dtype: torch.dtype = torch.float32, *, num_blocks: int = 4) -> Blocks:
    """A model of `dtype` that is frozen but for an adapter in each block and the bias of its head."""
    model = Blocks(width=64, num_blocks=num_blocks).to(dtype).requires_grad_(False)
    model.head = nn.Linear(64, 32, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model.head.reset_parameters()
    model.head.weight.requires_grad_(False)
    for block in model.blocks:
        block[0] = Adapter(block[0])
    return model


IDS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(1))
