"""Coefficients are those of the papers' formulas, and estimators refuse what does not suit them."""

from __future__ import annotations

import numpy as np
import pytest
from block_models import IDS, Blocks, stepping

import distzo2
from distzo2.estimators.protocol import Remembering, mean_loss
from distzo2.estimators.registry import ESTIMATORS, make_estimator, name_of
from distzo2.estimators.shaped import ES, FZOO
from distzo2.estimators.spsa import SPSA, CurvatureSPSA, MeAZO, SPSASign

# One micro-batch: two probes, both signs, and the clean loss.
BENT = {e: np.array([loss]) for e, loss in {(0, 0): 1, (0, 1): 2, (0, -1): 0.5, (1, 1): 1.25, (1, -1): 1.5}.items()}


def test_spsa_is_the_formula():
    losses = {(0, 1): np.array([1.0, 2.0]), (0, -1): np.array([0.5, 1.5]), (1, 1): np.array([3.0, 3.0]),
              (1, -1): np.array([3.0, 4.0])}  # fmt: skip
    assert SPSA().coefficients(losses, 2, 0.25).tolist() == [0.5 / (2 * 0.25 * 2), -0.5 / (2 * 0.25 * 2)]
    assert SPSA().evaluations(2) == [(0, 1), (0, -1), (1, 1), (1, -1)]


def test_fzoo_divides_by_the_spread_and_has_a_floor():
    losses = {(0, 0): np.array([1.0]), **{(k, 1): np.array([1.0 + k]) for k in range(4)}}
    spread = np.std([1.0, 2.0, 3.0, 4.0], ddof=1)
    assert np.allclose(FZOO().coefficients(losses, 4, 1e-3), np.arange(4) / (4 * spread), rtol=0, atol=0)
    flat = {e: np.array([1.0]) for e in losses}
    assert FZOO().coefficients(flat, 4, 1e-3).tolist() == [0.0] * 4
    with pytest.raises(distzo2.DistZO2Error, match="at least 2 probes"):
        FZOO().evaluations(1)


def test_means_are_summed_in_order():
    values = np.array([1.0, 1e16, -1e16, 1.0])
    assert mean_loss(values) == ((1.0 + 1e16) - 1e16 + 1.0) / 4


def test_signs_are_shared_among_the_probes():
    assert SPSASign().coefficients(BENT, 2, 0.25).tolist() == [0.5, -0.5]
    assert SPSASign().coefficients({e: BENT[0, 0] for e in BENT}, 2, 0.25).tolist() == [0.0, 0.0]


def test_curved_probes_count_less():
    bends = np.abs(np.array([2 - 2 + 0.5, 1.25 - 2 + 1.5])) / 0.25**2  # 8 and 12
    expected = np.array([1.5, -0.25]) / (2 * 0.25 * 2) / np.maximum(1.0, bends**0.1)
    assert np.allclose(CurvatureSPSA().coefficients(BENT, 2, 0.25), expected, rtol=1e-15)
    plain = SPSA().coefficients(BENT, 2, 0.25)
    assert np.array_equal(CurvatureSPSA(damping=2.0).coefficients(BENT, 2, 0.25), plain / 2)
    flat = {**BENT, (0, 1): np.array([1.5]), (1, 1): np.array([0.5])}
    assert np.array_equal(CurvatureSPSA().coefficients(flat, 2, 0.25), SPSA().coefficients(flat, 2, 0.25))
    assert CurvatureSPSA().evaluations(2) == [(0, 0), (0, 1), (0, -1), (1, 1), (1, -1)]


def test_a_second_moment_divides_the_rate():
    meazo, memory, moment = MeAZO(beta=0.75), MeAZO.memory, 0.0
    projected = np.array([1.5, -0.25]) / (2 * 0.25)
    for step in range(1, 4):
        scale = float(step)
        losses = {e: loss * scale for e, loss in BENT.items()}
        coefs, memory = meazo.coefficients_after(memory, losses, 2, 0.25)
        moment = 0.75 * moment + 0.25 * np.mean((scale * projected) ** 2)
        expected = scale * projected / (2 * np.sqrt(moment / (1 - 0.75**step)))
        assert np.allclose(coefs, expected, rtol=1e-11), step
        assert memory == pytest.approx((moment, 0.75**step), rel=1e-15)
    first = meazo.coefficients(BENT, 2, 0.25)
    assert np.allclose(first, meazo.coefficients({e: 100 * loss for e, loss in BENT.items()}, 2, 0.25), rtol=1e-9)
    assert isinstance(meazo, Remembering) and not isinstance(SPSA(), Remembering)
    assert meazo.coefficients({e: BENT[0, 0] for e in BENT}, 2, 0.25).tolist() == [0.0, 0.0]


