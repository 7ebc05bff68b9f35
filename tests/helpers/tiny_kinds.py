"""Tiny checkpoints of other kinds than causal models, with tokenizers, for the tests of tasks and commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_text import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "cat", "dog", "film", "is", "was", "it", "good", "bad", "yes", "no", "maybe", "great", ".", "a", "mat"]
MARKS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
SMALL = {"pad_token_id": 0, "vocab_size": len(MARKS) + len(WORDS)}
BERT = SMALL | {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
BART = SMALL | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
T5 = SMALL | {
    "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "eos_token_id": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def word_tokenizer(single: str = "<s> $A </s>", *, lstrip: bool = False) -> PreTrainedTokenizerFast:
    """A token a word; `single` says which special tokens stand around a text, `lstrip` whether the mask takes the
    space before it."""
    vocab = {word: i for i, word in enumerate([*MARKS, *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(mark, vocab[mark]) for mark in MARKS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=lstrip, special=True),
    )  # fmt: skip


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, where a word has another token with a space before it; the mask takes that space."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    ids = [("<s>", 1), ("<eos>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <eos>", special_tokens=ids
    )
    return tokenizer


def make(directory: Path, name: str, tokenizer: Any = None, **fields: Any) -> Path:
    """A checkpoint of the class `name` with seeded weights, its configuration with `fields`."""
    kind = getattr(transformers, name)
    tokenizer = tokenizer or word_tokenizer("$A </s>" if name.startswith("T5") else "<s> $A </s>")
    base = BART if "Bart" in name else T5 if "T5" in name else BERT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind(kind.config_class(**base | fields)).float()
        for parameter in model.parameters():  # larger than a start of training: answers differ
            parameter.data.mul_(3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
