"""Units that catch up: a slice gets the bytes of its part of the whole, and a version counts what a copy holds."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distzo2.formats.packing import packed_as
from distzo2.parallel.sliced_store import slices_of
from distzo2.weights.scratch import Scratch
from distzo2.weights.store import MemoryStore, Store, StoredCopy
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import Unit, collect_params
from distzo2_core import FAMILIES, GroupScalars, Term, Update

CPU = torch.device("cpu")


def unit(store: str | None = None) -> Unit:
    """Parameters of several dtypes; with `store` two of them are codes, with scales behind them."""
    layers = {"a": nn.Linear(64, 9), "b": nn.Linear(3, 50).bfloat16(), "c": nn.Linear(2, 2), "d": nn.Linear(128, 7)}
    params = collect_params(nn.ModuleDict(layers))
    for param in params if store else ():
        if param.name in ("a.weight", "d.weight"):
            param.stored = packed_as(param.shape, store)
    return Unit(0, "unit", params, [], resident=False)


def content(unit: Unit) -> torch.Tensor:
    """Bytes of a unit: codes are 0, and scales small."""
    buffer = torch.zeros(unit.num_bytes, dtype=torch.uint8)
    for view, param in zip(unit.views(buffer), unit.params, strict=True):
        if param.is_coded:
            scales = param.scales_of(range(param.numel))
            buffer[scales.start : scales.stop].view(torch.float32).uniform_(1e-3, 1e-2)
        else:
            view.copy_(param.tensor.detach())
    return buffer


def caught_up(unit: Unit, copy: StoredCopy, before: torch.Tensor, frozen: set[str]) -> torch.Tensor:
    """The bytes of a copy after two updates, of which the second is made at a version of its own."""
    store = MemoryStore([copy], CPU)
    weights = UnitWeights([unit], [copy], Store(), store, device=CPU)
    kept = torch.full_like(before, 255)
    for param in unit.params:
        item = param.dtype.itemsize if param.layout is None else 1
        for held in copy.kept_of(param):
            part = slice(param.byte_offset + held.start * item, param.byte_offset + held.stop * item)
            kept[part] = before[part]
    for place, at in copy.places:
        part = kept[place.start : place.stop]
        store.acquire(copy)[at : at + len(part)].copy_(part)
    trained = [p for p in unit.params if p.name not in frozen]
    weights.bind(weights, {p.index: 0 for p in trained}, 1, seed=5)
    reached = any(copy.elements_of(p) for p in trained)
    for step in range(2):
        weights.updates.push(Update(step, (GroupScalars(0.1, 0.01),), (Term(FAMILIES["normal"], step, 0, 0, 0.5),)))
        weights.trim()
        assert len(weights.updates.last) == reached  # no update is missing where none has anything to change
        weights.flush()
        assert copy.version == (weights.version if reached else 0) and not weights.updates.last
    return store.acquire(copy)[: copy.end - copy.begin].clone()


@pytest.mark.parametrize("store", [None, "affine8", "affine16"])
@pytest.mark.parametrize("shares", [[1.0], [1.0, 1.0, 1.0], [1.0, 3.0], [1.0] * 9], ids=str)
@pytest.mark.parametrize("frozen", [set(), {"a.weight", "b.bias"}], ids=["trained", "some frozen"])
def test_slices_catch_up_to_the_bytes_of_the_whole(store: str | None, shares: list[float], frozen: set[str]) -> None:
    torch.manual_seed(0)
    block = unit(store)
    before = content(block)
    whole = caught_up(block, StoredCopy(block, 0, block.num_bytes, block=0), before, frozen)
    slices = [caught_up(block, slices_of([block], shares, i)[0], before, frozen) for i in range(len(shares))]
    assert torch.equal(torch.cat(slices)[: len(whole)], whole)
    for param, old, new in zip(block.params, block.views(before), block.views(whole), strict=True):
        assert torch.equal(old, new) == (param.name in frozen), param.name


@pytest.mark.parametrize("store", [None, "affine8", "affine16"])
def test_every_element_is_in_one_slice(store: str | None) -> None:
    block = unit(store)
    for param in block.params:
        slices = [slices_of([block], [1.0, 2.0, 1.0], i)[0] for i in range(3)]
        assert [e for copy in slices for e in copy.elements_of(param)] == list(range(param.numel))


def test_scratch_follows_the_stream_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on another stream waits for kernels that still read the buffers, and an allocator waits for both."""
    log = []

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            log.append((self, "waits for", other))

    numbers = iter(range(9))
    buffer = lambda self, num_bytes: SimpleNamespace(  # noqa: E731
        data_ptr=functools.partial(str, next(numbers)), record_stream=lambda stream: log.append(("read on", stream))
    )
    monkeypatch.setattr(Scratch, "_allocate", buffer)
    one, scratch = unit(), Scratch([unit()], torch.device("cuda", 1))
    for name in ("A", "A", "B", "B"):
        monkeypatch.setattr(torch.cuda, "current_stream", {torch.device("cuda", 1): Stream(name)}.get)
        if scratch.find(one, "+") is None:
            scratch.take(one, ["+", "-"], [])
    assert log == [("B", "waits for", "A"), ("read on", "B"), ("read on", "B")]
