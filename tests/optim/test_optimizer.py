"""ZOSGD as an optimizer: schedules, groups, seeds, state, divergence, and the model's own state."""

from __future__ import annotations

import functools
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from plain import flat_losses, plain_loop
from same_bits import assert_same, assert_same_tensors, same_bits
from torch import nn

import distzo2
from distzo2.optim.state import STILL, WARM_UP, DivergenceError, NonFiniteLossError, Progress


@pytest.mark.parametrize("weights", ["device", "host", "disk"])
def test_a_linear_schedule_to_zero_is_the_plain_loops(weights, tmp_path):
    steps = 6
    model = distzo2.offload(Blocks(), weights=weights, directory=tmp_path)
    opt = distzo2.ZOSGD(model, lr=2e-2, eps=1e-3, seed=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps)
    losses, used = [], []
    for _ in range(steps):
        opt.step(lambda: model(IDS))
        used.append(opt.last.lr[0])
        schedule.step()
        losses.append(flat_losses(opt))
    assert used == [float(np.float32(2e-2 * (1 - t / steps))) for t in range(steps)]
    before = model.state_dict()
    opt.step(lambda: model(IDS))  # the schedule has come to zero
    assert opt.last.lr == [0.0]
    assert_same_tensors(model.state_dict(), before)
    reference = Blocks().eval()
    expected = plain_loop(
        reference, [[lambda: reference(IDS)]] * steps, lr=lambda step: 2e-2 * (1 - step / steps), eps=1e-3, seed=0
    )
    assert_same((losses, before), (expected, reference.state_dict()))


def test_seeds(tmp_path):
    results = {}
    for seed in (0, 1, 2**63, 2**64 - 1):
        model, reference = offloaded(Blocks(), tmp_path), Blocks().eval()
        opt = distzo2.ZOSGD(model, lr=1e-2, seed=seed)
        opt.step(functools.partial(model, IDS))
        results[seed] = flat_losses(opt)
        closures = [[functools.partial(reference, IDS)]]
        assert [results[seed]] == plain_loop(reference, closures, lr=lambda step: 1e-2, eps=1e-3, seed=seed)
    assert len({tuple(v) for v in results.values()}) == 4
    for seed in (-1, 2**64, 1.5, True):
        with pytest.raises(distzo2.DistZO2Error, match="seed"):
            distzo2.ZOSGD(offloaded(Blocks()), lr=1e-2, seed=seed)


def test_groups_with_rates_of_their_own():
    model = offloaded(Blocks())
    head = list(model.head.parameters())
    others = [p for n, p in model.named_parameters() if n.startswith("blocks")]
    before = model.state_dict()
    opt = distzo2.ZOSGD(model, [{"params": head, "lr": 1e-1}, {"params": others}], lr=0.0)
    opt.step(lambda: model(IDS))
    after = model.state_dict()
    assert not same_bits(after["head.weight"], before["head.weight"])
    assert same_bits(after["blocks.0.0.weight"], before["blocks.0.0.weight"])  # its rate is zero
    assert same_bits(after["embedding.weight"], before["embedding.weight"])  # in no group
    opt.param_groups[1]["lr"] = 1e-2
    opt.step(lambda: model(IDS))
    assert not same_bits(model.state_dict()["blocks.0.0.weight"], before["blocks.0.0.weight"])


def test_perturb_and_update_scales():
    model = offloaded(Blocks())
    head = list(model.head.parameters())
    opt = distzo2.ZOSGD(model, [{"params": head, "perturb_scale": 0.0}], lr=1e-2)
    opt.step(lambda: model(IDS))
    assert opt.last.losses[0] == opt.last.losses[1]
    opt.param_groups[0].update(perturb_scale=2.0, update_scale=0.0)
    before = model.state_dict()
    opt.step(lambda: model(IDS))
    assert opt.last.losses[0] != opt.last.losses[1]
    assert same_bits(model.state_dict()["head.weight"], before["head.weight"])


def test_weight_decay_leaves_biases_and_norms_out():
    model, opt = stepping(Blocks(), weight_decay=0.5)
    decays = {id(p): g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.0 if name.endswith("bias") else 0.5), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr of parameter group 0 is -1.0; 0 or more"),
        ({"lr": None}, "lr of parameter group 0 is None; a finite number"),
        ({"lr": 1e-2, "weight_decay": -1.0}, "weight_decay of parameter group 0 is -1.0; 0 or more"),
    ],
)
def test_rates_that_are_none(options, text):
    with pytest.raises(distzo2.DistZO2Error, match=text):
        distzo2.ZOSGD(distzo2.offload(Blocks()), **options)


def test_a_model_that_was_not_handed_over_is_refused():
    with pytest.raises(distzo2.DistZO2Error, match="handed over"):
        distzo2.ZOSGD(Blocks(), lr=1e-2)


