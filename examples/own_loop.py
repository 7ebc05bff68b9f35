"""A training loop of your own: two lines hand the model and the optimizer over, and `step` takes a closure.

    python examples/own_loop.py [cpu | cuda]

The model is any torch module; this one sorts points by the sector of the plane that they lie in. Its blocks live in
host memory and stream through the device. `ZOSGD(journal=..., resume=True)` would continue a run that was killed.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import distzo2


class Classifier(nn.Module):
    """Points [batch, 2] to scores [batch, 4], through blocks that are streamed one by one."""

    def __init__(self, width: int = 32, num_blocks: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(num_blocks))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        hidden = self.first(points)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.randn(size, 2)
    return points, (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long()


def main(device: str = "cpu", num_steps: int = 300) -> float:
    torch.manual_seed(0)
    model = distzo2.offload(Classifier(), device=device, weights="host")  # was: Classifier().to(device)
    opt = distzo2.ZOSGD(model, lr=0.02, num_probes=4)  # was: torch.optim.SGD(model.parameters(), lr=...)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, num_steps)
    for step in range(num_steps):
        points, classes = (tensor.to(device) for tensor in batch_of(64))
        loss = opt.step(lambda points=points, classes=classes: cross_entropy(model(points), classes))  # no backward()
        scheduler.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss:.3f}")
    points, classes = batch_of(1000)
    accuracy = model(points.to(device)).argmax(1).cpu().eq(classes).float().mean().item()
    print(f"accuracy {accuracy:.1%}")  # chance is 25%
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:2])
