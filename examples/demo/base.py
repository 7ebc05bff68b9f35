"""Makes the demo's data and its base model: a Llama of 1.1 M parameters, pre-trained here by backpropagation.

    python base.py --out demo-run/base

The model reads 32 tokens of a docstring and " From:", and then names the library by a token of its own. Fine-tuning has
to teach it to answer in words instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from docstrings import LABELS, LIBRARIES, Docstring, Split, collect, roots, split
from tqdm import tqdm

from distzo2.tasks.batches import DataOrder
from distzo2.tasks.examples import load_examples
from distzo2.tasks.objectives import Objective

SUFFIX = " From:"


@dataclass(frozen=True)
class Recipe:
    """What the base and its data are made with; the defaults are the demo's."""

    docstrings: int = 1600  # of a library, at most
    num_train: int = 300  # docstrings of a label
    num_held_out: int = 200
    num_tokens: int = 32  # of a docstring that the model reads
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    steps: int = 400
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0
    backprop_steps: int = 100


def make(directory: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes model/, train.jsonl, held_out.jsonl and facts.json, which it returns, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = {
        library: split(collect(library, root, recipe.docstrings), recipe.num_train, recipe.num_held_out)
        for library, root in roots().items()
    }
    pretrain = [d for s in splits.values() for d in s.pretrain]
    print(f"{len(pretrain)} docstrings of {len(LIBRARIES)} libraries to pre-train on", flush=True)

    tokenizer = train_tokenizer(pretrain, recipe.vocabulary)
    for name in ("train", "held_out"):
        lines = labelled_lines(splits, name, tokenizer, recipe.num_tokens)
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    model = make_model(recipe, len(tokenizer))
    num_parameters = sum(p.numel() for p in model.parameters())
    windows = pretraining_windows(pretrain, tokenizer, recipe.num_tokens)
    print(f"a Llama of {num_parameters:,} parameters, {len(windows)} pieces of {recipe.num_tokens} tokens", flush=True)
    start = time.perf_counter()
    pretrain_model(model, windows, recipe)
    seconds = time.perf_counter() - start
    model.eval()
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    backprop = backprop_baseline(directory, model, tokenizer, recipe)  # after it is saved: this changes the model
    facts = {"parameters": num_parameters, "pretrain_seconds": seconds, "backprop": backprop}
    (directory / "facts.json").write_text(json.dumps(facts, indent=1))
    return facts


def train_tokenizer(docstrings: Sequence[Docstring], vocabulary: int) -> Any:
    """A byte-level BPE of these texts, as a transformers tokenizer. The labels' words are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", *(f"<{library}>" for library in LIBRARIES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    often = [SUFFIX + "".join(LABELS.values())] * 400
    bpe.train_from_iterator([*(d.text for d in docstrings), *often], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def labelled_lines(splits: dict[str, Split], part: str, tokenizer: Any, num_tokens: int) -> list[dict[str, Any]]:
    """Lines of the new labelling: the beginning of a docstring, the four words, and which is right."""
    choices = list(LABELS.values())
    lines = []
    for label, library in enumerate(LABELS):
        for docstring in getattr(splits[library], part):
            ids = tokenizer(docstring.text)["input_ids"][:num_tokens]
            lines.append({"prompt": tokenizer.decode(ids) + SUFFIX, "choices": choices, "label": label})
    return lines


def make_model(recipe: Recipe, vocabulary: int) -> torch.nn.Module:
    """The untrained Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config).float()


def pretraining_windows(docstrings: Sequence[Docstring], tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """int64 [windows, num_tokens + suffix + 1]: pieces of docstrings, each with the suffix and its library's token."""
    suffix = tokenizer(SUFFIX)["input_ids"]
    tokens = {library: tokenizer.convert_tokens_to_ids(f"<{library}>") for library in LIBRARIES}
    rows = []
    encoded = tokenizer([d.text for d in docstrings])["input_ids"]
    for docstring, ids in zip(docstrings, encoded, strict=True):
        for first in range(0, min(len(ids), 16 * num_tokens) - num_tokens + 1, num_tokens):
            rows.append(ids[first : first + num_tokens] + suffix + [tokens[docstring.library]])
    return torch.tensor(rows)


def pretrain_model(model: torch.nn.Module, windows: torch.Tensor, recipe: Recipe) -> None:
    """Next-token prediction of the text and, weighted by half, of the library's token."""
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(recipe.steps), desc="pre-training", disable=None)  # None: shown on a terminal only
    for _ in bar:
        batch = windows[torch.randint(len(windows), (recipe.batch_size,), generator=order)]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(batch), -1)
        loss = losses[:, :-1].mean() + 0.5 * losses[:, -1].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}, library {losses[:, -1].mean().item():.3f}", refresh=False)


def backprop_baseline(directory: Path, model: torch.nn.Module, tokenizer: Any, recipe: Recipe) -> dict[str, float]:
    """Held-out loss and accuracy that AdamW reaches with gradients from the same base and lines. Changes `model`."""
    train = load_examples(directory / "train.jsonl", tokenizer)
    held_out = load_examples(directory / "held_out.jsonl", tokenizer)
    objective = Objective(model, "choices", pad_id=tokenizer.pad_token_id)
    order = DataOrder(len(train), 16, recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=recipe.backprop_steps)
    for step in range(recipe.backprop_steps):
        loss = objective.closure(objective.batch([train[i] for i in order.batch(step)]))()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    totals = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for first in range(0, len(held_out), 100):
            totals += objective.evaluation(objective.batch(held_out[first : first + 100]))()
    loss_sum, count, hits, answers = totals.tolist()
    return {"loss": loss_sum / count, "accuracy": hits / answers}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and the data")
    make(parser.parse_args().out, Recipe())