def test_a_non_finite_loss_is_not_applied(tmp_path):
    model, opt = stepping(Blocks(), tmp_path, journal=tmp_path / "journal.jsonl", max_skipped=3)
    opt.step(lambda: model(IDS))
    before = model.state_dict()
    for _ in range(2):
        opt.step(lambda: model(IDS) * float("nan"))
        assert opt.last.skipped == "non-finite loss"
    assert_same_tensors(model.state_dict(), before)
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        opt.step(lambda: model(IDS) * float("inf"))
    opt.close()
    entries = distzo2.record.journal.read_journal(tmp_path / "journal.jsonl").entries
    assert [e.skipped for e in entries] == [None, *["non-finite loss"] * 3]
    assert all(not e.update.terms for e in entries[1:])


def test_a_step_without_closures_is_none(tmp_path):
    model, opt = stepping(Blocks(), tmp_path, journal=tmp_path / "journal.jsonl")
    before = model.state_dict()
    assert opt.step() is None and opt.step(None) is None and opt.step_count == 0 and opt.last is None
    assert_same_tensors(model.state_dict(), before)
    with pytest.raises(distzo2.DistZO2Error, match="a closure or a non-empty list"):
        opt.step([])


def test_a_state_dict_continues_with_the_same_bits(tmp_path):
    def run(steps, model, opt):
        return [opt.step(lambda: model(IDS)).item() for _ in range(steps)]

    model, opt = stepping(Blocks(), tmp_path, seed=4)
    run(3, model, opt)
    saved_opt, saved_model = opt.state_dict(), model.state_dict()
    expected, final = run(3, model, opt), model.state_dict()

    fresh, fresh_opt = stepping(Blocks(), tmp_path, lr=1.0, seed=9)
    fresh.load_state_dict(saved_model)
    fresh_opt.load_state_dict(saved_opt)
    assert fresh_opt.param_groups[0]["lr"] == 1e-2
    assert run(3, fresh, fresh_opt) == expected
    assert_same_tensors(fresh.state_dict(), final)


@pytest.mark.parametrize("journal", [None, "journal.jsonl"])
def test_an_optimizers_own_state_may_be_loaded_at_any_time(journal, tmp_path):
    """As accelerate does. What is loaded changes no bit."""

    def run(name, interrupts):
        path = tmp_path / f"{name}-{journal}" if journal else None
        model, opt = stepping(Blocks(), tmp_path, journal=path, weight_decay=0.1, num_probes=2)
        opt.register_load_state_dict_pre_hook(lambda opt, state: None)
        for _ in range(3):
            opt.step(lambda: model(IDS))
            if interrupts:
                buffer = io.BytesIO()
                torch.save(opt.state_dict(), buffer)
                buffer.seek(0)
                opt.load_state_dict(torch.load(buffer, weights_only=True))
                opt.load_state_dict(opt.state_dict())
        return model, opt

    (plain, _), (model, opt) = run("plain", False), run("loaded", True)
    assert_same_tensors(model.state_dict(), plain.state_dict())
    state = opt.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.5
    opt.step(lambda: model(IDS))
    if journal:
        before = model.state_dict()
        for other in (state, stepping(Blocks(), seed=9)[1].state_dict()):
            with pytest.raises(distzo2.DistZO2Error, match=r"writes the journal .*loaded-journal.*resume=True"):
                opt.load_state_dict(other)
        assert_same_tensors(model.state_dict(), before)
        opt.close()
        resumed = offloaded(Blocks())
        options = {"weight_decay": 0.1, "num_probes": 2, "journal": tmp_path / f"loaded-{journal}", "resume": True}
        with pytest.raises(distzo2.DistZO2Error, match="seed is 0"):
            distzo2.ZOSGD(resumed, lr=0.1, seed=5, **options)
        again = distzo2.ZOSGD(resumed, lr=0.1, **options)
        again.load_state_dict(opt.state_dict())
        assert again.param_groups[0]["lr"] == 0.5
        assert_same_tensors(resumed.state_dict(), before)


def test_strict_loading(tmp_path):
    model, opt = stepping(Blocks(), tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"head.weight": torch.zeros(32, 8)})
    opt.step(lambda: model(IDS))


def test_replaced_weights_end_a_journal(tmp_path):
    model, opt = stepping(Blocks(), tmp_path, journal=tmp_path / "journal.jsonl")
    opt.step(lambda: model(IDS))
    model.load_state_dict(Blocks().state_dict())
    with pytest.raises(distzo2.DistZO2Error, match="replaced from outside"):
        opt.step(lambda: model(IDS))
    opt.close()


def test_moving_and_casting_are_refused():
    model = offloaded(Blocks())
    moves = (model.half, model.double, lambda: model.head.to(torch.bfloat16), lambda: model.to("meta"))
    for move in moves:
        with pytest.raises(distzo2.DistZO2Error, match="before offload"):
            move()


