"""Gains over packed weights train with the bits of a plain loop, wherever the weights live."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf")

import tiny_gguf  # noqa: E402
from plain import flat_losses  # noqa: E402
from same_bits import assert_same_tensors  # noqa: E402

import distzo2  # noqa: E402
import distzo2_core  # noqa: E402
from distzo2.checkpoint.tensor_files import CheckpointError  # noqa: E402
from distzo2.errors import DistZO2Error  # noqa: E402
from distzo2.models.replay import replay  # noqa: E402

IDS = torch.arange(3, 27).view(2, 12)
PLACES = ("device", "host", "disk")
LR = {"Q4_0": 32.0, "Q4_K": 32.0, "affine4": 2.0}  # so large that updates would leave gains below 0
EPS, SEED, STEPS = 1e-2, 3, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One Llama in two types of blocks, and a checkpoint of 16 bits."""
    root, model = tmp_path_factory.mktemp("gains"), tiny_gguf.make_model("llama")
    found = {
        kind: tiny_gguf.write(root / f"{kind}.gguf", "llama", model, kind, quantized=True) for kind in ("Q4_0", "Q4_K")
    }
    found["affine4"] = root / "raw"
    model.bfloat16().save_pretrained(found["affine4"])
    return found


def load(files: dict[str, Path], kind: str, **more: Any) -> torch.nn.Module:
    more |= {"store": kind} if kind == "affine4" else {}
    return distzo2.from_pretrained(files[kind], prepare=distzo2.gains, **more)


def optimizer(model: torch.nn.Module, kind: str, **more: Any) -> distzo2.ZOSGD:
    return distzo2.ZOSGD(model, lr=LR[kind], eps=EPS, seed=SEED, num_probes=2, noise="rademacher", **more)


def train(model: torch.nn.Module, opt: distzo2.ZOSGD, steps: int = STEPS) -> list[list[float]]:
    losses = []
    for _ in range(steps):
        opt.step(lambda: model(input_ids=IDS, labels=IDS).loss)
        losses.append(flat_losses(opt))
    return losses


