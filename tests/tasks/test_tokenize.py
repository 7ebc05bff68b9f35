"""Lines become tokens: which of them are learned, and what is cut from long lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_text import make_checkpoint, make_tokenizer

from distzo2.errors import DataError, DistZO2Error
from distzo2.tasks.examples import tokenize_for
from distzo2.tasks.kinds import max_positions
from distzo2.tasks.lines import read_line
from distzo2.tasks.tokenize import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def one(tokenizer, line: dict, **options):
    lines = [read_line(json.dumps(line).encode(), "f:1")]
    return tokenize_for(tokenizer, **options)(lines)[0]


@pytest.mark.parametrize("bos", [False, True])
def test_only_the_completion_is_learned(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    example = one(tokenizer, {"prompt": "the cat sat", "completion": " on the mat"})
    assert tokenizer.decode(example.tokens, skip_special_tokens=True) == "the cat sat on the mat"
    assert tokenizer.decode(example.tokens[example.targets]) == " on the mat<eos>"
    assert (example.tokens[0] == 1) == bos
    text = one(tokenizer, {"text": "the cat sat"})
    assert not text.targets[0] and text.targets[1:].all() and text.tokens[-1] == 0


def test_a_border_inside_a_token_belongs_to_the_completion(tokenizer) -> None:
    example = one(tokenizer, {"prompt": "the ca", "completion": "t sat"})
    learned = tokenizer.decode(example.tokens[example.targets])
    assert learned.endswith("t sat<eos>") and tokenizer.decode(example.tokens) == "the cat sat<eos>"


def test_choices_share_the_prompt(tokenizer) -> None:
    example = one(tokenizer, {"prompt": "the cat is", "choices": [" good", " bad and far"], "label": 1})
    whole = [tokenizer.decode(np.concatenate([example.tokens, o])) for o in example.options]
    assert whole == ["the cat is good", "the cat is bad and far"]
    assert example.label == 1 and example.num_tokens == len(example.tokens) + len(example.options[1])
    with pytest.raises(DataError, match=r"f:1: the prompt has no tokens"):
        one(tokenizer, {"prompt": "", "choices": ["a", "b"], "label": 0})


def test_every_turn_of_the_assistant_is_learned(tokenizer) -> None:
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "and the dog"), ("assistant", "ran far")]
    messages = {"messages": [{"role": r, "content": c} for r, c in turns] + [{"role": "user", "content": "more"}]}
    example = one(tokenizer, messages)
    assert (
        tokenizer.decode(example.tokens) == "User: the cat\nAssistant: sat\nUser: and the dog\nAssistant: ran far<eos>"
    )
    assert tokenizer.decode(example.tokens[example.targets]) == " sat ran far<eos>"

    templated = make_tokenizer(bos=True)
    templated.chat_template = (
        "<s>{% for m in messages %}{{ m.role }}[{{ m.content }}]<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant[{% endif %}"
    )
    example = one(templated, messages)
    whole = "<s>user[the cat]<eos>assistant[sat]<eos>user[and the dog]<eos>assistant[ran far]<eos>"
    assert templated.decode(example.tokens) == whole
    assert templated.decode(example.tokens[example.targets]) == "sat]<eos>ran far]<eos>"

    templated.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(DataError, match=r"f:1: the chat template refuses these messages: no such role"):
        one(templated, messages)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "the cat sat on the mat and", "completion": " the dog ran"},
        {"prompt": "the cat sat on the mat and", "choices": [" yes", " no it is"], "label": 0},
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_long_lines(line: dict, bos: bool) -> None:
    """Cut where it is asked, and never the choices nor the token that the tokenizer puts first."""
    tokenizer = make_tokenizer(bos=bos)
    whole = one(tokenizer, line)
    limit = whole.num_tokens - 3
    with pytest.raises(DataError, match=rf"f:1: {whole.num_tokens} tokens, the limit is {limit}"):
        one(tokenizer, line, limit=limit)
    left, right = (one(tokenizer, line, limit=limit, truncate=side) for side in ("left", "right"))
    assert left.tokens.tolist() == [*whole.tokens[:bos], *whole.tokens[3 + bos :]]
    assert right.tokens.tolist() == whole.tokens[:-3].tolist()
    for cut in (left, right):
        assert [option.tolist() for option in cut.options] == [option.tolist() for option in whole.options]
    if "choices" in line:
        limit, reason = max(len(option) for option in whole.options) + bos, "leaves no room for the prompt"
    else:
        assert left.targets.sum() == whole.targets.sum()
        limit, reason = 2, "no token is left to learn"
    with pytest.raises(DataError, match=reason):
        one(tokenizer, line, limit=limit, truncate="right")


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    assert load_tokenizer(tmp_path / "m")("the cat")["input_ids"]
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(DistZO2Error, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    with pytest.raises(DistZO2Error, match="no tokenizer"):
        load_tokenizer(tmp_path / "m")


def test_positions_of_configs() -> None:
    from transformers import GPT2Config, LlamaConfig, MambaConfig, OPTConfig

    assert max_positions(OPTConfig(max_position_embeddings=77)) == 77
    assert max_positions(LlamaConfig(max_position_embeddings=78)) == 78
    assert max_positions(GPT2Config(n_positions=79)) == 79
    assert max_positions(MambaConfig()) is None
