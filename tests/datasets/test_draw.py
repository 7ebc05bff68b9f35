"""The examples of tasks against a plain loop: the rows that are drawn, their tokens, and the scores of options."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from published import rows, write_split, write_task
from same_bits import same_bits
from tiny_text import make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM

from distzo2 import offload
from distzo2.datasets.draw import TaskReader, draw, loss_of
from distzo2.datasets.rows import Asked, Task, find_task
from distzo2.errors import DataError, UsageError
from distzo2.rewards.functions import WORDS
from distzo2.tasks.kinds import CAUSAL, ModelKind
from distzo2.tasks.objectives import Objective, choice_scores, evaluate_examples

TOKENIZERS = {bos: make_tokenizer(bos=bos) for bos in (False, True)}
OPTIONS = ["sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    directory = make_checkpoint(tmp_path_factory.mktemp("draw") / "m", positions=256)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def reader(task: str, *, bos: bool = False, **options) -> TaskReader:
    return TaskReader(find_task(task), TOKENIZERS[bos], kind=CAUSAL, **options)


def asked(task: str, count: int = 4) -> list[Asked]:
    return [find_task(task).ask(record, f"row {i + 1}") for i, record in enumerate(rows(task, count))]


def encoded(text: str, bos: bool) -> list[int]:
    return TOKENIZERS[bos](text)["input_ids"]


def plain_options(row: Asked, bos: bool, shots: str = "") -> list[tuple[list[int], int]]:
    """Of each option the tokens of the whole text, and how many of them are scored."""
    before = len(encoded(row.prompt.strip(" "), bos))
    texts = [(row.prompt + option).strip(" ") for option in row.options]
    return [(encoded((shots + t).lstrip(), bos), len(encoded(t, bos)) - before) for t in texts]


# ---- which rows ----------------------------------------------------------------------------------------------------


def test_rows_are_the_first_of_numpys_permutation(tmp_path: Path) -> None:
    write_task(tmp_path, "sst2", train=30, validation=9)
    task = find_task("sst2")
    drawn = draw(task, tmp_path, 3, num_train=5, num_dev=4, num_eval=6)
    np.random.seed(3)
    places = np.random.permutation(30)[:9]
    np.random.seed(3)
    held_out = np.random.permutation(9)[:6]
    texts = [f"{record['sentence'].strip()} It was" for record in rows("sst2", 39)]
    assert [row.prompt for row in drawn.train + drawn.dev] == [texts[i] for i in places]
    assert len(drawn.dev) == 4 and [row.prompt for row in drawn.eval] == [texts[30 + i] for i in held_out]
    assert drawn.train[0].where == f"{tmp_path / 'train.jsonl'}, row {places[0] + 1}"
    assert draw(task, tmp_path, 3, num_train=5, num_dev=4).digest() == drawn.digest()
    assert draw(task, tmp_path, 4, num_train=5, num_dev=4).digest() != drawn.digest()
    few = draw(task, tmp_path, 3, num_train=100, num_dev=28)  # as WSC: development comes first
    assert (len(few.train), len(few.dev), few.eval) == (2, 28, [])
    with pytest.raises(DataError, match="30 rows to train on, and 30 of them are for development"):
        draw(task, tmp_path, 3, num_train=1, num_dev=30)


def test_only_rows_that_are_drawn_are_asked(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [record | {"label": -1} for record in rows("cb", 3)])
    with pytest.raises(DataError, match=r"train.jsonl, row [123]: label: 0, 1, 2 were expected, it is -1"):
        draw(find_task("cb"), tmp_path, 0, num_train=1)
    with pytest.raises(DataError, match="no split 'validation'"):
        draw(find_task("cb"), tmp_path, 0, num_eval=1)


# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("task", OPTIONS)
def test_scored_tokens_and_scores_are_those_of_a_plain_loop(task: str, bos: bool, model) -> None:
    """An option at a time where it is one token, and else the options of an example in a batch: then to the bit."""
    objective = Objective(model, "choices", pad_id=0)
    for row, example in zip(asked(task), reader(task, bos=bos).asked(asked(task)), strict=True):
        wanted = plain_options(row, bos)
        assert [[*example.tokens, *option] for option in example.options] == [tokens for tokens, _ in wanted]
        leads = example.lead or (0,) * len(wanted)
        assert [len(o) - lead for o, lead in zip(example.options, leads, strict=True)] == [n for _, n in wanted]
        assert (example.label, example.right or (row.label,)) == (row.label, row.right)
        groups = [[each] for each in wanted] if {n for _, n in wanted} == {1} else [wanted]
        plain = torch.cat([plain_scores(model, group) for group in groups])
        batch = objective.batch([example])
        with torch.no_grad():
            scores = choice_scores(batch, objective._token_scores(batch)[1])
        assert same_bits(scores[0], plain)
        evaluated = objective.evaluation(batch)().tolist()
        assert evaluated[2] == float(int(plain.argmax()) in row.right)


def test_one_option_is_the_answer(model) -> None:
    """As of a passage with one entity, beside others."""
    task = find_task("record")
    data = [task.ask(r | more, "row") for r, more in zip(rows("record", 2), ({}, {"entities": ["Home"]}), strict=True)]
    for order in (data, data[::-1]):
        batch = (objective := Objective(model, "choices", pad_id=0)).batch(reader("record").asked(order))
        with torch.no_grad():
            loss, count, hits, answers = objective.evaluation(batch)().tolist()
            alone = objective.evaluation(objective.batch(reader("record").asked(data[:1])))().tolist()
        assert (count, answers, hits) == (2, 2, 1 + alone[2]) and loss == pytest.approx(alone[0], rel=1e-5)


@torch.no_grad()
def plain_scores(model, texts: list[tuple[list[int], int]]) -> torch.Tensor:
    """float32 [options]: the mean log-likelihood of the last tokens of each text, which are read in one batch."""
    width = max(len(tokens) for tokens, _ in texts) - 1
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (tokens, _) in enumerate(texts):
        ids[i, : len(tokens) - 1], mask[i, : len(tokens) - 1] = torch.tensor(tokens[:-1]), 1
    logits = model(input_ids=ids, attention_mask=None if mask.all() else mask).logits.float()
    scores = torch.zeros(len(texts), max(num_scored for _, num_scored in texts))
    for i, (tokens, num_scored) in enumerate(texts):
        for k, place in enumerate(range(len(tokens) - num_scored, len(tokens))):
            row = logits[i, place - 1]
            scores[i, k] = row[tokens[place]] - row.logsumexp(-1)
    return scores.sum(-1) / torch.tensor([num_scored for _, num_scored in texts])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("task", ["copa", "record", "squad", "drop"])
def test_a_whole_text_is_learned(task: str, bos: bool) -> None:
    """Or what follows the prompt; a written answer ends with its newline."""
    for loss in ("text", "completion"):
        for row, example in zip(asked(task), reader(task, bos=bos).learned(asked(task), loss), strict=True):
            whole = encoded((row.prompt + row.completion).strip(" "), bos)
            assert example.tokens.tolist() == whole
            learned = len(whole) - (1 if loss == "text" else len(encoded(row.prompt.strip(" "), bos)))
            assert example.targets.tolist() == [False] * (len(whole) - learned) + [True] * learned
            assert row.completion.endswith("\n") == (task in ("squad", "drop"))


def test_which_loss() -> None:
    sst2, squad = find_task("sst2"), find_task("squad")
    assert loss_of(sst2, None) == ("choices", "choices") and loss_of(squad, None) == ("text", "lm")
    assert loss_of(sst2, "lm") == ("completion", "lm") and loss_of(sst2, "error") == ("choices", "error")
    assert loss_of(squad, "lm") == ("completion", "lm") and loss_of(find_task("copa"), "choices") == ("choices",) * 2


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_that_is_too_long_loses_its_beginning(bos: bool, caplog) -> None:
    """Each by itself: a longer option has less of the prompt before it. The token at the start stays."""
    limit = 16

    def cut(tokens: list[int], room: int = 0) -> list[int]:
        return tokens[:1] + tokens[1:][-(limit - room - 1) :] if bos else tokens[-(limit - room) :]

    row = asked("copa")[0]
    (example,) = reader("copa", bos=bos, limit=limit).asked([row])
    for option, lead, (tokens, num_scored) in zip(example.options, example.lead, plain_options(row, bos), strict=True):
        assert [*example.tokens, *option] == cut(tokens) and len(option) - lead == num_scored
    assert len(example.tokens) + len(example.options[0]) == limit
    squad = asked("squad")[0]
    (learned,) = reader("squad", bos=bos, limit=limit, max_new_tokens=5).learned([squad], "text")
    assert learned.tokens.tolist() == cut(encoded(squad.prompt + squad.completion, bos), 5)
    (question,) = reader("squad", bos=bos, limit=limit, max_new_tokens=5).questions([squad])
    assert question.tokens == cut(encoded(squad.prompt, bos), 5) and question.row == {"answers": list(squad.answers)}
    cuts = "texts longer than 16 tokens lose their beginning, demonstrations first (1 of them)"
    assert caplog.messages == [f"task {task}: {cuts}" for task in ("copa", "squad", "squad")]
    with pytest.raises(DataError, match=r"row 1: .* tokens, the limit is 16"):
        reader("copa", bos=bos, limit=limit, truncate="error").asked([row])


def test_demonstrations(model) -> None:
    """They stand before the text, with a newline between; what is scored does not change."""
    for task in ("sst2", "copa", "squad"):
        *shots, row = asked(task, 3)
        before = "".join((shot.prompt + shot.completion).strip() + "\n\n" for shot in shots)
        if task == "squad":
            (question,) = reader(task).questions([row], shots)
            assert question.tokens == encoded(before + row.prompt, False)
            continue
        (example,) = reader(task, bos=True).asked([row], shots)
        leads = example.lead or (0,) * len(example.options)
        found = [([*example.tokens, *o], len(o) - lead) for o, lead in zip(example.options, leads, strict=True)]
        assert found == plain_options(row, True, before)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("task", ["sst2", "rte", "copa", "record"])
def test_calibration(task: str, bos: bool, model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the option that gains most log-likelihood by its prompt (sums of tokens)."""
    data, read = asked(task, 5), reader(task, bos=bos)
    examples, blanks = read.asked(data), read.blanks(data)
    hits = 0
    for row in data:
        gains = []
        for tokens, num_scored in plain_options(row, bos):
            gains.append(plain_scores(model, [(tokens, num_scored)]) * num_scored)
        blank = Asked(row.where, row.blank, row.options, row.label, row.right, "", (), None)
        for i, (tokens, num_scored) in enumerate(plain_options(blank, bos)):
            opened = tokens if len(tokens) > num_scored else [1, *tokens]  # nothing is before it: the text's beginning
            gains[i] = gains[i] - plain_scores(model, [(opened, num_scored)]) * num_scored
        hits += int(torch.cat(gains).argmax()) in row.right
    streamed = offload(model, weights="device") if not hasattr(model, "_distzo2_state") else model
    objective = Objective(streamed, "choices", pad_id=0)
    for size, per_pass in ((5, 1), (2, 8)):
        monkeypatch.setattr("distzo2.tasks.objectives.BATCHES_PER_PASS", per_pass)
        score = evaluate_examples(objective, examples, batch_size=size, blanks=blanks)
        assert score.accuracy == hits / 5
        assert score.loss == pytest.approx(evaluate_examples(objective, examples).loss, rel=1e-5)


def test_what_does_not_go_together() -> None:
    with pytest.raises(UsageError, match="task squad has no prompt without content"):
        reader("squad").blanks(asked("squad"))
    with pytest.raises(UsageError, match="the answers of task sst2 are options, not written"):
        reader("sst2").held_out(asked("sst2"), "choices", rewards=WORDS)
    with pytest.raises(UsageError, match="--truncate right: at the end of a task's text stands its answer"):
        reader("sst2", truncate="right")
    with pytest.raises(UsageError, match="a causal language model was expected, T5 is not one"):
        TaskReader(find_task("sst2"), TOKENIZERS[False], kind=ModelKind("encoder-decoder", "T5"))
    for option, reason in (
        (" ", "option 1 has no token that another predicts"),
        (" b ", "choices 0 and 1 are the same"),
    ):
        row = Task(name="t", prompt="{x} a", options=[" b", option], label="l").ask({"x": "c", "l": 0}, "row 7")
        with pytest.raises(DataError, match=f"row 7: {reason}"):
            reader("sst2").asked([row])
