"""Batched generation: texts are padded on the left, and every new token of all of them is one pass over the weights.

The model's own `generate` makes the tokens, with its cache of keys and values. In the closure of a step each lane has a
cache of its own, a token of all lanes is one pass, and a lane ends when its texts have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from distzo2.errors import DistZO2Error, UsageError
from distzo2.models.shapes import max_positions
from distzo2.peft.adapters import tokens_in_front
from distzo2.streaming.lanes import current_lane


@dataclass(frozen=True)
class Generated:
    """What a model wrote behind a text."""

    tokens: list[int]  # without the token that ends a text; with those that make the stop string
    text: str | None  # without special tokens, up to the stop string; None without a tokenizer


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    inputs: Sequence[str | Sequence[int]],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 50,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    pad_id: int | None = None,
    **options: Any,
) -> list[Generated]:
    """Continues texts, greedily unless `options` say otherwise.

    Inside a closure what it samples is a function of (seed, step, micro-batch), the same for every perturbation.

    Args:
        model: with transformers' `generate`; handed over or not. Its weights stream once for each new token of a batch.
        inputs: texts, or tokens of texts. Of an encoder-decoder model, what its encoder reads.
        tokenizer: for texts and for `stop`.
        max_new_tokens: tokens to add to each at most, 1 or more.
        stop: strings that end a text.
        batch_size: texts that share a pass, and whose keys and values are in memory together. Texts of like length
            go together; a finished one is padded until its batch has finished. In a closure an encoder-decoder takes
            all at once, since lanes that encode a second time would enter other units than those that still decode.
        pad_id: token that fills rows up (default: the tokenizer's, or one that ends a text, or 0); it is masked.
        options: of transformers' `generate`, such as do_sample=True, temperature=0.7, top_k=50.

    Returns:
        One for each of `inputs`, in their order.

    Raises:
        UsageError: texts or `stop` without a tokenizer, or `options` that search or return several texts.
        DistZO2Error: the model generates nothing, or a text has no tokens, or more than its positions leave room for.
    """
    if not hasattr(model, "generate"):
        raise DistZO2Error(f"{type(model).__name__} generates no text")
    if tokenizer is None and (stop or any(isinstance(each, str) for each in inputs)):
        raise UsageError("generate_batch needs tokenizer= for texts and stop strings")
    if max_new_tokens < 1:
        raise UsageError(f"generate_batch needs max_new_tokens of 1 or more, not {max_new_tokens}")
    if options.get("num_return_sequences", 1) != 1 or (stop and options.get("num_beams", 1) != 1):
        raise UsageError("generate_batch returns one text for each, and stop strings need num_beams=1")
    rows = [tokenizer(each)["input_ids"] if isinstance(each, str) else list(each) for each in inputs]
    if any(not row for row in rows):
        raise DistZO2Error("a text to continue has no tokens")
    # peft puts a prompt before the padding, too far from a shorter text: with one, only texts of one length share rows.
    peft_config = getattr(model, "active_peft_config", None)
    in_front = tokens_in_front(peft_config) if peft_config else 0
    _check_room(model, max(map(len, rows), default=0), max_new_tokens, in_front)
    ends = _end_tokens(model, tokenizer)
    if pad_id is None:
        pad_id = next((i for i in (getattr(tokenizer, "pad_token_id", None), *ends) if i is not None), 0)
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    settings = greedy | {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id} | options
    if ends:
        settings["eos_token_id"] = ends
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [list(g) for _, g in groupby(order, key=lambda i: len(rows[i]) if in_front else 0)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and current_lane() is not None:
        batch_size = max(batch_size, len(rows))  # a lane that encodes once more would leave the passes of the others
    parts = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    results: list[Generated | None] = [None] * len(rows)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        for part in parts:
            made = _generate(model, [rows[i] for i in part], tokenizer, stop, ends, settings)
            for i, tokens in zip(part, made, strict=True):
                results[i] = Generated(tokens, None if tokenizer is None else _text(tokenizer, tokens, stop))
    finally:
        for module in training:
            module.training = True
    return results


def _check_room(model: nn.Module, longest: int, new: int, in_front: int) -> None:
    """
    Raises:
        DistZO2Error: a text of `longest` tokens, behind `in_front` of a prompt of peft, has no room for `new` ones.
    """
    config = getattr(model, "config", None)
    positions, needed = max_positions(config), in_front + longest + new
    if getattr(config, "is_encoder_decoder", False):
        needed = max(longest, new + 1)  # the decoder begins with a start token
    if positions is not None and needed > positions:
        raise DistZO2Error(
            f"a text of {longest} tokens and max_new_tokens={new} take {needed} positions: {type(model).__name__} has "
            f"{positions}"
        )


def _generate(
    model: nn.Module, rows: list[list[int]], tokenizer: Any, stop: Sequence[str], ends: list[int], settings: dict
) -> list[list[int]]:
    """New tokens of each row, up to what ended it."""
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), settings["pad_token_id"])
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if encodes else slice(width - len(row), width)  # an encoder's positions count from 0
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    runtime = getattr(model, "_distzo2_runtime", None)  # of a model that was handed over
    device = model.device if runtime is None else runtime.device
    stops = _Stops(tokenizer, stop, 1 if encodes else width)
    made = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        stopping_criteria=StoppingCriteriaList([stops] if stop else []),
        **settings,
    )
    result = []
    for i, row in enumerate(made[:, stops.start :].tolist()):
        row = row[: stops.ended.get(i, len(row))]
        result.append(row[: next((k for k, token in enumerate(row) if token in ends), len(row))])
    return result


class _Stops(StoppingCriteria):
    """Ends the rows whose new text holds a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start  # `start`: where new tokens begin
        self.ended: dict[int, int] = {}  # row -> its number of new tokens
        # A token adds a byte or more, but for a few that add nothing or complete a character.
        self._window = max((len(s.encode()) for s in stop), default=0) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.start :]
        for i, row in enumerate(new[:, -self._window :].tolist()):
            if i not in self.ended and any(
                s in self.tokenizer.decode(row, skip_special_tokens=True) for s in self.stop
            ):
                self.ended[i] = new.shape[1]
        return torch.tensor([i in self.ended for i in range(len(new))], device=input_ids.device)


def _text(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def _end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a text, of the model's generation_config and of the tokenizer."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = list(known) if isinstance(known, list | tuple) else [known]
    return [int(i) for i in dict.fromkeys([*known, getattr(tokenizer, "eos_token_id", None)]) if i is not None]
