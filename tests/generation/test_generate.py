"""Batched generation over streamed weights against transformers, one text at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_kinds import make
from tiny_peft import adapted
from tiny_text import make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import distzo2
from distzo2.errors import DistZO2Error, UsageError

TEXTS = [
    "the cat",
    "a graph has nodes and edges, a",
    "is it good? Answer:",
    "maybe",
    "a film is good or bad the dog ran",
]


def streamed(directory: Path, tmp_path: Path):
    return distzo2.from_pretrained(directory, weights="disk", directory=tmp_path / "w")


def llama(directory: Path) -> Path:
    return make_checkpoint(directory)


def opt(directory: Path) -> Path:
    """Positions are learned, and counted by the mask."""
    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2}
    tokenizer = make_tokenizer(bos=True)
    more = {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **size, **more, eos_token_id=0)).float()
        for parameter in model.parameters():
            parameter.data.mul_(4)  # answers differ
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", [llama, opt])
def test_a_batch_has_the_tokens_of_each_text_alone(kind, tmp_path: Path) -> None:
    directory = kind(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = streamed(directory, tmp_path).train()
    made = distzo2.generate_batch(model, TEXTS, tokenizer=tokenizer, max_new_tokens=12, batch_size=3)
    assert model.training
    for text, generated in zip(TEXTS, made, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        wanted = plain.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        wanted = wanted[: wanted.index(0)] if 0 in wanted else wanted
        assert generated.tokens == wanted
        assert generated.text == tokenizer.decode(wanted, skip_special_tokens=True)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [g.tokens for g in distzo2.generate_batch(model, rows, max_new_tokens=12, pad_id=3)] == [
        g.tokens for g in made
    ]
    distzo2.runtime_of(model).close()


def test_a_text_ends_at_a_stop_string_or_an_end_token(tmp_path: Path) -> None:
    """Whatever tokens spell the string, and others of the batch go on."""
    model = streamed(llama(tmp_path / "m"), tmp_path)
    tokenizer = make_tokenizer()
    long = distzo2.generate_batch(model, TEXTS, tokenizer=tokenizer, max_new_tokens=12)
    stop = long[0].text[3:5]
    passes = []
    handle = model.lm_head.register_forward_hook(lambda *args: passes.append(1))
    short = distzo2.generate_batch(model, TEXTS, tokenizer=tokenizer, max_new_tokens=12, stop=[stop, "never"])
    assert len(passes) <= 12
    handle.remove()
    for whole, cut in zip(long, short, strict=True):
        place = whole.text.find(stop)
        assert cut.text == (whole.text if place < 0 else whole.text[:place])
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        if place >= 0:
            assert stop in tokenizer.decode(cut.tokens) and stop not in tokenizer.decode(cut.tokens[:-1])
    model.generation_config.eos_token_id = [long[1].tokens[2], 0]
    ended = distzo2.generate_batch(model, TEXTS, tokenizer=tokenizer, max_new_tokens=12)
    assert ended[1].tokens == long[1].tokens[: long[1].tokens.index(long[1].tokens[2])]
    torch.manual_seed(5)
    sampled = distzo2.generate_batch(model, TEXTS, tokenizer=tokenizer, do_sample=True, temperature=2.0)
    assert [s.tokens for s in sampled] != [g.tokens for g in long]
    distzo2.runtime_of(model).close()


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "m", name)
    plain = getattr(transformers, name).from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = streamed(directory, tmp_path)
    texts = ["the cat is", "a film was it good . the dog"]
    for text, made in zip(
        texts, distzo2.generate_batch(model, texts, tokenizer=tokenizer, max_new_tokens=6), strict=True
    ):
        ids = plain.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)[0, 1:].tolist()
        assert made.tokens == (ids[: ids.index(2)] if 2 in ids else ids)
    distzo2.runtime_of(model).close()


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_prompts_of_peft(name: str) -> None:
    """A prompt stands at the text and not before the padding, whatever shares its batch."""
    plain, rows = adapted(name), [[5, 6, 7], list(range(1, 11)), [40, 41, 42], [43, 44, 45, 46]]
    for p in plain.parameters():
        p.data.mul_(4)
    plain.peft_config["default"].inference_mode = False
    expected = []
    with torch.no_grad():
        for row in rows:
            tokens = list(row)
            for _ in range(6):
                tokens.append(int(plain(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            expected.append(tokens[len(row) :])
    model = distzo2.offload(plain, weights="host")
    model.generation_config.eos_token_id = None
    assert [made.tokens for made in distzo2.generate_batch(model, rows, max_new_tokens=6)] == expected


def test_what_generates_nothing(tmp_path: Path) -> None:
    with pytest.raises(DistZO2Error, match="Linear generates no text"):
        distzo2.generate_batch(torch.nn.Linear(1, 1), [[1]])
    model = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "m"))
    with pytest.raises(UsageError, match="needs tokenizer= for texts and stop strings"):
        distzo2.generate_batch(model, [[1]], stop=["\n"])
    with pytest.raises(UsageError, match="one text for each, and stop strings need num_beams=1"):
        distzo2.generate_batch(model, [[1]], tokenizer=make_tokenizer(), stop=["a"], num_beams=2)
    with pytest.raises(DistZO2Error, match="has no tokens"):
        distzo2.generate_batch(model, [[1], []])
    with pytest.raises(UsageError, match="max_new_tokens of 1 or more, not 0"):
        distzo2.generate_batch(model, [[1]], max_new_tokens=0)
    with pytest.raises(DistZO2Error, match=r"of 60 tokens and max_new_tokens=5 take 65 positions: \w+ has 64"):
        distzo2.generate_batch(model, [[1], [1] * 60], max_new_tokens=5)
