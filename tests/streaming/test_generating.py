"""Lanes that generate: they end after different numbers of tokens, each with a cache of its own."""

from __future__ import annotations

import functools
import os
import signal
from typing import Any

import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from plain import flat_losses, plain_loop
from same_bits import assert_same
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import distzo2
from distzo2.streaming.isolation import RandomStream

PROMPTS = [[[5, 6, 7], [8, 9], [10]], [[3, 4, 5, 6, 7]]]  # of two micro-batches
RATES = {"lr": 1e-2, "eps": 5e-2, "seed": 3, "num_probes": 2}
ENDS = list(range(0, 24, 4))


def llama() -> nn.Module:
    """A model with tied embeddings whose texts end after different numbers of tokens."""
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, eos_token_id=ENDS,
        pad_token_id=1,
    )  # fmt: skip
    return seeded(LlamaForCausalLM, config, 6)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, eos_token_id=ENDS, pad_token_id=1,
        decoder_start_token_id=1,
    )  # fmt: skip
    return seeded(T5ForConditionalGeneration, config, 3)


def seeded(kind: Any, config: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).float().eval()
        for param in model.parameters():
            param.data.normal_(0, 0.3)
    return model


def loss_of(tokens: list[list[int]]) -> float:
    """Differs wherever a token does."""
    return sum((i + 1) * 0.01 * token for row in tokens for i, token in enumerate([*row, len(row)]))


def written(model: nn.Module, prompts: list[list[int]], told: list[int] | None = None, **options: Any) -> float:
    made = distzo2.generate_batch(model, prompts, max_new_tokens=8, **options)
    if told is not None:
        told.append(max(len(each.tokens) for each in made))
    return loss_of([each.tokens for each in made])


def closures_of(model: nn.Module, **options: Any) -> list[Any]:
    return [functools.partial(written, model, prompts, **options) for prompts in PROMPTS]


@functools.cache
def plain_run(build: Any) -> tuple[list[list[float]], dict[str, torch.Tensor], list[int]]:
    """Losses of two steps, the weights after them, and the lengths of what was written."""
    model, lengths = build(), []
    losses = plain_loop(model, [closures_of(model, told=lengths)] * 2, **RATES | {"lr": lambda step: 1e-2})
    assert len(set(lengths)) > 1 and len(set(losses[0])) > 4
    return losses, model.state_dict(), lengths


@pytest.mark.parametrize(("build", "weights"), [(llama, "device"), (llama, "host"), (llama, "disk"), (t5, "disk")])
def test_lanes_of_unequal_lengths_are_the_plain_loops(build, weights, tmp_path):
    """Each perturbation's text is what a whole perturbed model writes alone, in waves of any size, cached or not."""
    expected, state, expected_lengths = plain_run(build)
    for max_lanes, write_every, options in ((None, 1, {}), (3, 3, {"use_cache": False})):
        lengths, losses = [], []
        model = distzo2.offload(build(), weights=weights, directory=tmp_path, write_every=write_every)
        opt = distzo2.ZOSGD(model, max_lanes=max_lanes, **RATES)
        before = torch.get_rng_state()
        for _ in range(2):
            opt.step(closures_of(model, told=lengths, **options))
            losses.append(flat_losses(opt))
        assert torch.equal(torch.get_rng_state(), before)
        assert_same((losses, model.state_dict()), (expected, state))
        assert set(lengths) == set(expected_lengths)
        assert opt.check(closures_of(model)[0]) == written(model, PROMPTS[0])
        distzo2.runtime_of(model).close()


def test_what_is_sampled_is_the_same_for_every_perturbation(tmp_path):
    """Lanes draw from (seed, step, micro-batch): without a perturbation that matters all of them write the same."""
    model, reference, options = offloaded(llama(), tmp_path), llama(), {"do_sample": True, "temperature": 3.0}
    opt = distzo2.ZOSGD(model, **RATES | {"eps": 1e-9, "lr": 0.0})
    drawn = []
    for step in range(2):
        opt.step(closures_of(model, **options))
        expected = []
        for batch, closure in enumerate(closures_of(reference, **options)):
            with torch.random.fork_rng(devices=[]):
                RandomStream.seeded(torch.device("cpu"), RATES["seed"], step, batch).restore()
                expected.append(closure())
        assert opt.last.losses == [expected] * 4
        drawn.append(expected)
    assert drawn[0] != drawn[1]


