"""Chat templates: what they may not depend on, and what teaches a model to stop."""

from __future__ import annotations

import json
import logging
from datetime import datetime

import pytest
from tiny_text import make_tokenizer

from distzo2.errors import DistZO2Error
from distzo2.tasks.examples import tokenize_for
from distzo2.tasks.lines import read_line

TURNS = [("user", "the cat"), ("assistant", "sat"), ("user", "and the dog"), ("assistant", " ran far ")]
MESSAGES = {"messages": [{"role": r, "content": c} for r, c in TURNS]}
MORNING, EVENING = datetime(2026, 3, 4, 5, 6), datetime(2026, 3, 4, 17, 30)
EACH = "{% for m in messages %}{{ m.role }}[{{ m.content }}]"


def one(template: str, line: dict = MESSAGES, bos: bool = False, **options):
    tokenizer = make_tokenizer(bos=bos)
    tokenizer.chat_template = template
    example = tokenize_for(tokenizer, **options)([read_line(json.dumps(line).encode(), "f:1")])[0]
    return tokenizer.decode(example.tokens), tokenizer.decode(example.tokens[example.targets])


@pytest.mark.parametrize(
    "clock",
    [
        "{{ strftime_now('%d %b %Y %H:%M') }}",
        "{% if not date is defined %}{% set date = strftime_now('%H') %}{% endif %}{{ date }}",
        "{% if strftime_now('%p') == 'AM' %}good{% else %}bad{% endif %}",
    ],
)
def test_a_template_sees_the_time_of_the_run(clock: str, caplog: pytest.LogCaptureFixture) -> None:
    template = clock + EACH + "<eos>{% endfor %}"
    morning = one(template, clock=MORNING)
    assert "asks for the time: in this run it is 2026-03-04 05:06 to the end" in caplog.text
    assert one(template, clock=MORNING) == morning != one(template, clock=EVENING)


def test_no_time_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    one("{# strftime_now #}" + EACH + "<eos>{% endfor %}", clock=MORNING)
    assert not caplog.records


@pytest.mark.parametrize(
    "chance", ["{{ ['a', 'b', 'c'] | random }}", "{{ lipsum() }}", "{% set x = messages|random %}{{ x.role }}"]
)
def test_a_template_leaves_nothing_to_chance(chance: str) -> None:
    with pytest.raises(DistZO2Error, match="leaves what it writes to chance"):
        one(chance + EACH + "<eos>{% endfor %}")


@pytest.mark.parametrize(
    ("end", "learned", "told"),
    [
        ("]<eos>", "sat]<eos> ran far ]<eos>", False),
        ("]<|end|>\n", "sat]<|end|>\n ran far ]<|end|>\n", False),  # a token that was added
        ("]\n", "sat]\n ran far ]\n<eos>", True),  # white space marks no end, though it is an added token
        ("][/END]", "sat][/END] ran far ][/END]<eos>", True),  # text, at which nothing stops
        ("", "sat ran far <eos>", True),
        (" | trim]<eos>", "sat]<eos>ran far]<eos>", False),
        (" | trim]", "sat]ran far]<eos>", True),
    ],
)
def test_the_end_is_learned(end: str, learned: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    trim, end = " | trim" * (" | trim" in end), end.removeprefix(" | trim")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|end|>", "\n"])
    each = "{% for m in messages %}<s>{{ m.role }}[{{ m.content" + trim + " }}"
    tokenizer.chat_template = each + end + "{% endfor %}{% if add_generation_prompt %}<s>assistant[{% endif %}"
    lines = [read_line(json.dumps(MESSAGES).encode(), "f:1")] * 2
    for options, expected in (({}, learned), ({"legacy": True}, learned.removesuffix("<eos>") if told else learned)):
        example = tokenize_for(tokenizer, **options)(lines)[1]
        assert tokenizer.decode(example.tokens[example.targets]).replace(" ", "") == expected.replace(" ", "")
    assert caplog.text.count("the end of the text is learned") == told


def test_no_token_for_the_end(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    lines = [read_line(b'{"text": "the cat"}', "f:1")] * 3
    with caplog.at_level(logging.WARNING):
        tokenize_for(tokenizer)(lines)
    assert caplog.text.count("no token for the end of a text: nothing teaches the model to stop") == 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("opening", ["", "<s>"])
def test_special_tokens_spelled_in_messages(bos: bool, opening: str) -> None:
    template = opening + EACH + "<eos>{% endfor %}{% if add_generation_prompt %}assistant[{% endif %}"
    line = {"messages": [{"role": "user", "content": "a <eos> b"}, {"role": "assistant", "content": "<s>sat"}]}
    for splits in (False, True):
        whole, learned = one(template, line, bos, split_special_tokens=splits)
        start = "<s>" if bos or opening else ""
        assert whole == f"{start}user[a <eos> b]<eos>assistant[<s>sat]<eos>" and learned == "<s>sat]<eos>"
    tokenizer = make_tokenizer(bos=bos)
    tokenizer.chat_template = template
    lines = [read_line(json.dumps(line).encode(), "f:1")]
    counts = [
        [(e.tokens == 0).sum(), (e.tokens == 1).sum()]
        for e in (tokenize_for(tokenizer, split_special_tokens=splits)(lines)[0] for splits in (False, True))
    ]
    starts = int(bos or opening != "")
    assert counts == [[3, 1 + starts], [2, starts]]
