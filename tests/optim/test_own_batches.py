"""Probes with batches of their own: which lanes run, their losses, what is written down, and what is refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from block_models import Blocks, offloaded, stepping
from same_bits import assert_same_tensors

import distzo2
import distzo2_core
from distzo2.record.journal import read_journal

SEED, EPS, PROBES = 5, float(np.float32(1e-3)), 3
OWN = {"seed": SEED, "eps": EPS, "num_probes": PROBES, "probe_batches": "own"}


def batch(step: int, index: int) -> torch.Tensor:
    return torch.randint(0, 32, (2 + index % 3, 7), generator=torch.Generator().manual_seed(100 * step + index))


def closures_of(model, step: int, ran: list | None = None) -> list:
    def closure(m: int):
        if ran is not None and distzo2.current_lane() is not None:
            place = distzo2.current_lane()
            ran.append((place.probe, place.sign, place.batch, place.first))
        ids = batch(step, m)
        return model(ids) * ids.numel(), ids.numel()

    return [functools.partial(closure, m) for m in range(2 * PROBES)]


def advance(model, opt, until: int) -> None:
    while opt.step_count < until:
        opt.step(closures_of(model, opt.step_count))


@pytest.mark.parametrize("max_lanes", [None, 1])
def test_a_probe_sees_its_own_part_alone(max_lanes, tmp_path):
    ran: list = []
    model, opt = stepping(Blocks(), tmp_path, journal=tmp_path / "journal", max_lanes=max_lanes, **OWN)
    opt.step(closures_of(model, 0))  # new code runs more often
    opt.step(closures_of(model, 1, ran))
    opt.close()
    assert {(p, s, m) for p, s, m, _ in ran} == {(m // 2, s, m) for m in range(2 * PROBES) for s in (+1, -1)}
    assert sorted(m for *_, m, first in ran if first) == list(range(2 * PROBES))
    reference = Blocks().eval().requires_grad_(False)
    params = [p.data for p in reference.parameters()]
    for step in range(2):
        clean, losses, coefs = [w.clone() for w in params], [], []
        for probe in range(PROBES):
            for sign in (+1, -1):
                for index, w in enumerate(params):
                    w.copy_(clean[index])
                    place = {"seed": SEED, "step": step, "param": index, "probe": probe}
                    distzo2_core.perturb_(w, sign * EPS, backend="reference", **place)
                parts = [batch(step, m) for m in (2 * probe, 2 * probe + 1)]
                losses.append([float(reference(ids) * ids.numel()) / ids.numel() for ids in parts])
            counts = [ids.numel() for ids in parts]
            plus, minus = (np.dot(row, counts) / sum(counts) for row in losses[-2:])
            coefs.append((plus - minus) / (2 * EPS * PROBES))
        entry = read_journal(tmp_path / "journal").entries[step]
        assert entry.losses == losses and entry.counts == [
            [float(batch(step, m).numel()) for m in (2 * p, 2 * p + 1)] for p in range(PROBES) for _ in range(2)
        ]
        assert entry.coefs == pytest.approx(coefs, rel=1e-5, abs=1e-6)
        for index, w in enumerate(params):
            w.copy_(clean[index])
            update = [distzo2_core.Term(0, step, k, 0, c) for k, c in enumerate(entry.coefs)]
            table = distzo2_core.SegmentTable([distzo2_core.Segment(0, w.numel(), w.dtype, index, 0, 0, 1, w.numel())])
            made = distzo2_core.Update(step, entry.update.groups, tuple(update))
            buffer = w.reshape(-1).view(torch.uint8)
            distzo2_core.materialize(buffer, table, seed=SEED, updates=[made], write_back=True, backend="reference")
            w.copy_(buffer.view(w.dtype).view(w.shape))
    assert_same_tensors(model.state_dict(), reference.state_dict())


def test_a_resumed_run_has_the_same_bits(tmp_path):
    states = []
    for name, stops in (("whole", (6,)), ("cut", (2, 6))):
        for stop in stops:
            options = {**OWN, "momentum": 0.5, "journal": tmp_path / name, "resume": stop != stops[0]}
            model, opt = stepping(Blocks(0.1), tmp_path, **options)
            advance(model, opt, stop)
            opt.close()
        states.append(model.state_dict())
    assert_same_tensors(*states)
    with pytest.raises(distzo2.DistZO2Error, match="probe_batches is 'own' in the journal and None in this run"):
        stepping(Blocks(0.1), **(options | {"probe_batches": "shared"}))


def test_what_has_no_batches_of_its_own():
    with pytest.raises(distzo2.DistZO2Error, match=r"estimator FZOO compares losses .*: expected one of spsa"):
        stepping(Blocks(), **(OWN | {"estimator": "fzoo"}))
    with pytest.raises(distzo2.DistZO2Error, match="there is one probe, which has the whole batch"):
        stepping(Blocks(), **(OWN | {"num_probes": 1}))
    with pytest.raises(distzo2.DistZO2Error, match="probe_batches='none': expected 'shared' or 'own'"):
        stepping(Blocks(), **(OWN | {"probe_batches": "none"}))
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2, **OWN)
    with pytest.raises(distzo2.DistZO2Error, match="5 micro-batches cannot be cut into equal parts for 3 probes"):
        opt.step(closures_of(model, 0)[1:])
    with pytest.raises(distzo2.DistZO2Error, match="count= is of a batch that all probes share"):
        opt.step(closures_of(model, 0), count=3)
    assert opt.step_count == 0
