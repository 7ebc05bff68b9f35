"""Scratch: where perturbed weights are made, out of place, for the lanes to use.

Buffers are reused across steps. What a buffer holds is a pure function of the clean weights and the emission, so a
buffer may be taken whenever no running lane looks at it: its content is made again when it is wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from distzo2.weights.units import Unit
from distzo2_core import aligned_buffer

SMALL_BYTES = 64 * 1024  # units up to this size share one class
BUFFERS = 2  # of a class at least: one for each sign; frozen blocks have one, which is clean
MOST_BUFFERS = 32  # and at most, in up to
CLASS_BYTES = 8 * 2**20  # where there are more than two


def buffers_of(unit: Unit) -> int:
    """How many copies of a unit are of use at least: those of frozen residents, as of embeddings, are used again."""
    return BUFFERS if unit.trainable or (unit.resident and unit.packed is None) else 1


@dataclass
class _SizeClass:
    num_bytes: int = 0  # of its largest unit, and so of each buffer
    least: int = 1  # buffers
    buffers: dict[Hashable, torch.Tensor] = field(default_factory=dict)  # by what they hold, oldest use first

    @property
    def limit(self) -> int:
        """How many buffers there may be."""
        return max(self.least, min(MOST_BUFFERS, CLASS_BYTES // self.num_bytes))


def _class_of(unit: Unit) -> Hashable:
    if unit.seen_bytes <= SMALL_BYTES:
        return "small"
    if unit.packed is not None:  # decoding again costs less than the memory of embeddings beside a block
        return "packed"
    return "streamed" if not unit.resident else ("resident", unit.seen_bytes.bit_length() // 3)


def _size_classes(units: Sequence[Unit]) -> dict[Hashable, _SizeClass]:
    classes: dict[Hashable, _SizeClass] = {}
    for unit in units:
        one = classes.setdefault(_class_of(unit), _SizeClass())
        one.num_bytes = max(one.num_bytes, unit.seen_bytes)
        one.least = max(one.least, buffers_of(unit))
    return classes


def least_bytes(units: Sequence[Unit]) -> int:
    """What the least buffers of each class of the units' sizes take."""
    return sum(one.least * one.num_bytes for one in _size_classes(units).values())


class Scratch:
    """One or two buffers for each class of unit sizes, and more where they are small; beyond, only while the open
    windows of one lane need them."""

    def __init__(self, units: Sequence[Unit], device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None  # whose kernels used the buffers last
        self._classes = _size_classes(units)
        self._class_of = {unit.index: self._classes[_class_of(unit)] for unit in units}

    def find(self, unit: Unit, key: Hashable) -> torch.Tensor | None:
        """Returns the buffer that holds `key` of `unit`, or None."""
        self._follow()
        buffers, held = self._class_of[unit.index].buffers, (unit.index, key)
        buffer = buffers.get(held)
        if buffer is not None and buffer is not next(reversed(buffers.values())):
            buffers[held] = buffers.pop(held)
        return buffer

    def limit(self, unit: Unit) -> int:
        """How many buffers there may be for units of this size."""
        return self._class_of[unit.index].limit

    def take(self, unit: Unit, keys: Sequence[Hashable], pinned: Collection[int]) -> list[torch.Tensor]:
        """Returns buffers to be filled with `keys` of `unit`; never one whose address is in `pinned`."""
        self._follow()
        size_class = self._class_of[unit.index]
        buffers = size_class.buffers
        limit = size_class.limit
        taken = []
        for key in keys:
            usable = (k for k, b in buffers.items() if b.data_ptr() not in pinned and all(b is not t for t in taken))
            oldest = next(usable, None)
            if oldest is None or (not isinstance(oldest, int) and len(buffers) < limit):
                taken.append(self._allocate(size_class.num_bytes))
            else:
                taken.append(buffers.pop(oldest))
            buffers[unit.index, key] = taken[-1]
        return taken

    def _follow(self) -> None:
        """Orders the current stream behind the one that used the buffers last, and their end behind both."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
            for size_class in self._classes.values():
                for buffer in size_class.buffers.values():
                    buffer.record_stream(stream)
        self._stream = stream

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if self._device.type == "cpu":
            return aligned_buffer(num_bytes)  # on huge pages: a matrix product that reads it misses the TLB less
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def forget(self) -> None:
        """Marks every buffer as holding nothing: a number stands in the place of what it held."""
        for size_class in self._classes.values():
            size_class.buffers = dict(enumerate(size_class.buffers.values()))

    @property
    def num_bytes(self) -> int:
        return sum(b.numel() for one in self._classes.values() for b in one.buffers.values())
