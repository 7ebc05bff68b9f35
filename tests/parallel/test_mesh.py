"""Shapes of meshes and the dealing of lanes: each lane is run once; what is impossible is refused with what fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distzo2.errors import UsageError
from distzo2.estimators.shaped import FZOO
from distzo2.estimators.spsa import SPSA
from distzo2.parallel.mesh import (
    GLOBAL,
    OWN,
    ROW,
    MeshShape,
    deal_evaluations,
    deal_evenly,
    deal_lanes,
    parse_mesh,
    pert_fits,
    resolve_mesh,
)


def spsa(num_probes: int):
    return SPSA().evaluations(num_probes)


def all_lanes(evaluations, num_batches):
    return [(e, m) for e in range(len(evaluations)) for m in range(num_batches)]


@given(pert=st.integers(1, 6), data=st.integers(1, 4), num_probes=st.integers(1, 6), extra=st.integers(0, 5))
def test_every_lane_is_run_by_exactly_one_rank(pert, data, num_probes, extra):
    shape, evaluations, total = MeshShape(pert, data), spsa(num_probes), data + extra
    if not pert_fits(evaluations, pert):
        return
    deal = deal_lanes(shape, evaluations, [total] * shape.size, GLOBAL)
    assert sorted(lane for lanes in deal.lanes for lane in lanes) == all_lanes(evaluations, total)
    sizes = [len(lanes) for lanes in deal.lanes]
    assert max(sizes) - min(sizes) <= len(evaluations) // pert  # of micro-batches one more or less, of evaluations none
    assert all(lanes == sorted(lanes) for lanes in deal.lanes)  # lanes of one evaluation stand together
    row = deal_lanes(shape, evaluations, [d + 1 for d in range(data) for _ in range(pert)], ROW)
    assert sorted(lane for lanes in row.lanes for lane in lanes) == all_lanes(evaluations, data * (data + 1) // 2)


@given(pert=st.integers(1, 4), data=st.integers(1, 4), num_probes=st.integers(1, 6), each=st.integers(1, 5))
def test_lanes_of_probes_with_batches_of_their_own(pert, data, num_probes, each):
    shape, evaluations, total = MeshShape(pert, data), spsa(num_probes), num_probes * each
    expected = [(e, m) for e, (probe, _) in enumerate(evaluations) for m in range(probe * each, (probe + 1) * each)]
    shares = [len(part) for part in deal_evenly(total, shape.size)]
    rows = [len(part) for part in deal_evenly(total, data) for _ in range(pert)]
    ways = (GLOBAL, shape.size, [total] * shape.size), (OWN, 1, shares), (ROW, pert, rows)
    for sharded, width, closures in ways:  # `width` ranks have the same list
        if width > 1 and min(closures) < width:
            with pytest.raises(UsageError, match="ranks cannot share"):
                deal_lanes(shape, evaluations, closures, sharded, own_batches=True)
            continue
        deal = deal_lanes(shape, evaluations, closures, sharded, own_batches=True)
        assert sorted(lane for lanes in deal.lanes for lane in lanes) == expected and deal.num_batches == each
        batches = [sorted({m for _, m in lanes}) for lanes in deal.lanes]
        assert all(len(lanes) == 2 * len(ms) for lanes, ms in zip(deal.lanes, batches, strict=True))  # both signs
        for ms, first, count in zip(batches, deal.first_batch, closures, strict=True):
            assert all(first <= m < first + count for m in ms)
        if sharded != ROW:
            assert [len(ms) for ms in batches] == shares


def test_ranks_own_closures_are_numbered_in_rank_order():
    deal = deal_lanes(MeshShape(2, 2), spsa(1), [2, 0, 3, 1], OWN)
    assert deal.num_batches == 6 and deal.first_batch == [0, 2, 2, 5]
    assert deal.lanes == [
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [],
        [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)],
        [(0, 5), (1, 5)],
    ]
    with pytest.raises(UsageError, match="no rank has a closure"):
        deal_lanes(MeshShape(1, 2), spsa(1), [0, 0], OWN)
    with pytest.raises(UsageError, match="rank 1 has 2 closures and rank 0, of the same data coordinate, 3"):
        deal_lanes(MeshShape(2, 1), spsa(1), [3, 2], ROW)


def test_both_signs_stay_together_where_the_probes_allow_it():
    for num_probes, pert in ((2, 2), (4, 2), (6, 3), (4, 4)):
        evaluations = spsa(num_probes)
        for part in deal_evaluations(evaluations, pert):
            assert len(part) == 2 * num_probes // pert
            assert {evaluations[i] for i in part} == {
                (p, s) for p in {evaluations[i][0] for i in part} for s in (1, -1)
            }
    assert deal_evaluations(spsa(1), 2) == [[0], [1]]
    assert deal_evaluations(spsa(2), 4) == [[0], [1], [2], [3]]
    assert deal_evaluations(spsa(3), 2) == [[0, 1, 2], [3, 4, 5]]
    assert deal_evaluations(FZOO().evaluations(4), 2) == [[0, 1, 2], [3, 4]]  # the clean one goes to the first rank


@pytest.mark.parametrize(
    ("world_size", "num_probes", "micro_batches", "shape"),
    [
        (1, 1, 1, "pert=1,data=1"),
        (2, 1, 1, "pert=2,data=1"),
        (2, 1, 2, "pert=1,data=2"),  # both signs on one rank
        (2, 2, 2, "pert=2,data=1"),  # as many lanes, and half the noise
        (4, 1, 3, "pert=2,data=2"),
        (4, 2, 1, "pert=4,data=1"),
        (3, 1, 3, "pert=1,data=3"),
        (2, None, None, "pert=2,data=1"),
        (4, None, None, "pert=1,data=4"),
    ],
)
def test_the_mesh_that_is_chosen(world_size, num_probes, micro_batches, shape):
    evaluations = None if num_probes is None else spsa(num_probes)
    assert str(resolve_mesh(world_size, evaluations=evaluations, micro_batches=micro_batches)) == shape


@pytest.mark.parametrize(
    ("world_size", "asked", "num_probes", "micro_batches", "text"),
    [
        (4, {"pert": 2, "data": 4}, 1, 8, "8 ranks would .* 4; on 4 ranks, pert=1,data=4 or pert=2,data=2"),
        (4, {"pert": 3}, 1, 8, "a multiple of 3 ranks would be needed, and there are 4"),
        (4, {"pert": 2, "data": 1}, 1, 8, "2 ranks would be needed, and there are 4"),
        (4, {"pert": 4}, 1, 4, "4 ranks share neither .* evenly; on 4 ranks, pert=1,data=4"),
        (2, {"data": 2}, 1, 1, "1 micro-batch a step cannot .*; on 2 ranks, pert=2,data=1 would fit"),
        (3, {}, 1, 1, "no mesh of 3 ranks fits: more micro-batches or more probes"),
        (1, {"pert": 2}, 1, 1, "and there is 1"),
        (2, {"pert": 0}, 1, 1, "pert=0: a multiple of 0 ranks would be needed, and there are 2; on 2 ranks"),
    ],
)  # fmt: skip
def test_impossible_meshes_are_refused_with_what_fits(world_size, asked, num_probes, micro_batches, text):
    with pytest.raises(UsageError, match=text):
        resolve_mesh(world_size, **asked, evaluations=spsa(num_probes), micro_batches=micro_batches)


def test_the_option():
    assert parse_mesh("pert=2,data=3") == {"pert": 2, "data": 3}
    assert parse_mesh("data=4") == {"data": 4}
    for text in ("", "pert", "pert=0", "pert=2,pert=2", "rows=2", "pert=x"):
        with pytest.raises(ValueError):
            parse_mesh(text)
