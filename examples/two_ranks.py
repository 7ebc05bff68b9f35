"""Two ranks on one machine share every step; the weights are those of one rank, bit for bit.

    torchrun --standalone --nproc-per-node 2 examples/two_ranks.py
    python examples/two_ranks.py                                      # one rank: the same checksum

A step has two evaluations, of +eps·z and -eps·z, on two micro-batches each. With `pert=2` a rank runs one of the
evaluations, with `data=2` one of the micro-batches; only losses travel. With GPUs each rank takes one.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn.functional import mse_loss

import distzo2
import distzo2_core as core


def model_of(width: int = 64, num_blocks: int = 4) -> nn.Module:
    """The same weights on every rank; `ZOSGD` compares them."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(num_blocks)))


def main(num_steps: int = 20) -> int:
    torch.set_num_threads(1)  # of each rank; the bits of a forward may depend on it
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    mesh = distzo2.parallel.init(pert=ranks)  # before the model is handed over; or data=ranks
    device = f"cuda:{mesh.local_rank}" if torch.cuda.device_count() >= ranks else "cpu"
    model = distzo2.offload(model_of(), device=device, weights="host")
    opt = distzo2.ZOSGD(model, lr=0.02, eps=1e-3, num_probes=1)
    data = torch.Generator().manual_seed(1)  # the list given to `step` is the same on every rank
    for step in range(num_steps):
        batches = torch.randn(2, 16, 64, generator=data).to(device)
        loss = opt.step([lambda batch=batch: mse_loss(model(batch), batch.flip(1)) for batch in batches])
        if mesh.rank == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {loss:.6f}", flush=True)
    checksum = core.checksum(list(model.state_dict().values()))
    if mesh.rank == 0:
        print(f"{mesh.world_size} ranks ({mesh}): checksum of the weights {checksum & (2**64 - 1):016x}", flush=True)
    distzo2.parallel.shutdown()
    return checksum


if __name__ == "__main__":
    main()
