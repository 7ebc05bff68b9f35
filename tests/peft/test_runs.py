"""Runs of the command line that train an adapter, or chosen parameters only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import kill_cases
import peft
import pytest
import torch
import transformers
from cli_runs import STEPS, finetune, one_line, record, resume, steps_in, weights
from parallel_ranks import Ranks
from safetensors.torch import load_file
from same_bits import assert_same_tensors
from tiny_kinds import make
from tiny_text import choice_lines, make_tokenizer, write_jsonl
from torchrun_cases import command, run_alone
from transformers import AutoModelForCausalLM

from distzo2.checkpoint.config import load_config
from distzo2.cli.main import main
from distzo2.peft.adapters import known_config, tokens_in_front
from distzo2.run import train
from distzo2.run.options import EvalOptions
from distzo2.run.preflight import reading_of
from distzo2.tasks.examples import load_examples
from distzo2.tasks.kinds import model_kind
from distzo2.tasks.objectives import Objective
from distzo2.tasks.tokenize import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_directory")
LARGE = {"lora": ["--lr=1", "--eps=1e-2"], "prefix": ["--lr=1e-1"], "prompt": ["--lr=1e-1"]}  # a step is seen


def adapter(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "adapter_model.safetensors")


def with_peft(files, directory: str | Path = "out/adapter"):
    """The model with an adapter, by peft itself."""
    base = AutoModelForCausalLM.from_pretrained(files.model)
    return peft.PeftModel.from_pretrained(base, directory).eval()


@pytest.mark.parametrize(("method", "where"), [("lora", "disk"), ("prefix", "disk"), ("prompt", "host")])
def test_a_killed_run_ends_with_the_same_bits(files, method: str, where: str, capsys, tmp_path: Path) -> None:
    options = ["--steps=12", f"--peft={method}", f"--weights={where}", *LARGE[method]]
    assert finetune(files, *options) == 0
    assert "parameters: " in capsys.readouterr().out
    started, made = adapter("out/adapter_start"), adapter("out/adapter")
    assert any(not torch.equal(started[key], made[key]) for key in made)
    assert all(value.dtype == torch.float32 for value in made.values())
    assert not Path("out/checkpoint").exists()

    arguments = ["finetune", f"--model={files.model}", f"--train={files.train}", "--out=killed", *STEPS, *options]
    ended = kill_cases.run(tmp_path, arguments, 0.02, lambda: Path("killed/journal.jsonl").exists())
    if ended.killed:  # a busy machine may let it end
        ended = kill_cases.run(tmp_path, ["finetune", "--resume", "--out=killed", "--quiet"])
    assert ended.status == 0, ended.text
    assert_same_tensors(adapter("killed/adapter_start"), started)
    assert_same_tensors(adapter("killed/adapter"), made)

    assert main(["replay", "out", "-o", "again", "--quiet"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("again", name).read_bytes() == Path("out/adapter", name).read_bytes()
    assert main(["replay", "--journal=out/journal.jsonl", f"--base={files.model}", "--to-step=0", "-o", "none"]) == 0
    assert_same_tensors(adapter("none"), started)
    assert main(["journal", "verify", "out"]) == 0


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_an_evaluation_has_the_loss_of_peft(files, method: str, capsys) -> None:
    assert finetune(files, f"--peft={method}", *LARGE[method], f"--eval={files.eval}", "--batch-size=2") == 0
    capsys.readouterr()
    which = ["--model", str(files.model), "--adapter=out/adapter"]
    assert main(["eval", *which, f"--eval={files.eval}", "--json", "--batch-size=6"]) == 0
    figures = json.loads(capsys.readouterr().out)
    kind, tokenizer, model = model_kind(files.model), load_tokenizer(files.model), with_peft(files)
    model.peft_config["default"].inference_mode = False
    options = EvalOptions(model=str(files.model), eval=str(files.eval))
    examples = load_examples(files.eval, tokenizer, **reading_of(options, kind))
    in_front = tokens_in_front(known_config(Path("out/adapter"), "causal"))
    objective = Objective(model, "choices", pad_id=kind.padding(tokenizer), in_front=in_front)
    with torch.no_grad():
        total, count, *_ = objective.evaluation(objective.batch(examples))().tolist()
    assert figures["loss"] == total / count
    assert main(["generate", *which, "--prompt=the cat", "--max-new-tokens=4"]) == 0
    words = tokenizer(["the cat"], return_tensors="pt").input_ids
    tokens = model.generate(input_ids=words, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, words.shape[1] :]
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_prefix_starts_at_keys_and_values_of_real_tokens(files) -> None:
    assert finetune(files, "--peft=prefix", "--virtual-tokens=3", "--steps=1", "--seed=7") == 0
    tokens = torch.randint(load_config(files.model).vocab_size, (1, 3), generator=torch.Generator().manual_seed(7))
    base = AutoModelForCausalLM.from_pretrained(files.model).eval()
    model = with_peft(files, "out/adapter_start")
    with torch.no_grad():
        expected, found = base(tokens).past_key_values, model.get_prompt(1)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert record()["options"]["lr"] == 1e-3 and record()["options"]["eps"] == 1e-1  # as given, and as MeZO has it


def test_a_merged_checkpoint_has_the_bits_of_peft(files, capsys) -> None:
    assert finetune(files, "--peft=lora", *LARGE["lora"], "--lora-targets=q_proj, down_proj", "--merge") == 0
    with_peft(files).merge_and_unload().save_pretrained("theirs")
    assert_same_tensors(weights("out/checkpoint"), weights("theirs"))
    assert main(["replay", "out", "--merge", "-o", "again", "--quiet"]) == 0
    assert_same_tensors(weights("again"), weights("theirs"))
    assert main(["eval", "--model=out/checkpoint", f"--eval={files.eval}"]) == 0
    assert finetune(files, "--out=tied", "--peft=lora", "--lora-targets=embed_tokens", "--merge") == 1
    assert "model.embed_tokens.weight, which another module shares: merged" in capsys.readouterr().err
    assert not Path("tied/adapter").exists()  # it is said before the first step


def test_an_adapter_is_trained_further_and_a_run_branched(files) -> None:
    assert finetune(files, "--peft=lora", *LARGE["lora"]) == 0
    more = ["--out=more", "--eval", str(files.eval), "--save=best", "--freeze=*lora_A*", "--lr=1"]
    assert finetune(files, "--adapter=out/adapter", *more) == 0
    assert record("more")["options"]["eps"] == 1e-2
    assert_same_tensors(adapter("more/adapter_start"), adapter("out/adapter"))
    assert main(["replay", "more", "-o", "r", "--to-step", str(record("more")["best_step"]), "--quiet"]) == 0
    assert_same_tensors(adapter("r"), adapter("more/adapter"))
    start, made = adapter("more/adapter_start"), adapter("more/adapter")
    assert all(torch.equal(start[key], made[key]) for key in made if "lora_A" in key)
    assert main(["finetune", "--branch-from=out", "--at-step=2", "--out=branch", "--quiet", "--steps=4"]) == 0
    assert_same_tensors(adapter("branch/adapter"), adapter("out/adapter"))


def test_a_start_that_was_changed(files, capsys) -> None:
    assert finetune(files, "--peft=lora", "--steps=2") == 0
    shutil.copy("out/adapter/adapter_model.safetensors", "out/adapter_start")
    assert resume("--steps=3") == 2
    assert "adapter_start: is not the adapter that the run began with" in one_line(capsys)
    assert main(["replay", "out", "-o", "again"]) == 1
    assert "adapter_start/adapter_model.safetensors: SHA-256" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--peft=lora", "--adapter=x"], 2, "give one of them"),
        (["--peft=lora", "--train-only=*.bias"], 2, "--train-only: an adapter is all that is trained"),
        (["--peft=prefix", "--merge"], 2, "a prefix cannot be merged"),
        (["--merge"], 2, "--merge needs --peft lora or --adapter"),
        (["--peft=lora", "--lora-targets=q_proj, v_porj"], 2, "--lora-targets v_porj: LlamaForCausalLM has no such"),
        (["--peft=lora", "--lora-targets=q_proj.weight"], 1, "LORA on LlamaForCausalLM: "),
        (["--adapter=nowhere"], 1, "nowhere: expected the directory of an adapter"),
        (["--train-only=*.nothing"], 2, "--train-only *.nothing: matches no parameter of LlamaForCausalLM, which has"),
    ],
)
def test_what_is_refused_leaves_nothing(files, capsys, options: list[str], status: int, reason: str) -> None:
    assert finetune(files, *options) == status
    assert reason in one_line(capsys)
    assert not Path("out").exists()


def test_only_some_parameters_are_trained(files, capsys) -> None:
    options = ["--train-only=last:2", "--train-only=*norm*", "--freeze", "re:mlp|layernorm"]
    assert finetune(files, *options, "--steps=2") == 0
    assert "training 9 of 47 parameters" in capsys.readouterr().out
    base, made = weights(files.model), weights("out/checkpoint")
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    blocks = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (3, 4) for p in "qkvo"}
    assert base.keys() == made.keys() and changed == blocks | {"model.norm.weight"}
    assert resume("--steps=4") == 0 and steps_in() == 4
    assert finetune(files, *options, "--out=whole") == 0
    assert_same_tensors(weights("out/checkpoint"), weights("whole/checkpoint"))
    assert main(["replay", "out", "-o", "again", "--quiet"]) == 0
    assert_same_tensors(weights("again"), weights("whole/checkpoint"))
    assert resume("--steps=5", "--freeze=*norm*") == 2
    assert "--freeze was 're:mlp|layernorm' and is '*norm*'" in one_line(capsys)


def test_norms_of_a_16_bit_base_are_trained_in_32(files, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their checkpoint has them in float32, and a run that began in 16 bits continues so."""
    shutil.copytree(files.model, "base16")
    files = SimpleNamespace(**vars(files) | {"model": "base16"})
    AutoModelForCausalLM.from_pretrained("base16").bfloat16().save_pretrained("base16")
    options = ["--train-only=*norm*", "--lr=1e-2"]
    assert finetune(files, *options, "--steps=2") == 0 and resume("--steps=4") == 0
    assert finetune(files, *options, "--out=whole") == 0
    assert "what was trained is in float32 there: load it with dtype=torch.float32" in capsys.readouterr().out
    made = weights("whole/checkpoint")
    assert_same_tensors(weights("out/checkpoint"), made)
    assert {name for name, value in made.items() if value.dtype == torch.float32} == {n for n in made if "norm" in n}
    assert load_config(Path("whole/checkpoint")).dtype == torch.bfloat16
    assert main(["replay", "out", "-o", "again", "--quiet"]) == 0
    assert_same_tensors(weights("again"), made)
    assert finetune(files, *options, "--branch-from=out", "--at-step=2", "--out=branch") == 0
    assert_same_tensors(weights("branch/checkpoint"), made)

    with monkeypatch.context() as patch:
        before = train._continues
        patch.setattr(train, "_continues", lambda *held: before(*held) | {"widen": False})
        assert finetune(files, *options, "--steps=2", "--out=old") == 0
    known = json.loads(Path("old/run.json").read_text())
    assert known.pop("widen") is False
    Path("old/run.json").write_text(json.dumps(known))
    assert main(["finetune", "--resume", "--out=old", "--steps=4", "--quiet"]) == 0
    old = weights("old/checkpoint")
    assert {value.dtype for value in old.values()} == {torch.bfloat16}
    assert main(["replay", "old", "-o", "old_again", "--quiet"]) == 0
    assert_same_tensors(weights("old_again"), old)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM", "BartForConditionalGeneration"])
