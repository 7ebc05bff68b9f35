"""Random checkpoints of OPT's published shapes, written shard by shard so that no whole model is in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from distzo2.models.shapes import shape_config


def write_random_checkpoint(directory: Path, name: str, dtype: torch.dtype, num_layers: int | None = None) -> None:
    """Writes `name` with weights N(0, 0.02²) in `dtype`, one shard a layer; does nothing where it is there already.
    `num_layers` replaces its number of layers."""
    index_path = directory / "model.safetensors.index.json"
    if index_path.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = shape_config(name, num_layers)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for key, p in model.named_parameters():
        parts = key.split(".")
        shard = parts[parts.index("layers") + 1] if "layers" in parts else "rest"
        shards.setdefault(shard, {})[key] = p.shape
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shapes in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for key, shape in shapes.items():
            if key.endswith("bias"):
                tensors[key] = torch.zeros(shape, dtype=dtype)
            elif len(shape) == 1:
                tensors[key] = torch.ones(shape, dtype=dtype)
            else:
                tensors[key] = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
            weight_map[key] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(directory)
    index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
