"""The estimator is right in the statistical sense: its direction and its error are those of theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import distzo2
import distzo2_core
from distzo2.optim.estimator import FZOO, SPSA, mean_loss


class InDouble(nn.Module):
    """A float32 model whose forward computes in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        params = {n: p.double() for n, p in self.inner.named_parameters()}
        logits = torch.func.functional_call(self.inner, params, kwargs={"input_ids": ids, "use_cache": False}).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tiny_llama() -> InDouble:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=24, hidden_size=8, num_hidden_layers=2, intermediate_size=16, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True, attn_implementation="eager",
            initializer_range=0.3,
        )  # fmt: skip
        return InDouble(LlamaForCausalLM(config)).eval()


def estimate(opt, model_params, steps: range, noise: str) -> torch.Tensor:
    """The sum of c·z over the steps' journal of coefficients, float64 [d]."""
    total = [torch.zeros(p.numel(), dtype=torch.float64) for p in model_params]
    draw = getattr(distzo2_core, noise)
    for step, coefs in steps:
        for probe, c in enumerate(coefs):
            for i, p in enumerate(model_params):
                total[i] += c * draw(p.numel(), seed=opt.settings.seed, step=step, param=i, probe=probe).double()
    return torch.cat(total)


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are so small that waking a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_direction_on_a_tiny_llama(noise):
    ids = torch.randint(0, 24, (2, 12), generator=torch.Generator().manual_seed(0))
    reference = tiny_llama()
    reference(ids).backward()
    gradient = torch.cat([p.grad.double().flatten() for p in reference.parameters()])
    d = gradient.numel()

    model = distzo2.offload(tiny_llama(), units=["."])
    opt = distzo2.ZOSGD(model, lr=0.0, eps=1e-3, num_probes=500, max_lanes=2, noise=noise, max_coef=None)
    params = list(reference.parameters())
    total, used = torch.zeros(d, dtype=torch.float64), 0
    for n in (500, 1000, 2000, 4000):
        while used < n:
            opt.step(lambda: model(ids))
            total += estimate(opt, params, [(opt.last.step, opt.last.coefs)], noise)
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
