"""TRL's trainers by ZO: the bits of the library's own loop through the fused head, adapters, references, metrics."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_cases import LLAMA, Batches, arguments, rates_of
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from same_bits import assert_same_tensors, same_bits
from tiny_text import make_tokenizer
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import TrlParser
from trl.trainer.utils import add_fused_lm_head

import distzo2
from distzo2.errors import MissingPackageError
from distzo2.integrations import transformers
from distzo2.integrations import trl as zo
from distzo2.integrations.transformers import ZOTrainingArguments
from distzo2.record.journal import read_journal
from distzo2.version import require

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "dog", "ran", "far", "away", "from", "home"]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.pad_token = "<s>"
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A checkpoint, which DPO and KTO load their reference from."""
    path = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        sizes = LLAMA | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "eos_token_id": 0,
            "bos_token_id": 1,
        }
        model = LlamaForCausalLM(LlamaConfig(**sizes | {"pad_token_id": 1}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(base: Path, adapter: bool = False, kind: Any = LlamaForCausalLM) -> Any:
    torch.manual_seed(42)
    model = kind.from_pretrained(base)
    return get_peft_model(model, LoraConfig(**LORA)) if adapter else model


def rows(*columns: str) -> Dataset:
    text = {
        "text": lambda i: " ".join(WORDS[i % 3 : 4 + i % 7]), "prompt": lambda i: " ".join(WORDS[: 2 + i % 3]),
        "chosen": lambda i: " " + " ".join(WORDS[i % 5 : 6]),
        "rejected": lambda i: " " + " ".join(WORDS[7 : 9 + i % 3]),
        "completion": lambda i: " " + WORDS[i % 8], "label": lambda i: i % 2 == 0,
    }  # fmt: skip
    return Dataset.from_dict({column: [text[column](i) for i in range(8)] for column in columns})


def counted(model: Any, batch: dict) -> tuple[torch.Tensor, int]:
    """The closure of an own loop over TRL's fused head: mean and number of tokens."""
    count = torch.tensor(int(batch["labels"][:, 1:].ne(-100).sum()))
    with distzo2.present(model.get_output_embeddings()):
        log_probs = model(**batch, use_cache=False, fused_lm_head=True).log_probs
    return ((-log_probs).sum() / count).double() * int(count), int(count)


@pytest.mark.parametrize("case", ["full", "adapter"])
def test_sft_has_the_bits_of_the_librarys_own_loop(tmp_path: Path, base: Path, tokenizer: Any, case: str) -> None:
    args = arguments(zo.ZOSFTConfig, tmp_path, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
    trainer = zo.ZOSFTTrainer(
        model=load(base), args=args, train_dataset=rows("text"), processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if case == "adapter" else None,
    )  # fmt: skip
    trainer.data_collator = batches = Batches(trainer.data_collator)
    trainer.train()
    reference = load(base, case == "adapter")
    add_fused_lm_head(reference.get_base_model() if case == "adapter" else reference)
    distzo2.offload(reference)
    optimizer = distzo2.ZOSGD(reference, lr=1e-2, eps=1e-3, seed=42)
    for number, rate in enumerate(rates_of(trainer)):
        optimizer.param_groups[0]["lr"] = rate
        parts = [batches.made[i] for i in (2 * number, 2 * number + 1)] if number < 2 else None
        parts = parts or batches.made[4:6]
        optimizer.step([lambda part=part: counted(reference, part) for part in parts])
    found, expected = trainer.model.state_dict(), reference.state_dict()
    assert_same_tensors(found, expected)
    log = trainer.state.log_history
    seen = sum(int(batch["attention_mask"].sum()) for batch in batches.made[:6])
    assert log[-2]["num_tokens"] == seen  # counted once, not once an evaluation
    if case == "adapter":
        moved = {name for name, value in found.items() if not same_bits(value, load(base, True).state_dict()[name])}
        assert moved and all("lora_" in name for name in moved)
        saved = tmp_path / "checkpoint-3"
        assert (saved / "adapter_model.safetensors").stat().st_size < 8000 and not (
            saved / "model.safetensors"
        ).exists()
        loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), saved)
        assert_same_tensors(loaded.state_dict(), found)


def test_an_adapter_run_resumes(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    def run(directory: Path, resume: bool, steps: int) -> Any:
        args = arguments(zo.ZOSFTConfig, directory, max_steps=steps, lr_scheduler_type="constant")
        trainer = zo.ZOSFTTrainer(
            model=load(base), args=args, train_dataset=rows("text"), processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    run(tmp_path / "two", False, 2)
    assert_same_tensors(run(tmp_path / "two", True, 3), run(tmp_path / "three", False, 3))


TRAINERS = {
    "dpo": (zo.ZODPOTrainer, zo.ZODPOConfig, ("prompt", "chosen", "rejected"), {}),
    "dpo, reference computed before": (
        zo.ZODPOTrainer,
        zo.ZODPOConfig,
        ("prompt", "chosen", "rejected"),
        {"precompute_ref_log_probs": True},
    ),
    "kto": (zo.ZOKTOTrainer, zo.ZOKTOConfig, ("prompt", "completion", "label"), {}),
    "reward": (zo.ZORewardTrainer, zo.ZORewardConfig, ("chosen", "rejected"), {}),
}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *((name, "none") for name in TRAINERS),
        *((name, "by its configuration") for name in ("dpo", "reward")),
        *((name, "made before") for name in ("dpo", "kto")),
    ],
)
def test_losses_and_steps_are_those_of_trls_own_loss(
    tmp_path: Path, base: Path, tokenizer: Any, name: str, adapter: str
) -> None:
    trainer_class, config, columns, fields = TRAINERS[name]
    kind = LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM
    lora = LoraConfig(**LORA, task_type="SEQ_CLS" if name == "reward" else "CAUSAL_LM")
    more = {"peft_config": lora} if adapter == "by its configuration" else {}

    def make(trainer_class: Any, args: Any) -> Any:
        torch.manual_seed(1)
        options = {"num_labels": 1} if name == "reward" else {}
        model = kind.from_pretrained(base, **options)
        model = get_peft_model(model, lora) if adapter == "made before" else model  # TRL then adds a copy as reference
        data = rows(*columns)
        return trainer_class(
            model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **more
        )

    args = arguments(config, tmp_path, zo_probes=2, gradient_accumulation_steps=2, **fields)
    trainer = make(trainer_class, args)
    plain = make(trainer_class.__mro__[3], arguments(config.__mro__[2], tmp_path / "plain", bf16=False, **fields))
    ours, theirs = trainer.evaluate(), plain.evaluate()
    assert ours["eval_loss"] == theirs["eval_loss"]

    batches, step = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *more: (batches.append(inputs), step(model, dict(inputs), *more))[1]
    trainer.train()
    model = distzo2.offload(plain.model)
    zo._open_fused_head(model)
    before = model.state_dict()
    optimizer = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=42, num_probes=2)
    for number, rate in enumerate(rates_of(trainer)):
        optimizer.param_groups[0]["lr"] = rate
        parts = batches[2 * number : 2 * number + 2]
        optimizer.step([lambda part=part: plain.compute_loss(model, dict(part)) for part in parts])
    found = trainer.model.state_dict()
    assert_same_tensors(found, model.state_dict())
    assert len(batches) == 6 and any(not same_bits(found[key], value) for key, value in before.items())