def test_lora_on_other_kinds_of_models(name: str, tmp_path: Path, capsys) -> None:
    """A classifier's head is trained with it, as peft has it."""
    lines = {
        "BertForSequenceClassification": [
            {"text": f"the film is {w}", "label": i % 2} for i, w in enumerate(["good", "bad"] * 4)
        ],
        "BertForMaskedLM": [{"prompt": "it is <mask> .", "choices": ["good", "bad"], "label": i % 2} for i in range(8)],
        "BartForConditionalGeneration": [{"prompt": "it is", "completion": "good"}] * 8,
    }[name]
    files = SimpleNamespace(model=make(tmp_path / "model", name), train=write_jsonl(tmp_path / "t.jsonl", lines))
    assert finetune(files, "--peft=lora", "--lr=1", "--merge") == 0, capsys.readouterr().err
    assert any("classifier" in key for key in adapter("out/adapter")) == ("Classification" in name)
    model = getattr(transformers, name).from_pretrained(files.model)
    peft.PeftModel.from_pretrained(model, "out/adapter").merge_and_unload().save_pretrained("theirs")
    assert_same_tensors(weights("out/checkpoint"), weights("theirs"))
    assert finetune(files, "--peft=prefix", "--out=prefix") == 1
    assert "--peft prefix is for causal language models" in capsys.readouterr().err


