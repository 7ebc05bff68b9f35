"""A step's loss is the mean over all losses of the step, where closures return sums and counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, stepping

import distzo2
from distzo2.estimators.protocol import mean_loss
from distzo2.estimators.spsa import SPSA
from distzo2.record.header import has_older_rules, with_older_rules
from distzo2.record.journal import read_journal
from distzo2.record.line import encode_line

EPS = float(np.float32(1e-3))
CUTS = [(0, 5), (5, 6), (6, 14), (14, 21)]  # of the 21 tokens of IDS, into unequal parts


def token_losses(model: torch.nn.Module, first: int, last: int) -> torch.Tensor:
    """float64 [last - first]: a loss for each of these tokens, with the same bits in every micro-batch."""
    ids = IDS.reshape(-1, 1)
    x = model.embedding(ids)
    for block in model.blocks:
        x = x + block(x)
    return torch.nn.functional.cross_entropy(model.head(x)[:, 0], ids[:, 0], reduction="none")[first:last].double()


def noting(closure: Callable[[], Any], seen: list[Any]) -> Callable[[], Any]:
    def noted() -> Any:
        seen.append(closure())
        return seen[-1]

    return noted


def counted(losses: torch.Tensor) -> tuple[Any, Any]:
    return losses.sum(), losses.numel()


def mean(losses: torch.Tensor) -> torch.Tensor:
    return losses.mean()


def closures_of(model: torch.nn.Module, returns: Callable[..., Any] = counted, cuts: Any = CUTS) -> list[Any]:
    return [lambda cut=cut: returns(token_losses(model, *cut)) for cut in cuts]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("num_probes", [1, 2])
def test_it_is_the_sum_of_sums_over_the_sum_of_counts(num_probes: int) -> None:
    model, opt = stepping(Blocks(), eps=EPS, num_probes=num_probes, max_coef=None)
    kinds = [  # a tensor and a number, two numbers, two tensors, float32
        counted,
        lambda losses: (float(losses.sum()), float(losses.numel())),
        lambda losses: (losses.sum(), torch.tensor([losses.numel()])),
        lambda losses: (losses.sum().float(), np.int64(losses.numel())),
    ]
    for step in range(3):
        seen: list[list[Any]] = [[] for _ in CUTS]
        closures = [
            noting(lambda cut=cut, kind=kind: kind(token_losses(model, *cut)), seen[m])
            for m, (cut, kind) in enumerate(zip(CUTS, kinds, strict=True))
        ]
        result = opt.step(closures)
        # In each micro-batch the lanes run in the order of evaluations; in the first step one runs once more, alone.
        runs = [[tuple(map(float, pair)) for pair in each[: 2 * num_probes]] for each in seen]
        values = []
        for e in range(2 * num_probes):
            total = num = 0.0
            for micro_batch in runs:
                total, num = total + micro_batch[e][0], num + micro_batch[e][1]
            values.append(total / num)
        assert num == IDS.numel()
        expected = [
            np.float32((p - m) / (2 * EPS * num_probes)) for p, m in zip(values[::2], values[1::2], strict=True)
        ]
        assert opt.last.coefs == [float(c) for c in expected] and all(opt.last.coefs), step
        assert opt.last.counts == [[5.0, 1.0, 8.0, 7.0]] * (2 * num_probes)
        assert opt.last.losses == [[run[e][0] / run[e][1] for run in runs] for e in range(2 * num_probes)]
        assert float(result) == opt.last.loss == pytest.approx(np.mean(values), rel=1e-12)


def test_the_cut_of_a_step_does_not_matter() -> None:
    """As one batch and in pieces: the same losses up to float64's rounding. Their means differ, and so do steps."""
    found = []
    for cuts in ([(0, 21)], [(0, 6), (6, 21)], CUTS):
        for returns in (counted, mean):
            model, opt = stepping(Blocks(), eps=EPS)
            opt.step(closures_of(model, returns, cuts))
            found.append((opt.last.loss, opt.last.coefs[0]))
    (whole, coef), _, *others = found
    for (loss, c), (of_means, other) in zip(others[::2], others[1::2], strict=True):
        assert loss == pytest.approx(whole, rel=1e-14) and c == pytest.approx(coef, rel=1e-9)
        assert abs(of_means - whole) > 1e-3 and other != pytest.approx(coef, rel=1e-3)


@pytest.mark.parametrize("returns", [torch.sum, lambda x: x, lambda x: float(x.sum()), lambda x: (x.sum(), 1)])
def test_the_number_of_losses_may_be_known_beforehand(returns: Callable[..., Any], tmp_path: Path) -> None:
    """With it, closures return sums; with 1, what they have divided by the number already, as Trainer's do."""
    found, num = [], IDS.numel()
    for kind, count in ((counted, None), (returns, num), (returns, torch.tensor(num)), (lambda x: x.sum() / num, 1)):
        model, opt = stepping(Blocks(), eps=EPS, journal=tmp_path / f"{len(found)}.jsonl")
        opt.step(closures_of(model, kind), count=count)
        found.append(opt.last)
        opt.close()
    for last in found[1:]:
        assert last.loss == pytest.approx(found[0].loss, rel=1e-14)
        assert last.coefs == pytest.approx(found[0].coefs, rel=1e-9)
        assert last.difference == pytest.approx(found[0].difference, rel=1e-9)
        assert last.counts is None and last.loss == pytest.approx(np.mean(last.losses), rel=1e-14)
    assert found[1].coefs == found[2].coefs and found[1].losses == found[2].losses