def test_moves_to_where_the_model_is_change_nothing():
    class Cast(nn.Linear):
        def forward(self, x):
            return super(Cast, self.to(x.dtype)).forward(x)

    model = Blocks()
    model.blocks[1][0] = Cast(8, 8)
    offloaded(model)
    before = model.state_dict()
    assert model.to("cpu") is model and model.float() is model and model.head.cpu() is model.head
    assert model.to(torch.device("cpu"), torch.float32).share_memory() is model
    distzo2.ZOSGD(model, lr=0.0).step(lambda: model(IDS))
    assert_same_tensors(model.state_dict(), before)


def test_float64_and_twice_are_refused():
    with pytest.raises(distzo2.DistZO2Error, match=r"embedding\.weight is torch\.float64"):
        offloaded(Blocks().double())
    model = offloaded(Blocks())
    with pytest.raises(distzo2.DistZO2Error, match="already"):
        offloaded(model)


def progress(max_coef: float | None, clip_percentile: float | None = None) -> Progress:
    options = {"max_coef": max_coef, "clip_percentile": clip_percentile, "max_clipped": 3, "max_skipped": 3}
    return Progress(SimpleNamespace(**options, memory=()))


def use(progress: Progress, *coefs: float) -> tuple[np.ndarray, bool]:
    used, clipped = progress.clip(np.array(coefs, np.float32))
    progress.warn_if_still(used)
    progress.count(used.tolist(), None, clipped, max(map(abs, coefs)) if clipped else None)
    return used, clipped


def test_clipping_against_the_running_median():
    clipping = progress(10.0)
    for value in np.random.default_rng(0).normal(size=50).astype(np.float32):
        assert use(clipping, value) == (value, False)
    used, clipped = use(clipping, 1e6, -5e5)
    assert clipped and used[0] == pytest.approx(-2 * used[1])
    assert used[0] < 20
    use(clipping, 1e6)
    with pytest.raises(DivergenceError, match=r"step 52: .* running median for 3 steps in a row"):
        use(clipping, 1e6)
    use(clipping, 1e6)  # a run that is resumed after it begins to count again


def test_clipping_needs_a_history_and_can_be_off():
    clipping = progress(10.0)
    for _ in range(WARM_UP - 1):
        use(clipping, 1.0)
    assert use(clipping, 1e6)[1] is False
    off = progress(None)
    assert all(use(off, v)[1] is False for v in [1.0] * 40 + [1e30])


def test_clipping_to_a_running_percentile():
    """Of the coefficients as they were: of what it has clipped itself, a percentile could only fall. Clipping is usual
    there, and ends a run only where coefficients are far above it."""
    clipping = progress(10.0, 90.0)
    drawn = np.random.default_rng(0).lognormal(size=600).astype(np.float32)
    seen, clipped = [], 0
    for value in drawn:
        limit = np.percentile(seen[-101:], 90.0) if len(seen) >= WARM_UP else np.inf
        used, was_clipped = use(clipping, -value)
        assert was_clipped == (value > limit) and used == pytest.approx(-min(value, limit), rel=1e-6)
        seen.append(float(value))
        clipped += was_clipped
    assert 40 < clipped < 80
    for _ in range(5):
        use(clipping, float(np.percentile(seen[-101:], 90.0)) * 2.0)
    with pytest.raises(DivergenceError, match=r"above 10 times percentile 90 of the last 101 steps for 3 steps"):
        for _ in range(3):
            use(clipping, 1e6)


def test_a_resumed_run_clips_to_the_same_percentile(tmp_path):
    def run(name, *stops):
        options = {"journal": tmp_path / name, "clip_percentile": 60.0, "momentum": 0.5}
        for stop in stops:
            model, opt = stepping(Blocks(), tmp_path, resume=stop != stops[0], **options)
            while opt.step_count < stop:
                opt.step(functools.partial(model, IDS))
            opt.close()
        return model.state_dict(), distzo2.record.journal.read_journal(tmp_path / name).entries

    (state, entries), (resumed, theirs) = run("whole", 40), run("cut", 22, 40)
    assert_same_tensors(state, resumed)
    assert [(e.update, e.extra) for e in entries] == [(e.update, e.extra) for e in theirs]
    clipped = [e for e in entries if e.extra]
    assert 4 < len(clipped) < 20 and all(e.extra["largest"] > abs(e.coefs[0]) for e in clipped)
    for percentile in (0.0, 100.5, float("nan")):
        with pytest.raises(distzo2.DistZO2Error, match=r"clip_percentile=.*above 0 and at most 100"):
            stepping(Blocks(), clip_percentile=percentile)


def test_steps_that_change_nothing_are_told_once(caplog):
    still = progress(10.0)
    for value in (1.0, *[0.0] * (STILL - 1), 1e-9, *[0.0] * 3 * STILL):
        use(still, value, 0.0)
    (told,) = caplog.messages
    assert told.startswith(f"step {2 * STILL}: for {STILL} steps in a row no perturbation has changed a loss")
