"""F1 and EM of written answers, against values of the official rule."""

from __future__ import annotations

import pytest

from distzo2.errors import UsageError
from distzo2.rewards.functions import check_row, exact_match, f1, parsed, reward_named, words_of


@pytest.mark.parametrize(
    ("text", "answers", "wanted_f1", "wanted_em"),
    [
        ("1976", ["1976"], 1, 1),  # the examples of the metric's card at Hugging Face and of torchmetrics
        ("Hello", ["1976"], 0, 0),
        ("2 時間 21 分", ["2 時間"], 2 / 3, 0),
        ("The Cat's hat!", ["cats hat"], 1, 1),
        ("an answer, the answer", ["Answer"], 2 / 3, 0),  # a word counts as often as it is there
        ("theory of a", ["theory  of\nan"], 1, 1),
        ("in London in 1900", ["London", "in London", "Paris"], 2 * 0.5 * 1 / 1.5, 0),  # the best of several
        ("", ["the"], 0, 1),
        ("U.S.", ["US"], 1, 1),
        ("—", ["-"], 0, 0),  # punctuation is that of ASCII
    ],
)
def test_against_the_official_rule(text: str, answers: list[str], wanted_f1: float, wanted_em: float) -> None:
    assert f1(text, answers) == pytest.approx(wanted_f1)
    assert exact_match(text, answers) == wanted_em


def test_words() -> None:
    assert words_of("The  quick-brown fox, (an A.N.T.) ate.") == ["quickbrown", "fox", "ant", "ate"]


def rewarded(name: str, text: str, row: dict) -> float:
    (value,) = reward_named(name)([""], [text], [row])
    return value


@pytest.mark.parametrize(
    ("name", "text", "row", "wanted"),
    [
        ("exact", " The cat.", {"completion": "cat"}, 1),
        ("em", "a cat", {"answers": ["dog", "cat"]}, 1),
        ("f1", "a black cat", {"answer": "cat"}, 2 / 3),
        ("number", "6 * 7 = 42, so $1,042.50.", {"answer": 1042.5}, 1),
        ("number", "-7 or .5", {"answers": ["it is #### 0.50"]}, 1),
        ("number", "none", {"answers": ["none"]}, 0),
        ("number", "pages 10-12", {"answer": 12}, 1),
        ("number", "x=-3", {"answer": "(-3)"}, 1),
        ("number", "1,2", {"answer": 2}, 1),
        ("number", "1,234,567", {"answer": 1234567}, 1),
        ("number", "1,2345", {"answer": 2345}, 1),
        (r"regex:<a>\d+</a>", " <a>12</a>\n", {}, 1),
        (r"regex:\d+", "12 apples", {}, 0),
    ],
)
def test_rewards_by_name(name: str, text: str, row: dict, wanted: float) -> None:
    assert rewarded(name, text, row) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["", "accuracy", "f1:x", "regex:", "json:", "mine.py", "mine.py:", "mine.py:a b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="expected exact, f1, number, regex:PATTERN"):
        parsed(name)


def test_json_that_a_schema_allows(tmp_path) -> None:
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}')
    texts = ['{"n": 3}', ' {"n": 3}\n', '{"n": "3"}', "{}", '{"n": 3', "[" * 100_000]
    assert [rewarded(f"json:{path}", text, {}) for text in texts] == [1, 1, 0, 0, 0, 0]
    for bad in ('{"type": "thing"}', "{"):
        path.write_text(bad)
        with pytest.raises(UsageError, match="not a JSON schema"):
            reward_named(f"json:{path}")


def test_rows_without_answers() -> None:
    for row in ({}, {"answers": []}, {"answers": [None]}, {"answer": {"x": 1}}):
        with pytest.raises(ValueError, match="answers: a list of texts was expected"):
            check_row("f1", row)
    check_row("regex:a", {})
