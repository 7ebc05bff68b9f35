"""Scratch: where perturbed weights are made, out of place, for the lanes to use.

Buffers are reused across steps. What a buffer holds is a pure function of the clean weights and the emission, so a
buffer may be taken whenever no running lane looks at it: its content is made again when it is wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import torch

from distzo2.weights.units import Unit
from distzo2_core import aligned_buffer

SMALL_BYTES = 64 * 1024  # units up to this size share one class, with more buffers
BUFFERS = 2  # one for each sign
SMALL_BUFFERS = 32


@dataclass(eq=False)
class _Entry:
    buffer: torch.Tensor
    address: int
    key: Hashable = None


class Scratch:
    """Two buffers for each class of unit sizes; more only while the open windows of one lane need them."""

    def __init__(self, units: Sequence[Unit], device: torch.device) -> None:
        self._device = device
        self._class_bytes: dict[Hashable, int] = {}
        for unit in units:
            kind = self._class_of(unit)
            self._class_bytes[kind] = max(self._class_bytes.get(kind, 0), unit.num_bytes)
        self._entries: dict[Hashable, list[_Entry]] = {kind: [] for kind in self._class_bytes}  # oldest use first
        self._holder: dict[Hashable, _Entry] = {}  # by what an entry holds

    @staticmethod
    def _class_of(unit: Unit) -> Hashable:
        if unit.num_bytes <= SMALL_BYTES:
            return "small"
        return "streamed" if not unit.resident else ("resident", unit.num_bytes.bit_length() // 3)

    def find(self, unit: Unit, key: Hashable) -> torch.Tensor | None:
        """Returns the buffer that holds `key` of `unit`, or None."""
        entry = self._holder.get((unit.index, key))
        if entry is None:
            return None
        self._used(self._entries[self._class_of(unit)], entry)
        return entry.buffer

    def take(self, unit: Unit, keys: Sequence[Hashable], pinned: Collection[int]) -> list[torch.Tensor]:
        """Returns buffers to be filled with `keys` of `unit`; never one whose address is in `pinned`."""
        kind = self._class_of(unit)
        entries = self._entries[kind]
        limit = SMALL_BUFFERS if kind == "small" else BUFFERS
        taken: list[_Entry] = []
        for _ in keys:
            usable = (e for e in entries if e.address not in pinned and e not in taken)
            entry = next(usable, None)
            if entry is None or (entry.key is not None and len(entries) < limit):
                buffer = self._allocate(self._class_bytes[kind])
                entry = _Entry(buffer, buffer.data_ptr())
                entries.append(entry)
            else:
                self._used(entries, entry)
            taken.append(entry)
        for key, entry in zip(keys, taken, strict=True):  # after all allocations: one that fails changes nothing
            self._holder.pop(entry.key, None)
            entry.key = (unit.index, key)
            self._holder[entry.key] = entry
        return [entry.buffer for entry in taken]

    @staticmethod
    def _used(entries: list[_Entry], entry: _Entry) -> None:
        if entries[-1] is not entry:
            entries.remove(entry)
            entries.append(entry)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if self._device.type == "cpu":
            return aligned_buffer(num_bytes)  # on huge pages: a matrix product that reads it misses the TLB less
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def forget(self) -> None:
        """Marks every buffer as holding nothing."""
        self._holder.clear()
        for entries in self._entries.values():
            for entry in entries:
                entry.key = None

    @property
    def num_bytes(self) -> int:
        return sum(e.buffer.numel() for entries in self._entries.values() for e in entries)
