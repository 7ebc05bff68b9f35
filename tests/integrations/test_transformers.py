"""Trainers of transformers by ZO: the bits of the library's own loop, and all that a Trainer does besides steps."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_cases
import numpy as np
import pytest
import torch
from hf_cases import Batches, arguments, make_data, make_model, mean_of_tokens, own_loop, rates_of, tokens
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from same_bits import assert_same_tensors
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import HPSearchBackend

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
    return (((guesses != labels) & labels.ne(-100)).float().sum() / tokens(batch)).double() * tokens(batch), tokens(
        batch
    )


def twice(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    flat = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1]), labels[:, 1:].reshape(-1)
    return 2 * torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch


def smoothed(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    inputs, count = {k: v for k, v in batch.items() if k != "labels"}, torch.tensor(tokens(batch))
    smoother = LabelSmoother(epsilon=0.1)
    loss = smoother(
        model(**inputs, num_items_in_batch=count), batch["labels"], shift_labels=True, num_items_in_batch=count
    )
    return loss.double() * int(count), int(count)


def of_func(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    count = tokens(batch)
    return twice(model(**inputs), batch["labels"], torch.tensor(count)).double() * count, count


def of_labels(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    count = tokens(batch, shift=False)
    return model(**batch, num_items_in_batch=torch.tensor(count)).loss.double() * count, count


class Means(ZOTrainer):
    """The loss of a step is the mean of its micro-batches' losses, however many tokens each has."""

    loss_is_scaled_for_ga = False


def mean_of_batch(model: Any, batch: dict) -> torch.Tensor:
    return model(**batch, num_items_in_batch=torch.tensor(tokens(batch))).loss


def under_autocast(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    with torch.autocast("cpu", torch.bfloat16):
        return mean_of_tokens(model, batch)


def two_groups(model: Any) -> list[dict]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1]},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