def test_lora_on_experts(tmp_path: Path, capsys) -> None:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields["num_key_value_heads"] = 2
    tokenizer, config = make_tokenizer(), transformers.MixtralConfig(vocab_size=512, num_local_experts=4, **fields)
    for part in (transformers.MixtralForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    files = SimpleNamespace(model=tmp_path / "model", train=write_jsonl(tmp_path / "t.jsonl", choice_lines(8)))
    assert finetune(files, "--peft=lora", "--lora-targets=q_proj,experts.down_proj", "--lr=1", "--merge") == 0
    base = transformers.MixtralForCausalLM.from_pretrained(files.model)
    peft.PeftModel.from_pretrained(base, "out/adapter").merge_and_unload().save_pretrained("theirs")
    assert_same_tensors(weights("out/checkpoint"), weights("theirs"))
    fields |= {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(vocab_size=512, **fields)).save_pretrained(files.model)
    capsys.readouterr()
    assert finetune(files, "--peft=lora", "--out=other") == 1
    assert "peft has no LoRA targets for models of type qwen2_moe: name modules by --lora-targets" in one_line(capsys)


def test_an_adapter_beside_16_bits(files, capsys) -> None:
    """It stays float32; the base, its placement and its dtype do not change its bits by a resume."""
    options = ["--peft=lora", "--dtype=bfloat16", "--compute-dtype=float32", "--lr=1e-1"]
    assert finetune(files, *options, "--merge") == 0
    assert finetune(files, *options, "--out=first", "--steps=2", "--weights=disk") == 0
    assert resume("--steps=4", out="first") == 0
    assert_same_tensors(adapter("first/adapter"), adapter("out/adapter"))
    base = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(base, "out/adapter").merge_and_unload().save_pretrained("theirs")
    assert_same_tensors(weights("out/checkpoint"), weights("theirs"))
    assert main(["replay", "first", "--merge", "-o", "again", "--quiet"]) == 0
    assert_same_tensors(weights("again"), weights("theirs"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("method", "more"),
    [("lora", ["--slice=on", "--weights=disk"]), ("prefix", ["--parallel=pert=2"]), ("prompt", ["--slice=on"])],
)
def test_two_ranks_train_the_adapter_of_one(ranks, files, method: str, more: list[str], tmp_path: Path) -> None:
    options = [*STEPS, "--micro-batches=2", f"--peft={method}", *LARGE[method], "--threads=1"]
    arguments = ["finetune", f"--model={files.model}", f"--train={files.train}", *options]
    run_alone(tmp_path / "alone", [*arguments, "--out=out"])
    first = ranks.values(command, 2, tmp_path, [*arguments, *more, "--out=out", "--steps=2"])
    then = ranks.values(command, 2, tmp_path, ["finetune", "--resume", "--out=out", "--quiet", "--steps=4"])
    assert [r["status"] for r in first + then] == [0] * 4, first + then
    assert_same_tensors(adapter("out/adapter"), adapter("alone/out/adapter"))
