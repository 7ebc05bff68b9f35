"""Buffers of the model (BatchNorm's statistics and the like) that lanes change: each lane sees its own, and the model
has its old ones after the pass."""

from __future__ import annotations

import torch
from torch import nn

SMALL_BYTES = 64 * 1024  # buffers up to this size are compared by content in training mode


class BufferGuard:
    """Notices changed buffers by their version counters, so that unchanged ones cost a comparison.

    torch's batch norm changes its statistics without counting a version; in training mode small buffers are therefore
    compared by their contents.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slots: list[tuple[nn.Module, str]] = []
        self._objects: list[torch.Tensor | None] = []
        self._pristine: list[torch.Tensor | None] = []
        self._versions: list[int] = []
        self._training = False

    def begin(self) -> None:
        """Takes the model's buffers as they are. Contents are copied once, and again only after a change."""
        self._training = any(m.training for m in self._model.modules())
        slots = [(m, name) for m in self._model.modules() for name in m._buffers]
        objects = [m._buffers[name] for m, name in slots]
        known = {id(o): i for i, o in enumerate(self._objects)}
        pristine, versions = [], []
        for tensor in objects:
            i = known.get(id(tensor))
            fresh = tensor is not None and (i is None or self._differs(i))
            pristine.append(tensor.detach().clone() if fresh else (None if i is None else self._pristine[i]))
            versions.append(0 if tensor is None else tensor._version)
        self._slots, self._objects, self._pristine, self._versions = slots, objects, pristine, versions

    def swap_in(self, changed: dict[int, torch.Tensor]) -> None:
        """Gives the lane that is about to run the buffers that it changed before."""
        for i, value in changed.items():
            self._set(i, value)

    def swap_out(self, changed: dict[int, torch.Tensor]) -> None:
        """Keeps what the lane changed in `changed`, and restores the model's own."""
        for i, (module, name) in enumerate(self._slots):
            now = module._buffers.get(name)
            if now is self._objects[i]:
                if now is None or not self._differs(i):
                    continue
                changed[i] = now.detach().clone()
            else:
                changed[i] = now
                module._buffers[name] = self._objects[i]
            self._restore(i)

    def end(self) -> None:
        """After the last lane: nothing is left of what the lanes changed."""
        for i, (module, name) in enumerate(self._slots):
            module._buffers[name] = self._objects[i]
            if self._objects[i] is not None and self._differs(i):
                self._restore(i)

    def _differs(self, i: int) -> bool:
        """Whether the model's own buffer `i` is no longer what it was at the beginning."""
        own = self._objects[i]
        if own._version != self._versions[i]:
            return True
        return self._training and own.nbytes <= SMALL_BYTES and not torch.equal(own, self._pristine[i])

    def _set(self, i: int, value: torch.Tensor | None) -> None:
        module, name = self._slots[i]
        own = self._objects[i]
        if own is not None and value is not None and own.shape == value.shape and own.dtype == value.dtype:
            with torch.no_grad():
                own.copy_(value)
            self._versions[i] = own._version - 1  # differs: the lane's values go out with it again
        else:
            module._buffers[name] = value

    def _restore(self, i: int) -> None:
        own = self._objects[i]
        if own is not None:
            with torch.no_grad():
                own.copy_(self._pristine[i])
            self._versions[i] = own._version
