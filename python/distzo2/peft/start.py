"""Where a prompt or a prefix starts: at what the model makes of real tokens, as in MeZO (arXiv 2305.17333)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distzo2.errors import DistZO2Error, blaming
from distzo2.parallel.group import Mesh
from distzo2.peft.adapters import NAME, keys_of, write_adapter
from distzo2.streaming.offload import runtime_of


@torch.no_grad()
def start_from_tokens(model: Any, directory: Path, seed: int, mesh: Mesh | None = None) -> None:
    """Fills the prompt or prefix of a `PeftModel` that was handed over and is not trained yet, and its `directory`: a
    prompt with the embeddings of tokens of the vocabulary drawn under `seed`, a prefix with the keys and values that
    the streamed model has at them, on all ranks of `mesh` the first one's.

    Raises:
        DistZO2Error: a layer's keys and values are not of the shape that peft's prefix has.
    """
    config, runtime = model.peft_config[NAME], runtime_of(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.word_embeddings.num_embeddings, (1, config.num_virtual_tokens), generator=generator)
    with blaming(f"{type(model.get_base_model()).__name__} fails on {config.num_virtual_tokens} tokens"):
        tokens = tokens.to(runtime.device)
        if config.peft_type == "PROMPT_TUNING":
            value = model.word_embeddings(tokens)[0]
        else:
            value = _keys_and_values(model.get_base_model()(input_ids=tokens, use_cache=True).past_key_values, config)
    [(name, key)] = keys_of(model).items()
    value = value.float().cpu().contiguous()
    if mesh is not None:
        value = mesh.exchange.broadcast(value)
    write_adapter(directory, config, {key: value})
    unit = next(unit for unit in runtime.units if any(p.name == name for p in unit.params))
    with runtime.access.replacing("starting a prompt", source=lambda: "tokens") as note:
        note(unit.name, [value])
        with runtime.access.writing(unit, keep=True) as views:
            views[name].copy_(value)


def _keys_and_values(cache: Any, config: Any) -> torch.Tensor:
    """[tokens, layers · 2 · heads · head_dim], as peft's prefix encoder holds them, of a cache of one row."""
    heads = config.num_attention_heads
    expected = (1, heads, config.num_virtual_tokens, config.token_dim // heads)
    layers = getattr(cache, "layers", [])
    found = [tuple(getattr(getattr(x, each, None), "shape", ())) for x in layers for each in ("keys", "values")]
    if len(layers) != config.num_layers or set(found) != {expected}:
        odd = next((shape for shape in found if shape != expected), f"{len(layers)} layers")
        raise DistZO2Error(
            f"a prefix needs keys and values of shape {expected} in each of {config.num_layers} layers, and the model "
            f"has {odd}: --peft lora works"
        )
    pairs = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])  # layer, 2, head, token
    return pairs.permute(3, 0, 1, 2, 4).reshape(config.num_virtual_tokens, -1)
