"""The estimator is right in the statistical sense: its direction and its error are those of theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_models import IDS, Blocks, offloaded
from torch import nn

import distzo2
import distzo2_core
from distzo2.estimators.shaped import ES, FZOO
from distzo2.estimators.spsa import CurvatureSPSA, MeAZO, SPSASign


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_direction_is_that_of_the_gradient(noise):
    reference = Blocks(num_blocks=2)
    reference(IDS).backward()
    params = list(reference.parameters())
    gradient = torch.cat([p.grad.double().flatten() for p in params])
    d = gradient.numel()

    model = offloaded(Blocks(num_blocks=2), units=["."])
    opt = distzo2.ZOSGD(model, lr=0.0, eps=1e-3, num_probes=500, max_lanes=2, noise=noise, max_coef=None)
    draw = getattr(distzo2_core, noise)
    total, used = torch.zeros(d, dtype=torch.float64), 0
    for n in (500, 1000, 2000):
        while used < n:
            opt.step(lambda: model(IDS))
            for probe, c in enumerate(opt.last.coefs):
                place = {"seed": opt.settings.seed, "step": opt.last.step, "probe": probe}
                z = [draw(p.numel(), param=i, **place) for i, p in enumerate(params)]
                total += c * torch.cat(z).double()
            used += 500
        cosine = float(total @ gradient / (total.norm() * gradient.norm()))
        expected = (n / (n + d + 1)) ** 0.5
        # The spread of the cosine over seeds is about (1 - cos^2) / sqrt(2n) beside 1 / sqrt(d).
        assert cosine == pytest.approx(expected, abs=4 * (1 - expected**2) / (2 * n) ** 0.5), (n, d)
        ratio = float(total @ gradient) / (used / 500) / float(gradient @ gradient)
        assert ratio == pytest.approx(1.0, abs=5 * (2 / n) ** 0.5)


class Quadratic(nn.Module):
    """x·A·x / 2 with a diagonal A, in float64."""

    def __init__(self, d: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.x = nn.Parameter(torch.randn(d, generator=generator))
        self.register_buffer("a", torch.rand(d, generator=generator, dtype=torch.float64) + 0.5)

    def forward(self) -> torch.Tensor:
        x = self.x.double()
        return 0.5 * (self.a * x * x).sum()


@pytest.mark.parametrize(("noise", "excess"), [("normal", +1), ("rademacher", -1)])
def test_error_on_a_quadratic_falls_at_the_rate_of_theory(noise, excess):
    """E|ĝ - g|² = (d + 1)/N·|g|² for normal noise and (d - 1)/N·|g|² for signs; a quadratic has no bias in eps."""
    d = 6
    model = distzo2.offload(Quadratic(d))
    gradient = (Quadratic(d).a * Quadratic(d).x.double()).detach().numpy()
    opt = distzo2.ZOSGD(model, lr=0.0, eps=1e-2, num_probes=64, max_lanes=16, noise=noise, max_coef=None)
    estimates = []
    for _ in range(64):
        opt.step(lambda: model())
        z = np.stack(
            [
                getattr(distzo2_core, noise)(d, seed=0, step=opt.last.step, param=0, probe=k).double().numpy()
                for k in range(64)
            ]
        )
        estimates.append(64 * np.array(opt.last.coefs)[:, None] * z)
    single = np.concatenate(estimates)  # [4096, d], each the estimate of one probe
    for n in (1, 4, 16, 64):
        means = single.reshape(-1, n, d).mean(1)
        error = ((means - gradient) ** 2).sum(1).mean() / (gradient**2).sum()
        expected = (d + excess) / n
        # The relative spread of a mean of `len(means)` squared errors, heavy-tailed for normal noise.
        assert error == pytest.approx(expected, rel=6 * (3 / len(means)) ** 0.5), n
    error = ((single - gradient) ** 2).sum(1).mean() / (gradient**2).sum()
    assert abs(error - (d + excess)) < abs(error - (d - excess))


# By estimator, the squared correlation of a probe's coefficient with the derivative along the probe, which is normal:
# of its sign 2/pi, of its rank 3/pi. What only scales a step, or weighs alike curved probes alike, loses nothing.
SHAPED = {
    "fzoo": (FZOO(), 1.0),
    "es": (ES(), 1.0),
    "es, one-sided": (ES(mirrored=False), 1.0),
    "es, ranks": (ES("ranks"), 3 / np.pi),
    "es, group": (ES("group"), 1.0),
    "1.5spsa": (CurvatureSPSA(), 1.0),
    "meazo": (MeAZO(), 1.0),
    "spsa-sign": (SPSASign(), 2 / np.pi),
}


@pytest.mark.parametrize("name", SHAPED)
def test_the_update_points_along_the_gradient_as_far_as_theory_says(name):
    """Of N probes whose coefficients have a squared correlation r with the derivative, cos^2 = r·N / (r·N + d)."""
    estimator, kept = SHAPED[name]
    reference = Quadratic(40)
    reference().backward()
    gradient, n, steps = reference.x.grad.double(), 100, 5
    model = distzo2.offload(Quadratic(40))
    opt = distzo2.ZOSGD(model, lr=0.0, eps=1e-4, num_probes=n, noise="rademacher", max_coef=None, estimator=estimator)
    cosines = []
    for step in range(steps):
        opt.step([lambda: model()] * (2 if name == "es, group" else 1))
        z = [distzo2_core.rademacher(40, seed=0, step=step, param=0, probe=k).double() for k in range(n)]
        update = torch.tensor(opt.last.coefs, dtype=torch.float64) @ torch.stack(z)
        cosines.append(float(update @ gradient / (update.norm() * gradient.norm())))
    expected = (kept * n / (kept * n + 40)) ** 0.5
    assert np.mean(cosines) == pytest.approx(expected, abs=4 * (1 - expected**2) / (2 * n * steps) ** 0.5 + 0.01)


def test_an_estimator_of_ones_own():
    class SignsOnly:
        def evaluations(self, num_probes):
            return [(k, sign) for k in range(num_probes) for sign in (1, -1)]

        def coefficients(self, losses, num_probes, eps):
            return np.array([np.sign(losses[k, 1][0] - losses[k, -1][0]) for k in range(num_probes)])

    model = distzo2.offload(Quadratic(5))
    opt = distzo2.ZOSGD(model, lr=1e-2, estimator=SignsOnly(), num_probes=3)
    before = float(model())
    for _ in range(50):
        opt.step(lambda: model())
        assert set(opt.last.coefs) <= {1.0, -1.0}
    assert float(model()) < before
    opt.settings.estimator.coefficients = lambda *args: np.zeros(7)
    with pytest.raises(distzo2.DistZO2Error, match=r"shape \(7,\); one for each of 3 probes"):
        opt.step(lambda: model())
    for bad in ("adam", object()):
        with pytest.raises(distzo2.DistZO2Error, match="estimator"):
            distzo2.ZOSGD(distzo2.offload(Quadratic(5)), lr=1e-2, estimator=bad)
