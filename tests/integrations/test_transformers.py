"""Trainers of transformers by ZO: the bits of the library's own loop, and all that a Trainer does besides steps."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_cases
import numpy as np
import pytest
import torch
from hf_cases import Batches, arguments, make_data, make_model, mean_of_tokens, own_loop, rates_of, tokens
from same_bits import assert_same_tensors
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import distzo2
from distzo2.integrations.arguments import ZOFields
from distzo2.integrations.transformers import (
    ZOMixin,
    ZOSeq2SeqTrainer,
    ZOSeq2SeqTrainingArguments,
    ZOTrainer,
    ZOTrainingArguments,
)
from distzo2.record.journal import read_journal


class Rows(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(make_data())


class NotDifferentiable(ZOTrainer):
    """The loss is the share of tokens that are not guessed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        guesses = model(**inputs).logits[:, :-1].argmax(-1)
        return ((guesses != labels[:, 1:]) & labels[:, 1:].ne(-100)).float().sum() / num_items_in_batch


def wrong_tokens(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    labels = batch["labels"][:, 1:]
    guesses = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
    return ((guesses != labels) & labels.ne(-100)).float().sum() / tokens(batch) * tokens(batch), tokens(batch)


def twice(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    flat = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1]), labels[:, 1:].reshape(-1)
    return 2 * torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch


def smoothed(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    inputs, count = {k: v for k, v in batch.items() if k != "labels"}, torch.tensor(tokens(batch))
    smoother = LabelSmoother(epsilon=0.1)
    loss = smoother(model(**inputs, num_items_in_batch=count), batch["labels"], shift_labels=True, num_items_in_batch=count)
    return loss.double() * int(count), int(count)


def of_func(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    count = tokens(batch)
    return twice(model(**inputs), batch["labels"], torch.tensor(count)).double() * count, count


def of_labels(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    count = tokens(batch, shift=False)
    return model(**batch, num_items_in_batch=torch.tensor(count)).loss.double() * count, count


def under_autocast(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    with torch.autocast("cpu", torch.bfloat16):
        return mean_of_tokens(model, batch)


def two_groups(model: Any) -> list[dict]:
    params = list(model.parameters())
    return [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]


# name: (kind of model, arguments, keywords of the trainer, closure of the own loop, options of the own loop)
CASES: dict[str, tuple] = {
    "one batch a step": ("llama", {}, {}, mean_of_tokens, {}),
    "accumulated": ("llama", {"gradient_accumulation_steps": 3}, {}, mean_of_tokens, {}),
    "a shorter last step": ("llama", {"gradient_accumulation_steps": 4, "max_steps": 4}, {}, mean_of_tokens, {}),
    "label smoothing": ("llama", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, {}, smoothed, {}),
    "compute_loss_func": ("llama", {"gradient_accumulation_steps": 2}, {"compute_loss_func": twice}, of_func, {}),
    "not differentiable": ("llama", {"zo_eps": 1.0}, {"class": NotDifferentiable}, wrong_tokens, {"eps": 1.0}),
    "schedule with warm-up": ("llama", {"lr_scheduler_type": "cosine", "warmup_steps": 1}, {}, mean_of_tokens, {}),
    "weight decay": ("llama", {"weight_decay": 0.5}, {}, mean_of_tokens, {"weight_decay": 0.5, "groups": two_groups}),
    "fzoo": ("llama", {"zo_estimator": "fzoo", "zo_probes": 3, "zo_noise": "rademacher", "zo_max_lanes": 2}, {},
             mean_of_tokens, {"estimator": "fzoo", "num_probes": 3, "noise": "rademacher"}),
    "iterable": ("llama", {"gradient_accumulation_steps": 2}, {"train_dataset": Rows()}, mean_of_tokens, {}),
    "by length": ("llama", {"train_sampling_strategy": "group_by_length"}, {}, mean_of_tokens, {}),
    "bert": ("bert", {"gradient_accumulation_steps": 3}, {}, of_labels, {}),
    "t5": ("t5", {"gradient_accumulation_steps": 2}, {}, of_labels, {}),
    "autocast": ("llama", {"bf16": True}, {}, under_autocast, {}),
    "bfloat16 in float32": ("llama", {"zo_compute_dtype": "float32"}, {"dtype": torch.bfloat16}, mean_of_tokens,
                            {"hand_over": {"compute_dtype": torch.float32}}),
    "on disk": ("llama", {"zo_weights": "disk", "zo_write_every": 2}, {}, mean_of_tokens, {}),
    "dropout": ("bert", {"zo_dropout": True}, {}, of_labels, {"hand_over": {"train": True}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_librarys_own_loop(tmp_path: Path, name: str) -> None:
    kind, fields, given, loss, options = CASES[name]
    batches = Batches()
    given = {"train_dataset": make_data(kind), "dtype": torch.float32} | given
    model, reference = (make_model(kind).to(given["dtype"]) for _ in range(2))
    trainer = given.pop("class", ZOTrainer)(
        model=model,
        args=arguments(ZOTrainingArguments, tmp_path, **fields),
        data_collator=batches,
        **{key: value for key, value in given.items() if key != "dtype"},
    )
    trainer.train()
    every, steps = trainer.args.gradient_accumulation_steps, trainer.args.max_steps
    per_epoch = 6  # of 12 examples
    cut = [batches.made[i + j : i + min(j + every, per_epoch)] for i in range(0, 60, 6) for j in range(0, 6, every)]
    options = {"hand_over": {"train": False}} | options
    expected = own_loop(reference, cut[:steps], loss, rates=rates_of(trainer), **options)
    assert_same_tensors(trainer.model.state_dict(), expected)
    assert trainer.state.global_step == len(read_journal(tmp_path / "journal.jsonl").entries) == steps
    assert not torch.equal(expected[next(iter(expected))], make_model(kind).to(given["dtype"]).state_dict()[next(iter(expected))])
