"""Windows: a forward finds each unit's weights, perturbed, where its module uses them and only there; what a draft got
silently wrong, each as a test."""

from __future__ import annotations

import pytest
import torch
from block_models import IDS, Blocks, offloaded
from plain import plain_loop
from same_bits import assert_same
from torch import nn

import distzo2


def run_both(build, make_closure, tmp_path, steps=3, train=False, **options):
    """Streams from disk and runs the plain loop; asserts the same bits of losses and weights."""
    model = build()
    reference = build()
    if not train:
        reference.eval()
    model = offloaded(model, tmp_path, train=train, **options)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3)
    losses = []
    for _ in range(steps):
        opt.step(make_closure(model))
        losses.append([v for row in opt.last.losses for v in row])
    expected = plain_loop(reference, [[make_closure(reference)]] * steps, lr=lambda step: 1e-2, eps=1e-3, seed=3)
    assert_same((losses, model.state_dict()), (expected, reference.state_dict()))
    return losses


def _seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return build().float().eval()


def test_vit_owner_parameters_used_after_an_inner_unit(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    losses = run_both(
        lambda: _seeded(lambda: ViTForImageClassification(config)),
        lambda model: lambda: model(pixel_values=pixels, labels=labels).loss,
        tmp_path,
    )
    assert losses[0][0] != losses[0][1]


def test_clip_nested_windows(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 8, "patch_size": 4},
        projection_dim=8,
        attn_implementation="eager",
    )  # fmt: skip
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    run_both(
        lambda: _seeded(lambda: CLIPModel(config)),
        lambda model: lambda: model(input_ids=ids, pixel_values=pixels, return_loss=True).loss,
        tmp_path,
    )


@pytest.mark.parametrize("name", ["T5", "Bert", "Albert", "Mamba"])
def test_other_shapes_of_models(name, tmp_path):
    import transformers

    if name == "T5":
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        build = lambda: transformers.T5ForConditionalGeneration(config)  # noqa: E731
    elif name == "Mamba":
        config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
        build = lambda: transformers.MambaForCausalLM(config)  # noqa: E731
    else:
        config = getattr(transformers, f"{name}Config")(
            vocab_size=40, hidden_size=16, embedding_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16,
        )  # fmt: skip
        build = lambda: getattr(transformers, f"{name}ForMaskedLM")(config)  # noqa: E731
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    run_both(
        lambda: _seeded(build),
        lambda model: lambda: model(input_ids=ids, labels=ids, **_no_cache(model)).loss,
        tmp_path,
        steps=2,
    )


def _no_cache(model):
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def test_use_of_a_weight_outside_its_module_is_named(tmp_path):
    class TiedByHand(Blocks):
        def forward(self, ids):
            x = self.embedding(ids)
            for block in self.blocks:
                x = x + block(x)
            return nn.functional.cross_entropy((x @ self.embedding.weight.T).flatten(0, 1), ids.flatten())

    model = offloaded(TiedByHand(), tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match=r"embedding\.weight.*units="):
        opt.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match=r"embedding\.weight"):
        opt.step(lambda: model(IDS))
    assert torch.isfinite(torch.stack([v.abs().max() for v in model.state_dict().values()])).all()
    run_both(TiedByHand, lambda m: lambda: m(IDS), tmp_path / "whole", units=["."])


def test_a_later_use_outside_its_module_is_named_when_the_loss_is_nan(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match=r"head\.weight.*units="):
        opt.step(lambda: model(IDS) + model.head.weight.sum())


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_inside_and_around_the_closure(inside, tmp_path):
    model, reference = offloaded(Blocks(), tmp_path), Blocks().eval()
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3)
    losses = []

    def forward(m):
        if not inside:
            return m(IDS)
        with torch.autocast("cpu", torch.bfloat16):
            return m(IDS)

    for _ in range(3):
        if inside:
            opt.step(lambda: forward(model))
        else:
            with torch.autocast("cpu", torch.bfloat16):
                opt.step(lambda: forward(model))
        losses.append([v for row in opt.last.losses for v in row])
    reference.requires_grad_(False)

    def plain_closure():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return reference(IDS)

    expected = plain_loop(reference, [[plain_closure]] * 3, lr=lambda step: 1e-2, eps=1e-3, seed=3)
    assert_same((losses, model.state_dict()), (expected, reference.state_dict()))
    assert losses[0][0] != losses[0][1]
    assert losses[0][0] != Blocks().eval()(IDS).item()  # it did run in 16 bits


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks(backend, tmp_path):
    torch._dynamo.reset()

    def build():
        return Blocks()

    model = build()
    reference = build().eval()
    for block in model.blocks:
        block.compile(backend=backend)
    model = offloaded(model, tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3)
    losses = []
    for _ in range(3):
        opt.step(lambda: model(IDS))
        losses.append([v for row in opt.last.losses for v in row])
    expected = plain_loop(reference, [[lambda: reference(IDS)]] * 3, lr=lambda step: 1e-2, eps=1e-3, seed=3)
    assert_same((losses, model.state_dict()), (expected, reference.state_dict()))
    torch._dynamo.reset()


def test_whole_model_compile_is_refused():
    torch._dynamo.reset()
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    whole = torch.compile(model, backend="eager")
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        opt.step(lambda: whole(IDS))
    model.compile(backend="eager")
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        opt.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        distzo2.offload(torch.compile(Blocks(), backend="eager"))
    torch._dynamo.reset()


def test_a_model_compiled_and_run_before_the_hand_over_is_refused():
    torch._dynamo.reset()
    model = Blocks().eval()
    whole = torch.compile(model, backend="eager")
    whole(IDS)
    opt = distzo2.ZOSGD(offloaded(model), lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        opt.step(lambda: whole(IDS))
    torch._dynamo.reset()
