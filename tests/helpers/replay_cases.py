"""Small checkpoints, and journals of updates over them."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distzo2.checkpoint.reading import digest_checkpoint
from distzo2.record.entry import StepEntry
from distzo2.record.header import make_header, table_row
from distzo2.record.journal import Journal
from distzo2_core import GroupScalars, Term, Update

SEED = 2**63 + 12345


NUM_STEPS = 5


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def make_llama(path: Path, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=96, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    return path


def make_updates(num_probes: int = 1, num_groups: int = 2) -> list[Update]:
    """Both families, a changing lr, weight decay in the first group only, one skipped step."""
    updates = []
    for step in range(NUM_STEPS):
        lr = 0.0 if step == 2 else f32(0.01 / (step + 1))
        groups = tuple(GroupScalars(f32(lr * (g + 1)), f32(0.1) if g == 0 else 0.0) for g in range(num_groups))
        terms = tuple(Term(step % 2, step, k, 0, f32(math.sin(7 * step + k))) for k in range(num_probes))
        updates.append(Update(step, groups, () if step == 2 else terms))
    return updates


def make_table(names_and_weights: dict[str, torch.Tensor], frozen: Sequence[str] = ()) -> list[dict[str, Any]]:
    return [
        table_row(
            index, name, w.shape, w.dtype, w.stride(), name not in frozen, None if name in frozen else int(w.dim() < 2),
            "normal",
        )
        for index, (name, w) in enumerate(names_and_weights.items())
    ]  # fmt: skip


def write_run(
    path: Path, base: Path, table: list[dict[str, Any]], updates: Sequence[Update], **header_fields: Any
) -> Path:
    header = make_header(
        seed=SEED, base=digest_checkpoint(base), table=table, groups=[{}] * len(updates[0].groups), **header_fields
    )
    with Journal.create(path, header) as journal:
        for update in updates:
            skipped = "non-finite loss" if not update.terms else None
            journal.append(StepEntry(update.step, update, f32(1e-3), [[1.0], [math.nan if skipped else 2.0]], skipped))
    return path


def named_weights(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    return {name: param.detach().clone() for name, param in model.named_parameters()}
