"""A reward that has no gradient: a small model learns Countdown from what it writes, by evolution strategies.

    python countdown.py --out countdown-run

A Llama of 1.0 M parameters is first taught by backpropagation how an answer looks: half of the answers that it reads
are right, half stop after two of the numbers. Then `distzo2 finetune --objective reward` raises the share of its own
answers that `reward.py` finds right, and `distzo2 replay` rebuilds the result from the run's journal. Evolution
strategies change what a model prefers; they do not teach one of this size to reckon.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import Task, all_tasks, expressions
from tqdm import tqdm

from distzo2.run.metrics import read_metrics

VOCABULARY = "\n0123456789 =:+-*"  # a token each; the first ends a text
NEW_TOKENS = 6  # three numbers, two operators, the end
SHORT = 3  # characters of an answer that stops too early: two numbers and an operator

# Mirrored pairs of signs, 16 answers to each prompt, rewards shaped by mean and spread over them (`es`, the default).
SETTINGS = (
    "--objective=reward --probes=8 --noise=rademacher --eps=5e-3 --lr=1e-2 --schedule=linear --batch-size=128 "
    f"--max-new-tokens={NEW_TOKENS} --eval-every=10 --eval-batch-size=100"
)


@dataclass(frozen=True)
class Recipe:
    """What the base and the run are made with."""

    hidden: int = 128
    layers: int = 5
    base_steps: int = 600
    base_batch: int = 128
    lr: float = 3e-3
    num_held_out: int = 400
    steps: int = 60
    seed: int = 0


def make_base(directory: Path, recipe: Recipe) -> None:
    """Writes model/, train.jsonl, held_out.jsonl and facts.json into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tasks = all_tasks(recipe.seed)
    held_out, train = tasks[: recipe.num_held_out], tasks[recipe.num_held_out :]
    for name, some in (("train", train), ("held_out", held_out)):
        rows = [{"prompt": t.prompt, "numbers": t.numbers, "target": t.target} for t in some]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, model = make_tokenizer(), make_model(recipe)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"a Llama of {num_parameters:,} parameters; {len(train)} tasks, {len(held_out)} held out", flush=True)
    start = time.perf_counter()
    teach(model, tokenizer, train, recipe)
    facts = {"parameters": num_parameters, "seconds": time.perf_counter() - start}
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "facts.json").write_text(json.dumps(facts))


def make_tokenizer() -> Any:
    """A token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}, unk_token="\n"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="\n", pad_token="\n")


def make_model(recipe: Recipe) -> torch.nn.Module:
    """The untrained Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config).float()


def teach(model: torch.nn.Module, tokenizer: Any, tasks: Sequence[Task], recipe: Recipe) -> None:
    """Next-token prediction of answers: half of them right, the others the beginnings of any expressions."""
    draw = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.base_steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(recipe.base_steps), desc="teaching the base", disable=None):
        rows = []
        for task in draw.choices(tasks, k=recipe.base_batch):
            answer = draw.choice(task.solutions)
            if draw.random() < 0.5:
                answer = draw.choice(list(expressions(task.numbers)))[:SHORT]
            prompt, answer = (tokenizer(text)["input_ids"] for text in (task.prompt, answer + "\n"))
            rows.append((torch.tensor(prompt + answer), torch.tensor([-100] * len(prompt) + answer)))
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True, padding_value=fill)
            for i, fill in ((0, 0), (1, -100))
        )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def distzo2(*arguments: object) -> None:
    """Runs a command of distzo2 in its own process, as a user would."""
    command = ["distzo2", *map(str, arguments)]
    print("\n" + " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def run(out: Path, recipe: Recipe) -> bool:
    """Runs the example in `out`, whose base is kept and whose earlier run is replaced. Returns whether the journal gave
    the saved checkpoint again."""
    start = time.perf_counter()
    made, run, again = out / "base", out / "run", out / "replayed"
    if not (made / "facts.json").is_file():
        make_base(made, recipe)
    for directory in (run, again):
        shutil.rmtree(directory, ignore_errors=True)
    data = (f"--model={made / 'model'}", f"--train={made / 'train.jsonl'}", f"--eval={made / 'held_out.jsonl'}")
    reward = f"--reward={Path(__file__).parent / 'reward.py'}:countdown"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    more = (reward, f"--steps={recipe.steps}", f"--device={device}", f"--out={run}")
    distzo2("finetune", *data, *SETTINGS.split(), *more)
    distzo2("report", run)
    distzo2("replay", run, f"--out={again}")
    name = "model.safetensors"
    same = (again / name).read_bytes() == (run / "checkpoint" / name).read_bytes()

    lines = read_metrics(run / "metrics.jsonl")
    rewards = {line["step"]: line["reward"] for line in lines if line["kind"] == "eval"}
    steps = [line for line in lines if line["kind"] == "step"]
    facts = json.loads((made / "facts.json").read_text())
    seconds = sum(line["seconds"] for line in steps) / len(steps)
    size, verb = (run / "journal.jsonl").stat().st_size, "give" if same else "DO NOT give"
    print(f"""
Held out ({recipe.num_held_out} tasks that no training saw), mean reward: 1 if right, 0.1 if it only uses the numbers
  before  {rewards[0]:.3f}   the base of {facts["parameters"]:,} parameters, taught for {facts["seconds"]:.0f} s
  after   {rewards[len(steps)]:.3f}   {len(steps)} steps, 16 members x 128 prompts, {seconds:.2f} s each
Base + journal ({size:,} bytes) {verb} the checkpoint bit for bit.
Picture: {run / "report.png"}. All of it took {time.perf_counter() - start:.0f} s.""")
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("countdown-run"), help="directory of the base and the run")
    sys.exit(0 if run(parser.parse_args().out, Recipe()) else 1)
