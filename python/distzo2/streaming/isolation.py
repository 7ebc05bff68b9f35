"""What is a lane's own: random streams, buffers and attributes of modules, and the state of the caller's thread."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distzo2.errors import UsageError
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


class ScheduleState:
    """The modes, device and stream under which a pass's schedule goes on in the thread of a lane: a context manager."""

    def __init__(self, device: torch.device) -> None:
        self._thread_state = ThreadState()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._lanes: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        self._thread_state.enter()
        if self._stream is not None:
            self._lanes = torch.cuda.current_stream()
            torch.cuda.set_stream(self._stream)

    def __exit__(self, *error) -> None:
        if self._lanes is not None:
            torch.cuda.set_stream(self._lanes)
        self._thread_state.exit()


_SWITCHES = (  # of the process, which code sets for the time of a `with` block
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
)


class LaneSwitches:
    """Settings of torch for the whole process, such as the attention kernels that may be used, as one lane has them."""

    def __init__(self) -> None:
        self._own: tuple[Any, ...] | None = None  # None: as the caller has them

    def swap_in(self) -> None:
        if self._own is not None:
            set_switches(self._own)

    def swap_out(self, callers: tuple[Any, ...]) -> bool:
        """Restores the `callers`; returns whether the lane has others."""
        now = switches()
        self._own = None if now == callers else now
        if self._own is not None:
            set_switches(callers)
        return self._own is not None


def switches() -> tuple[Any, ...]:
    return tuple([get() for get, _ in _SWITCHES])


def set_switches(values: tuple[Any, ...]) -> None:
    for (get, set_to), value in zip(_SWITCHES, values, strict=True):
        if get() != value:
            set_to(value)


_MISSING = object()


class _OfThread(threading.local):
    attributes: LaneAttributes | None = None  # of the lane that runs in this thread


_of_thread = _OfThread()


class LaneAttributes:
    """The attributes and hooks of modules that a lane has set: swapped in while it runs, the model's own in between.

    A lane finds what the model had before the pass, or what it set itself. What it sets is noticed by methods of
    `nn.Module`, so lanes that set nothing cost nothing.
    """

    def __init__(self) -> None:
        # A dict of a module, a name in it (None: all that it holds), the model's own value, and the lane's.
        self._set: dict[tuple[int, str | None], list[Any]] = {}

    def record(self) -> None:
        """Records what the current thread sets from now on."""
        _of_thread.attributes = self

    @staticmethod
    def stop() -> None:
        _of_thread.attributes = None

    def note(self, module: nn.Module, name: str) -> None:
        """An attribute or a buffer is about to change."""
        place = module.__dict__
        if name in module._buffers:
            if name not in module._non_persistent_buffers_set:
                return  # part of the model's state: `BufferGuard` takes it back
            place = module._buffers
        self._note(place, name)

    def note_buffer(self, module: nn.Module, name: str) -> None:
        """A buffer is about to be registered."""
        if name in module._buffers:
            self.note(module, name)
        else:
            self._note(module._buffers, name)

    def note_hooks(self, hooks: dict[int, Any]) -> None:
        """A hook is about to be added. Handles refer to the dict, which stays the same object."""
        self._note(hooks, None)

    def _note(self, place: dict[Any, Any], name: str | None) -> None:
        key = id(place), name
        if key not in self._set:
            own = _get(place, name)
            self._set[key] = [place, name, own, own]

    def swap_in(self) -> None:
        for place, name, _, value in self._set.values():
            _put(place, name, value)

    def swap_out(self) -> None:
        for entry in self._set.values():
            place, name, own, _ = entry
            entry[3] = _get(place, name)
            _put(place, name, own)


def _get(place: dict[Any, Any], name: str | None) -> Any:
    return place.copy() if name is None else place.get(name, _MISSING)


def _put(place: dict[Any, Any], name: str | None, value: Any) -> None:
    if name is None:
        place.clear()
        place.update(value)
    elif value is _MISSING:
        place.pop(name, None)
    else:
        place[name] = value


