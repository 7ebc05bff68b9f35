"""Every kind of model through `finetune`, `eval` and `generate`; what no objective fits is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_runs import assert_same_bits, one_line, steps_in, weights
from tiny_kinds import make, word_tokenizer
from tiny_text import write_jsonl

from distzo2.cli.main import main

pytestmark = pytest.mark.usefixtures("own_directory")

COMPLETIONS = [{"prompt": "the cat is", "completion": "good ."}, {"prompt": "a film was it", "completion": "bad"}] * 2
CHOICES = [{"prompt": "the cat is", "choices": ["good .", "bad"], "label": i % 2} for i in range(4)]
WORDS = [{"prompt": "the cat is <mask> .", "choices": ["good", "bad"], "label": i % 2} for i in range(4)]
CLASSES = [{"text": "the cat is " + "good " * i, "label": i % 3} for i in range(4)]


def finetune(model: Path, lines: list[dict[str, Any]], *options: str) -> int:
    data = write_jsonl(Path("data.jsonl"), lines)
    common = ["--steps=3", "--batch-size=4", "--micro-batches=2", "--lr=1e-2", "--quiet", "--out=out"]
    return main(["finetune", f"--model={model}", f"--train={data}", f"--eval={data}", *common, *options])


FIELDS = {"MixtralForCausalLM": {"num_local_experts": 3, "num_key_value_heads": 1}, "GPT2LMHeadModel": {"n_embd": 16}}
WIDENS = ["--dtype=bfloat16", "--compute-dtype=float32"]  # stored and computed
NARROWS = ["--dtype=float32", "--compute-dtype=bfloat16", "--no-signal"]


@pytest.mark.parametrize(
    ("name", "lines", "objective", "dtypes"),
    [
        ("T5ForConditionalGeneration", COMPLETIONS, "lm", WIDENS),
        ("T5ForConditionalGeneration", CHOICES, "choices", []),
        ("BertForMaskedLM", WORDS, "choices", NARROWS),
        ("BertForSequenceClassification", CLASSES, "choices", []),
        ("MixtralForCausalLM", COMPLETIONS, "lm", WIDENS),
        ("GPT2LMHeadModel", COMPLETIONS, "lm", NARROWS),
    ],
)
def test_a_run(name: str, lines: list[dict[str, Any]], objective: str, dtypes: list[str], capsys) -> None:
    """Streamed from the disk: killed and resumed it has the bits of a run that was not, and whose blocks were on the
    device; `eval` gives its last score."""
    model = make(Path("model"), name, **({"num_labels": 3} if lines is CLASSES else FIELDS.get(name, {})))
    options = [f"--objective={objective}", *dtypes]
    assert finetune(model, lines, *options, "--weights=device", "--out=whole") == 0
    assert finetune(model, lines, *options, "--weights=disk", "--steps=2", "--save=none") == 0
    assert main(["finetune", "--resume", "--out=out", "--steps=3", "--save=last", "--quiet"]) == 0 and steps_in() == 3
    assert main(["replay", "out", "--out=again", "--quiet"]) == 0
    assert_same_bits("out/checkpoint", "whole/checkpoint")
    assert_same_bits("again", "whole/checkpoint")
    before, after = weights(model), weights("again")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    scores = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    capsys.readouterr()
    assert main(["eval", "--model=out/checkpoint", "--eval=data.jsonl", "--json", *options[:3]]) == 0
    found = json.loads(capsys.readouterr().out)
    last = [line for line in scores if line["kind"] == "eval"][-1]
    assert found == {"loss": last["loss"], "accuracy": last["accuracy"], "examples": 4, "objective": objective}


def test_an_encoder_decoder_generates(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(Path("model"), "T5ForConditionalGeneration")
    capsys.readouterr()
    assert main(["generate", f"--model={model}", "--prompt=the cat is", "--max-new-tokens=6"]) == 0
    plain = transformers.T5ForConditionalGeneration.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = plain.generate(**tokenizer("the cat is", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert capsys.readouterr().out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_a_prompt_ends_without_what_ends_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(Path("model"), "BertLMHeadModel", is_decoder=True)
    capsys.readouterr()
    assert main(["generate", f"--model={model}", "--prompt=the cat is", "--max-new-tokens=4"]) == 0
    plain = transformers.BertLMHeadModel.from_pretrained(model).eval()
    prompt = word_tokenizer("<s> $A")("the cat is", return_tensors="pt")
    ids = plain.generate(**prompt, max_new_tokens=4, do_sample=False)[0, 4:]
    assert capsys.readouterr().out.strip() == word_tokenizer().decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("name", "lines", "fields", "reason"),
    [
        ("BertForQuestionAnswering", CLASSES, {}, "no objective fits BertForQuestionAnswering"),
        ("BertForMaskedLM", CHOICES, {}, "data.jsonl:1: the prompt has no mask token"),
        ("BertForSequenceClassification", CLASSES, {"num_labels": 2}, "data.jsonl:3: label: expected a class of Bert"),
        ("BertForSequenceClassification", CLASSES, {"num_labels": 1}, "a head with 1 output"),
        ("T5ForConditionalGeneration", CLASSES, {}, "needs lines with a prompt for its encoder"),
        ("BertLMHeadModel", COMPLETIONS, {}, "BertLMHeadModel sees the tokens that it is asked to predict"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, lines, fields, reason: str, capsys) -> None:
    model = make(Path("model"), name, **fields)
    capsys.readouterr()
    assert finetune(model, lines, "--weights=disk") == 1
    assert reason in one_line(capsys)
    assert not Path("out").exists()
    assert main(["eval", f"--model={model}", "--eval=data.jsonl"]) == 1
    assert reason in one_line(capsys)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering"])
def test_what_generates_no_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(Path("model"), name)
    capsys.readouterr()
    assert main(["generate", f"--model={model}", "--prompt=the cat"]) == 1
    assert name in one_line(capsys)


@pytest.mark.parametrize("pad_id", [21, None])
def test_a_pad_id_outside_of_the_vocabulary(pad_id: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = word_tokenizer()
    if pad_id is not None:
        tokenizer.add_special_tokens({"pad_token": "<more>"})
    else:
        tokenizer.pad_token = None
    model = make(Path("model"), "LlamaForCausalLM", tokenizer)
    assert finetune(model, COMPLETIONS, "--save=none") == 0
    assert main(["eval", f"--model={model}", "--eval=data.jsonl"]) == 0
    assert main(["generate", f"--model={model}", "--prompt=the cat", "--max-new-tokens=3"]) == 0
    capsys.readouterr()
    if pad_id is not None:
        assert finetune(model, [{"text": "the cat <more>"}], "--out=other") == 1
        assert "data.jsonl:1: token 21 ('<more>'): LlamaForCausalLM knows 21 tokens" in one_line(capsys)
