"""ZO2's loop in plain torch, for OPT: what a streamed step of ours is set against.

Written from the paper (arXiv 2503.12668, its dual forward, RNG states, deferred update and three streams), and kind to
it where it leaves a choice: a block is one flat range of pinned memory and one copy each way, copies never block the
host, and no more is synchronised than the order needs. As published, a block is perturbed and restored in place by
noise that a saved generator state gives again (four draws a block and step), its update waits for the next upload, and
the step ends with the losses on the host, so that nothing is uploaded across steps.

The losses and weights are those of MeZO's loop: parameters in the model's order, one seed a step. The tied table and
head stay on the device, perturbed once for each side; ZO2's own code perturbs them apart, by two different z.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import nn

# The next block's upload, this one's compute and the last one's offload at once; with two, the upload waits for the
# offload.
BUFFERS = 3
Event = Any  # torch.cuda.Event; None on a CPU


class ZO2Loop:
    """Steps of an OPT causal language model. Parameters that are on meta are left to be filled, see `named_weights`."""

    def __init__(
        self, model: nn.Module, device: str, *, lr: float, eps: float, seed: int, buffers: int = BUFFERS
    ) -> None:
        """Takes the model apart: its blocks go to pinned memory, the rest to the device."""
        self.lr, self.eps, self.seed, self.num_steps = lr, eps, seed, 0
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)
        cuda = self.device.type == "cuda"
        self.upload, self.compute, self.offload = [torch.cuda.Stream(self.device) if cuda else None for _ in range(3)]
        model.eval().requires_grad_(False)
        layers, model.model.decoder.layers = model.model.decoder.layers, nn.ModuleList()
        rest = model.to_empty(device=self.device) if next(model.parameters()).is_meta else model.to(self.device)
        rest.tie_weights()
        self.sides = (copy.deepcopy(rest), rest)  # the first is a copy, perturbed by +eps; the second is the weights
        self._place_blocks(layers, buffers)
        self.slot_free: list[Event] = [None] * buffers
        self.stored: list[Event] = [None] * len(self.blocks)
        self.pending: tuple[float, list[torch.Tensor]] | None = None  # scale and generator states of the last step

    def _place_blocks(self, layers: nn.ModuleList, buffers: int) -> None:
        """One pinned buffer for all blocks, which is filled, and `buffers` blocks on the device."""
        first = dict(layers[0].named_parameters())
        numel = sum(p.numel() for p in first.values())
        dtype = next(iter(first.values())).dtype
        self.host = torch.empty(len(layers) * numel, dtype=dtype)
        self.host.fill_(0)  # touched by all threads before it is pinned
        if self.upload is not None:  # torch's own pinned memory comes in powers of two
            num_bytes = self.host.numel() * self.host.element_size()
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), num_bytes, 0)))
        self.blocks = [self.host[number * numel :][:numel] for number in range(len(layers))]
        self.names = [(name, p.shape) for name, p in first.items()]
        for layer, block in zip(layers, self.blocks, strict=True):
            for (_, p), view in zip(layer.named_parameters(), self._views(block), strict=True):
                if not p.is_meta:
                    view.copy_(p)
        self.slots, self.shells = [], []
        for _ in range(buffers):
            shell, slot = copy.deepcopy(layers[0]), torch.empty(numel, dtype=dtype, device=self.device)
            for (name, _), view in zip(self.names, self._views(slot), strict=True):
                owner, _, leaf = name.rpartition(".")
                shell.get_submodule(owner)._parameters[leaf] = nn.Parameter(view, requires_grad=False)
            self.slots.append(slot)
            self.shells.append(shell)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The parameters of a block in its flat range."""
        ends = list(accumulate(shape.numel() for _, shape in self.names))
        return [flat[end - shape.numel() : end].view(shape) for end, (_, shape) in zip(ends, self.names, strict=True)]

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and stored weights: the rest's on the device, then the blocks' in host memory."""
        yield from self.sides[1].named_parameters()
        for number, block in enumerate(self.blocks):
            for (name, _), view in zip(self.names, self._views(block), strict=True):
                yield f"model.decoder.layers.{number}.{name}", view

    # ---- a step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """Two losses of token ids [batch, tokens] at +eps and -eps; the update is made when its weights come next."""
        if self.compute is not None:
            self.compute.wait_stream(torch.cuda.current_stream(self.device))
        self.generator.manual_seed(self.seed + self.num_steps)
        states = [self.generator.get_state()]
        with self._on(self.compute):
            plus, minus = self.sides
            weights = list(minus.parameters())
            self._update(weights, 0)
            self._perturb(weights, states[0], self.eps)
            states.append(self.generator.get_state())
            for mine, other in zip(plus.parameters(), weights, strict=True):
                mine.copy_(other)
            self._perturb(weights, states[0], -2 * self.eps)
            hidden = [embed(side, ids) for side in self.sides]

        def visit(number: int, shell: nn.Module) -> None:
            weights = list(shell.parameters())
            self._update(weights, number + 1)
            for side, scale in ((0, self.eps), (1, -2 * self.eps)):
                self._perturb(weights, states[number + 1], scale)
                if side == 0:
                    states.append(self.generator.get_state())
                hidden[side] = first_of(shell(hidden[side]))
            self._perturb(weights, states[number + 1], self.eps)

        self._stream_blocks(visit)
        with self._on(self.compute):
            losses = [loss(side, part, ids) for side, part in zip(self.sides, hidden, strict=True)]
            self._perturb(list(self.sides[1].parameters()), states[0], self.eps)
            plus_loss, minus_loss = (each.item() for each in losses)
        self.pending = (-self.lr * (plus_loss - minus_loss) / (2 * self.eps), states)
        self.num_steps += 1
        return plus_loss, minus_loss

    @torch.no_grad()
    def flush(self) -> None:
        """Makes the last update, which the next step would have made."""
        with self._on(self.compute):
            self._update(list(self.sides[1].parameters()), 0)
        self._stream_blocks(lambda number, shell: self._update(list(shell.parameters()), number + 1))
        self.pending = None
        self._synchronize()

    def close(self) -> None:
        """Gives the pinned memory back."""
        self._synchronize()
        if self.upload is not None:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())))
        self.blocks, self.host = [], torch.empty(0)

    def _stream_blocks(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Uploads each block to the next slot, calls visit(number, module) on the compute stream, and offloads it."""
        for number, block in enumerate(self.blocks):
            index = number % len(self.slots)
            with self._on(self.upload):
                self._wait(self.upload, self.slot_free[index])
                self._wait(self.upload, self.stored[number])
                self.slots[index].copy_(block, non_blocking=True)
                uploaded = self._event(self.upload)
            with self._on(self.compute):
                self._wait(self.compute, uploaded)
                visit(number, self.shells[index])
                computed = self._event(self.compute)
            with self._on(self.offload):
                self._wait(self.offload, computed)
                block.copy_(self.slots[index], non_blocking=True)
                self.slot_free[index] = self.stored[number] = self._event(self.offload)

    def _perturb(self, weights: list[torch.Tensor], state: torch.Tensor, scale: float) -> None:
        """w += scale * z in place, with the z that follow the generator's state."""
        self.generator.set_state(state)
        for weight in weights:
            weight.add_(torch.empty_like(weight).normal_(generator=self.generator), alpha=scale)

    def _update(self, weights: list[torch.Tensor], unit: int) -> None:
        """The update of the last step, if there was one; unit 0 is what is not in a block."""
        if self.pending is not None:
            scale, states = self.pending
            self._perturb(weights, states[unit], scale)

    # ---- streams; nothing on a CPU ----------------------------------------------------------------------------------

    @staticmethod
    def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    @staticmethod
    def _event(stream: torch.cuda.Stream | None) -> Event:
        return None if stream is None else stream.record_event()

    @staticmethod
    def _wait(stream: torch.cuda.Stream | None, event: Event) -> None:
        if event is not None:
            stream.wait_event(event)

    def _synchronize(self) -> None:
        if self.upload is not None:
            torch.cuda.synchronize(self.device)


def first_of(output: Any) -> torch.Tensor:
    """The hidden states of a block's output, which is a tuple in some versions of transformers."""
    return output[0] if isinstance(output, tuple) else output


def embed(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What OPT's decoder does before its blocks; with no padding, attention needs no mask but the causal one."""
    decoder = model.model.decoder
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return decoder.embed_tokens(ids) + decoder.embed_positions(None, 0, position_ids=positions)


def loss(model: nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What it does after them."""
    logits = model.lm_head(model.model.decoder.final_layer_norm(hidden))
    return model.loss_function(logits=logits, labels=ids, vocab_size=model.config.vocab_size).float()
