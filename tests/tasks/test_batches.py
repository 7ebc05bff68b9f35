"""The order of examples, and micro-batches as tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_text import choice_lines, make_tokenizer, write_jsonl

from distzo2.tasks.batches import DataOrder, collate
from distzo2.tasks.examples import load_examples


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_an_epoch_is_a_permutation_and_any_batch_is_direct() -> None:
    order = DataOrder(10, 4, seed=7)
    sequence = [i for step in range(10) for i in order.batch(step)]
    for epoch in range(4):
        assert sorted(sequence[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert sequence[:10] != sequence[10:20]
    assert DataOrder(10, 4, seed=7).batch(6) == order.batch(6)
    assert [DataOrder(10, 4, seed=8).batch(s) for s in range(3)] != [order.batch(s) for s in range(3)]
    assert len(DataOrder(3, 8, seed=0).batch(2)) == 8


def test_collated_sequences(tokenizer, tmp_path: Path) -> None:
    lines = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a", "completion": " dog ran far away"}]
    examples = load_examples(write_jsonl(tmp_path / "d", lines), tokenizer)
    batch = collate(examples, pad_id=9)
    assert batch.num_tokens == sum(len(e.tokens) for e in examples)
    for row, example in enumerate(examples):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == example.tokens.tolist() and bool(real[0])
        assert collate([example], pad_id=9).attention_mask is None
        assert (batch.input_ids[row][~real] == 9).all()
        asked = [int(t) for t, pair in zip(batch.tokens, batch.scored, strict=True) if batch.rows[pair] == row]
        assert asked == example.tokens[example.targets].tolist()


def test_choices_of_one_token_share_a_row(tokenizer, tmp_path: Path) -> None:
    line = {"prompt": "the cat is", "choices": [" yes", " no"], "label": 0}
    examples = load_examples(write_jsonl(tmp_path / "one", [line]), tokenizer)
    assert collate(examples, pad_id=0).input_ids.shape[0] == 1
    examples = load_examples(write_jsonl(tmp_path / "d", choice_lines(5)), tokenizer)
    batch = collate(examples, pad_id=0)
    assert batch.choices.shape == (5, 3) and batch.labels.tolist() == [0, 1, 2, 0, 1]
    assert batch.input_ids.shape[0] < 15 and batch.input_ids.dtype == torch.int64
