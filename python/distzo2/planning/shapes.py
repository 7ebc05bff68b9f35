"""OPT's published shapes, so that a model can be planned or made without its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import OPTConfig

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


def opt_config(name: str, num_layers: int | None = None) -> OPTConfig:
    """The configuration of a published OPT, with fewer layers where asked."""
    from transformers import OPTConfig

    hidden, layers, heads = SHAPES[name]
    return OPTConfig(
        vocab_size=50272,
        hidden_size=hidden,
        num_hidden_layers=num_layers or layers,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        word_embed_proj_dim=hidden,
    )