@pytest.mark.parametrize(
    ("returns", "count", "reason"),
    [
        (mean, 0, "count=0.0: expected a finite number above 0"),
        (mean, math.nan, "count=nan"),
        (counted, 21, "step 0: count=21 was given, and closures returned counts too"),
    ],
)
def test_a_count_that_cannot_be_is_refused(returns: Callable[..., Any], count: float, reason: str) -> None:
    model, opt = stepping(Blocks())
    with pytest.raises(distzo2.DistZO2Error, match=reason):
        opt.step(closures_of(model, returns), count=count)
    assert opt.step_count == 0


def test_a_mean_counts_as_one() -> None:
    model, opt = stepping(Blocks(), eps=EPS)
    opt.step([lambda: token_losses(model, 0, 5).mean(), lambda: counted(token_losses(model, 5, 21))])
    assert opt.last.counts == [[1.0, 16.0]] * 2
    (a, b), (c, d) = opt.last.losses
    assert opt.last.loss == pytest.approx((a + 16 * b + c + 16 * d) / 34, rel=1e-14)
    assert opt.last.coefs[0] == pytest.approx((a + 16 * b - c - 16 * d) / 17 / (2 * EPS), rel=1e-6)


def test_means_have_the_bits_of_before_and_no_counts(tmp_path: Path) -> None:
    """Per-example losses too are a mean, and a pair whose count is 1 says no more than a mean."""
    runs = []
    for returns in (mean, lambda x: x, lambda x: (x.mean(), 1), lambda x: float(x.mean())):
        path = tmp_path / f"{len(runs)}.jsonl"
        model, opt = stepping(Blocks(), eps=EPS, journal=path)
        for _ in range(2):
            opt.step(closures_of(model, returns))
        plus, minus = (mean_loss(row) for row in opt.last.losses)
        assert opt.last.coefs == [float(np.float32((plus - minus) / (2 * EPS)))] and opt.last.counts is None
        opt.close()
        assert b"counts" not in path.read_bytes()
        runs.append(([entry.losses for entry in read_journal(path).entries], weights_of(model)))
    for losses, weights in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(value, runs[0][1][name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("returns", "reason"),
    [
        (lambda x: (x.sum(), 0), "step 0: the closures returned 0 as the number of losses"),
        (lambda x: (x.sum(), -3), "batch 0 returned a sum of losses and -3.0 as their number.*at least 0"),
        (lambda x: (x.sum(), math.nan), "sum of losses and nan as their number"),
        (lambda x: (x.sum(), torch.tensor(math.inf)), "sum of losses and inf as their number"),
        (lambda x: (x.sum(), 2, 3), r"a tuple of \[\], int, int; a loss was expected, or the pair"),
        (lambda x: (x, 21), r"a tuple of \[21\], int; a loss was expected"),
        (lambda x: (x.mean(), torch.zeros(2, 3)), r"a tuple of \[\], \[2, 3\]"),
        (lambda x: (), "a tuple of nothing"),
        (lambda x: (x.sum(), None), "returned NoneType"),
        (lambda x: [x.sum(), 21], "returned list"),
    ],
)
def test_what_is_no_pair_is_refused_and_nothing_is_made(returns: Callable[..., Any], reason: str) -> None:
    model, opt = stepping(Blocks())
    before = weights_of(model)
    with pytest.raises(distzo2.DistZO2Error, match=reason):
        opt.step(lambda: returns(token_losses(model, 0, 21)))
    assert opt.step_count == 0
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


def test_a_micro_batch_may_have_no_losses() -> None:
    """It adds nothing to the count; what it adds to the sum, such as a penalty, counts."""
    found = []
    for penalty in (None, 0.0, 3.0):
        model, opt = stepping(Blocks(), eps=EPS)
        closures = closures_of(model, cuts=[(0, 21)])
        if penalty is not None:
            closures += closures_of(model, lambda losses, p=penalty: (losses[0] * 0 + p, 0), [(0, 1)])
        opt.step(closures)
        found.append(opt.last)
    assert found[0].loss == found[1].loss and found[0].coefs == found[1].coefs
    assert found[1].counts == [[21.0, 0.0]] * 2 and [row[1] for row in found[2].losses] == [3.0, 3.0]
    assert found[2].loss == pytest.approx(found[0].loss + 3.0 / 21, rel=1e-12)


class Noting(SPSA):
    """Keeps the losses that it is given."""

    def coefficients(self, losses: Any, num_probes: int, eps: float) -> np.ndarray:
        self.given = dict(losses)
        return super().coefficients(losses, num_probes, eps)


def test_an_estimator_gets_what_gives_the_right_mean() -> None:
    for returns in (counted, mean):
        model, opt = stepping(Blocks(), eps=EPS, estimator=Noting())
        opt.step(closures_of(model, returns))
        given = opt.settings.estimator.given
        for row, key in zip(opt.last.losses, opt.last.evaluations, strict=True):
            weights = [b - a for a, b in CUTS] if returns is counted else None
            assert mean_loss(given[key]) == pytest.approx(np.average(row, weights=weights), rel=1e-14)
            assert given[key].tolist() == row or returns is counted


def test_sums_are_added_in_ascending_order_in_float64() -> None:
    model, opt = stepping(Blocks(), eps=EPS, estimator=Noting())
    sums, counts = [0.1, 1e16, -1e16, 0.7], [0.5, 2.0, 0.25, 3.0]

    def closure(m: int) -> Callable[[], Any]:
        return lambda: (token_losses(model, 0, 1)[0] * 0 + sums[m], counts[m])

    opt.step([closure(m) for m in range(4)])
    expected = (((0.1 + 1e16) - 1e16) + 0.7) / 5.75
    assert expected != (0.7 - 1e16 + 1e16 + 0.1) / 5.75
    given = opt.settings.estimator.given
    assert {key: value.tolist() for key, value in given.items()} == {(0, +1): [expected], (0, -1): [expected]}
    assert opt.last.counts == [counts] * 2


def test_a_sum_that_is_not_finite_skips_the_step(tmp_path: Path) -> None:
    model, opt = stepping(Blocks(), journal=tmp_path / "journal.jsonl")
    opt.step([lambda: (token_losses(model, 0, 5).sum() * math.inf, 5), lambda: counted(token_losses(model, 5, 21))])
    assert opt.last.skipped == "non-finite loss"
    opt.close()
    (entry,) = read_journal(tmp_path / "journal.jsonl").entries
    assert entry.skipped == "non-finite loss" and entry.counts == [[5.0, 16.0]]


def test_check_gives_the_mean() -> None:
    model, opt = stepping(Blocks())
    mean = opt.check(lambda: token_losses(model, 0, 21).mean())
    assert opt.check(lambda: counted(token_losses(model, 0, 21))) == pytest.approx(mean, rel=1e-14)


@pytest.mark.parametrize("how", ["resumed", "branched"])
def test_a_run_under_the_mean_of_means_goes_on_under_it(how: str, tmp_path: Path) -> None:
    """Under an older header two means of unequal batches weigh the same, even where closures return counts."""
    path = tmp_path / "journal.jsonl"
    model, opt = stepping(Blocks(), eps=EPS, journal=path)
    opt.step(closures_of(model, mean))
    opt.close()
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(encode_line(with_older_rules(read_journal(path).header), 1 << 20) + lines[1])
    found = []
    for name, returns in (("sums", counted), ("means", mean)):
        new = tmp_path / f"{name}.jsonl"
        if how == "resumed":
            new.write_bytes(path.read_bytes())
        options = {"resume": True} if how == "resumed" else {"branch_from": (path, None)}
        model, opt = stepping(Blocks(), eps=EPS, journal=new, **options)
        assert opt.step_count == 1
        opt.step(closures_of(model, returns))
        plus, minus = (mean_loss(row) for row in opt.last.losses)
        assert opt.last.counts is None and opt.last.coefs == [float(np.float32((plus - minus) / (2 * EPS)))]
        with pytest.raises(distzo2.DistZO2Error, match=r"0\.0 as their number, which must be finite and above 0"):
            opt.step(closures_of(model, lambda losses: (losses.sum(), 0)))
        opt.close()
        contents = read_journal(new)
        assert has_older_rules(contents.header) and len(contents.entries) == 2
        found.append(opt.last.loss)
    assert found[0] == pytest.approx(found[1], rel=1e-14)


def test_counts_that_differ_between_evaluations_are_all_kept(tmp_path: Path) -> None:
    """As of a closure that counts what the perturbed model says."""
    path, calls = tmp_path / "journal.jsonl", []
    model, opt = stepping(Blocks(), journal=path, max_lanes=1)

    def closure() -> tuple[torch.Tensor, int]:
        calls.append(0)
        return token_losses(model, 0, 21).sum(), len(calls)

    opt.step(closure)
    (first,), (second,) = opt.last.counts
    assert second == first + 1
    assert opt.last.loss == pytest.approx(
        (first * opt.last.losses[0][0] + second * opt.last.losses[1][0]) / (first + second)
    )
    opt.close()
    (entry,) = read_journal(path).entries
    assert entry.counts == opt.last.counts and entry.mean_loss == pytest.approx(opt.last.loss, rel=1e-14)