def group_numbers(param: Any) -> torch.Tensor:
    """The group of each weight, by which the file's scales are numbered; rows of a head lie in another order there."""
    layout, shape = param.layout, tuple(param.shape)
    rows = torch.arange(layout.rows)
    if layout.head_dim:
        rows = rows.view(-1, layout.head_dim // 2, 2).mT.reshape(-1)
    assert layout.gain.rows == 1 and layout.block % layout.gain.cols == 0
    cols = torch.arange(layout.cols) // layout.gain.cols
    return (rows[:, None] * (layout.cols // layout.gain.cols) + cols).view(shape)


def plain_loop(files: dict[str, Path], kind: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The losses of each step, and the gains and weights after the last, of two-sided SPSA written out over a model in
    memory."""
    streamed = load(files, kind)
    runtime = distzo2.runtime_of(streamed)
    packed = [p for p in runtime.params if p.gain is not None]
    groups = [group_numbers(p) for p in packed]
    model = type(streamed)._from_config(streamed.config, dtype=torch.bfloat16).eval()
    model.load_state_dict(streamed.state_dict(), strict=False)
    model.tie_weights()
    wide = load(files, kind, dtype=torch.float32).state_dict()
    values = [wide[p.name] for p in packed]
    gains = [torch.ones(p.gain.numel) for p in packed]

    def show(scale: float, step: int, probe: int) -> None:
        for p, group, value, gain in zip(packed, groups, values, gains, strict=True):
            if scale:
                where = {"seed": SEED, "step": step, "param": p.gain.index, "probe": probe, "family": "rademacher"}
                gain = distzo2_core.perturb_(gain.clone(), scale, **where, backend="reference")
            model.get_parameter(p.name).data = (gain[group] * value).bfloat16()

    history = []
    for step in range(STEPS):
        losses = []
        for probe in range(2):
            for sign in (1, -1):
                show(sign * EPS, step, probe)
                with torch.no_grad():
                    losses.append(float(model(input_ids=IDS, labels=IDS).loss))
        history.append(losses)
        eps = float(torch.tensor(EPS))
        coefs = [float(torch.tensor((losses[2 * k] - losses[2 * k + 1]) / (4 * eps))) for k in range(2)]
        for p, gain in zip(packed, gains, strict=True):
            noises = [
                distzo2_core.perturb_(
                    torch.zeros_like(gain), 1.0, seed=SEED, step=step, param=p.gain.index, probe=k,
                    family="rademacher", backend="reference",
                )
                for k in range(2)
            ]  # fmt: skip
            change = torch.tensor(0.0)
            for c, z in zip(coefs, noises, strict=True):  # signs: products are exact
                change = change + c * z
            exact = gain.double() - LR[kind] * change.double()  # of a fused product and sum
            gain.copy_(exact.float().clamp(min=0))
    show(0.0, STEPS, 0)
    weights = dict(model.state_dict())
    return history, weights | {p.gain.name: gain for p, gain in zip(packed, gains, strict=True)}


@pytest.mark.parametrize("kind", LR)
def test_gains_train_with_the_bits_of_a_plain_loop(files, kind: str, tmp_path: Path) -> None:
    losses, expected = plain_loop(files, kind)
    gains = [value for name, value in expected.items() if name.endswith("_gain")]
    assert gains and any((value == 0).any() for value in gains) and all((value >= 0).all() for value in gains)
    for place in PLACES:
        model = load(files, kind, weights=place, directory=tmp_path)
        assert train(model, optimizer(model, kind)) == losses
        assert_same_tensors(model.state_dict(), {name: expected[name] for name in model.state_dict()})
        assert expected.keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["Q4_0", "affine4"])
def test_a_run_of_gains_resumes_replays_and_is_saved(files, kind: str, tmp_path: Path) -> None:
    """Saved and replayed are weights with their gains applied, and nothing else."""
    whole, cut, again = (load(files, kind, weights="disk", directory=tmp_path) for _ in range(3))
    with closing(optimizer(whole, kind, journal=tmp_path / "whole.jsonl")) as opt:
        losses = train(whole, opt)
    with closing(optimizer(cut, kind, journal=tmp_path / "cut.jsonl")) as opt:
        train(cut, opt, 1)
    with closing(optimizer(again, kind, journal=tmp_path / "cut.jsonl", resume=True)) as opt:
        assert train(again, opt, STEPS - 1) == losses[1:]
    expected = whole.state_dict()
    assert_same_tensors(again.state_dict(), expected)

    weights = {name: value for name, value in expected.items() if not name.endswith("_gain")}
    distzo2.save_pretrained(whole, tmp_path / "saved")
    for backend in ("native", "reference"):
        replay(files[kind], tmp_path / "whole.jsonl", tmp_path / backend, progress=False, backend=backend)
    for name in ("saved", "native", "reference"):
        assert_same_tensors(distzo2.from_pretrained(tmp_path / name).state_dict(), weights)
    files_of = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("saved", "native")]
    assert files_of[0] == files_of[1]
    replay(files[kind], tmp_path / "whole.jsonl", tmp_path / "first", 0, progress=False)
    start = load(files, kind).state_dict()
    assert_same_tensors(distzo2.from_pretrained(tmp_path / "first").state_dict(), {n: start[n] for n in weights})


def test_gains_are_seen_in_float32_whatever_is_computed_in(files) -> None:
    model = load(files, "Q4_0", dtype=torch.float32, compute_dtype=torch.bfloat16)
    runtime = distzo2.runtime_of(model)
    assert {p.seen for p in runtime.params if p.is_gain} == {torch.float32}
    assert {p.seen for p in runtime.params if not p.is_gain} == {torch.bfloat16}
    bare = distzo2.from_pretrained(files["Q4_0"], dtype=torch.float32, compute_dtype=torch.bfloat16)
    with torch.no_grad():  # a gain of 1 changes no bit
        assert torch.equal(model(input_ids=IDS).logits, bare(input_ids=IDS).logits)


def test_gains_are_loaded_and_edited_as_other_weights_are(files) -> None:
    model, other = load(files, "Q4_0"), load(files, "Q4_0")
    train(other, optimizer(other, "Q4_0"), 1)
    expected = other.state_dict()
    model.load_state_dict(expected)
    assert_same_tensors(model.state_dict(), expected)
    assert sorted(distzo2.state_dict(other, trainable_only=True)) == sorted(n for n in expected if n.endswith("_gain"))

    projection = "model.layers.0.mlp.up_proj"
    with distzo2.edit(model):
        model.get_submodule(projection).weight_gain.data.zero_()
    assert not model.state_dict()[f"{projection}.weight"].any()
    with distzo2.edit(other):  # which makes the model plain, with its gains applied
        other.get_submodule(projection).weight.data += 1
    expected[f"{projection}.weight"] += 1
    assert_same_tensors(other.state_dict(), {n: v for n, v in expected.items() if not n.endswith("_gain")})


def test_what_gains_cannot_be_is_refused(files) -> None:
    with pytest.raises(CheckpointError, match=r"raw: gains are trained over packed weights, .* --store affine4"):
        distzo2.from_pretrained(files["affine4"], prepare=distzo2.gains)

    def freeze(model, checkpoint_map):
        model, checkpoint_map = distzo2.gains(model, checkpoint_map)
        model.get_parameter("model.layers.0.mlp.up_proj.weight_gain").requires_grad_(False)
        return model, checkpoint_map

    with pytest.raises(DistZO2Error, match=r"up_proj\.weight is packed with gains \(Q4_0 with gains\), and .* trained"):
        distzo2.from_pretrained(files["Q4_0"], prepare=freeze)

    def thaw(model, checkpoint_map):
        model, checkpoint_map = distzo2.gains(model, checkpoint_map)
        return model.requires_grad_(True), checkpoint_map

    with pytest.raises(DistZO2Error, match=r"is packed \(affine8 g64 with gains\), and cannot be perturbed"):
        distzo2.from_pretrained(files["affine4"], store="affine8", prepare=thaw)
