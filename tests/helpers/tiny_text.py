"""A tiny Llama checkpoint with a tokenizer, and JSONL files, for the tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat and the dog ran far away from home",
    "a graph has nodes and edges, a matrix has rows and columns, a film is good or bad",
    "Question: is it good? Answer: yes, no, maybe. User: Assistant: System:",
] * 20


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 tokens; with `bos`, one that puts <s> before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>", bos_token="<s>")


def make_checkpoint(directory: Path, *, positions: int = 64, layers: int = 2) -> Path:
    """A Llama of hidden size 32 with seeded weights, and its tokenizer."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=1,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    """Writes objects as JSON and strings as they are."""
    path.write_text("".join((s if isinstance(s, str) else json.dumps(s)) + "\n" for s in lines), encoding="utf-8")
    return path


def choice_lines(count: int) -> list[dict[str, Any]]:
    """Lines with choices of one and of several tokens."""
    words = ["cat", "dog", "graph", "film", "matrix"]
    return [
        {
            "prompt": f"the {words[i % 5]} is {'good' if i % 2 else 'bad'}. Answer:",
            "choices": [" yes", " no", " maybe it is"],
            "label": i % 3,
        }
        for i in range(count)
    ]


def uneven_lines(count: int) -> list[dict[str, Any]]:
    """Lines of which one, five or nine words are learned."""
    return [{"prompt": "the cat sat.", "completion": " the" * (1 + 4 * (i % 3))} for i in range(count)]