def test_a_cache_is_used_by_generate_alone():
    model, seen = llama(), []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda m, args: seen.append((args[0].shape[1], model.config.use_cache)))
    offloaded(model)

    def both() -> torch.Tensor:
        return written(model, [[5, 6]]) + model(torch.tensor([[1, 2, 3]])).logits.float().mean()

    distzo2.evaluate(model, [both, both])
    widths = [width for width, _ in seen]
    assert set(widths) == {1, 2, 3} and widths.count(3) == widths.count(2) == 4  # two lanes, and each once more alone
    assert all(on is (width != 3) for width, on in seen) and model.config.use_cache is True


def test_a_lane_may_end_behind_a_whole_pass_only():
    model, opt = stepping(Blocks())

    def times(count: int):
        return lambda: sum(model(IDS) for _ in range(count))

    opt.step([times(1), times(3), times(2)])
    opt.step(times(2))
    for less in (lambda: model(IDS) + model.embedding(IDS).sum(), lambda: model.blocks[0](model.embedding(IDS)).sum()):
        with pytest.raises(distzo2.DistZO2Error, match=r"no further unit.*whole pass"):
            opt.step([times(2), less])
    tied = offloaded(llama())
    with pytest.raises(distzo2.DistZO2Error, match="no further unit"):  # before the head, which is the embeddings again
        distzo2.evaluate(tied, [lambda: tied(IDS % 24).logits, lambda: tied.model(IDS % 24)[0]])

    def by_hand(depth: int, head: bool = True):
        x = model.embedding(IDS)
        for _ in range(depth):
            x = model.blocks[0](x)
        return model.head(x).sum() if head else x.sum()

    with pytest.raises(distzo2.DistZO2Error, match=r"no further unit.*'blocks\.0'|'blocks\.0'.*no further unit"):
        distzo2.evaluate(model, [lambda: by_hand(3), lambda: by_hand(2, head=False)])


@pytest.mark.parametrize("what", ["error", "interrupt"])
def test_a_generation_that_is_ended_leaves_no_trace(what, tmp_path):
    """In the middle of a lane's text, while others are at theirs."""
    results = []
    for armed in (True, False):
        model = llama()
        passes = []

        def ends(module, args, passes=passes):
            lane = distzo2.current_lane()
            if lane is not None and lane.index == 2 and lane.step == 1:
                passes.append(lane)
                if len(passes) == 5 and what == "error":
                    raise KeyError("in a token")
                if len(passes) == 5:
                    os.kill(os.getpid(), signal.SIGINT)

        if armed:
            model.model.layers[1].register_forward_pre_hook(ends)
        opt = distzo2.ZOSGD(distzo2.offload(model, weights="disk", directory=tmp_path / f"{armed}"), **RATES)
        opt.step(closures_of(model))
        before = torch.get_rng_state()
        if armed:
            with pytest.raises(KeyError if what == "error" else KeyboardInterrupt):
                opt.step(closures_of(model))
            assert torch.equal(torch.get_rng_state(), before) and model.config.use_cache is True
        opt.step(closures_of(model))
        results.append((flat_losses(opt), model.state_dict()))
    assert_same(*results)


def test_an_encoder_decoder_takes_all_texts_of_a_closure_at_once():
    """A lane that encoded a second time would enter other units than lanes that still decode."""

    def losses(batch_size: int) -> list[list[float]]:
        model, opt = stepping(t5(), **RATES)
        opt.step(lambda: written(model, PROMPTS[0], batch_size=batch_size))
        return opt.last.losses

    assert losses(1) == losses(3)