def test_grpo_is_refused_at_its_defaults_and_learns_with_two_iterations(
    tmp_path: Path, base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"num_generations": 2, "max_completion_length": 4}
    with pytest.raises(distzo2.DistZO2Error, match=r"num_iterations=1.*num_iterations=2 works"):
        arguments(zo.ZOGRPOConfig, tmp_path, **fields)
    apart = {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
    with pytest.raises(distzo2.DistZO2Error, match=r"num_iterations=2, with .*num_iterations=4 works"):
        arguments(zo.ZOGRPOConfig, tmp_path, num_iterations=2, **apart, **fields)
    arguments(zo.ZOGRPOConfig, tmp_path, num_iterations=4, **apart, **fields)
    arguments(zo.ZOGRPOConfig, tmp_path, steps_per_generation=4, **fields)  # completions of earlier weights
    args = arguments(zo.ZOGRPOConfig, tmp_path, num_iterations=2, max_steps=2, **fields)
    given = {"args": args, "train_dataset": rows("prompt"), "processing_class": tokenizer}
    given["reward_funcs"] = lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]
    with monkeypatch.context() as patch, pytest.raises(distzo2.DistZO2Error, match="run on one rank"):
        patch.setenv("WORLD_SIZE", "2")
        zo.ZOGRPOTrainer(model=load(base), **given)
    trainer = zo.ZOGRPOTrainer(model=load(base), **given)
    trainer.train()
    assert "tokens_per_second" not in trainer.state.log_history[0]  # no input has the name of the model's
    entries = read_journal(tmp_path / "journal.jsonl").entries
    assert len(entries) == 2 and all(entry.update.terms[0].c for entry in entries)


