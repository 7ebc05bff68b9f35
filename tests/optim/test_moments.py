"""Momentum by replay: the bits of a plain loop that adds up in the same order, resumed, replayed and on a mesh."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from same_bits import assert_same_tensors, same_bits
from torch import nn

import distzo2
import distzo2_core
from distzo2.optim.moments import MOST, Momentum, default_window
from distzo2.record.entry import StepEntry
from distzo2.record.journal import read_journal
from distzo2.record.lineage import BranchPoint
from distzo2_core import Term
from distzo2_core.reference import fma

SEED, LR, EPS, BETA, WINDOW, PROBES = 3, 2e-2, float(np.float32(1e-3)), 0.8, 6, 2
SKIPPED = 7
RUN = {"lr": LR, "eps": EPS, "seed": SEED, "num_probes": PROBES, "momentum": BETA, "momentum_window": WINDOW}


def noise(w: torch.Tensor, param: int, step: int, probe: int) -> torch.Tensor:
    return distzo2_core.normal(w.numel(), seed=SEED, step=step, param=param, probe=probe).view(w.shape)


def fused(a: float, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(fma(np.float32(a), b.numpy(), c.numpy()))


def momentum_loop(model: nn.Module, steps: int, decay: float) -> list[list[float]]:
    """SPSA with a stored momentum, which is added up anew, oldest term first, since float32 forgets. Returns the
    coefficients of each step."""
    coefs: list[list[float]] = []
    params = [p.data for p in model.parameters()]
    for step in range(steps):
        own = []
        for probe in range(PROBES):
            losses = []
            for sign in (+1, -1):
                clean = [w.clone() for w in params]
                for index, w in enumerate(params):
                    w.copy_(fused(sign * EPS, noise(w, index, step, probe), w))
                losses.append(float(model(IDS)) if step != SKIPPED else math.nan)
                for w, before in zip(params, clean, strict=True):
                    w.copy_(before)
            own.append(float(np.float32((losses[0] - losses[1]) / (2 * EPS * PROBES))))
        coefs.append([] if math.isnan(own[0]) else own)
        for index, w in enumerate(params if coefs[-1] else ()):
            momentum = w * np.float32(decay) if w.dim() > 1 and decay else torch.zeros_like(w)
            for earlier in range(max(0, step - WINDOW + 1), step + 1):
                factor = math.prod([BETA] * (step - earlier))
                for probe, c in enumerate(coefs[earlier]):
                    momentum = fused(np.float32(factor * c), noise(w, index, earlier, probe), momentum)
            w.copy_(fused(-np.float32(LR), momentum, w))
    return coefs


def advance(model: nn.Module, opt: distzo2.ZOSGD, until: int) -> list[list[float]]:
    coefs = []
    while opt.step_count < until:
        scale = math.nan if opt.step_count == SKIPPED else 1.0
        opt.step(lambda scale=scale: model(IDS) * scale)
        coefs.append(opt.last.coefs)
    return coefs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The journal, coefficients and weights of 20 steps that nothing disturbs."""
    journal = tmp_path_factory.mktemp("whole") / "journal"
    model, opt = stepping(Blocks(), journal=journal, weight_decay=0.1, **RUN)
    coefs = advance(model, opt, 20)
    opt.close()
    return journal, coefs, model.state_dict()


def test_twenty_steps_are_those_of_a_plain_loop(whole):
    reference = Blocks().eval().requires_grad_(False)
    assert momentum_loop(reference, 20, 0.1) == whole[1]
    assert_same_tensors(whole[2], reference.state_dict())
    plain, opt = stepping(Blocks(), weight_decay=0.1, **(RUN | {"momentum": 0.0, "momentum_window": None}))
    advance(plain, opt, 20)
    assert not same_bits(plain.state_dict()["head.weight"], whole[2]["head.weight"])


def test_updates_list_their_window_oldest_first(whole):
    entries = read_journal(whole[0]).entries
    assert [entry.coefs for entry in entries] == whole[1] and not entries[SKIPPED].update.terms
    places = [(t.step, t.probe) for t in entries[9].update.terms]
    assert places == [(step, probe) for step in (4, 5, 6, 8, 9) for probe in range(PROBES)]
    first = entries[9].update.terms[0]
    assert first.c == float(np.float32(math.prod([BETA] * 5) * whole[1][4][0]))


