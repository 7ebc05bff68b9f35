"""F1 and EM of written answers, against values of the official rule."""

from __future__ import annotations

import pytest

from distzo2.generation.answers import exact_match, f1, words_of


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