# name: (kind of model, arguments, keywords of the trainer, closure of the own loop, options of the own loop)
CASES: dict[str, tuple] = {
    "accumulated": ("llama", {"gradient_accumulation_steps": 3}, {}, mean_of_tokens, {}),
    "means of micro-batches": ("llama", {"gradient_accumulation_steps": 3}, {"class": Means}, mean_of_batch, {}),
    "a shorter last step": ("llama", {"gradient_accumulation_steps": 4, "max_steps": 4}, {}, mean_of_tokens, {}),
    "label smoothing": ("llama", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, {}, smoothed, {}),
    "compute_loss_func": ("llama", {"gradient_accumulation_steps": 2}, {"compute_loss_func": twice}, of_func, {}),
    "not differentiable": ("llama", {"zo_eps": 1.0}, {"class": NotDifferentiable}, wrong_tokens, {"eps": 1.0}),
    "schedule with warm-up": ("llama", {"lr_scheduler_type": "cosine", "warmup_steps": 1, "zo_eps_schedule": "linear",
                                        "zo_eps_final": 0.5}, {}, mean_of_tokens, {"sizes": [1e-3, 1e-3, 7.5e-4]}),
    "weight decay": ("llama", {"weight_decay": 0.5}, {}, mean_of_tokens, {"weight_decay": 0.5, "groups": two_groups}),
    "fzoo": ("llama", {"zo_estimator": "fzoo", "zo_probes": 3, "zo_noise": "rademacher", "zo_max_lanes": 2}, {},
             mean_of_tokens, {"estimator": "fzoo", "num_probes": 3, "noise": "rademacher"}),
    "iterable": ("llama", {"gradient_accumulation_steps": 2}, {"train_dataset": Rows()}, mean_of_tokens, {}),
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
    assert not torch.equal(
        expected[next(iter(expected))], make_model(kind).to(given["dtype"]).state_dict()[next(iter(expected))]
    )


class Mine(ZOMixin, Trainer):
    """A trainer of a user's own: it counts, and has a loss of its own for a model that is no language model."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        type(self).calls += distzo2.current_lane().first
        loss = (model(inputs["x"]) - inputs["y"]).square().mean()
        return (loss, {}) if return_outputs else loss


@dataclass
class MyArguments(ZOFields, TrainingArguments):
    mine: int = 3


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_trainer_and_a_model_of_ones_own(tmp_path: Path, handed_over: bool) -> None:
    def build() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))

    g = torch.Generator().manual_seed(4)
    data = [{"x": torch.randn(4, generator=g), "y": torch.randn(4, generator=g)} for _ in range(8)]
    batches, model = Batches(), build()
    if handed_over:
        distzo2.offload(model)
    Mine.calls = 0
    args = arguments(MyArguments, tmp_path, gradient_accumulation_steps=2, remove_unused_columns=False, max_steps=2)
    trainer = Mine(model=model, args=args, train_dataset=data, data_collator=batches)
    trainer.train()
    expected = own_loop(
        build(), [batches.made[:2], batches.made[2:4]],
        lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(), rates=rates_of(trainer),
    )  # fmt: skip
    assert_same_tensors(trainer.model.state_dict(), expected)
    assert Mine.calls == 4


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluation_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    data = make_data("bert")
    best = EarlyStoppingCallback(early_stopping_patience=2)
    args = arguments(
        ZOTrainingArguments, tmp_path, learning_rate=10.0, max_steps=8, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = ZOTrainer(
        model=make_model("bert"), args=args, train_dataset=data, eval_dataset=data, compute_metrics=accuracy,
        callbacks=[best],
    )  # fmt: skip
    args = TrainingArguments(str(tmp_path / "p"), use_cpu=True, report_to="none")
    plain = Trainer(model=make_model("bert"), args=args, eval_dataset=data, compute_metrics=accuracy)
    ours, theirs = trainer.evaluate(), plain.evaluate()
    assert {k: ours[k] for k in ("eval_loss", "eval_accuracy")} == {
        k: theirs[k] for k in ("eval_loss", "eval_accuracy")
    }
    np.testing.assert_array_equal(trainer.predict(data).predictions, plain.predict(data).predictions)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.global_step == len(losses) == losses.index(min(losses)) + 3 < 8
    assert trainer.evaluate()["eval_loss"] == min(losses)  # the best checkpoint's weights
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_generating_predictions(tmp_path: Path) -> None:
    data, model = make_data("t5", 4), make_model("t5").eval()
    args = arguments(ZOSeq2SeqTrainingArguments, tmp_path, predict_with_generate=True, generation_max_length=5)
    expected = model.generate(torch.stack([row["input_ids"] for row in data]), max_length=5, do_sample=False)
    trainer = ZOSeq2SeqTrainer(model=model, args=args, train_dataset=data)
    found = trainer.predict(data).predictions
    np.testing.assert_array_equal(np.where(found == -100, 0, found)[:, : expected.shape[1]], expected)
    trainer.train()


@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_what_is_saved_loads_anywhere(tmp_path: Path, kind: str) -> None:
    args = arguments(ZOTrainingArguments, tmp_path, save_strategy="steps", save_steps=3)
    trainer = ZOTrainer(model=make_model(kind), args=args, train_dataset=make_data(kind))
    trainer.train()
    for directory in (tmp_path / "checkpoint-3", tmp_path / "saved", tmp_path / "saved"):
        trainer.save_model(str(directory)) if directory.name == "saved" else None
        loaded = hf_cases.KINDS[kind][0].from_pretrained(directory)
        assert_same_tensors(loaded.state_dict(), trainer.model.state_dict())
    args = torch.load(tmp_path / "saved/training_args.bin", weights_only=False)
    assert args.zo_eps == 1e-3 and pickle.loads(pickle.dumps(args)) == args


VERA = VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
LORA = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2)


@pytest.mark.parametrize("config", [VERA, LORA], ids=["vera", "lora"])
def test_the_best_adapter_is_loaded_in_its_dtype(tmp_path: Path, config: Any) -> None:
    """And one whose file has more than what is trained."""
    model = get_peft_model(make_model().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    args = arguments(
        ZOTrainingArguments, tmp_path, learning_rate=300.0, max_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = ZOTrainer(model=model, args=args, train_dataset=make_data(), eval_dataset=make_data(count=4))
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    loaded = PeftModel.from_pretrained(make_model().to(torch.bfloat16), best, autocast_adapter_dtype=False)
    assert_same_tensors(trainer.model.state_dict(), loaded.state_dict())


def test_a_rate_left_at_its_default_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rate in (5e-5, 1e-6):
        args = arguments(ZOTrainingArguments, tmp_path, learning_rate=rate, zo_journal=False)
        ZOTrainer(model=make_model(), args=args).create_optimizer()
    [told] = [record.message for record in caplog.records if record.name == "distzo2"]
    assert told.startswith("learning_rate=5e-05 is a default made for AdamW")


def test_a_plain_trainer_ends_with_the_error_that_the_documentation_quotes(tmp_path: Path) -> None:
    model = distzo2.offload(make_model())
    plain = Trainer(
        model=model, args=arguments(TrainingArguments, tmp_path), train_dataset=make_data(),
        optimizers=(distzo2.ZOSGD(model, lr=1e-2), None),
    )  # fmt: skip
    page = (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text()
    with pytest.raises(RuntimeError) as error:
        plain.train()
    assert re.search(r"\*\*`(element 0 .*)`\*\*", page)[1] in str(error.value)


def test_trials_of_a_search_have_journals_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # of optuna's trials
    args = arguments(ZOTrainingArguments, tmp_path)
    trainer = ZOTrainer(model_init=lambda: make_model(), args=args, train_dataset=make_data())
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, eps in enumerate((1e-2, 1e-3)):
        trainer.train(trial=SimpleNamespace(number=number, params={"zo_eps": eps}))
        found = read_journal(tmp_path / f"run-{number}" / "journal.jsonl")
        assert len(found.entries) == 3 and found.header["options"]["eps"] == pytest.approx(eps)


def test_losses_that_are_not_finite_are_skipped_and_said(tmp_path: Path) -> None:
    class Sometimes(ZOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step in (0, 2) else loss

    trainer = Sometimes(
        model=make_model(), args=arguments(ZOTrainingArguments, tmp_path, max_steps=4), train_dataset=make_data()
    )
    output = trainer.train()
    rows = trainer.state.log_history
    assert [np.isnan(row["loss"]) for row in rows[:4]] == [True, False, True, False]
    assert [row["zo_skipped"] for row in rows[:4]] == [1, 0, 1, 0]
    assert output.training_loss == rows[-1]["train_loss"] == pytest.approx((rows[1]["loss"] + rows[3]["loss"]) / 2)


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(ZOTrainingArguments, tmp_path, report_to="tensorboard")
    trainer = ZOTrainer(model=make_model(), args=args, train_dataset=make_data())
    trainer.train()
    used = trainer.model.num_parameters(exclude_embeddings=True) * 2  # operations of a forward for each token
    assert trainer.state.total_flos == 3 * 16 * 2 * used  # steps, tokens, evaluations
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*"))))
    events.Reload()
    found = set(events.Tags()["scalars"])
    assert {f"train/{n}" for n in ("loss", "zo_coef", "zo_signal", "tokens_per_second", "learning_rate")} <= found
    assert all(event.value > 0 for event in events.Scalars("train/tokens_per_second"))


REFUSED = [
    ({"torch_compile": True}, "torch_compile"), ({"bf16_full_eval": True}, "bf16_full_eval"),
    ({"fp16_full_eval": True}, "fp16_full_eval"), ({"fp16": True}, "fp16"), ({"neftune_noise_alpha": 5.0}, "neftune"),
    ({"deepspeed": "ds.json"}, "DeepSpeed"), ({"fsdp": "full_shard"}, "FSDP"), ({"optim": "adafactor"}, "ZOSGD"),
    ({"auto_find_batch_size": True}, "zo_max_lanes"), ({"bf16": True, "zo_compute_dtype": "float32"}, "contradict"),
    ({"zo_existing": "yes"}, "overwrite"), ({"zo_memory_budget": "much"}, "12GiB"),
    ({"zo_compute_dtype": "int8"}, "float32"), ({"zo_eps": 0.0}, "positive"), ({"zo_probes": 0}, "expected 1 to"),
    ({"zo_max_coef": 0.5}, "above 1"), ({"zo_weights": "ram"}, "disk"), ({"zo_pert": 0}, "at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "text"), REFUSED, ids=[next(iter(f)) for f, _ in REFUSED])
def test_what_cannot_go_with_zo_is_refused_by_name(tmp_path: Path, fields: dict, text: str) -> None:
    with pytest.raises(distzo2.DistZO2Error, match=text) as error:
        arguments(ZOTrainingArguments, tmp_path, **fields)
    assert next(iter(fields)) in str(error.value)


def test_the_page_has_all_fields() -> None:
    page = (Path(__file__).parents[2] / "docs/trainer.md").read_text()
    missing = [f.name for f in fields(ZOFields) if f"`{f.name}`" not in page]
    assert not missing and all(f.metadata["help"] for f in fields(ZOFields))


def test_what_a_trainer_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = make_model(), arguments(ZOTrainingArguments, tmp_path)
    with pytest.raises(distzo2.DistZO2Error, match=r"TrainingArguments.*fields zo_"):
        ZOTrainer(model=model, args=arguments(TrainingArguments, tmp_path))
    with pytest.raises(distzo2.DistZO2Error, match=r"the optimizer must be a distzo2.ZOSGD"):
        ZOTrainer(model=make_model(), args=args, optimizers=(torch.optim.SGD(model.parameters(), 1.0), None))
    with pytest.raises(distzo2.DistZO2Error, match=r"^zo_data=3: .*zo_pert=1,zo_data=1 would fit"):
        ZOTrainer(model=model, args=arguments(ZOTrainingArguments, tmp_path, zo_data=3))
    with pytest.raises(distzo2.DistZO2Error, match=r"adapters of type ADALORA .*: it cuts ranks by grad"):
        ZOTrainer(model=get_peft_model(model, AdaLoraConfig(target_modules=["q_proj"], total_step=9)), args=args)
    args._n_gpu = 2
    with pytest.raises(distzo2.DistZO2Error, match=r"DataParallel"):
        ZOTrainer(model=model, args=args)
