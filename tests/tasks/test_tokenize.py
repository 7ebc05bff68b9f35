"""Lines become tokens: which of them are learned, and what is cut from long lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from tiny_text import make_checkpoint, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from distzo2.errors import DataError, DistZO2Error
from distzo2.tasks.examples import tokenize_for
from distzo2.tasks.kinds import ModelKind
from distzo2.tasks.lines import read_line
from distzo2.tasks.tokenize import load_tokenizer, special_counts


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


def letters(alphabet: str, single: str, lower: bool = False) -> PreTrainedTokenizerFast:
    """A token a letter; what is not in the alphabet is dropped."""
    vocab = {mark: i for i, mark in enumerate(["<pad>", "[CLS]", "[SEP]", *alphabet])}
    tokenizer = Tokenizer(models.BPE({k: v for k, v in vocab.items()}, []))
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    marks = [(mark, vocab[mark]) for mark in ("<pad>", "[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    tokenizer.add_special_tokens([mark for mark, _ in marks])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="[SEP]")


@pytest.mark.parametrize(
    ("alphabet", "single", "counts", "text"),
    [
        ("ACGT", "[CLS] $A", (1, 0), "ACGT"),
        ("ACGT", "[CLS] $A [SEP]", (1, 1), "ACGT"),
        ("ACGT", "$A [SEP] [SEP]", (0, 2), "GATT"),
        ("0123456789", "[CLS] [SEP] $A [SEP]", (2, 1), "2026"),
        ("bcd", "$A", (0, 0), "bdc"),
        ("a", "[CLS] $A [CLS]", (1, 1), "aaa"),
    ],
)
def test_special_tokens_are_the_tokenizers(alphabet: str, single: str, counts: tuple[int, int], text: str) -> None:
    tokenizer = letters(alphabet, single)
    assert special_counts(tokenizer, tokenizer) == counts
    example = one(tokenizer, {"text": text})
    whole = tokenizer.convert_ids_to_tokens(example.tokens)
    assert whole[counts[0] :] == [*text, "[SEP]"] and example.targets.sum() == len(text) + 1 - (not counts[0])
    example = one(tokenizer, {"prompt": text, "choices": [text[0], text[1] + text[0]], "label": 0})
    assert [len(option) for option in example.options] == [1, 2]
    assert tokenize_for(tokenizer).prompt(text) == tokenizer(text)["input_ids"][: counts[0] + len(text)]


def test_a_run_begun_before_keeps_its_tokens() -> None:
    """Earlier versions tried the letter a, and took the start token of a vocabulary without it for a tail."""
    tokenizer = letters("ACGT", "[CLS] $A")
    example = one(tokenizer, {"text": "ACGT"}, legacy=True)
    assert tokenizer.convert_ids_to_tokens(example.tokens) == ["[CLS]", "A", "C", "G", "[SEP]"]
    tokenizer = make_tokenizer(bos=True)
    line = {"prompt": "the cat sat", "completion": " on the mat"}
    assert one(tokenizer, line, legacy=True).tokens.tolist() == one(tokenizer, line).tokens.tolist()


def test_special_tokens_spelled_in_data(tokenizer) -> None:
    bos = make_tokenizer(bos=True)
    for each, line in (
        (tokenizer, {"text": "the <s> cat<eos>"}),
        (bos, {"prompt": "the <s>", "completion": " cat<eos> ran"}),
        (bos, {"prompt": "the <eos>", "choices": [" <s>", " dog"], "label": 0}),
    ):
        for splits in (False, True):
            example = one(each, line, split_special_tokens=splits)
            tokens = np.concatenate([example.tokens, *example.options[:1]])[each is bos :]
            ends = not example.options  # with the token that is learned as the end of the text
            found = np.isin(tokens[: len(tokens) - ends], [0, 1]).sum()
            spelled = sum(str(line).count(mark) for mark in ("<s>", "<eos>")) - ("text" in line)
            assert found == (0 if splits else spelled)
            text = line.get("text") or line["prompt"] + (line.get("completion") or line["choices"][0])
            assert each.decode(tokens[: len(tokens) - ends]) == text or not splits


def test_tokens_that_the_model_does_not_know(tokenizer) -> None:
    last = len(tokenizer) - 1
    text = tokenizer.decode([last])
    for line in ({"text": text}, {"prompt": "a", "choices": [text, "b"], "label": 1}):
        with pytest.raises(DataError, match=rf"f:1: token {last} \(.*\): the model knows {last} tokens"):
            one(tokenizer, line, kind=ModelKind(vocab_size=last))
        one(tokenizer, line, kind=ModelKind(vocab_size=last + 1))


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


def test_no_merge_is_left_to_chance(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tokenizer = make_tokenizer()
    expected = tokenizer("the cat sat on the mat and the dog ran")["input_ids"]
    tokenizer.backend_tokenizer.model.dropout = 0.5
    tokenizer.save_pretrained(tmp_path)
    assert '"dropout": 0.5' in (tmp_path / "tokenizer.json").read_text()
    loaded = load_tokenizer(tmp_path)
    assert all(loaded("the cat sat on the mat and the dog ran")["input_ids"] == expected for _ in range(5))


@pytest.mark.parametrize("name", ["ByT5Tokenizer", "CanineTokenizer"])
def test_tokenizers_written_in_python(name: str) -> None:
    tokenizer = getattr(transformers, name)()
    head, tail = special_counts(tokenizer, tokenizer)
    assert (head, tail) == ((0, 1) if name == "ByT5Tokenizer" else (1, 1))
    example = one(tokenizer, {"prompt": "ab", "choices": ["c", "de"], "label": 0})
    assert len(example.tokens) == head + 2 and [len(option) for option in example.options] == [1, 2]
