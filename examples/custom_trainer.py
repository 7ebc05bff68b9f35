"""A zeroth-order trainer in one file: a two-layer model in host memory that comes through device slots block by block.

It uses distzo2_core alone. Weights are bfloat16. Each step visits each block once: one pass over the block applies the
last step's update, stores the block, and writes a copy of it for every perturbation. docs/core.md explains the calls.

    python examples/custom_trainer.py [cpu | cuda]
"""

from __future__ import annotations

import sys

import torch

import distzo2_core as core

NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES = 16, 64, 4
SHAPES = [(NUM_HIDDEN, NUM_INPUTS), (NUM_CLASSES, NUM_HIDDEN)]  # a block holds one layer's matrix
SEED, NUM_PROBES, EPS, LR = 7, 4, 1e-2, 0.03


def batch_of(step: int, num_examples: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs [num_examples, 16] and the classes that a fixed linear teacher gives them."""
    inputs = core.normal(num_examples * NUM_INPUTS, seed=SEED, step=step, param=1000).view(-1, NUM_INPUTS)
    teacher = core.normal(NUM_INPUTS * NUM_CLASSES, seed=SEED, step=0, param=1001).view(NUM_INPUTS, NUM_CLASSES)
    return inputs, (inputs @ teacher).argmax(1)


class Trainer:
    """Weights in a pool, two slots on the device, and an engine that brings blocks from one to the other and back."""

    def __init__(self, device: str) -> None:
        sizes = [2 * rows * cols for rows, cols in SHAPES]  # bytes of bfloat16
        self.device, self.num_bytes = torch.device(device), max(sizes)
        self.pool = core.HostPool(sizes, device=device)
        self.tables = []  # where a block's elements lie, and which parameter they are
        for block, (rows, cols) in enumerate(SHAPES):
            initial = core.normal(rows * cols, seed=SEED, step=0, param=block) / cols**0.5
            self.pool.tensor(block).view(torch.bfloat16).copy_(initial)
            segment = core.Segment(0, rows * cols, torch.bfloat16, block, 0, group=0, rows=rows, cols=cols)
            self.tables.append(core.SegmentTable([segment]))
        self.slots = [self.buffer() for _ in range(2)]
        self.copies = [self.buffer() for _ in range(2 * NUM_PROBES)]  # perturbed weights of the block at work
        self.engine = core.CopyEngine(device, self.pool, [slot.data_ptr() for slot in self.slots], self.num_bytes)
        self.pending: list[core.Update] = []  # made, and not yet in the stored weights

    def buffer(self) -> torch.Tensor:
        """Memory for a block on the device; uint8 [num_bytes]."""
        if self.device.type == "cpu":
            return core.aligned_buffer(self.num_bytes)
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)

    def visit(self, block: int, program: core.Program) -> list[torch.Tensor]:
        """Brings a block in, applies the program's updates and stores it; returns the copies of the program's emits."""
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        self.engine.prefetch((block + 1) % len(SHAPES))
        slot = self.slots[self.engine.acquire(block, stream)]
        copies = self.copies[: program.num_emits]
        core.materialize(slot, self.tables[block], seed=SEED, program=program, outs=copies, write_back=True)
        self.engine.release(block, stream, dirty=program.num_updates > 0)
        rows, cols = SHAPES[block]
        return [copy[: 2 * rows * cols].view(torch.bfloat16).view(rows, cols) for copy in copies]

    def step(self, step: int, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        """One SPSA step of NUM_PROBES probes; returns the mean loss of its evaluations."""
        signs = [(probe, sign) for probe in range(NUM_PROBES) for sign in (1.0, -1.0)]
        emits = [core.Emit((core.Term(core.NORMAL, step, probe, 0, sign * EPS),), (1.0,)) for probe, sign in signs]
        program = core.encode_program(self.pending, emits, num_groups=1)
        lanes = [inputs.to(self.device)] * len(emits)
        for block in range(len(SHAPES)):  # one pass over the weights serves all evaluations
            weights = self.visit(block, program)
            lanes = [lane @ weight.float().T for lane, weight in zip(lanes, weights, strict=True)]
            if block + 1 < len(SHAPES):
                lanes = [lane.relu() for lane in lanes]
        labels = labels.to(self.device)
        losses = torch.stack([torch.nn.functional.cross_entropy(lane, labels) for lane in lanes]).tolist()
        slopes = [(losses[2 * k] - losses[2 * k + 1]) / (2 * EPS * NUM_PROBES) for k in range(NUM_PROBES)]
        terms = tuple(core.Term(core.NORMAL, step, probe, 0, slope) for probe, slope in enumerate(slopes))
        self.pending = [core.Update(step, (core.GroupScalars(lr=LR, weight_decay=0.0),), terms)]
        return sum(losses) / len(losses)

    def finish(self) -> list[torch.Tensor]:
        """Applies the last update, closes the engine and returns the weights."""
        program = core.encode_program(self.pending, [], num_groups=1)
        for block in range(len(SHAPES)):
            self.visit(block, program)
        self.pending = []
        self.engine.flush()
        self.engine.close()
        return [self.pool.tensor(b).view(torch.bfloat16).view(shape).clone() for b, shape in enumerate(SHAPES)]


def main(device: str = "cpu", num_steps: int = 300) -> tuple[list[float], float]:
    """Trains and reports; returns the mean loss of each step, and the accuracy on examples that were not trained on."""
    trainer = Trainer(device)
    losses = []
    for step in range(1, num_steps + 1):
        losses.append(trainer.step(step, *batch_of(step)))
        if step % 50 == 0:
            print(f"step {step}: loss {sum(losses[-50:]) / 50:.3f}")
    first, second = trainer.finish()
    inputs, labels = batch_of(0, 2000)
    accuracy = ((inputs @ first.float().T).relu() @ second.float().T).argmax(1).eq(labels).float().mean().item()
    print(f"accuracy {accuracy:.1%}")
    return losses, accuracy


if __name__ == "__main__":
    main(*sys.argv[1:2])