def test_the_reference_has_all_classes() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    found = {value for module in (transformers, zo) for name, value in vars(module).items() if name.startswith("ZO")}
    classes = [each for each in found if each.__module__.startswith("distzo2.integrations.")]
    missing = [each for each in classes if f"::: {each.__module__}.{each.__name__}\n" not in page]
    assert len(classes) == 17 and not missing


def test_references_that_move_are_refused(tmp_path: Path) -> None:
    with pytest.raises(distzo2.DistZO2Error, match=r"sync_ref_model=True .*ref_model is fixed"):
        arguments(zo.ZODPOConfig, tmp_path, sync_ref_model=True)


def test_what_adapters_cannot_do_is_said(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    model, args = distzo2.offload(load(base)), arguments(zo.ZOSFTConfig, tmp_path)
    with pytest.raises(distzo2.DistZO2Error, match=r"handed over: give the plain model"):
        zo.ZOSFTTrainer(
            model=model,
            args=args,
            train_dataset=rows("text"),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )


def test_prompt_tuning_saves_its_adapter(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    args = arguments(zo.ZOSFTConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    trainer = zo.ZOSFTTrainer(
        model=load(base), args=args, train_dataset=rows("text"), processing_class=tokenizer, peft_config=prompt
    )
    trainer.train()
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "checkpoint-1")
    assert_same_tensors(loaded.state_dict(), trainer.model.state_dict())


def test_options_from_yaml_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nzo_probes: 4\nzo_compute_dtype: float32\nzo_pert: 2\nuse_cpu: true\n"
    )
    [args] = TrlParser([zo.ZOSFTConfig]).parse_args_and_config(
        ["--config", str(tmp_path / "run.yaml"), "--zo_eps", "1e-2"]
    )
    assert (args.zo_probes, args.zo_compute_dtype, args.zo_pert, args.zo_eps, args.bf16) == (
        4,
        "float32",
        2,
        1e-2,
        False,
    )
    [args] = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "o", "--zo_weights", "disk", "--use_cpu"]
    )
    assert args.zo_weights == "disk" and args.zo_slice is None
    assert "zo_memory_budget" in HfArgumentParser(zo.ZODPOConfig).format_help()


def test_versions_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackageError, match=r"no_such_package is not installed: pip install .*\[hf\]"):
        require(no_such_package="1.0")
    with pytest.raises(ImportError, match=r"trl 1\.\S+ is too old, 99\.1 or later is needed"):
        require(trl="99.1")
    require(optional=True, no_such_package="1.0")
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning, match=r"is tested with trl 1.16, and this is 1.17.0"),
    ):
        patch.setattr("importlib.metadata.version", lambda package: "1.17.0")
        runpy.run_path(zo.__file__)
    code = "import sys, distzo2; sys.exit(bool({'transformers', 'accelerate', 'trl', 'peft', 'gguf'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
