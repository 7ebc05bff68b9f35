"""What is a lane's own: random streams, the buffers it changes, and the state it inherits from the caller's thread."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from distzo2_core import ThreadState

SMALL_BYTES = 64 * 1024  # buffers up to this size are compared by content in training mode


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


class CallerState:
    """What a lane inherits from the thread that called: modes, autocast, device, stream, number of threads."""

    def __init__(self, device: torch.device) -> None:
        self.thread_state = ThreadState()
        self.num_threads = torch.get_num_threads()
        self.autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}]
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.device = device
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter(self) -> None:
        """Takes the state over in the current thread; the modes end with `thread_state.exit()`."""
        self.thread_state.enter()
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)
        for kind, dtype in self.autocast:
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        if self.stream is not None:
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(self.stream)


class BufferGuard:
    """Gives each lane its own buffers (BatchNorm's statistics and the like), and the model its old ones after the pass.

    Changed buffers are noticed by their version counters, so that unchanged ones cost a comparison. torch's batch norm
    changes its statistics without counting a version; in training mode small buffers are compared by content.
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
        """Moves what the lane changed to `changed`, and restores the model's own."""
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
        """Removes, after the last lane, all that the lanes changed."""
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
            self._versions[i] = own._version - 1  # differs, so that the lane's values go out with it again
        else:
            module._buffers[name] = value

    def _restore(self, i: int) -> None:
        own = self._objects[i]
        if own is not None:
            with torch.no_grad():
                own.copy_(self._pristine[i])
            self._versions[i] = own._version
