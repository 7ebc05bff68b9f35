"""Rows of published data sets as text, and tasks of a user's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
from published import rows

from distzo2.datasets.rows import Asked, find_task, read_tasks, table_of_tasks
from distzo2.errors import DataError, UsageError


def ask(task: str, place: int, **changes: object) -> Asked:
    return find_task(task).ask(rows(task, place + 1)[place] | changes, "here")


# Of row 1 of each data set: the prompt, what is learned, the options, and the prompt without content.
TEXTS = {
    "sst2": ("a dog is good It was", " great", 2, "It was"),
    "rte": ('The dog sat on the matrix.\nDoes this mean that "the dog sat" is true? Yes or No?\n', "No", 2, ""),
    "cb": ('Suppose The dog sat on the matrix. Can we infer that "the dog sat"? Yes, No, or Maybe?\n', "No", 3, ""),
    "boolq": ("The dog is far away. Is the dog good?\n", "No", 2, ""),
    "wsc": (
        "The dog ran from the matrix and It was far.\nIn the previous sentence, does the pronoun "
        '"it" refer to dog? Yes or No?\n', "Yes", 2, "",
    ),
    "wic": (
        'Does the word "dog" have the same meaning in these two sentences? Yes, No?\na dog ran\nthe dog sat\n',
        "Yes", 2, "",
    ),
    "multirc": (
        "The dog sat. The matrix ran.\nQuestion: Who ran?\n"
        'I found this answer "dog". Is that correct? Yes or No?\n', "No", 2, "",
    ),
    "copa": ("The dog ran away because", " I sat.", 2, "because"),
    "record": (
        "The dog sat.\n- The matrix ran far.\n- Home is good.\n-", " A film of Home and the matrix", 3, "-",
    ),
    "squad": (
        "Title: Film\nContext: The dog sat on the matrix.\nQuestion: Where is it?\nAnswer:",
        " on the matrix\n", 0, None,
    ),
    "drop": ("Passage: The dog ran 1 yards.\nQuestion: How far?\nAnswer:", " 1\n", 0, None),
}  # fmt: skip


@pytest.mark.parametrize("task", TEXTS)
def test_the_text_of_a_row(task: str) -> None:
    asked = ask(task, 1)
    assert (asked.prompt, asked.completion, len(asked.options), asked.blank) == TEXTS[task]
    assert not asked.options or asked.options[asked.label] == asked.completion
    assert set(find_task(task).fields) <= rows(task, 1)[0].keys()


def test_the_eleven_tasks() -> None:
    tasks = read_tasks()
    assert list(tasks) == list(TEXTS)
    assert {name for name, task in tasks.items() if task.loss == "text"} == {"copa", "record", "squad", "drop"}
    assert {name for name, task in tasks.items() if task.num_dev == 100} == {"cb", "copa"}
    table = table_of_tasks(tasks)
    assert len(table) == 12 and "sentence, label" in table[1] and "f1 of written text" in table[10]


def test_particulars() -> None:
    assert ask("copa", 0).prompt == "The cat ran away so"
    assert ask("copa", 0).options == (" it was bad and the film sat on the mat.", " I sat.")
    assert ask("boolq", 0, question="Is it?").prompt == "The cat is far away. Is it?\n"
    assert ask("boolq", 0).completion == "Yes"
    record = ask("record", 0)  # any of the answers is right, the first is learned, an entity stands once
    assert (record.label, record.right) == (2, (2, 0))
    assert ask("record", 0, entities=["Home", "cat", "Home"]).right == (0, 1)
    assert ask("squad", 0).answers == ("on the film", "film")


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("sst2", {"label": -1}, "here: label: 0, 1 were expected, it is -1 .a test split hides its labels"),
        ("cb", {"label": 3}, "here: label: 0, 1, 2 were expected, it is 3"),
        ("sst2", {"sentence": 3.5, "label": None}, "here: label: 0, 1 were expected, it is None"),
        ("sst2", {"sentence": ["a"]}, r"here: sentence: text was expected, it is \['a'\]"),
        ("copa", {"question": "why"}, "here: question: 'cause' or 'effect' was expected, it is 'why'"),
        ("record", {"answers": ["x"]}, "here: answers: 'x' is not in entities"),
        ("record", {"answers": []}, "here: answers: none is not in entities"),
        ("record", {"query": "@ran"}, "here: '@placeholder' is not in ' @ran'"),
        ("record", {"entities": "cat"}, "here: entities: a list of texts was expected, it is 'cat'"),
        ("squad", {"answers": {"text": []}}, "here: answers.text: no answer"),
        ("squad", {"answers": {}}, r"here: no field 'answers.text' \('text' is missing\)"),
        ("drop", {"answers_spans": {"types": []}}, "no field 'answers_spans.spans' .'spans' is missing, of types"),
    ],
)
def test_a_bad_row(task: str, changes: dict, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        ask(task, 0, **changes)


MINE = """
[mine]
data = "my reviews"
prompt = "{title|strip|capital}: {text}\\nStars:"
options = [" one", " two"]
label = "stars"
labels = ["1", "2"]
"""


def test_a_task_of_a_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE + MINE.replace("[mine]", "[SST2]"))
    asked = find_task("Mine", file).ask({"title": " film ", "text": "{bad}", "stars": 2}, "here")
    assert (asked.prompt, asked.completion) == ("Film: {bad}\nStars:", " two")
    assert find_task("sst2", file).label == "stars" and len(read_tasks(file)) == 12


CHOICE = "[a]\nprompt = '{x}'\noptions = ['b', 'c']\nlabel = 'l'"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a", "--task-file .*mine.toml: Expected"),
        ("a = 3", r"\[a\] was expected, a table for each task"),
        ("[a]\nlabel = 'x'", r"\[a\] prompt: missing"),
        ("[a]\nprompt = '{x}'\ncolour = 1", r"\[a\] colour: Extra inputs are not permitted"),
        (CHOICE.replace("{x}", "{x"), "'{x': expected '}' before end of string"),
        (CHOICE.replace("{x}", "{x|shout}"), "of transforms strip, rstrip, lower"),
        (CHOICE.replace("{x}", "{x!r}"), "field.transform. was expected"),
        (CHOICE.replace(", 'c'", ""), "two options or more and a label, or each, were"),
        (CHOICE + "\nlabels = ['A', 'a']", "labels: 2 different ones were expected"),
        (CHOICE + "\neach = 'e'", "each needs one option with a placeholder"),
        (CHOICE + "\nnum_dev = 0", "num_dev: expected a number greater"),
        ("[a]\nprompt = '{x}'", "metric 'accuracy' needs options, and no completion"),
        ("[a]\nprompt = '{x}'\nmetric = 'f1'\ncompletion = 'b'", "needs completion, answers, a loss of text"),
    ],
)
def test_a_bad_task_file(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_tasks(tmp_path / "mine.toml")


def test_what_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"--task sst3: no such task; known are sst2, rte, .*, drop"):
        find_task("sst3")
    with pytest.raises(UsageError, match="--task-file no"):
        read_tasks("no.toml")
