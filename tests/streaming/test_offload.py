"""Handing a model over, and what may be done to it afterwards."""

from __future__ import annotations

import kill_cases
import pytest
import torch
from block_models import IDS, Blocks, offloaded
from both_ways import run_both
from checkpoint_models import make
from same_bits import assert_same_tensors, same_bits
from torch import nn

import distzo2


def test_eval_is_the_default():
    model = Blocks(dropout=0.5)
    assert model.training
    assert not offloaded(model).training


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_an_edit_that_fails_or_runs_the_model_changes_nothing(weights, tmp_path):
    model = distzo2.offload(Blocks(), weights=weights, directory=tmp_path)
    before = model.state_dict()
    with pytest.raises(distzo2.DistZO2Error, match="middle of a pass"), distzo2.edit(model):
        model(IDS)
    with pytest.raises(distzo2.DistZO2Error, match=r"head\.weight is torch\.float64"), distzo2.edit(model):
        model.head.weight.data = model.head.weight.data.double()
    with pytest.raises(KeyError), distzo2.edit(model), torch.no_grad():
        model.head.weight.zero_()
        raise KeyError
    assert_same_tensors(model.state_dict(), before)
    assert torch.isfinite(model(IDS))


class Deep(nn.Module):
    """Three blocks of 16 parameters in eight modules, one of which is there twice, and a tied pair."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.blocks = nn.ModuleList(nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))) for _ in range(3))
        for block in self.blocks:
            block.append(block[2])


@pytest.mark.parametrize("weights", ["device", "host", "disk"])
def test_a_state_dict_brings_each_unit_once(weights, tmp_path, monkeypatch):
    other = Deep()
    model = distzo2.offload(Deep(), weights=weights, directory=tmp_path)
    runtime, opened = distzo2.runtime_of(model), []
    for store in (runtime.weights.memory, runtime.weights.ring):

        def counted(copy, open=store.open, **how):
            opened.append((copy.unit.name, *how.values()))
            return open(copy, **how)

        monkeypatch.setattr(store, "open", counted)
    names = sorted(unit.name for unit in runtime.units)

    def take():
        taken, opened[:] = sorted(opened), []
        return taken

    read_before = runtime.stats().get("bytes_read", 0)
    before = model.state_dict()
    assert take() == [(name, False) for name in names]
    if weights == "disk":
        sizes = [unit.num_bytes for unit in runtime.units if not unit.resident]
        assert runtime.stats()["bytes_read"] - read_before == sum(sizes)
    assert before["first.weight"].data_ptr() == before["second.weight"].data_ptr()  # as in a model of its own
    assert before["blocks.0.2.weight"].data_ptr() == before["blocks.0.8.weight"].data_ptr()
    assert_same_tensors(model.blocks[1][3].state_dict(), {n: before[f"blocks.1.3.{n}"] for n in ("weight", "bias")})
    assert take() == [("blocks.1", False)]
    model.load_state_dict(other.state_dict())
    assert [row for row in take() if row[1]] == [(name, True, False) for name in names]
    assert_same_tensors(model.state_dict(), other.state_dict())
    take()
    part = {"weight": torch.ones(8, 8), "bias": torch.zeros(8)}
    model.blocks[1][3].load_state_dict(part)
    assert take() == [("blocks.1", False), ("blocks.1", True, True)]
    wrong = {**before, "blocks.2.7.weight": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(wrong)
    after = model.state_dict()
    assert_same_tensors(after, {**before, "blocks.2.7.weight": other.state_dict()["blocks.2.7.weight"]})
    with pytest.raises(distzo2.DistZO2Error, match="assign=True"):
        model.load_state_dict(dict(before), assign=True)
    nn.Module.load_state_dict(model, before)  # as libraries may call them
    assert_same_tensors(nn.Module.state_dict(model), before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Module.load_state_dict(model.blocks[2], {**model.blocks[2].state_dict(), "7.weight": torch.zeros(3)})
    model.state_dict = lambda: "the user's"
    with distzo2.edit(model):
        pass
    assert model.state_dict() == "the user's"


def test_a_parameter_added_after_the_hand_over_is_named():
    model = offloaded(Blocks())
    model.head._parameters["bias"] = nn.Parameter(torch.zeros(32))
    with pytest.raises(distzo2.DistZO2Error, match="parameter bias of a Linear was added"):
        model.state_dict()


@pytest.mark.parametrize(
    ("option", "wrong", "expected"),
    [("write_every", value, "an integer of at least 1 was expected") for value in (0, -3, 2.0, True, None)]
    + [("memory_budget", value, "expected a positive number of bytes") for value in (0, -1, 1.5, True, "all")]
    + [("host_memory", value, "expected a positive number of bytes") for value in (0, 2.0, "200GB")],
)
def test_numbers_out_of_range_are_refused(option, wrong, expected):
    with pytest.raises(distzo2.DistZO2Error, match=f"{option}=.*: {expected}"):
        distzo2.offload(nn.Linear(2, 2), **{option: wrong})


class Shares(Blocks):
    """One layer is part of several blocks."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[1:]:
            block[0] = self.blocks[0][0]


