"""Tiny models and data for trainers of Hugging Face, and the library's own loop beside theirs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_kinds import BERT, T5
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from transformers.data.data_collator import default_data_collator

import distzo2

LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "bert": (BertForSequenceClassification, BertConfig, BERT | {"num_labels": 3}),
    "t5": (T5ForConditionalGeneration, T5Config, T5),
}


def make_model(kind: str = "llama", **fields: Any) -> Any:
    model_class, config, small = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return model_class(config(**small | fields))


def make_data(kind: str = "llama", count: int = 12, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Examples whose labels count 1 to `length` tokens, or for "bert" a class."""
    g = torch.Generator().manual_seed(2)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 20, (length,), generator=g)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        row["labels"][: i % (length - 2)] = -100
        if kind == "bert":
            row["labels"] = torch.tensor(i % 3)
        rows.append(row)
    return rows


class Batches:
    """A collator that keeps what it makes, in order."""

    def __init__(self, collate: Callable[[list], dict] = default_data_collator) -> None:
        self.made: list[dict[str, torch.Tensor]] = []
        self._collate = collate

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        self.made.append(self._collate(features))
        return dict(self.made[-1])


def arguments(kind: type, directory: Path, **fields: Any) -> Any:
    small = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return kind(str(directory), **small | quiet | fields)


def tokens(batch: dict[str, torch.Tensor], shift: bool = True) -> int:
    """How many labels of a batch count."""
    return int((batch["labels"][..., 1:] if shift else batch["labels"]).ne(-100).sum())


def mean_of_tokens(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The closure of a user's own loop: (sum, count) of a causal model's loss."""
    count = tokens(batch)
    return model(**batch, num_items_in_batch=torch.tensor(count)).loss.double() * count, count


def own_loop(
    model: Any,
    steps: Sequence[Sequence[dict[str, torch.Tensor]]],
    loss: Callable[[Any, dict], Any] = mean_of_tokens,
    *,
    rates: Sequence[float] | None = None,
    sizes: Sequence[float] | None = None,
    groups: Callable[[Any], list] | None = None,
    hand_over: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The weights after `steps` lists of micro-batches in a loop of the library's own."""
    model = distzo2.offload(model, **hand_over or {})
    optimizer = distzo2.ZOSGD(model, groups and groups(model), **{"lr": 1e-2, "eps": 1e-3, "seed": 42} | options)
    for number, batches in enumerate(steps):
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[number]
        if sizes is not None:
            optimizer.eps = sizes[number]
        optimizer.step([lambda batch=batch: loss(model, batch) for batch in batches])
    return model.state_dict()


def rates_of(trainer: Any) -> list[float]:
    """The learning rate of each step that a trainer logged."""
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


class KillAt(TrainerCallback):
    """Kills its own process after a step, or in the evaluation that follows it, as nothing can catch."""

    def __init__(self, step: int, evaluating: bool) -> None:
        self.step, self.evaluating = step, evaluating

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and not self.evaluating:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and self.evaluating:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(
    directory: Path, resume: Any = None, *, kill_at: int = -1, kill_evaluating: bool = False, **fields: Any
) -> Any:
    """A trainer that evaluates, stops early and has trained in `directory`."""
    from transformers import EarlyStoppingCallback

    from distzo2.integrations.transformers import ZOTrainer, ZOTrainingArguments

    args = arguments(
        ZOTrainingArguments, directory,
        **{"max_steps": 8, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1,
           "metric_for_best_model": "loss", "lr_scheduler_type": "cosine", "learning_rate": 1.0} | fields,
    )  # fmt: skip
    trainer = ZOTrainer(
        model=make_model(), args=args, train_dataset=make_data(), eval_dataset=make_data(count=4),
        callbacks=[EarlyStoppingCallback(4), KillAt(kill_at, kill_evaluating)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def on_ranks(
    rank: int, world_size: int, directory: Path, fields: dict[str, Any], trl_base: str | None = None,
    killed: tuple[int, ...] = (),
) -> Any:  # fmt: skip
    """Trains on the ranks of a test, of which `killed` die after step 3; returns the weights, what was logged and
    evaluated, and the wrapper's type."""
    from accelerate.state import AcceleratorState

    from distzo2.integrations.transformers import ZOTrainer, ZOTrainingArguments

    environment = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    environment = environment if world_size > 1 else {}
    os.environ |= {name: str(value) for name, value in environment.items()}
    try:
        if trl_base is None:
            args = arguments(ZOTrainingArguments, directory, save_strategy="steps", save_steps=2, eval_strategy="steps",
                             eval_steps=2, per_device_eval_batch_size=4, **fields)  # fmt: skip
            held_out = [row | {"labels": row["input_ids"]} for row in make_data(count=8)]
            trainer = ZOTrainer(model=make_model(), args=args, train_dataset=make_data(), eval_dataset=held_out)
        else:
            trainer = sft_trainer(directory, trl_base, **fields)
        trainer.add_callback(KillAt(3 if rank in killed else -1, False))
        trainer.train()
        state = trainer.model.state_dict()
        trainer.save_model(str(directory / "saved"))
        rows = [{k: v for k, v in row.items() if k in KEPT} for row in trainer.state.log_history]
        return {name: value.numpy() for name, value in state.items()}, rows, type(trainer.model_wrapped).__name__
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in environment:
            del os.environ[name]


KEPT = ("loss", "eval_loss", "learning_rate", "step", "num_tokens", "num_input_tokens_seen", "total_flos")


def sft_trainer(directory: Path, base: str, **fields: Any) -> Any:
    """TRL's SFT on the checkpoint `base`."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from distzo2.integrations.trl import ZOSFTConfig, ZOSFTTrainer

    args = arguments(ZOSFTConfig, directory, **fields)
    data = Dataset.from_dict({"text": ["the cat sat on the mat"[: 9 + i] for i in range(12)]})
    tokenizer = AutoTokenizer.from_pretrained(base)
    return ZOSFTTrainer(
        model=LlamaForCausalLM.from_pretrained(base), args=args, train_dataset=data, processing_class=tokenizer
    )
