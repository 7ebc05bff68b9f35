"""torch's CUDA streams and events without a GPU: who waits for whom is kept, as vector clocks, and nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.priority, self.cuda_stream = device, priority, id(self)
        self.clock: dict[Stream, int] = {self: 0}  # of each stream, how many operations have ended before the next one

    def work(self) -> tuple[Stream, int]:
        """Issues an operation and returns what `is_behind` takes."""
        self.clock[self] += 1
        return self, self.clock[self]

    def is_behind(self, work: tuple[Stream, int]) -> bool:
        return self.clock.get(work[0], 0) >= work[1]

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        for stream, count in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())


class Event:
    """The time between two is always a quarter of a second."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:  # torch would take the current device's, if none is named
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 250.0


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces torch's streams. Returns `compute`, which is current on device 1, and `work()`, which issues an
    operation on the stream that is current there. Device 0 is the current one, and has none."""
    compute = Stream()
    streams = [compute]

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        streams.append(entered)
        yield
        streams.pop()

    def current_stream(device: torch.device) -> Stream:
        assert torch.device(device) == torch.device("cuda:1")
        return streams[-1]

    for name, value in {"Stream": Stream, "Event": Event, "stream": stream, "current_stream": current_stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return SimpleNamespace(compute=compute, work=lambda: streams[-1].work())
