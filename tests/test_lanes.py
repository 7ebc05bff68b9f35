"""Lanes and windows: what a draft got silently wrong, each as a test, and what the caller keeps."""

from __future__ import annotations

import contextvars
import gc
import threading

import numpy as np
import pytest
import torch
from plain import plain_loop
from test_equivalence import assert_same, same_bits
from torch import nn
from zoo import BY_NAME, CONV

import distzo2


def offloaded(model, directory=None, **options):
    weights = "host" if directory is None else "disk"
    return distzo2.offload(model, weights=weights, directory=directory, **options)


class Blocks(nn.Module):
    """Embedding, a list of blocks and a head, with room for mischief."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embedding = nn.Embedding(32, 8)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout)) for _ in range(4)
            )
            self.head = nn.Linear(8, 32, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), ids.flatten())


IDS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(1))


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


def test_dropout_is_the_same_for_both_signs(tmp_path):
    model = offloaded(Blocks(dropout=0.5), tmp_path, train=True)
    assert model.training
    opt = distzo2.ZOSGD(model, lr=0.0, eps=1e-6, seed=3, num_probes=2)
    opt.step([lambda: model(IDS), lambda: model(IDS)])
    first = np.array(opt.last.losses)
    assert np.ptp(first, axis=0).max() < 1e-3  # signs and probes differ by eps alone
    assert abs(first[0, 0] - first[0, 1]) > 1e-2  # micro-batches have streams of their own
    opt.step([lambda: model(IDS), lambda: model(IDS)])
    assert abs(np.array(opt.last.losses)[0, 0] - first[0, 0]) > 1e-2  # and so have steps


def test_eval_is_the_default():
    model = Blocks(dropout=0.5)
    assert model.training
    assert not offloaded(model).training


def test_batch_norm_statistics_are_left_alone(tmp_path):
    model = offloaded(CONV.build().train(), tmp_path, train=True)
    before = {n: b.clone() for n, b in model.named_buffers()}
    opt = distzo2.ZOSGD(model, lr=1e-2, seed=3)
    single = []
    for step in range(3):
        opt.step([CONV.closure(model, step), CONV.closure(model, step)])
        losses = np.array(opt.last.losses)
        assert (losses[:, 0] == losses[:, 1]).all()  # a lane does not see what another did to the buffers
        single.append(losses[:, 0].tolist())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert single[0][0] != single[0][1]


def test_a_lane_sees_its_own_buffers():
    class Counting(Blocks):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids):
            self.calls += 1
            loss = super().forward(ids)
            self.calls += 1
            return loss * self.calls

    model = offloaded(Counting())
    opt = distzo2.ZOSGD(model, lr=0.0)
    plain = Blocks().eval()(IDS).item()
    opt.step(lambda: model(IDS))
    assert np.allclose(opt.last.losses, 2 * plain, rtol=1e-2)
    assert float(model.calls) == 0


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


class Boom(Exception):
    pass


def test_an_exception_in_the_middle_of_a_block_comes_as_it_was_raised(tmp_path):
    class Fragile(nn.Linear):
        armed = False

        def forward(self, x):
            y = super().forward(x)
            if Fragile.armed:
                raise Boom("in the middle")
            return y

    model = Blocks()
    model.blocks[2][0] = Fragile(8, 8)
    offloaded(model, tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: model(IDS))
    before = model.state_dict()
    threads = threading.active_count()
    Fragile.armed = True
    for _ in range(3):
        with pytest.raises(Boom, match="in the middle"):
            opt.step(lambda: model(IDS))
    Fragile.armed = False
    assert threading.active_count() == threads
    assert opt.step_count == 1
    for name, value in model.state_dict().items():
        assert same_bits(value, before[name])
    assert all(torch.isnan(p).all() for p in model.parameters())
    opt.step(lambda: model(IDS))
    assert opt.step_count == 2


def test_only_one_lane_raises(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    calls = []

    def closure():
        calls.append(None)
        loss = model(IDS)
        if len(calls) == 2:
            raise KeyError("second")
        return loss

    with pytest.raises(KeyError, match="second"):
        opt.step(closure)
    assert len(calls) == 2
    opt.step(lambda: model(IDS))


def test_a_lane_that_skips_a_block_is_named():
    class Skipping(Blocks):
        def forward(self, ids, skip=None):
            x = self.embedding(ids)
            for i, block in enumerate(self.blocks):
                if i != skip:
                    x = x + block(x)
            return self.head(x).float().square().mean()

    model = offloaded(Skipping())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step([lambda: model(IDS, skip=1)] * 2)  # all lanes alike is no difference
    with pytest.raises(distzo2.DistZO2Error, match=r"position 2 .*'blocks\.1'.*'blocks\.2'"):
        opt.step([lambda: model(IDS), lambda: model(IDS, skip=1)])
    with pytest.raises(distzo2.DistZO2Error, match=r"'blocks\.3'.*'head'"):
        opt.step([lambda: model(IDS), lambda: model(IDS, skip=3)])
    opt.step([lambda: model(IDS)] * 2)


def test_a_lane_that_ends_early_is_named():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="no further unit"):
        opt.step([lambda: model(IDS), lambda: model.embedding(IDS).sum()])


def test_a_closure_that_never_enters_the_model():
    model, other = offloaded(Blocks()), Blocks()
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="without entering any unit"):
        opt.step(lambda: other(IDS))


def test_the_callers_random_state_is_left_as_it_was(tmp_path):
    model = offloaded(Blocks(dropout=0.5), tmp_path, train=True)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    opt.step(lambda: model(IDS))
    assert torch.equal(torch.get_rng_state(), state)


def test_lanes_inherit_the_callers_context():
    variable = contextvars.ContextVar("variable", default=0)
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    seen = []

    def closure():
        seen.append((variable.get(), torch.get_num_threads(), torch.is_grad_enabled(), torch.empty(0).dtype))
        variable.set(99)
        return model(IDS).float()

    variable.set(5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        opt.step(closure)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert seen == [(5, 1, False, torch.float64)] * 2
    assert variable.get() == 5


def test_default_device_modes_reach_the_lanes():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    seen = []

    def closure():
        seen.append(torch.empty(1).device.type)
        return model(IDS)

    with torch.device("meta"):
        opt.step(closure)
    assert seen == ["meta", "meta"]


def test_a_closure_must_not_step_again():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)

    def closure():
        opt.step(lambda: model(IDS))

    with pytest.raises(distzo2.DistZO2Error, match="middle of a pass"):
        opt.step(closure)


def test_per_example_losses_and_plain_numbers():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=0.0)
    scalar = float(opt.step(lambda: model(IDS)))
    assert float(opt.step(lambda: float(model(IDS)))) == pytest.approx(scalar, rel=1e-3)
    assert float(opt.step(lambda: model(IDS).repeat(4))) == pytest.approx(scalar, rel=1e-3)
    with pytest.raises(distzo2.DistZO2Error, match="dict"):
        opt.step(lambda: model(IDS) and {})


def test_check_finds_a_forward_that_is_not_deterministic():
    model = offloaded(Blocks())
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.check(lambda: model(IDS))
    calls = iter(range(100))
    with pytest.raises(distzo2.DistZO2Error, match="not deterministic"):
        opt.check(lambda: model(IDS) + next(calls))


def test_two_threads_cannot_share_a_forward():
    model = offloaded(Blocks())
    errors = []

    def intruder():
        try:
            model(IDS)
        except distzo2.DistZO2Error as error:
            errors.append(str(error))

    def closure():
        thread = threading.Thread(target=intruder)
        thread.start()
        thread.join()
        return model(IDS)

    distzo2.ZOSGD(model, lr=1e-2).step(closure)
    assert len(errors) == 2 and "thread" in errors[0]


def test_language_model_under_dropout_in_train_mode(tmp_path):
    case = BY_NAME["gpt2"]
    model = offloaded(case.build().train(), tmp_path, train=True)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3)
    opt.step(case.closure(model))
    plus, minus = opt.last.losses[0][0], opt.last.losses[1][0]
    assert abs(plus - minus) < 0.05


def test_a_model_that_is_dropped_takes_its_threads_with_it(tmp_path):
    def lanes() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("distzo2-lane")]

    def use() -> list[threading.Thread]:
        model = offloaded(Blocks(), tmp_path)
        distzo2.ZOSGD(model, lr=1e-2).step(lambda: model(IDS))
        return [thread for thread in lanes() if thread not in before]

    before = lanes()
    threads = use()
    assert len(threads) == 2
    gc.collect()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