class SharesADeepPart(Blocks):
    """A module that is a part of two blocks, and listed nowhere else, inside and around other modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        shared = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.blocks[0].append(shared)
        self.blocks[2].append(nn.Sequential(nn.Linear(8, 8), shared))


class SameStorage(Blocks):
    """The head is a second Parameter over the embedding's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embedding.weight.data)


class SameStorageInBlocks(Blocks):
    """Biases of two blocks are views of one tensor, each the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.zeros(8)
        self.blocks[0][0].bias, self.blocks[3][0].bias = nn.Parameter(both), nn.Parameter(both.view(8))


@pytest.mark.parametrize("build", [Shares, SharesADeepPart], ids=lambda build: build.__name__)
def test_a_module_in_several_blocks_works(build, tmp_path):
    _, model, reference = run_both(build, lambda model: model(IDS), tmp_path)
    with torch.no_grad():
        assert same_bits(model(IDS), reference(IDS))


@pytest.mark.parametrize("build", [SameStorage, SameStorageInBlocks], ids=lambda build: build.__name__)
def test_parameters_over_the_same_elements_stay_tied(build, tmp_path):
    def tied():
        model = build()
        owners = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = owners.setdefault(p.data_ptr(), p)
        return model

    model = offloaded(build(), tmp_path)
    reference = tied()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in reference.named_parameters()]
    run_both(tied, lambda model: model(IDS), tmp_path / "tied")
    distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=3).step(lambda: model(IDS))
    state = model.state_dict()
    if build is SameStorage:
        assert same_bits(state["head.weight"], state["embedding.weight"])


def test_views_that_overlap_are_refused_by_name():
    for first, second in ((slice(0, 8), slice(4, 12)), (slice(0, 8), slice(0, 4))):
        storage = torch.zeros(12)
        model = Blocks()
        model.blocks[0][0].bias = nn.Parameter(storage[first])
        model.extra = nn.Parameter(storage[second])
        with pytest.raises(distzo2.DistZO2Error, match=r"extra.*share a part|share a part.*extra"):
            offloaded(model)
    model = Blocks()
    model.blocks[0][0].bias, model.extra = nn.Parameter(storage[:8]), nn.Parameter(storage[8:])
    assert torch.isfinite(offloaded(model)(IDS))  # parts of one storage that do not meet
    model = Blocks()
    model.register_buffer("table", model.head.weight.data[2:])
    with pytest.raises(distzo2.DistZO2Error, match=r"buffer table is a view of parameter head\.weight"):
        offloaded(model)
    model.head.requires_grad_(False)
    offloaded(model)
    model = SameStorage()
    model.head.weight.requires_grad_(False)
    with pytest.raises(distzo2.DistZO2Error, match=r"embedding\.weight and head\.weight share"):
        offloaded(model)


def test_buffers_on_meta_are_made_again_or_named():
    plain = make("llama").eval()
    with torch.device("meta"):
        model = type(plain)(plain.config)
    offloaded(model).load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert same_bits(model(IDS).logits, plain(IDS).logits)

    class Garbage(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1].register_buffer("table", torch.arange(8.0), persistent=False)

    class Unmade(Garbage):
        def _init_weights(self, module) -> None:
            pass

    for build in (Garbage, Unmade):
        with torch.device("meta"):
            model = build()
        with pytest.raises(distzo2.DistZO2Error, match=r"buffer blocks\.1\.table is on the meta device"):
            offloaded(model)


RESTRUCTURE = {
    "a module": lambda model: setattr(model, "head", nn.Linear(8, 32)),
    "a block": lambda model: model.blocks.append(nn.Linear(8, 8)),
    "a block replaced": lambda model: model.blocks.__setitem__(0, nn.Linear(8, 8)),
    "a parameter": lambda model: setattr(model.head, "weight", nn.Parameter(torch.zeros(40, 8))),
    "a bias": lambda model: model.head.register_parameter("bias", nn.Parameter(torch.zeros(32))),
    "an adapter": lambda model: model.add_module("adapter", nn.Linear(8, 8)),
    "a tie": lambda model: setattr(model.head, "weight", model.embedding.weight),
}


@pytest.mark.parametrize("change", RESTRUCTURE.values(), ids=RESTRUCTURE)
def test_other_parameters_after_the_hand_over_are_refused_or_taken_over_in_edit(change, tmp_path):
    model, reference = offloaded(Blocks(), tmp_path), Blocks().eval()
    before = model.state_dict()
    old = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="handed over cannot be added, replaced or resized"):
        change(model)
    assert_same_tensors(model.state_dict(), before)
    with distzo2.edit(model):
        torch.manual_seed(1)
        change(model)
    torch.manual_seed(1)
    change(reference)
    with torch.no_grad():
        assert same_bits(model(IDS), reference(IDS))
    assert_same_tensors(model.state_dict(), reference.state_dict())
    with pytest.raises(distzo2.DistZO2Error):
        old.step(lambda: model(IDS))
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(lambda: model(IDS))
    assert opt.last.losses[0] != opt.last.losses[1]


def test_other_parameters_are_refused_before_any_lane_has_run(tmp_path):
    code = """
        import distzo2
        from torch import nn
        model = distzo2.offload(nn.Sequential(nn.Linear(2, 2)))
        model.new = nn.Linear(2, 2)
    """
    assert "Sequential.new: parameters of a model that was handed over" in kill_cases.run(tmp_path, code).text


def test_what_brings_no_parameters_may_be_set():
    model = offloaded(Blocks())
    model.blocks[0] = model.blocks[1]
    model.blocks = model.blocks[:2] + model.blocks[3:]
    del model.blocks[2]
    model.blocks[1][0].bias = None
    model.head.weight = model.head.weight
    model.blocks[0][1] = nn.ReLU()
    model.note = "a word"
    model.blocks = model.blocks
    assert torch.isfinite(model(IDS))


def test_resized_embeddings():
    model = make("llama").eval()
    with torch.no_grad():
        expected = model(IDS).logits
    offloaded(model)
    with pytest.raises(distzo2.DistZO2Error, match=r"embed_tokens|handed over"):
        model.resize_token_embeddings(104)
    with distzo2.edit(model):
        model.resize_token_embeddings(104)
    with torch.no_grad():
        assert same_bits(model(IDS).logits[..., :96].contiguous(), expected)


@pytest.mark.parametrize("weights", ["device", "host", "disk"])
def test_inference_mode_around_anything(weights, tmp_path):
    with torch.inference_mode():
        model = distzo2.offload(Blocks(), weights=weights, directory=tmp_path)
        opt = distzo2.ZOSGD(model, lr=1e-2)
        opt.step(lambda: model(IDS))
        model(IDS)
        distzo2.evaluate(model, [lambda: model(IDS)])
        state = model.state_dict()
    model.load_state_dict(state)
    opt.step(lambda: model(IDS))
    with distzo2.edit(model), torch.no_grad():
        model.head.weight.mul_(2)
    opt.step(lambda: model(IDS))
    with torch.inference_mode():
        model.load_state_dict(state)
        opt.step(lambda: model(IDS))
    opt.step(lambda: model(IDS))
    assert torch.isfinite(model(IDS))


def test_an_edit_whose_result_cannot_be_handed_over_leaves_a_plain_model(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    expected = model(IDS)
    with pytest.raises(distzo2.DistZO2Error, match="must be float32"), distzo2.edit(model):
        model.head.weight = nn.Parameter(model.head.weight.double())
    model.head.float()
    assert same_bits(model(IDS), expected)
    assert same_bits(offloaded(model, tmp_path)(IDS), expected)


def test_a_hand_over_that_is_interrupted_leaves_the_weight_file_free(tmp_path):
    class Interrupting(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.detach:
                raise KeyboardInterrupt
            return super().__torch_function__(func, types, args, kwargs or {})

    kept = distzo2.WeightFile(tmp_path / "weights.dzo2", tmp_path / "journal")
    model = Blocks()
    model.head.weight = Interrupting(model.head.weight.data)
    with pytest.raises(KeyboardInterrupt):
        distzo2.offload(model, weights="disk", weight_file=kept)
    distzo2.offload(Blocks(), weights="disk", weight_file=kept)
