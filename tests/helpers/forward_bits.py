"""The bits of a model's forward passes by transformers alone, which differ between processors and versions of torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def forward_bits(model: Path, inputs: list[dict[str, Any]]) -> str:
    """SHA-256 over logits, their logarithms of sums and a dropout mask, on one thread.

    Args:
        model: directory of a checkpoint.
        inputs: for each forward pass its arguments, tensors as nested lists.
    """
    torch.set_num_threads(1)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    digest = hashlib.sha256()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for arguments in inputs:
            logits = network(**{name: torch.tensor(value) for name, value in arguments.items()}).logits.float()
            digest.update(logits.numpy().tobytes())
            digest.update(logits.logsumexp(-1).numpy().tobytes())
        torch.manual_seed(1)
        digest.update(torch.nn.functional.dropout(torch.ones(1000), 0.1).numpy().tobytes())
    return digest.hexdigest()
