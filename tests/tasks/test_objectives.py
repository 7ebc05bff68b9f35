"""Objectives against naive computing: one sequence at a time, full logits, a loop over tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_text import choice_lines, make_checkpoint, make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

import distzo2
from distzo2.errors import UsageError
from distzo2.tasks.examples import load_examples
from distzo2.tasks.objectives import Objective, evaluate_examples, resolve_objective
from distzo2.tasks.tokenize import Example

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


def test_evaluation_in_any_parts(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = distzo2.from_pretrained(directory, weights="disk", directory=tmp_path / "w")
    examples = examples_of(choice_lines(11), tmp_path)
    losses, accuracy = naive_choices(plain, examples)
    objective = Objective(model, "choices", pad_id=0)
    for batch_size, per_pass in ((11, 1), (2, 3), (3, 8)):
        score = evaluate_examples(objective, examples, batch_size=batch_size, batches_per_pass=per_pass)
        assert score.loss == pytest.approx(sum(losses) / 11, rel=2e-5)
        assert score.accuracy == pytest.approx(accuracy) and score.num_examples == 11
    assert not math.isnan(score.loss)
    distzo2.runtime_of(model).close()
