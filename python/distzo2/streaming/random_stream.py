"""Random streams of lanes, and keeping the caller's random state as it was."""

from __future__ import annotations

import hashlib

import torch


class RandomStream:
    """The state of torch's default generators (CPU and the compute device) as one lane sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.capture()

    @classmethod
    def seeded(cls, device: torch.device, seed: int, step: int, batch: int) -> RandomStream:
        """The stream of micro-batch `batch` at `step`: the same for every sign and probe, whatever ran before."""
        digest = hashlib.sha256(f"distzo2 lane {seed} {step} {batch}".encode()).digest()
        value = int.from_bytes(digest[:8], "little", signed=True)
        stream = cls.__new__(cls)
        stream._device = device
        stream._cpu = torch.Generator().manual_seed(value).get_state()
        stream._cuda = torch.Generator(device=device).manual_seed(value).get_state() if device.type == "cuda" else None
        return stream

    def capture(self) -> None:
        """Takes the process's state into this stream."""
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def restore(self) -> None:
        """Makes this stream the process's state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