def test_fitness_is_shaped_over_all_members():
    members = np.array([2, 0.5, 1.25, 1.5])
    shaped = (members - members.mean()) / members.std()
    expected = [(shaped[0] - shaped[1]) / 4, (shaped[2] - shaped[3]) / 4]
    assert np.allclose(ES().coefficients(BENT, 2, 1e-3), expected, rtol=1e-15)
    assert ES("ranks").coefficients(BENT, 2, 1e-3).tolist() == pytest.approx([1 / 4, -1 / 12])
    ties = {**BENT, (1, 1): np.array([2.0])}  # ranks 2.5, 0, 2.5, 1 of 3
    assert ES("ranks").coefficients(ties, 2, 1e-3).tolist() == pytest.approx([2.5 / 12, 1.5 / 12])
    one_sided = {(0, 1): np.array([3.0]), (1, 1): np.array([1.0])}
    assert ES(mirrored=False).coefficients(one_sided, 2, 1e-3).tolist() == [0.5, -0.5]
    assert ES(mirrored=False).evaluations(2) == [(0, 1), (1, 1)]
    for shape in ("zscore", "ranks", "group"):
        assert ES(shape).coefficients({e: BENT[0, 0] for e in BENT}, 2, 1e-3).tolist() == [0.0, 0.0]


def test_each_micro_batch_is_normalised_across_the_members():
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(4, 3)) * [1.0, 100.0, 0.0] + 5.0  # on the third all members agree
    losses = dict(zip(ES().evaluations(2), batches, strict=True))
    spread = np.where(batches.std(0) > 0, batches.std(0), 1.0)
    shaped = ((batches - batches.mean(0)) / spread).mean(1)
    expected = [(shaped[0] - shaped[1]) / 4, (shaped[2] - shaped[3]) / 4]
    assert np.allclose(ES("group").coefficients(losses, 2, 1e-3), expected, rtol=1e-12)


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 2, 0)])
def test_group_gets_the_means_of_micro_batches(counts, tmp_path):
    """Where closures return counts, too, without micro-batches that have nothing to count."""
    model, opt = stepping(Blocks(), tmp_path, estimator=ES("group"), num_probes=2)
    rows = (IDS[:1], IDS[1:], IDS)
    opt.step([lambda ids=ids, n=n: (model(ids) * n, n) for ids, n in zip(rows, counts, strict=True)])
    means = {
        e: np.array(row)[np.array(counts) > 0] for e, row in zip(opt.last.evaluations, opt.last.losses, strict=True)
    }
    assert opt.last.coefs == ES("group").coefficients(means, 2, 1e-3).astype(np.float32).tolist()


def test_what_is_refused():
    for name, probes in (("fzoo", 1), ("es", 1)):
        with pytest.raises(distzo2.DistZO2Error, match=f"estimator {name} needs at least 2 probes .*, got 1"):
            ESTIMATORS[name]().evaluations(probes)
    with pytest.raises(
        distzo2.DistZO2Error, match="shape='best' of estimator es: expected one of zscore, ranks, group"
    ):
        make_estimator("es", shape="best")
    for name, options, text in (
        ("es", {"form": 1}, "no option form; its options: shape, mirrored, floor"),
        ("spsa", {"damping": 1.0}, "no option damping; its options: none"),
        ("1.5spsa", {"damping": 0.0}, "damping=0.0 of estimator 1.5spsa: expected a positive"),
    ):
        with pytest.raises(distzo2.DistZO2Error, match=text):
            make_estimator(name, **options)
    assert [name_of(make_estimator(n)) for n in ESTIMATORS] == [
        "SPSA", "FZOO", "ES(zscore)", "1.5SPSA", "MeAZO", "SPSASign",
    ]  # fmt: skip
    assert name_of(ES("ranks", mirrored=False)) == "ES(ranks, one-sided)"
