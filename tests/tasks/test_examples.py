"""Examples of models that are not causal, the lines that each of them takes, and bad lines that are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_kinds import roberta_tokenizer, word_tokenizer
from tiny_text import make_tokenizer, write_jsonl

from distzo2.errors import DataError, DistZO2Error, UsageError
from distzo2.tasks.examples import examples_digest, load_examples, tokenize_for
from distzo2.tasks.kinds import ModelKind
from distzo2.tasks.lines import read_line
from distzo2.tasks.tokenize import Example

DECODER = ModelKind("encoder-decoder", "ADecoder", start_id=2)
MASKED = ModelKind("masked", "AMasked")
CLASSES = ModelKind("classifier", "AClassifier", num_classes=3)
COMPLETION = {"prompt": "the cat is", "completion": "good ."}
CHOICES = {"prompt": "the cat is", "choices": ["good .", "bad"], "label": 1}
WORD = {"prompt": "the cat is <mask> .", "choices": ["good", "bad"], "label": 1}
TEXT = {"text": "the cat", "label": 2}


def one(kind: ModelKind, line: dict[str, Any], tokenizer: Any = None, **options: Any) -> Example:
    lines = [read_line(json.dumps(line).encode(), "f:1")]
    return tokenize_for(tokenizer or word_tokenizer(), kind, **options)(lines)[0]


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "$A", "<s> <s> $A"])
def test_encoder_and_decoder(single: str) -> None:
    tokenizer = word_tokenizer(single)
    example = one(DECODER, COMPLETION, tokenizer)
    labels = tokenizer(text_target="good .")["input_ids"]
    assert example.source.tolist() == tokenizer("the cat is")["input_ids"]
    assert example.tokens.tolist() == [2, *labels] and example.tokens[example.targets].tolist() == labels
    example = one(DECODER, CHOICES, tokenizer)
    assert [tokenizer.decode(option) for option in example.options] == ["good .", "bad"] and example.label == 1
    assert example.tokens.tolist() == [2, *labels[: single.split().index("$A")]]
    kind = ModelKind("encoder-decoder", "ADecoder")  # it begins with what ends a text, as mBART does
    if single.endswith("</s>"):
        assert one(kind, COMPLETION, tokenizer).tokens[0] == tokenizer.eos_token_id
    else:
        with pytest.raises(DistZO2Error, match="no decoder_start_token_id, with which ADecoder begins"):
            one(kind, COMPLETION, tokenizer)


def test_long_prompts_of_an_encoder() -> None:
    with pytest.raises(DataError, match="f:1: 5 tokens, the limit is 4"):
        one(DECODER, COMPLETION, limit=4)
    tokenizer = word_tokenizer()
    left, right = (one(DECODER, CHOICES, limit=4, truncate=side) for side in ("left", "right"))
    assert tokenizer.decode(left.source) == "<s> cat is </s>" and tokenizer.decode(right.source) == "<s> the cat </s>"
    for single, side, text in (("$A </s>", "left", "</s> . </s>"), ("$A </s>", "right", "</s> good .")):
        long = one(DECODER, COMPLETION, word_tokenizer(single), limit=3, truncate=side)
        assert tokenizer.decode(long.tokens) == text and not long.targets[0] and long.targets[1:].all()
    with pytest.raises(DataError, match="f:1: no token is left to learn"):
        one(DECODER, COMPLETION, word_tokenizer("$A </s>"), limit=1, truncate="left")
    with pytest.raises(DataError, match="f:1: a choice of 4 tokens, the limit is 3"):
        one(DECODER, CHOICES, limit=3, truncate="left")


@pytest.mark.parametrize("lstrip", [False, True])
def test_words_in_the_place_of_a_mask(lstrip: bool) -> None:
    tokenizer = word_tokenizer(lstrip=lstrip)
    for line in (WORD, WORD | {"choices": [" good", " bad"]}, WORD | {"prompt": "the cat is<mask>."}):
        example = one(MASKED, line, tokenizer)
        assert tokenizer.decode(example.tokens[example.place]) == "<mask>" and example.label == 1
        assert example.tokens.tolist() == tokenizer("the cat is <mask> .")["input_ids"]
        assert [tokenizer.decode(option) for option in example.options] == ["good", "bad"] and example.chooses
    example = one(MASKED, {"prompt": "<mask> is it", "completion": "good", "label": 5}, tokenizer)
    assert (example.place, example.label, example.chooses) == (1, 0, False)


def test_words_with_a_space_are_other_tokens() -> None:
    """In byte-level vocabularies; the mask takes the space before it."""
    tokenizer = roberta_tokenizer()
    vocab = tokenizer.get_vocab()
    for prompt, choices in (("it is <mask>.", ["good", "bad"]), ("it is<mask>.", [" good", " bad"])):
        example = one(MASKED, {"prompt": prompt, "choices": choices, "label": 0}, tokenizer)
        assert [int(option[0]) for option in example.options] == [vocab["Ġgood"], vocab["Ġbad"]]
    example = one(MASKED, {"prompt": "<mask> it is", "choices": [" a", " b"], "label": 0}, tokenizer)
    assert [int(option[0]) for option in example.options] == [vocab["a"], vocab["b"]]


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        (DECODER, TEXT, "ADecoder needs lines with a prompt for its encoder, .* a 'text' line"),
        (DECODER, {"messages": [{"role": "assistant", "content": "a"}]}, "a 'messages' line"),
        (MASKED, TEXT, "AMasked needs lines with a prompt that holds its mask token <mask>"),
        (MASKED, CHOICES, "the prompt has no mask token: AMasked fills in one <mask>"),
        (MASKED, WORD | {"prompt": "<mask> is <mask>"}, "the prompt has 2 mask tokens"),
        (MASKED, WORD | {"choices": ["good", "good cat"]}, "'good cat' is 2 tokens: a mask token stands for one"),
        (MASKED, WORD | {"choices": ["good", " "]}, "' ' is 0 tokens"),
        (MASKED, {"prompt": "<mask>", "completion": "good ."}, r"'good \.' is 2 tokens"),
        (CLASSES, CHOICES, 'AClassifier needs lines with a "text" and its "label", this is a .choices. line'),
        (CLASSES, {"text": "a"}, "label: expected a class of AClassifier, a number from 0 to 2"),
        *((CLASSES, TEXT | {"label": each}, "a number from 0 to 2") for each in (3, -1, True, "good", 1.0, [0, 1])),
    ],
)
def test_lines_that_do_not_fit(kind: ModelKind, line: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"^f:1: .*{reason}"):
        one(kind, line)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (ModelKind(), {"prompt": "the cat is", "choices": [" bad", " good", "  good"], "label": 0}),
        (ModelKind(), {"prompt": "the cat is", "choices": [" bad", " unheard", " of"], "label": 0}),  # not in its words
        (DECODER, CHOICES | {"choices": ["bad", "good", " good"]}),
        (MASKED, WORD | {"choices": ["bad", "good", " good"]}),
    ],
)
def test_choices_that_the_model_cannot_tell_apart(kind: ModelKind, line: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="f:1: choices 1 and 2 are the same tokens to the model"):
        one(kind, line)


def test_a_tokenizer_without_a_mask() -> None:
    with pytest.raises(DistZO2Error, match="AMasked fills masks in, and the tokenizer has no mask token"):
        one(MASKED, WORD, make_tokenizer())
    with pytest.raises(UsageError, match="--split-special-tokens: the prompts for AMasked hold its mask token"):
        one(MASKED, WORD, split_special_tokens=True)


def test_long_texts_keep_their_special_tokens() -> None:
    tokenizer = word_tokenizer()
    line = {"text": "the cat is good .", "label": 0}
    assert tokenizer.decode(one(CLASSES, line).tokens) == "<s> the cat is good . </s>"
    with pytest.raises(DataError, match="f:1: 7 tokens, the limit is 5"):
        one(CLASSES, line, limit=5)
    for side, text in (("left", "<s> is good . </s>"), ("right", "<s> the cat is </s>")):
        assert tokenizer.decode(one(CLASSES, line, limit=5, truncate=side).tokens) == text
    with pytest.raises(DataError, match="f:1: the text has no tokens"):
        one(CLASSES, {"text": " ", "label": 0}, word_tokenizer("$A"))
    example = one(MASKED, WORD, limit=5, truncate="left")
    assert tokenizer.decode(example.tokens) == "<s> is <mask> . </s>" and example.place == 2
    with pytest.raises(DataError, match="f:1: the mask token is cut off"):
        one(MASKED, WORD, limit=5, truncate="right")


def test_bad_lines_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is bad about them: JSON, the object, the kind, the length, what is left to learn."""
    bad = ['{"text": ', '{"text": 3}', '{"text": "a"} x', CHOICES, {"text": "cat " * 9}, {"text": " "}, "[1]"]
    good = [{"text": "the cat"}, {"text": "the dog is"}]
    path = write_jsonl(tmp_path / "d", [good[0], *bad, good[1]])
    tokenizer = word_tokenizer("$A")
    expected = load_examples(write_jsonl(tmp_path / "e", good), tokenizer, limit=8)
    found = load_examples(path, tokenizer, limit=8, skip_bad_lines=len(bad))
    assert examples_digest(found) == examples_digest(expected)
    assert f"{path}: 7 bad lines skipped, the first: {path}:2: not valid JSON" in caplog.text
    none = write_jsonl(tmp_path / "f", [b for b in bad if b is not CHOICES])
    for file, allowed, reason in (
        (path, 5, rf"{path}:6: 10 tokens, the limit is 8 .*\(and 5 bad lines before it were skipped\)$"),
        (path, 0, rf"{path}:2: not valid JSON: [^(]*$"),
        (none, 100, "holds no examples"),
    ):
        with pytest.raises(DataError, match=reason):
            load_examples(file, tokenizer, limit=8, skip_bad_lines=allowed)


def test_one_hash_of_all_that_is_learned() -> None:
    def ids(*values: int) -> np.ndarray:
        return np.asarray(values, dtype=np.int32)

    base = Example(ids(1, 2), np.asarray([False, True]))
    others = [
        Example(ids(1, 3), np.asarray([False, True])), Example(ids(1, 2), np.asarray([False, False])),
        Example(ids(1, 2), None), Example(ids(1), None, (ids(2),)), Example(ids(), None, (ids(1), ids(2))),
        Example(ids(), None, (ids(1, 2),)), Example(ids(1, 2), None, (), 1), Example(ids(1, 2), None, (), 0, ids()),
        Example(ids(), None, (), 0, ids(1, 2)), Example(ids(1, 2), None, (), 0, None, 1),
    ]  # fmt: skip
    digests = [examples_digest(each) for each in ([base], *([o] for o in others), [base] * 2, [base, others[0]], [])]
    assert len(set(digests)) == len(digests)
    assert digests[0] == examples_digest([Example(ids(1, 2), np.asarray([False, True]))]) and len(digests[0]) == 64
