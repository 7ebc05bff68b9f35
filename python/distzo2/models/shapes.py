"""Shapes of published language models, by name, as a plan or a bench needs them without a checkpoint; and positions."""

from __future__ import annotations

from typing import Any

SHAPES = {  # hidden size, layers, heads (arXiv 2205.01068, table 1)
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
    "opt-66b": (9216, 64, 72),
    "opt-175b": (12288, 96, 96),
}
LARGE = {  # of the memory table: architecture, hidden and inner size, layers, heads, those of keys, vocabulary
    "llama-3-8b": ("Llama", 4096, 14336, 32, 32, 8, 128256),
    "gemma-3-27b": ("Gemma3Text", 5376, 21504, 62, 32, 16, 262208),
    "llama-3-70b": ("Llama", 8192, 28672, 80, 64, 8, 128256),
    "mistral-large-123b": ("Mistral", 12288, 28672, 88, 96, 8, 32768),
}  # as their config.json has them; heads are 128 wide


def shape_config(name: str, num_layers: int | None = None) -> Any:
    """The transformers configuration of a published model; `num_layers` replaces its number of layers."""
    import transformers

    if name in SHAPES:
        hidden, layers, heads = SHAPES[name]
        kind, vocab, sizes = "OPT", 50272, {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
        sizes["max_position_embeddings"] = 2048
    else:
        kind, hidden, inner, layers, heads, keys, vocab = LARGE[name]
        sizes = {"intermediate_size": inner, "num_key_value_heads": keys, "head_dim": 128}
    layers = num_layers or layers
    sizes |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    return getattr(transformers, f"{kind}Config")(**sizes)


def max_positions(config: Any) -> int | None:
    """How many positions a model of this config has, or None where it has no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    values = (getattr(text_config(config), name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
