"""JSONL lines: what is accepted, what is refused with file and line, how they become tokens and batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_text import choice_lines, make_checkpoint, make_tokenizer, write_jsonl

from distzo2.errors import DataError, DistZO2Error, UsageError
from distzo2.tasks.batches import IGNORED, DataOrder, collate
from distzo2.tasks.lines import Tokenize, load_examples, load_tokenizer, max_positions, read_lines

GOOD = {"prompt": "the cat", "completion": " sat"}
CHOICES = {"prompt": "the cat is", "choices": [" good", " bad"], "label": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"text": "ab', "not valid JSON: Unterminated string starting at column 10"),
        ('{"text": "a \\ud800 b"}', r"'text' holds \ud800, half of a surrogate pair, at character 2"),
        ('{"prompt": "\\udfff", "completion": "b"}', r"'prompt' holds \udfff"),
        ('{"prompt": "a", "choices": ["b", "c\\ud800"], "label": 0}', r"choice 1 holds \ud800"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', r"message 0 holds \ud800"),
        ("[1, 2]", "a JSON object was expected, not an array"),
        ("3", "a JSON object was expected, not a number"),
        ('{"prompt": "a"}', "none of them"),
        ('{"completion": "a"}', "'prompt' is missing"),
        ('{"prompt": 3, "completion": "a"}', "'prompt' must be a string, not a number"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"prompt": "a", "completion": null}', "'completion' must be a string, not null"),
        ('{"text": ""}', "'text' is empty"),
        ('{"text": "a", "messages": []}', "both 'messages' and 'text'"),
        ('{"prompt": "a", "choices": ["b"], "label": 0}', "at least two"),
        ('{"prompt": "a", "choices": ["b", ""], "label": 0}', "choice 1"),
        ('{"prompt": "a", "choices": ["b", "b"], "label": 0}', "two choices are the same"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "'label' is missing"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": "0"}', "'label' must be an integer, not a string"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": true}', "'label' must be an integer, not a boolean"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 2}', "label 2 is out of range: there are 2 choices (0 to 1)"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": -1}', "label -1 is out of range"),
        ('{"messages": []}', "'messages' must be an array that is not empty"),
        ('{"messages": [{"role": "pope", "content": "a"}]}', "message 0: 'role' must be one of"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "user"}]}', "message 0: 'content' must be a string"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    first = CHOICES if "choices" in line else GOOD
    path = write_jsonl(tmp_path / "d.jsonl", [first, "", line])
    with pytest.raises(DataError) as error:
        read_lines(path)
    assert f"{path}:3: " in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a:2: not UTF-8"):
        read_lines(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="holds no examples"):
        read_lines(tmp_path / "b")
    with pytest.raises(DataError, match="No such file"):
        read_lines(tmp_path / "c")
    (tmp_path / "d").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert len(read_lines(tmp_path / "d")) == 1


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d", [GOOD, {"text": "a"}, CHOICES])
    with pytest.raises(DataError, match=r"d:3: a 'choices' line in a file that begins with a 'completion' line"):
        read_lines(path)


def one(tokenizer, line: dict, **options):
    lines = [read_line(line)]
    return Tokenize(tokenizer, limit=options.pop("limit", None), **options)(lines)[0]


def read_line(record: dict):
    from distzo2.tasks.lines import _check_line

    return _check_line(json.dumps(record).encode(), "f:1")


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


def test_long_lines(tokenizer) -> None:
    line = {"prompt": "the cat sat on the mat and", "completion": " the dog ran"}
    whole = one(tokenizer, line)
    limit = len(whole.tokens) - 3
    with pytest.raises(DataError, match=rf"f:1: {len(whole.tokens)} tokens, the limit is {limit}"):
        one(tokenizer, line, limit=limit)
    left = one(tokenizer, line, limit=limit, truncate="left")
    assert left.tokens.tolist() == whole.tokens[3:].tolist() and left.targets.sum() == whole.targets.sum()
    right = one(tokenizer, line, limit=limit, truncate="right")
    assert right.tokens.tolist() == whole.tokens[:-3].tolist()
    with pytest.raises(DataError, match="no token is left to learn"):
        one(tokenizer, line, limit=2, truncate="right")
    with pytest.raises(DistZO2Error, match="truncate='middle'"):
        Tokenize(tokenizer, limit=3, truncate="middle")


def test_long_lines_keep_their_choices_and_their_first_token() -> None:
    tokenizer = make_tokenizer(bos=True)
    line = {"prompt": "the cat sat on the mat and", "choices": [" yes", " no it is"], "label": 0}
    whole = one(tokenizer, line)
    limit = whole.num_tokens - 2
    with pytest.raises(DataError, match="tokens, the limit is"):
        one(tokenizer, line, limit=limit)
    left = one(tokenizer, line, limit=limit, truncate="left")
    assert left.tokens.tolist() == [1, *whole.tokens[3:]] and left.num_tokens == limit
    right = one(tokenizer, line, limit=limit, truncate="right")
    assert right.tokens.tolist() == whole.tokens[:-2].tolist()
    for cut, full in zip(right.options, whole.options, strict=True):
        assert cut.tolist() == full.tolist()
    with pytest.raises(DataError, match="leaves no room for the prompt"):
        one(tokenizer, line, limit=max(len(o) for o in whole.options) + 1, truncate="left")


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


# ---- order and batches ----------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_and_any_batch_is_direct() -> None:
    order = DataOrder(10, 4, seed=7)
    sequence = [i for step in range(10) for i in order.batch(step)]
    for epoch in range(4):
        assert sorted(sequence[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert sequence[:10] != sequence[10:20]
    assert DataOrder(10, 4, seed=7).batch(6) == order.batch(6)
    assert [DataOrder(10, 4, seed=8).batch(s) for s in range(3)] != [order.batch(s) for s in range(3)]
    assert len(DataOrder(3, 8, seed=0).batch(2)) == 8
    with pytest.raises(UsageError):
        DataOrder(0, 4, seed=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collated_sequences(tokenizer, side: str) -> None:
    lines = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a", "completion": " dog ran far away"}]
    examples = [one(tokenizer, line) for line in lines]
    batch = collate(examples, pad_id=9, side=side, multiple=4)
    assert batch.input_ids.shape[1] % 4 == 0 and batch.num_tokens == sum(len(e.tokens) for e in examples)
    labels = batch.lm_labels()
    for row, example in enumerate(examples):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == example.tokens.tolist()
        assert (batch.input_ids[row][~real] == 9).all() and (labels[row][~real] == IGNORED).all()
        expected = np.where(example.targets, example.tokens, IGNORED)
        assert labels[row][real].tolist() == expected.tolist()
        if side == "left":
            assert batch.position_ids[row][real].tolist() == list(range(len(example.tokens)))
    assert bool(batch.attention_mask[0, 0]) == (side == "right")


def test_choices_of_one_token_share_a_row(tokenizer, tmp_path: Path) -> None:
    line = {"prompt": "the cat is", "choices": [" yes", " no"], "label": 0}
    assert collate([one(tokenizer, line)], pad_id=0).input_ids.shape[0] == 1
    assert collate([one(tokenizer, line)], pad_id=0, merge=False).input_ids.shape[0] == 2
    examples = load_examples(write_jsonl(tmp_path / "d", choice_lines(5)), tokenizer)
    batch = collate(examples, pad_id=0)
    assert batch.choices.shape == (5, 3) and batch.labels.tolist() == [0, 1, 2, 0, 1]
    assert batch.input_ids.shape[0] < 15 and batch.input_ids.dtype == torch.int64
    with pytest.raises(ValueError, match="several labels"):
        batch.lm_labels()