@functools.cache
def watch_modules() -> None:
    """Has every change of a module's attributes, buffers and hooks noticed, from the first call on."""
    set_plainly, delete_plainly = nn.Module.__setattr__, nn.Module.__delattr__
    register_plainly = nn.Module.register_buffer

    @functools.wraps(set_plainly)
    def set_noticed(self: nn.Module, name: str, value: Any) -> None:
        if "_distzo2_streams" in self.__dict__ or _of_thread.attributes is not None:
            _notice(self, name, value)
        set_plainly(self, name, value)

    @functools.wraps(delete_plainly)
    def delete_noticed(self: nn.Module, name: str) -> None:
        _notice(self, name, None)
        delete_plainly(self, name)

    @functools.wraps(register_plainly)
    def register_noticed(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
        if _of_thread.attributes is not None:
            _of_thread.attributes.note_buffer(self, name)
        register_plainly(self, name, *args, **kwargs)

    nn.Module.__setattr__, nn.Module.__delattr__ = set_noticed, delete_noticed
    nn.Module.register_buffer = register_noticed
    for name in ("forward_hook", "forward_pre_hook"):
        setattr(nn.Module, f"register_{name}", _hooking(getattr(nn.Module, f"register_{name}"), f"_{name}s"))


def _hooking(register: Callable[..., Any], hooks: str) -> Callable[..., Any]:
    @functools.wraps(register)
    def noticed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _of_thread.attributes is not None:
            _of_thread.attributes.note_hooks(getattr(self, hooks))
        return register(self, *args, **kwargs)

    return noticed


@torch.compiler.disable  # traced, it would be compiled anew for each block
def _notice(module: nn.Module, name: str, value: Any) -> None:
    if module.__dict__.get("_distzo2_streams") is not None:
        refuse_new_weights(module, name, value)
    if _of_thread.attributes is not None and name not in module._modules:
        _of_thread.attributes.note(module, name)


def refuse_new_weights(module: nn.Module, name: str, value: Any) -> None:
    """
    Raises:
        UsageError: setting `name` to `value` would add or replace weights of a model that was handed over.
    """
    runtime = module.__dict__["_distzo2_streams"]
    if isinstance(value, nn.Module):
        known = all(_known(p, runtime) for p in value.parameters())
    elif isinstance(value, nn.Parameter):
        known = _known(value, runtime) and any(module is owner for owner in value._distzo2[0].owners)
    else:
        return
    if not known:
        raise UsageError(
            f"{type(module).__name__}.{name}: parameters of a model that was handed over cannot be added, replaced or "
            "resized, since they stream as they were cut. Do it before offload(), or inside `with distzo2.edit(model):`"
        )


def _known(parameter: nn.Parameter, runtime: Any) -> bool:
    return getattr(parameter, "_distzo2", (None, None))[1] is runtime


class CacheSwitch:
    """`use_cache` of a model's configurations, which is off in lanes, but for forwards of `generate`: that uses a cache
    of keys and values as it does elsewhere, and each call makes its own."""

    def __init__(self) -> None:
        self._setters: list[Callable[[bool], None]] = []  # of the configurations in which it is on
        self._on = True

    @contextmanager
    def off(self, configs: Sequence[Any]) -> Iterator[None]:
        """While entered, it is off unless `allow` switches it on."""
        on = [config for config in configs if getattr(config, "use_cache", None)]
        # Configurations of transformers check all that is set, which takes longer than the rest of the preparation.
        plainly = [object.__setattr__ if "use_cache" in vars(config) else setattr for config in on]
        self._setters = [functools.partial(put, config, "use_cache") for put, config in zip(plainly, on, strict=True)]
        self.allow(False)
        try:
            yield
        finally:
            self.allow(True)

    def allow(self, on: bool) -> None:
        """Switches it on, where it was, or off."""
        if on != self._on:
            self._on = on
            for setter in self._setters:
                setter(on)


@dataclass
class _Buffer:
    """One place in a module that holds a buffer, and the model's own tensor there."""

    buffers: dict[str, torch.Tensor | None]  # of the module
    name: str
    own: torch.Tensor | None
    pristine: torch.Tensor | None  # what `own` held when the pass began
    version: int  # of `own` then, by torch's count of writes
    is_repeated: bool  # an earlier place holds the same tensor


class BufferGuard:
    """Gives each lane its own buffers (BatchNorm's statistics and the like), and the model its old ones after the pass.

    Changed buffers are noticed by their version counters, so that unchanged ones cost a comparison. torch's batch norm
    changes its statistics without counting a version; in training mode small buffers are compared by content.
    """

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []
        self._training = False

    def begin(self, slots: list[tuple[nn.Module, str]], training: bool) -> None:
        """Takes the buffers of a model as they are: `slots` names them all, and `training` says whether any module is
        in that mode. Contents are copied once, and again only after a change."""
        self._training = training
        known, found, seen = {id(buffer.own): buffer for buffer in self._buffers}, [], set()
        for module, name in slots:
            own, pristine, version = module._buffers[name], None, 0
            if own is not None:
                before, version = known.get(id(own)), own._version
                pristine = own.detach().clone() if before is None or self._differs(before) else before.pristine
            found.append(_Buffer(module._buffers, name, own, pristine, version, id(own) in seen))
            seen.add(id(own))
        self._buffers = found

    def swap_in(self, changed: dict[int, torch.Tensor]) -> None:
        """Gives the lane that is about to run the buffers that it changed before."""
        for i, value in changed.items():
            buffer = self._buffers[i]
            own = buffer.own
            if own is not None and value is not None and own.shape == value.shape and own.dtype == value.dtype:
                with torch.no_grad():
                    own.copy_(value)
                buffer.version = own._version - 1  # differs, so that the lane's values go out with it again
            else:
                buffer.buffers[buffer.name] = value

    def swap_out(self, changed: dict[int, torch.Tensor]) -> None:
        """Moves what the lane changed to `changed`, and restores the model's own."""
        for i, buffer in enumerate(self._buffers):
            now = buffer.buffers.get(buffer.name)
            if now is not buffer.own:
                changed[i], buffer.buffers[buffer.name] = now, buffer.own
            elif now is None or buffer.is_repeated or not self._differs(buffer):
                continue
            else:
                changed[i] = now.detach().clone()
            self._restore(buffer)

    def end(self) -> None:
        """Removes, after the last lane, all that the lanes changed."""
        for buffer in self._buffers:
            buffer.buffers[buffer.name] = buffer.own
            if buffer.own is not None and self._differs(buffer):
                self._restore(buffer)

    def _differs(self, buffer: _Buffer) -> bool:
        """Whether the model's own buffer is no longer what it was at the beginning."""
        if buffer.own._version != buffer.version:
            return True
        small = self._training and buffer.own.nbytes <= SMALL_BYTES
        return small and not torch.equal(buffer.own, buffer.pristine)

    def _restore(self, buffer: _Buffer) -> None:
        if buffer.own is not None and not buffer.is_repeated:
            with torch.no_grad():
                buffer.own.copy_(buffer.pristine)
            buffer.version = buffer.own._version
