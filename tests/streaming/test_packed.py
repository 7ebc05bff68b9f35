"""Packed weights stream as their files have them, or as they are packed at load, with the bits of the decoded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

import tiny_gguf  # noqa: E402
from plain import flat_losses, plain_loop, update_  # noqa: E402
from same_bits import assert_same_tensors  # noqa: E402

import distzo2  # noqa: E402
import distzo2_core  # noqa: E402
from distzo2.errors import DistZO2Error  # noqa: E402
from distzo2.models.pretrained import clamped  # noqa: E402
from distzo2.models.replay import replay  # noqa: E402
from distzo2_core import reference  # noqa: E402

IDS = torch.arange(3, 27).view(2, 12)
KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q4_K", "Q6_K")
PLACES = ("device", "host", "disk")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One Llama in each type of blocks, and a checkpoint of 16 bits."""
    root, model = tmp_path_factory.mktemp("packed"), tiny_gguf.make_model("llama", num_hidden_layers=3)
    found = {kind: tiny_gguf.write(root / f"{kind}.gguf", "llama", model, kind, quantized=True) for kind in KINDS}
    found["raw"] = root / "raw"
    model.bfloat16().save_pretrained(found["raw"])
    return found


def only(*names: str) -> Any:
    """Freezes all parameters but those with one of these in their names."""

    def prepare(model, checkpoint_map):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and any(each in name for each in names))
        return model, checkpoint_map

    return prepare


def train(model: torch.nn.Module, steps: int = 3, **more: Any) -> list[list[float]]:
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-2, seed=3, num_probes=2, **more)
    losses = []
    for _ in range(steps):
        opt.step(lambda: model(input_ids=IDS, labels=IDS).loss)
        losses.append(flat_losses(opt))
    return losses


def decoded(model: torch.nn.Module) -> torch.nn.Module:
    """The plain model with a streamed one's weights, decoded."""
    plain = type(model)._from_config(model.config, dtype=torch.bfloat16).eval()
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


def assert_same_as_plain(
    found: list[tuple[list[list[float]], dict[str, torch.Tensor]]], plain: torch.nn.Module
) -> None:
    """Losses and weights of runs against a plain loop that trains the norms of `plain`, which is changed."""
    closure = [lambda: plain(input_ids=IDS, labels=IDS).loss]
    losses = plain_loop(plain, [closure] * 3, lr=lambda step: 1e-2, eps=1e-2, seed=3, num_probes=2,
                        trainable=lambda name: "norm" in name)  # fmt: skip
    for one in found:
        assert one[0] == losses
        assert_same_tensors(one[1], plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_training_beside_packed_weights_has_the_bits_of_the_decoded_model(files, kind: str, tmp_path: Path) -> None:
    found = []
    for place in PLACES:
        model = distzo2.from_pretrained(files[kind], weights=place, directory=tmp_path)
        plain = decoded(model)
        found.append((train(model), model.state_dict()))
        fixed = [copy.unit.name for copy in distzo2.runtime_of(model).weights.copies if copy.is_fixed]
        lies_there = place == "disk" and kind != "Q5_0"  # of which each block is widened
        assert fixed == ([f"model.layers.{i}" for i in range(3)] if lies_there else [])
    assert_same_as_plain(found, plain)


@pytest.mark.parametrize("computed", [torch.float32, torch.float16])
def test_packed_weights_are_decoded_to_what_is_computed_with(files, computed: torch.dtype, tmp_path: Path) -> None:
    """Never through the 16 bits that the parameters are declared in."""
    options = {"weights": "disk", "directory": tmp_path, "prepare": only()}
    model = distzo2.from_pretrained(files["Q4_K"], compute_dtype=computed, **options)
    wide = distzo2.from_pretrained(files["Q4_K"], dtype=computed, **options)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wide(input_ids=IDS).logits)


@pytest.mark.parametrize("store", ["affine4", "table4"])
def test_a_frozen_base_is_packed_at_load(files, store: str, tmp_path: Path) -> None:
    found = []
    for place in PLACES:
        model = distzo2.from_pretrained(
            files["raw"], weights=place, directory=tmp_path, store=store, prepare=only("norm")
        )
        block = distzo2.runtime_of(model).units[-2]
        assert block.num_bytes < 0.32 * sum(2 * p.numel for p in block.params)
        plain = decoded(model)
        found.append((train(model), model.state_dict()))
    assert_same_as_plain(found, plain)


