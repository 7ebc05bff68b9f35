"""Models of peft that are handed over: bits of a plain loop, and adapters that peft and the library give each other."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path

import peft
import pytest
import torch
from plain import flat_losses, plain_loop
from safetensors.torch import load_file, save_file
from same_bits import assert_same_tensors
from tiny_peft import CONFIGS, WITH_DTYPE, adapted, base_for, loss_beside_base, loss_of

import distzo2
from distzo2.errors import DistZO2Error
from distzo2.peft.replay import replay_adapter

STEPS = {"lr": 1e-2, "eps": 1e-2, "seed": 5}


def handed_over(name: str, steps: int = 2, loss=loss_of):
    model = distzo2.offload(adapted(name))
    optimizer = distzo2.ZOSGD(model, **STEPS)
    losses = []
    for _ in range(steps):
        optimizer.step(lambda: loss(model))
        losses.append(flat_losses(optimizer))
    return model, losses


@pytest.mark.parametrize(("name", "loss"), [(n, loss_of) for n in CONFIGS] + [
    (n, loss_beside_base) for n in ("lora", "lora_experts", "prefix", "prompt")])  # fmt: skip
def test_steps_have_the_bits_of_a_plain_loop(name: str, loss) -> None:
    """Also where a closure switches the adapter off, as preference losses do."""
    plain = adapted(name)
    trained = {n for n, p in plain.named_parameters() if p.requires_grad}
    plain.requires_grad_(False)
    expected = plain_loop(
        plain, [[lambda: loss(plain)]] * 2, lr=lambda _: 1e-2, eps=1e-2, seed=5, trainable=trained.__contains__
    )
    model, losses = handed_over(name, loss=loss)
    assert losses == expected
    state = model.state_dict()
    assert_same_tensors({n: state[n] for n, _ in plain.named_parameters()}, dict(plain.named_parameters()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_adapter_is_the_one_that_peft_saves_and_loads(name: str, tmp_path: Path) -> None:
    model, _ = handed_over(name)
    expected = loss_of(model)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    distzo2.save_adapter(model, tmp_path / "ours")
    assert_same_tensors(*(load_file(tmp_path / by / "adapter_model.safetensors") for by in ("ours", "theirs")))
    loaded = peft.PeftModel.from_pretrained(base_for(name), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loss_of(loaded), expected)
    with pytest.raises(DistZO2Error, match=r"save its adapter with distzo2\.save_adapter"):
        distzo2.save_pretrained(model, tmp_path / "whole")


@pytest.mark.parametrize(("name", "dtype"), [case for case in WITH_DTYPE if case[0] != "dora"])
def test_a_new_adapter_begins_as_peft_makes_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """On a checkpoint that is never in memory as a whole; the adapter is float32 beside 16 bits, as with peft."""
    base_for(name).to(dtype).save_pretrained(tmp_path / "base")
    before = torch.get_rng_state()
    prepare = distzo2.adapter(CONFIGS[name], tmp_path / "start", seed=3)
    model = distzo2.from_pretrained(tmp_path / "base", prepare=prepare)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        base = base_for(name).to(dtype)
        torch.manual_seed(3)
        theirs = peft.get_peft_model(base, copy.deepcopy(CONFIGS[name])).eval()
    assert_same_tensors(model.state_dict(), theirs.state_dict())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in theirs.parameters()]
    again = distzo2.from_pretrained(tmp_path / "base", prepare=distzo2.adapter(tmp_path / "start"))
    assert_same_tensors(again.state_dict(), theirs.state_dict())


def test_embeddings_that_peft_saves_beside_an_adapter(tmp_path: Path) -> None:
    """They are passed over where they are the base's, and refused where it was changed beside the adapter."""
    model = adapted("lora_embedding")
    model.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    base = base_for("lora_embedding")
    base.save_pretrained(tmp_path / "base")
    loaded = distzo2.from_pretrained(tmp_path / "base", prepare=distzo2.adapter(tmp_path / "adapter"))
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    base.lm_head.weight.data[3, 5] += 1
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(DistZO2Error, match=r"lm_head.base_layer.weight' is not that of .*: the base was changed"):
        distzo2.from_pretrained(tmp_path / "base", prepare=distzo2.adapter(tmp_path / "adapter"))


