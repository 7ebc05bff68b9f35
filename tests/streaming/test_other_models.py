"""Another model that was handed over, inside of a step's closures: the reference of DPO and KTO, a reward model."""

from __future__ import annotations

import functools

import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from both_ways import run_both
from same_bits import assert_same_tensors, same_bits
from torch import nn

import distzo2


def reference(directory=None, **options):
    model = Blocks(seed=6, num_blocks=6, width=12).bfloat16().requires_grad_(False)
    return offloaded(model, directory, **options), Blocks(seed=6, num_blocks=6, width=12).bfloat16().eval()


def token_logps(model, ids):
    x = model.embedding(ids)
    for block in model.blocks:
        x = x + block(x)
    return -nn.functional.cross_entropy(model.head(x).float().transpose(1, 2), ids, reduction="none").sum(1)


def dpo(ids, ref, model):
    """The loss of Rafailov et al. 2023, over pairs of neighbours."""
    with torch.no_grad():
        ratio = token_logps(model, ids) - token_logps(ref, ids)
    return -nn.functional.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()


def kto(ids, ref, model):
    """The loss of Ethayarajh et al. 2024; the reference comes first, and once more for the estimate of the KL term."""
    first = token_logps(ref, ids)
    ratio, rolled = token_logps(model, ids) - first, ids.roll(1, 0)
    kl = (token_logps(model, rolled) - token_logps(ref, rolled)).mean().clamp(min=0)
    return 1 - torch.sigmoid(0.1 * (ratio - kl) * torch.tensor([1.0, -1.0, 1.0, -1.0])).mean()


def around(ids, ref, model):
    """Windows of the reference are open while the lanes of the model take turns."""
    with distzo2.present(ref.head):
        bare = (ref.embedding(ids) @ ref.head.weight.T).float().logsumexp(-1).mean()
        return kto(ids, ref, model) + bare * model(ids) + ref.head.weight.float().square().sum()


def asking(ids, ref, model):
    """Passes of the reference inside of a lane; `evaluate` on a plain model is a call."""
    closures = [functools.partial(token_logps, ref, part) for part in ids.split(2)]
    found = distzo2.evaluate(ref, closures) if hasattr(ref, "_distzo2_runtime") else [c() for c in closures]
    return dpo(ids, ref, model) + torch.cat(found).mean() * model(ids)


BATCHES = [torch.randint(0, 32, (4, n), generator=torch.Generator().manual_seed(n)) for n in (5, 8)]


@pytest.mark.parametrize(("weights", "max_lanes"), [("disk", None), ("disk", 1), ("host", 3)])
@pytest.mark.parametrize("loss", [dpo, kto, around, asking])
def test_a_streamed_reference_has_the_plain_loops_bits(loss, weights, max_lanes, tmp_path):
    ref, plain = reference(tmp_path / "ref" if weights == "disk" else None, slots=2)
    before = ref.state_dict()
    run_both(
        Blocks, [functools.partial(loss, ids, ref) for ids in BATCHES], tmp_path / "model", max_lanes=max_lanes,
        plain_loss=[functools.partial(loss, ids, plain) for ids in BATCHES],
    )  # fmt: skip
    assert_same_tensors(ref.state_dict(), before)
    stats = distzo2.runtime_of(ref).stats()
    assert stats.get("slot_bytes", 0) <= 2 * 4096


def test_each_is_the_others_reference(tmp_path):
    """Two models that learn in turn, each with its own optimizer: a reference is up to date, and clean."""

    def run(wrap, directory):
        models = [Blocks(seed=s) for s in (5, 6)]
        plain = [Blocks(seed=s).eval() for s in (5, 6)]
        opts = [stepping(model, directory / f"{i}", seed=i)[1] for i, model in enumerate(models)]
        losses = []
        for step in range(4):
            mine, other = step % 2, 1 - step % 2
            plain[other].load_state_dict(models[other].state_dict())
            given = models[other] if wrap else plain[other]
            losses.append(float(opts[mine].step(lambda m=models[mine], o=given: dpo(BATCHES[1], o, m))))
        return losses

    assert run(True, tmp_path / "a") == run(False, tmp_path / "b")


def test_an_error_in_the_reference_comes_as_it_was_raised_and_loses_nothing(tmp_path):
    ref, plain = reference(tmp_path / "ref")
    model, opt = stepping(Blocks(), tmp_path / "model")
    calls = []

    def failing(module, args):
        calls.append(0)
        if len(calls) == 3:
            raise ZeroDivisionError("in the reference")

    handle = ref.blocks[4].register_forward_pre_hook(failing)
    before = model.state_dict()
    with pytest.raises(ZeroDivisionError, match="in the reference"):
        opt.step([functools.partial(around, ids, ref, model) for ids in BATCHES])
    handle.remove()
    assert_same_tensors(model.state_dict(), before)
    with torch.no_grad():
        assert same_bits(ref(IDS), plain(IDS))
    with pytest.raises(distzo2.DistZO2Error, match=r"head\.weight.*present\(module\)"):
        opt.step(lambda: model(IDS) + ref.head.weight.float().sum())
    with pytest.raises(distzo2.DistZO2Error, match=r"wrote blocks\.0\.0\.bias"):
        opt.step(lambda: model(IDS) + written(ref))
    assert_same_tensors(ref.state_dict(), plain.state_dict())
    opt.step(lambda: around(BATCHES[0], ref, model))


def written(ref):
    with distzo2.present(ref.blocks[0]):
        return ref.blocks[0][0].bias.mul_(2).sum()
