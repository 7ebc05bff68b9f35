"""Hooks: a forward finds each unit's weights, perturbed, where its module uses them and only there."""

from __future__ import annotations

import functools

import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from both_ways import run_both
from same_bits import assert_same_tensors
from torch import nn

import distzo2

IMAGE = {"image_size": 8, "patch_size": 4}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 16}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
CLIP_TEXT = {**TEXT, "eos_token_id": 2, "bos_token_id": 1}


@pytest.mark.parametrize(
    ("kind", "head", "options"),
    [
        ("ViT", "ForImageClassification", {**SMALL, **IMAGE}),  # the owner's parameters are used after an inner unit
        ("CLIP", "Model", {"text_config": CLIP_TEXT, "vision_config": {**SMALL, **IMAGE}, "projection_dim": 8}),
        ("T5", "ForConditionalGeneration", {"vocab_size": 40, **T5}),
        ("Bert", "ForMaskedLM", {**TEXT, "num_hidden_layers": 3}),
        ("Albert", "ForMaskedLM", {**TEXT, "num_hidden_layers": 3, "embedding_size": 16}),  # visits a unit again
        ("Mamba", "ForCausalLM", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_windows_of_many_shapes_of_models(kind, head, options, tmp_path):
    import transformers

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(2)
            config = getattr(transformers, f"{kind}Config")(**options)
            if kind in ("ViT", "CLIP"):
                config._attn_implementation = "eager"
            return getattr(transformers, f"{kind}{head}")(config).float().eval()

    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = {
        "ViT": {"pixel_values": pixels, "labels": torch.tensor([0, 1])},
        "CLIP": {"pixel_values": pixels, "input_ids": ids, "return_loss": True},
    }.get(kind, {"input_ids": ids, "labels": ids})
    if kind in ("T5", "Mamba"):
        batch["use_cache"] = False
    run_both(build, lambda model: model(**batch).loss, tmp_path)


class _Listed(Blocks):
    """Blocks are lists or dictionaries of modules, which no hook runs around."""

    def __init__(self, container, blocks=3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.blocks = nn.ModuleList(container(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(blocks))
            self.scales = nn.ParameterList(torch.rand(8) for _ in range(blocks))

    def forward(self, ids):
        x = self.embedding(ids)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            linear, norm = block.values() if hasattr(block, "values") else block
            x = x + torch.tanh(linear(norm(x))) * scale
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class _CalledOtherwise(nn.Module):
    """A module around whose call no hook runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))

    def __call__(self, x):
        return x * self.weight


class _Namespaces(Blocks):
    """Parameters in modules without a forward, at the root, in a block and in one another."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Module()
        self.parts.shift = nn.Parameter(torch.full((8,), 0.1))
        self.parts.inner = nn.ParameterDict({"scale": torch.full((8,), 0.9)})
        self.called = _CalledOtherwise()
        self.blocks[1].more = nn.ParameterList([torch.full((8,), 0.3)])
        self.blocks[1].forward = lambda x: self.blocks[1][0](x) * self.blocks[1].more[0]

    def forward(self, ids):
        x = self.called(self.embedding(ids)) * self.parts.inner["scale"] + self.parts.shift
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


CONTAINERS = {
    "lists": lambda: _Listed(lambda *modules: nn.ModuleList(modules)),
    "dictionaries": lambda: _Listed(lambda linear, norm: nn.ModuleDict({"linear": linear, "norm": norm})),
    "lists of parameters": lambda: _Listed(lambda linear, norm: nn.ModuleList([_CalledOtherwise(), norm])),
    "namespaces": _Namespaces,
}


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_modules_that_are_not_called_belong_to_what_holds_them(build, tmp_path):
    _, model, _ = run_both(build, lambda model: model(IDS), tmp_path)
    streamed = [unit.name for unit in distzo2.runtime_of(model).units if not unit.resident]
    assert streamed == [f"blocks.{i}" for i in range(len(model.blocks))]


def test_a_wildcard_names_the_outermost_modules():
    model = offloaded(_Listed(lambda *modules: nn.Sequential(*modules)), units=["blocks.*"])
    streamed = [unit.name for unit in distzo2.runtime_of(model).units if not unit.resident]
    assert streamed == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_lazy_module_is_named():
    model = Blocks()
    model.blocks[1][0] = nn.LazyLinear(8)
    with pytest.raises(distzo2.DistZO2Error, match=r"blocks\.1\.0\.weight.*lazy.*run the model once"):
        offloaded(model)


def test_use_of_a_weight_outside_its_module_is_named(tmp_path):
    class TiedByHand(Blocks):
        def forward(self, ids):
            x = self.embedding(ids)
            for block in self.blocks:
                x = x + block(x)
            return nn.functional.cross_entropy((x @ self.embedding.weight.T).flatten(0, 1), ids.flatten())

    model, opt = stepping(TiedByHand(), tmp_path)
    with pytest.raises(distzo2.DistZO2Error, match=r"embedding\.weight.*units="):
        opt.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match=r"embedding\.weight"):
        opt.step(lambda: model(IDS))
    assert torch.isfinite(torch.stack([v.abs().max() for v in model.state_dict().values()])).all()
    run_both(TiedByHand, lambda model: model(IDS), tmp_path / "whole", units=["."])


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_inside_and_around_the_closure(inside, tmp_path):
    def loss(model, cached=True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            return model(IDS)

    losses, *_ = run_both(
        Blocks,
        loss if inside else lambda model: model(IDS),
        tmp_path,
        around=None if inside else torch.autocast("cpu", torch.bfloat16),
        plain_loss=functools.partial(loss, cached=False),
    )
    assert losses[0][0] != Blocks().eval()(IDS).item()  # it did run in 16 bits


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_blocks(tmp_path):
    def compile_blocks(model):
        for block in model.blocks:
            block.compile(backend="aot_eager")

    run_both(Blocks, lambda model: model(IDS), tmp_path, prepare=compile_blocks)


@pytest.mark.usefixtures("fresh_dynamo")
def test_whole_model_compile_is_refused():
    model, opt = stepping(Blocks())
    whole = torch.compile(model, backend="eager")
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        opt.step(lambda: whole(IDS))
    model.compile(backend="eager")
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        opt.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        distzo2.offload(torch.compile(Blocks(), backend="eager"))
    model = Blocks().eval()
    whole = torch.compile(model, backend="eager")
    whole(IDS)  # before the hand-over
    _, opt = stepping(model)
    with pytest.raises(distzo2.DistZO2Error, match="compile"):
        opt.step(lambda: whole(IDS))


def test_requires_grad_after_the_hand_over_does_not_reach_autocasts_cache():
    model, opt = stepping(Blocks())
    model.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        opt.step(lambda: model(IDS))
    assert opt.last.losses[0] != opt.last.losses[1]


def test_deeply_nested_owners_stream(tmp_path):
    class Nested(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((8,), 0.9))
            self.inner = Nested(depth - 1) if depth else nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x * self.scale) + self.scale

    model = offloaded(Nested(8), tmp_path)
    x = torch.ones(2, 8)
    opt = distzo2.ZOSGD(model, lr=1e-2)
    for _ in range(2):
        opt.step(lambda: model(x).square().mean())
    assert opt.last.losses[0] != opt.last.losses[1]


def test_each_new_closure_is_watched(tmp_path):
    """An objective that stays finite on NaN must not hide a weight that is not there."""
    model, opt = stepping(Blocks(), tmp_path)
    opt.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match=r"head\.weight(?!.*units=)"):  # outside of any module
        opt.step(lambda: model(IDS) + (IDS.float() @ model.head.weight[:7]).argmax().float())


class Written(Blocks):
    """A block's forward writes its weight by `write`."""

    def __init__(self, write) -> None:
        super().__init__()
        self.blocks[1][0].register_forward_pre_hook(lambda module, args: write(module))


WRITES = {
    "in place": lambda module: module.weight.mul_(0.5),
    "a row": lambda module: module.weight.__setitem__(0, 0.0),
    "data": lambda module: module.weight.data.clamp_(-0.1, 0.1),  # which torch does not count
    "out": lambda module: torch.mul(module.weight, 0.5, out=module.weight),
    "numpy": lambda module: module.bias.detach().numpy().fill(0.5),
    "data replaced": lambda module: setattr(module.weight, "data", module.weight.data * 0.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("weights", ["device", "disk"])
def test_a_forward_that_writes_weights_is_named_and_loses_nothing(write, weights, tmp_path):
    model = distzo2.offload(Written(write), weights=weights, directory=tmp_path)
    before = model.state_dict()
    opt = distzo2.ZOSGD(model, lr=1e-2)
    with torch.no_grad():
        for forward in (lambda: model(IDS), lambda: distzo2.evaluate(model, [lambda: model(IDS)])):
            with pytest.raises(distzo2.DistZO2Error, match=r"wrote blocks\.1\.0\.\w+ \(Linear\) in place"):
                forward()
    with pytest.raises(distzo2.DistZO2Error, match=r"wrote blocks\.1\.0"):
        opt.step(lambda: model(IDS))
    assert_same_tensors(model.state_dict(), before)


def test_an_embedding_with_max_norm_is_named(tmp_path):
    model = Blocks()
    model.blocks[1].append(nn.Embedding(32, 8, max_norm=0.1))
    model.blocks[1].forward = lambda x: x + model.blocks[1][3](IDS)
    offloaded(model)
    before = model.state_dict()
    with pytest.raises(distzo2.DistZO2Error, match=r"wrote blocks\.1\.3\.weight \(Embedding\)"), torch.no_grad():
        model(IDS)
    assert_same_tensors(model.state_dict(), before)


def test_later_writes_are_noticed(tmp_path):
    writes = []
    model = distzo2.offload(
        Written(lambda module: module.weight.mul_(0.5) if writes else None), weights="disk", directory=tmp_path
    )
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: model(IDS))
    before = model.state_dict()
    writes.append(True)
    with pytest.raises(distzo2.DistZO2Error, match=r"wrote blocks\.1\.0\.weight"):
        opt.step(lambda: model(IDS))
    writes.clear()
    assert_same_tensors(model.state_dict(), before)
    opt.step(lambda: model(IDS))