def plain_codes(streamed: torch.nn.Module) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The losses of `train`, and the weights after it, of a loop in memory over the codes and scales of a model that
    was just loaded: what is not packed is updated as ever, and a code by its definition."""
    runtime, held = distzo2.runtime_of(streamed), {}
    for unit, views in runtime.access.visit():
        for param, view in zip(unit.params, views, strict=True):
            if param.is_coded:
                scale, dtype = param.layout.scale, param.stored.code_dtype
                scales = view[scale.offset : scale.offset + 4 * param.numel // scale.cols].view(torch.float32)
                codes = view[: param.numel * dtype.itemsize].view(dtype).clone()
                held[param.name] = codes, scales.repeat_interleave(scale.cols).clone()
    plain, lr, eps, probes = decoded(streamed), 1e-2, float(np.float32(1e-2)), 2
    params = list(enumerate(plain.named_parameters()))
    rest = {name: p.data.clone() for _, (name, p) in params if name not in held}
    assert held and rest
    history = []
    for step in range(3):
        losses = []
        for probe, sign in ((k, sign) for k in range(probes) for sign in (1, -1)):
            place = {"seed": 3, "step": step, "probe": probe}
            for i, (name, p) in params:
                w = (held[name][0].float() * held[name][1]).view(p.shape) if name in held else rest[name].float()
                p.data = distzo2_core.perturb_(w, sign * eps, param=i, **place).bfloat16()
            with torch.no_grad():
                losses.append(float(plain(input_ids=IDS, labels=IDS).loss))
        history.append(losses)
        coefs = [float(np.float32((losses[2 * k] - losses[2 * k + 1]) / (2 * eps * probes))) for k in range(probes)]
        for i, (name, p) in params:
            if name not in held:
                update_(rest[name], coefs, lr, 0.0, seed=3, step=step, param=i, noise="normal")
                continue
            codes, scales = held[name]
            change = np.zeros(p.numel(), np.float32)
            for k, c in enumerate(coefs):
                change = reference.fma(np.float32(c), reference.normal_values(3, step, i, k, 0, p.numel()), change)
            sums = np.float32(-lr) * change / scales.numpy()
            sums += reference.rounding_bits(3, step, i, 0, p.numel()).astype(np.float32) / np.float32(65536)
            top = torch.iinfo(codes.dtype).max
            moved = codes.double() + torch.from_numpy(np.floor(sums))
            codes.copy_(moved.clamp(-top, top))
    weights = {name: (codes.float() * scales).bfloat16() for name, (codes, scales) in held.items()} | rest
    for _, (name, p) in params:
        p.data = weights[name].view(p.shape)
    return history, plain.state_dict()


@pytest.mark.parametrize("store", ["affine8", "affine16"])
def test_codes_train_with_the_bits_of_a_plain_loop_wherever_they_live(files, store: str, tmp_path: Path) -> None:
    models = [distzo2.from_pretrained(files["raw"], weights=place, directory=tmp_path, store=store) for place in PLACES]
    name = "model.layers.1.mlp.up_proj.weight"
    before = models[0].state_dict()[name].clone()
    losses, expected = plain_codes(models[0])
    assert not torch.equal(before, expected[name])
    for model in models:
        assert train(model) == losses
        assert_same_tensors(model.state_dict(), expected)


def test_a_code_run_resumes_and_replays(files, tmp_path: Path) -> None:
    def model():
        return distzo2.from_pretrained(files["raw"], weights="host", store="affine16")

    whole = model()
    opt = distzo2.ZOSGD(whole, lr=1e-2, eps=1e-2, seed=3, journal=tmp_path / "whole.jsonl")
    cut = model()
    first = distzo2.ZOSGD(cut, lr=1e-2, eps=1e-2, seed=3, journal=tmp_path / "cut.jsonl")
    for step in range(4):
        opt.step(lambda: whole(input_ids=IDS, labels=IDS).loss)
        if step < 2:
            first.step(lambda: cut(input_ids=IDS, labels=IDS).loss)
    first.close()
    again = model()
    second = distzo2.ZOSGD(again, lr=1e-2, eps=1e-2, seed=3, journal=tmp_path / "cut.jsonl", resume=True)
    for _ in range(2):
        second.step(lambda: again(input_ids=IDS, labels=IDS).loss)
    expected = whole.state_dict()
    assert_same_tensors(again.state_dict(), expected)
    opt.close()
    replay(files["raw"], tmp_path / "whole.jsonl", tmp_path / "out", progress=False)
    replayed = distzo2.from_pretrained(tmp_path / "out").state_dict()
    assert_same_tensors(replayed, expected)


def test_what_packed_weights_cannot_do_is_refused(files, tmp_path: Path) -> None:
    model = distzo2.from_pretrained(files["Q4_1"])
    state = model.state_dict()
    model.load_state_dict(state)
    state["model.layers.0.mlp.up_proj.weight"] += 1
    with pytest.raises(DistZO2Error, match=r"unit model\.layers\.0 is packed"):
        model.load_state_dict(state)

    def thaw(model, checkpoint_map):
        return model.requires_grad_(True), checkpoint_map

    with pytest.raises(DistZO2Error, match=r"parameter model\.embed_tokens\.weight is packed \(Q4_1\)"):
        distzo2.from_pretrained(files["Q4_1"], prepare=thaw)


def test_an_edit_of_packed_weights_makes_them_plain(files) -> None:
    model = distzo2.from_pretrained(files["Q4_1"])
    expected = model.state_dict()
    with distzo2.edit(model):
        model.model.norm.weight.data += 1
    assert distzo2.runtime_of(model).units[0].packed is not None
    with distzo2.edit(model):
        model.model.layers[1].mlp.up_proj.weight.data += 1
    assert all(unit.packed is None for unit in distzo2.runtime_of(model).units)
    expected["model.norm.weight"] += 1
    expected["model.layers.1.mlp.up_proj.weight"] += 1
    assert_same_tensors(model.state_dict(), expected)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("trained", [(), ("q_norm", "post_feedforward")])
def test_gemma_streams_from_its_file_though_its_norms_are_made(name: str, trained, tmp_path: Path) -> None:
    """1 is taken away from them, so they are not as in the file. They are small, and resident."""
    path = tiny_gguf.write(tmp_path / "x.gguf", name, tiny_gguf.make_model(name), "Q4_K", quantized=True)
    found = []
    for place in PLACES:
        model = distzo2.from_pretrained(path, weights=place, directory=tmp_path / "blocks", prepare=only(*trained))
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
        losses = train(model) if trained else []
        found.append((logits, losses, model.state_dict()))
    copies = distzo2.runtime_of(model).weights.copies
    blocks = {f"model.layers.{i}" for i in range(model.config.num_hidden_layers)}
    assert {copy.unit.name for copy in copies if copy.streams} == blocks
    assert all(copy.is_fixed for copy in copies if copy.streams) and not (tmp_path / "blocks").exists()
    apart = {copy.unit.name for copy in copies if not copy.streams and copy.unit.beside is not None}
    assert apart == {f"{block} ({'trained' if trained else 'made'})" for block in blocks}
    for logits, losses, state in found[1:]:
        assert torch.equal(logits, found[0][0]) and losses == found[0][1]
        assert_same_tensors(state, found[0][2])


def test_a_weight_that_is_not_finite_is_named_at_its_first_visit(tmp_path: Path) -> None:
    """Scales of 60,000 are finite in a file, and lead beyond float16."""
    path = tiny_gguf.write(tmp_path / "wild.gguf", "llama", tiny_gguf.make_model("llama"), "Q4_0")
    model = distzo2.from_pretrained(path, compute_dtype=torch.float16)
    with pytest.raises(DistZO2Error, match=r"parameter model\.\S+ \(Q4_0\): expected finite weights.* beyond float16"):
        model(input_ids=IDS)


def test_decoded_weights_are_saved(files, tmp_path: Path) -> None:
    model = distzo2.from_pretrained(files["Q4_1"])
    expected = model.state_dict()
    distzo2.save_pretrained(model, tmp_path / "out")
    again = distzo2.from_pretrained(tmp_path / "out")
    assert_same_tensors(again.state_dict(), expected)
    assert not distzo2.runtime_of(again).base.is_packed


def test_codes_at_an_end_of_their_range_are_counted(files) -> None:
    model = distzo2.from_pretrained(files["raw"], store="affine8")
    assert clamped(model) == 0
    opt = distzo2.ZOSGD(model, lr=1e3, eps=1e-2, seed=3, max_coef=None)
    opt.step(lambda: model(input_ids=IDS, labels=IDS).loss)
    assert 0.5 < clamped(model) < 1
    assert clamped(distzo2.from_pretrained(files["Q4_1"])) == 0