def test_an_adapter_in_16_bits_is_trained_and_replayed_in_32(tmp_path: Path) -> None:
    base_for("lora").save_pretrained(tmp_path / "base")
    adapted("lora").save_pretrained(tmp_path / "start")
    file = tmp_path / "start/adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    model = distzo2.from_pretrained(tmp_path / "base", prepare=distzo2.adapter(tmp_path / "start"))
    with closing(distzo2.ZOSGD(model, journal=tmp_path / "journal.jsonl", **STEPS)) as optimizer:
        optimizer.step(lambda: loss_of(model))
    distzo2.save_adapter(model, tmp_path / "made")
    replay_adapter(tmp_path / "start", tmp_path / "journal.jsonl", tmp_path / "again", progress=False)
    made = load_file(tmp_path / "made/adapter_model.safetensors")
    assert_same_tensors(load_file(tmp_path / "again/adapter_model.safetensors"), made)
    assert all(value.dtype == torch.float32 for value in made.values())


def test_a_copy_of_a_tied_head(tmp_path: Path) -> None:
    """It begins as the head; merged, it would no longer be tied."""
    tied, config = base_for("lora_biases"), copy.deepcopy(CONFIGS["lora_head"])
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    tied.save_pretrained(tmp_path / "base")
    prepare = distzo2.adapter(config, tmp_path / "start")
    model = distzo2.from_pretrained(tmp_path / "base", prepare=prepare)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model), loss_of(tied))
    with pytest.raises(DistZO2Error, match=r"is on .*embed_tokens\.weight, which another module shares"):
        distzo2.merge_adapter(tmp_path / "base", tmp_path / "start", tmp_path / "merged")


def test_an_adapter_is_switched_off_between_steps_too() -> None:
    model, _ = handed_over("lora")
    with torch.no_grad():
        with model.disable_adapter():
            off = loss_of(model)
        assert torch.equal(off, loss_of(base_for("lora"))) and not torch.equal(off, loss_of(model))
    optimizer = distzo2.ZOSGD(model, **STEPS)
    optimizer.step(lambda: loss_of(model))
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    with pytest.raises(DistZO2Error, match=r"lora_A.* is trained by an optimizer"):
        optimizer.step(lambda: loss_of(model))


def test_merging_inside_edit(tmp_path: Path) -> None:
    model, _ = handed_over("lora")
    expected = loss_of(model)
    distzo2.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base_for("lora"), tmp_path / "adapter").merge_and_unload()
    with distzo2.edit(model):
        merged = model.merge_and_unload()
    assert_same_tensors(merged.state_dict(), theirs.state_dict())
    distzo2.save_pretrained(merged, tmp_path / "merged")
    assert_same_tensors(load_file(tmp_path / "merged/model.safetensors"), theirs.state_dict())
    torch.testing.assert_close(loss_of(model), expected)


def test_an_adapter_that_is_added_inside_edit(tmp_path: Path) -> None:
    base = distzo2.offload(base_for("lora"))
    with pytest.raises(DistZO2Error, match=r"inside `with distzo2\.edit"):
        peft.get_peft_model(base, copy.deepcopy(CONFIGS["lora"]))
    base = distzo2.offload(base_for("lora"))
    with distzo2.edit(base):
        model = peft.get_peft_model(base, copy.deepcopy(CONFIGS["lora"]))
    optimizer = distzo2.ZOSGD(model, **STEPS)
    optimizer.step(lambda: loss_of(model))
    distzo2.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_for("lora"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loss_of(loaded), loss_of(model))
    base = distzo2.offload(base_for("prompt"))
    with distzo2.edit(base):
        model = peft.get_peft_model(base, copy.deepcopy(CONFIGS["prompt"]))
    with pytest.raises(DistZO2Error, match=r"prompt_encoder.* is not in the model that was handed over"):
        distzo2.ZOSGD(model, **STEPS)


@pytest.mark.parametrize(
    ("base", "change", "reason"),
    [
        ("lora", lambda path: (path / "adapter_model.safetensors").unlink(), "cannot be opened"),
        ("lora", lambda path: (path / "adapter_config.json").unlink(), "expected the directory of an adapter"),
        ("lora", lambda path: (path / "adapter_config.json").write_text("{}"), "of type None are not supported"),
        ("lora_biases", lambda path: None, r"no tensor 'base_model.*', which the adapter of this model has"),
    ],
)
def test_a_damaged_adapter_or_one_of_another_model(tmp_path: Path, base: str, change, reason: str) -> None:
    base_for(base).save_pretrained(tmp_path / "base")
    adapted("lora").save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(DistZO2Error, match=reason):
        distzo2.from_pretrained(tmp_path / "base", prepare=distzo2.adapter(tmp_path / "adapter"))