@pytest.mark.parametrize("at", [4, SKIPPED + 1, 12])
def test_a_resumed_run_has_the_same_bits(whole, at, tmp_path):
    """In the middle of the window, and behind a skipped step."""
    options = {**RUN, "weight_decay": 0.1, "journal": tmp_path / "journal"}
    model, opt = stepping(Blocks(), tmp_path, **options)
    advance(model, opt, at)
    opt.close()
    model, opt = stepping(Blocks(), tmp_path, resume=True, **options)
    advance(model, opt, 20)
    opt.close()
    assert_same_tensors(model.state_dict(), whole[2])
    ours, theirs = (read_journal(path).entries for path in (tmp_path / "journal", whole[0]))
    assert [e.update for e in ours] == [e.update for e in theirs]
    with pytest.raises(distzo2.DistZO2Error, match=r"momentum is 0\.8 in the journal and None in this run"):
        stepping(Blocks(), resume=True, **(options | {"momentum": 0.0, "momentum_window": None}))


def test_a_loaded_state_continues_with_the_same_bits(whole, tmp_path):
    model, opt = stepping(Blocks(), tmp_path, weight_decay=0.1, **RUN)
    advance(model, opt, 11)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model, opt = stepping(Blocks(), tmp_path, weight_decay=0.1, **RUN)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    advance(model, opt, 20)
    assert_same_tensors(model.state_dict(), whole[2])


def test_a_branch_carries_on_the_momentum_of_its_parent(whole, tmp_path):
    """Also of a parent without any: coefficients are the same kind of number."""
    branch = BranchPoint(whole[0], 9)
    model, opt = stepping(Blocks(), weight_decay=0.1, journal=tmp_path / "same", branch_from=branch, **RUN)
    advance(model, opt, 20)
    opt.close()
    assert_same_tensors(model.state_dict(), whole[2])
    for noise, steps in (("normal", [6, 8, 9]), ("rademacher", [9])):
        options = RUN | {"momentum_window": 4, "noise": noise}
        path = tmp_path / noise
        model, opt = stepping(Blocks(), weight_decay=0.1, journal=path, branch_from=branch, **options)
        advance(model, opt, 10)
        opt.close()
        assert sorted({t.step for t in read_journal(path).entries[9].update.terms}) == steps


def test_terms_do_not_reach_what_their_step_did_not_use():
    momentum, term = Momentum(0.5, 4), functools.partial(Term, 0, probe=0, sub=0)
    momentum.count(0, [term(0, c=8.0)], [[2, 3]])
    momentum.count(1, [term(1, c=4.0)], [])
    own = [term(2, c=1.0)]
    assert [t.c for t in momentum.terms(2, own, [[1, 3]])] == [2.0, 2.0, 1.0]
    assert [t.c for t in momentum.terms(2, own, [[3, 3]])] == [2.0, 1.0]
    assert [t.c for t in momentum.terms(4, own, [[0, 9]])] == [0.5, 1.0]  # step 0 has left the window
    again = Momentum(0.5, 3)
    again.load(momentum.state())
    assert again.state() == momentum.state() and [t.c for t in again.terms(3, own, [])] == [1.0, 1.0]


def test_a_new_group_takes_part_from_the_next_step_on():
    model = offloaded(Blocks())
    head, others = model.head.weight, [p for n, p in model.named_parameters() if not n.startswith("head")]
    opt = distzo2.ZOSGD(model, others, lr=LR, momentum=0.9)
    opt.step(lambda: model(IDS))
    assert opt.state_dict()["distzo2"]["momentum"]
    opt.add_param_group({"params": [head]})
    assert opt.state_dict()["distzo2"]["momentum"] == []


def test_windows_of_their_own_accord():
    assert [default_window(beta) for beta in (0.0, 0.001, 0.5, 0.9, 0.95, 0.999)] == [1, 1, 7, 44, MOST, MOST]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"momentum": 1.0}, "momentum=1.0: expected a number from 0 to below 1"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": math.nan}, "momentum=nan"),
        ({"momentum_window": 4}, "momentum_window=4: there is no momentum"),
        ({"momentum": 0.9, "momentum_window": 0}, "momentum_window=0: expected 1 to 65536 steps of 1 probes"),
        ({"momentum": 0.9, "momentum_window": 5000, "num_probes": 16}, "expected 1 to 4096 steps of 16 probes"),
        ({"momentum": 0.9, "momentum_window": 2.5}, "momentum_window=2.5"),
    ],
)
def test_what_is_no_momentum(options, text):
    with pytest.raises(distzo2.DistZO2Error, match=text):
        stepping(Blocks(), **options)


def test_the_longest_line_is_read_again():
    scalars = (distzo2_core.GroupScalars(0.25, 0.0),)
    term = Term(0, 2**32 - 2, 2**20 - 1, 0, float(np.float32(-1.2345678e-38)))
    entry = StepEntry(2**32 - 1, distzo2_core.Update(2**32 - 1, scalars, (term,) * 65536), 0.5, [])
    assert StepEntry.from_line(entry.to_line()).coefs == []
