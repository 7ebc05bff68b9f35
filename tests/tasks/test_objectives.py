"""Objectives against naive computing: one sequence at a time, full logits, a loop over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_kinds import make
from tiny_text import choice_lines, make_checkpoint, make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

import distzo2
from distzo2.errors import DistZO2Error, UsageError
from distzo2.tasks.examples import load_examples
from distzo2.tasks.kinds import model_kind
from distzo2.tasks.objectives import Objective, evaluate_examples, resolve_objective
from distzo2.tasks.tokenize import Example, load_tokenizer

LM = [
    {"prompt": "the cat", "completion": " sat on the mat"},
    {"prompt": "a graph has nodes", "completion": " and edges"},
    {"text": "a film is good or bad"},
]
# Rows are batched and padded here and not there, so products are summed in other orders: some units of float32.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    directory = make_checkpoint(tmp_path_factory.mktemp("objectives") / "m")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def examples_of(lines, tmp_path: Path) -> list[Example]:
    return load_examples(write_jsonl(tmp_path / "d.jsonl", lines), make_tokenizer())


@torch.no_grad()
def likelihoods(model, tokens) -> torch.Tensor:
    """float64 [num_tokens - 1]: of each token but the first, given those before it."""
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    logits = model(input_ids=ids[None]).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def naive_choices(model, examples) -> tuple[list[float], float]:
    losses, right = [], 0
    for e in examples:
        scores = []
        for option in e.options:
            whole = torch.cat([torch.as_tensor(e.tokens), torch.as_tensor(option)])
            scores.append(likelihoods(model, whole)[len(e.tokens) - 1 :].mean())
        scores = torch.stack(scores)
        losses.append(-scores.log_softmax(0)[e.label].item())
        right += int(scores.argmax() == e.label)
    return losses, right / len(examples)


@torch.no_grad()
def test_choices(model, tmp_path: Path) -> None:
    lines = choice_lines(7)
    lines[3]["choices"] = [" good", " bad"]  # fewer than the others
    lines[3]["label"] = 1
    examples = examples_of(lines, tmp_path)
    losses, accuracy = naive_choices(model, examples)
    objective = Objective(model, "choices", pad_id=0)
    assert objective.closure(objective.batch(examples))().item() == pytest.approx(sum(losses) / 7, rel=2e-5)
    figures = objective.evaluation(objective.batch(examples))()
    assert figures.dtype == torch.float64
    assert figures.tolist() == pytest.approx([sum(losses), 7, accuracy * 7, 7], rel=2e-5)
    error = Objective(model, "error", pad_id=0)
    assert error.closure(error.batch(examples))().item() == pytest.approx(1 - accuracy)
    # lm learns the right choice of each.
    lm, scores = Objective(model, "lm", pad_id=0), []
    for e in examples:
        whole = torch.cat([torch.as_tensor(e.tokens), torch.as_tensor(e.options[e.label])])
        scores.append(likelihoods(model, whole)[len(e.tokens) - 1 :])
    assert lm.closure(lm.batch(examples))().item() == pytest.approx(-torch.cat(scores).mean().item(), rel=2e-5)


@torch.no_grad()
def test_lm(model, tmp_path: Path) -> None:
    examples = examples_of(LM, tmp_path)
    scores = torch.cat([likelihoods(model, e.tokens)[torch.as_tensor(e.targets[1:])] for e in examples])
    objective = Objective(model, "lm", pad_id=0)
    batch = objective.batch(examples)
    loss = objective.closure(batch)()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-scores.mean().item(), rel=2e-5)
    total, count, hits, answers = objective.evaluation(batch)().tolist()
    assert total / count == pytest.approx(loss.item(), rel=1e-6) and count == answers == len(scores)
    assert hits == int(hits) and 0 <= hits <= answers


@torch.no_grad()
def test_logits_are_made_only_where_they_are_read(model, tmp_path: Path) -> None:
    examples = examples_of([{"prompt": "the cat sat on the mat", "choices": [" yes", " no"], "label": 0}], tmp_path)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    objective = Objective(model, "choices", pad_id=0)
    with_keep = objective.closure(objective.batch(examples))()
    objective._takes_keep = False
    without = objective.closure(objective.batch(examples))()
    handle.remove()
    assert shapes[0][1] == 1 and shapes[1][1] == len(examples[0].tokens)
    torch.testing.assert_close(with_keep, without, **CLOSE)


def test_which_objective(tmp_path: Path) -> None:
    choices, lm = examples_of(choice_lines(2), tmp_path), examples_of(LM, tmp_path)
    assert resolve_objective(None, choices) == "choices" and resolve_objective(None, lm) == "lm"
    assert resolve_objective("lm", choices) == "lm" and resolve_objective("error", lm) == "error"
    with pytest.raises(UsageError, match="needs lines with 'choices'"):
        resolve_objective("choices", lm)


def test_evaluation_in_any_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = distzo2.from_pretrained(directory, weights="disk", directory=tmp_path / "w")
    examples = examples_of(choice_lines(11), tmp_path)
    losses, accuracy = naive_choices(plain, examples)
    objective = Objective(model, "choices", pad_id=0)
    for batch_size, per_pass in ((11, 1), (2, 3), (3, 8)):
        monkeypatch.setattr("distzo2.tasks.objectives.BATCHES_PER_PASS", per_pass)
        score = evaluate_examples(objective, examples, batch_size=batch_size)
        assert score.loss == pytest.approx(sum(losses) / 11, rel=2e-5)
        assert score.accuracy == pytest.approx(accuracy) and score.num_examples == 11
    assert not math.isnan(score.loss)
    distzo2.runtime_of(model).close()


# ---- other kinds of model ----------------------------------------------------------------------------------------

PLAIN = {"prompt": ["the cat is", "the film was it"], "completion": ["good .", "bad"]}
CHOICES = [
    {"prompt": "the cat is", "choices": ["good .", "bad", "maybe good"], "label": 0},
    {"prompt": "the film was it", "choices": ["good", "bad ."], "label": 1},
]
MASKS = [
    {"prompt": "the cat is <mask> .", "choices": ["good", "bad", "great"], "label": 0},
    {"prompt": "<mask> was it", "choices": [" good", "bad"], "label": 1},
]
CLASSES = [
    {"text": "the cat is", "label": 0},
    {"text": "the film was it good .", "label": 2},
    {"text": "a", "label": 1},
]


def made(directory: Path, name: str, lines, objective: str | None = None, **fields):
    """Model, tokenizer, examples and objective of a tiny checkpoint."""
    make(directory / name, name, **fields)
    kind, tokenizer = model_kind(directory / name), load_tokenizer(directory / name)
    model = getattr(transformers, name).from_pretrained(directory / name, dtype=torch.float32).eval()
    examples = load_examples(write_jsonl(directory / "d", lines), tokenizer, kind=kind, limit=kind.limit(None))
    name = resolve_objective(objective, examples)
    return model, tokenizer, examples, Objective(model, name, pad_id=kind.padding(tokenizer))


@torch.no_grad()
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_encoder_decoder(name: str, tmp_path: Path) -> None:
    lines = [dict(zip(PLAIN, values, strict=True)) for values in zip(*PLAIN.values(), strict=True)]
    model, tokenizer, examples, objective = made(tmp_path, name, lines)
    for line, example in zip(lines, examples, strict=True):  # to the bit as transformers does it, alone
        labels = tokenizer(text_target=line["completion"], return_tensors="pt")["input_ids"]
        plain = model(**tokenizer(line["prompt"], return_tensors="pt"), labels=labels)
        assert torch.equal(objective.closure(objective.batch([example]))(), plain.loss)
    inputs = tokenizer(PLAIN["prompt"], return_tensors="pt", padding=True)  # and together, padded
    labels = tokenizer(text_target=PLAIN["completion"], return_tensors="pt", padding=True)["input_ids"]
    plain = model(**inputs, labels=labels.masked_fill(labels == tokenizer.pad_token_id, -100))
    batch = objective.batch(examples)
    torch.testing.assert_close(objective.closure(batch)(), plain.loss, **CLOSE)
    assert batch.num_tokens == inputs["attention_mask"].sum() + (labels != tokenizer.pad_token_id).sum()

    model, tokenizer, examples, objective = made(tmp_path, name, CHOICES)
    losses, right = [], 0
    for line in CHOICES:
        scores = []
        for choice in line["choices"]:
            answer = tokenizer(text_target=choice, return_tensors="pt")["input_ids"][:, :-1]
            logits = model(**tokenizer(line["prompt"], return_tensors="pt"), labels=answer).logits[0].double()
            head = int(answer[0, 0] == tokenizer.bos_token_id)
            scores.append(logits.log_softmax(-1).gather(-1, answer[0, :, None])[head:].mean())
        losses.append(-torch.stack(scores).log_softmax(0)[line["label"]].item())
        right += int(torch.stack(scores).argmax() == line["label"])
    figures = objective.evaluation(objective.batch(examples))().tolist()
    assert figures == pytest.approx([sum(losses), 2, right, 2], rel=2e-5)
    lm = Objective(model, "lm", pad_id=0)
    assert lm.batch(examples).tokens.tolist() == [t for e in examples for t in e.options[e.label]]


@torch.no_grad()
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_masked(name: str, tmp_path: Path) -> None:
    model, tokenizer, examples, objective = made(tmp_path, name, MASKS)
    losses, words, right = [], [], 0
    for line in MASKS:
        inputs = tokenizer(line["prompt"], return_tensors="pt")
        logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id][0].double()
        ids = tokenizer.convert_tokens_to_ids([c.strip() for c in line["choices"]])
        scores = logits[ids]
        losses.append(-scores.log_softmax(0)[line["label"]].item())
        words.append(-logits.log_softmax(0)[ids[line["label"]]].item())
        right += int(scores.argmax() == line["label"])
    batch = objective.batch(examples)
    assert batch.input_ids.shape[0] == 2  # all words of a prompt share its row
    assert objective.evaluation(batch)().tolist() == pytest.approx([sum(losses), 2, right, 2], rel=2e-5)
    lm = Objective(model, "lm", pad_id=0)
    assert lm.closure(lm.batch(examples))().item() == pytest.approx(sum(words) / 2, rel=2e-5)
    lines = [{"prompt": line["prompt"], "completion": line["choices"][line["label"]]} for line in MASKS]
    _, _, examples, alone = made(tmp_path, name, lines)
    assert alone.name == "lm"
    assert torch.equal(alone.closure(alone.batch(examples))(), lm.closure(lm.batch(examples))())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "pad_id"),
    [
        ("BertForSequenceClassification", 0), ("RobertaForSequenceClassification", 0),
        ("LlamaForSequenceClassification", 0), ("LlamaForSequenceClassification", 3),
        ("BartForSequenceClassification", 0),
    ],
)  # fmt: skip
def test_classes(name: str, pad_id: int, tmp_path: Path) -> None:
    model, tokenizer, examples, objective = made(tmp_path, name, CLASSES, num_labels=3, pad_token_id=pad_id)
    losses, right = [], 0
    for line, example in zip(CLASSES, examples, strict=True):
        plain = model(**tokenizer(line["text"], return_tensors="pt"), labels=torch.tensor([line["label"]]))
        loss = objective.closure(objective.batch([example]))()
        assert torch.equal(loss, plain.logits.logsumexp(-1)[0] - plain.logits[0, line["label"]])
        assert loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
        losses.append(plain.loss.item())
        right += int(plain.logits.argmax() == line["label"])
    assert objective.evaluation(objective.batch(examples))().tolist() == pytest.approx(
        [sum(losses), 3, right, 3], rel=2e-5
    )
    error = Objective(model, resolve_objective("error", examples), pad_id=pad_id)
    assert error.closure(error.batch(examples))().item() == pytest.approx(1 - right / 3)
    with pytest.raises(UsageError, match="d: objective 'lm' needs tokens to learn, and a classifier learns classes"):
        resolve_objective("lm", examples, "d")


def offloaded(directory: Path, name: str, tokenizer: Any = None, **fields):
    make(directory / name, name, tokenizer, **fields)
    return distzo2.from_pretrained(directory / name), model_kind(directory / name)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM", "ElectraForCausalLM"])
@pytest.mark.parametrize("lines", [LM, choice_lines(2)])
def test_a_model_that_sees_the_future_is_refused(name: str, lines, tmp_path: Path) -> None:
    model, kind = offloaded(tmp_path, name, make_tokenizer(), vocab_size=600, max_position_embeddings=64)
    examples = examples_of(lines, tmp_path)
    assert kind.name == "causal"
    with pytest.raises(DistZO2Error, match=f"{name} sees the tokens that it is asked to predict"):
        Objective(model, resolve_objective(None, examples), pad_id=0).check_causal(examples[0], kind)


@pytest.mark.parametrize(
    ("name", "train", "fields"),
    [
        ("LlamaForCausalLM", True, {}), ("BertLMHeadModel", False, {"is_decoder": True}),
        ("GPT2LMHeadModel", True, {"n_embd": 16, "n_head": 2}), ("MambaForCausalLM", True, {}),
        ("MixtralForCausalLM", False, {"num_key_value_heads": 2, "num_local_experts": 4}),
        ("T5ForConditionalGeneration", False, {}), ("BartForConditionalGeneration", True, {"dropout": 0.5}),
    ],
)  # fmt: skip
def test_a_causal_model_passes(name: str, train: bool, fields: dict, tmp_path: Path) -> None:
    model, kind = offloaded(tmp_path, name, make_tokenizer(), vocab_size=600, **fields)
    model.train(train)
    lines = [{"prompt": "the cat sat on", "completion": " the mat"}] if kind.name != "causal" else LM
    examples = load_examples(write_jsonl(tmp_path / "d", lines), make_tokenizer(), kind=kind)
    Objective(model, "lm", pad_id=0).check_causal(examples[0], kind)
    assert model.training == train


@torch.no_grad()
def test_sums_for_a_mean_over_a_step(model, tmp_path: Path) -> None:
    """Under the rule "sum" a step's loss is the mean over all learned tokens or examples, whatever the cut."""
    texts = [*LM, {"text": "the cat"}, {"text": "a graph has nodes and edges, a matrix has rows and columns"}]
    for lines, name in ((texts, "lm"), (texts, "error"), (choice_lines(5), "choices"), (choice_lines(5), "lm")):
        examples = examples_of(lines, tmp_path)
        mean, summed = (Objective(model, name, pad_id=0) for _ in range(2))
        summed.rule = "sum"
        whole = mean.closure(mean.batch(examples))().item()
        learned = 5 if name == "choices" else len(summed.batch(examples).tokens)
        for size in (1, 2, 5):
            parts = [summed.closure(summed.batch(examples[i : i + size]))() for i in range(0, 5, size)]
            assert all(total.dtype == torch.float64 and isinstance(count, int) for total, count in parts)
            total, count = (sum(float(part[i]) for part in parts) for i in (0, 1))
            assert total / count == pytest.approx(whole, rel=2e-5) and count == learned
    single = mean.closure(mean.batch(examples[:1]))(), summed.closure(summed.batch(examples[:1]))()
    assert single[0].item() == pytest.approx((single[1][0] / single[1][1]).item(), rel=1e-6)
