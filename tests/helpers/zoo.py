"""Small models of many architectures, each with a batch and a closure that returns its loss in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

VOCAB = 64


@dataclass(frozen=True)
class Case:
    """A model builder and what to run it on; every call of `build` gives the same bits."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]

    def closure(
        self, model: nn.Module, batch_index: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Callable[[], torch.Tensor]:
        """Returns the loss of a batch, whose inputs are of `dtype`, in float32."""
        values = self.batch(batch_index).items()
        batch = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in values}

        def loss() -> torch.Tensor:
            output = model(**batch)
            return (output.loss if hasattr(output, "loss") else output).float()

        return loss


def _tokens(index: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(100 + index))
    return {"input_ids": ids, "labels": ids}


_SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
_OPT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "ffn_dim": 32, "num_attention_heads": 2,
    "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 1,
}  # fmt: skip


def _causal(name: str, kind: str, options: dict[str, object]) -> Case:
    """A causal language model of transformers' `kind`."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            return model.float().eval()

    return Case(name, build, _tokens)


class ConvClassifier(nn.Module):
    """A small convolutional network with BatchNorm; its forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv1(pixels)))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        return nn.functional.cross_entropy(self.head(x).float(), labels)


def _conv() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return ConvClassifier().eval()


def _pixels(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(200 + index)
    return {
        "pixels": torch.randn(4, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 5, (4,), generator=generator),
    }


LANGUAGE = [
    _causal("opt-tied", "OPT", {**_OPT, "tie_word_embeddings": True}),
    _causal("opt-untied", "OPT", {**_OPT, "tie_word_embeddings": False}),
    _causal("llama", "Llama", {**_SMALL, "tie_word_embeddings": False}),
    _causal("qwen3", "Qwen3", {**_SMALL, "head_dim": 8, "tie_word_embeddings": True}),
    _causal("gpt2", "GPT2", {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}),
    _causal("mixtral", "Mixtral", {**_SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}),
    _causal(
        "gemma3",
        "Gemma3Text",
        {**_SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
]
CONV = Case("conv", _conv, _pixels)
ALL = [*LANGUAGE, CONV]
BY_NAME = {case.name: case for case in ALL}
