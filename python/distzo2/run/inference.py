"""`distzo2 eval` and `distzo2 generate`: a checkpoint at work, its weights streamed."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import distzo2
from distzo2.errors import DistZO2Error
from distzo2.run.preflight import DTYPES, check_device, check_disk, check_memory, model_size, set_threads
from distzo2.tasks.lines import load_examples, load_tokenizer, sequence_limit
from distzo2.tasks.objectives import Objective, Score, evaluate_examples, resolve_objective


@contextmanager
def loaded(options: Namespace) -> Iterator[tuple[torch.nn.Module, torch.device]]:
    """The model of `options`, after the checks of its device and of the room it needs."""
    device = check_device(options.device)
    set_threads(options.threads)
    size = model_size(options.model, DTYPES.get(options.dtype))
    check_memory(size, device, options.weights)
    with tempfile.TemporaryDirectory(prefix="distzo2-", dir=options.weights_dir) as directory:
        if options.weights == "disk":
            check_disk(directory, {"the file of streamed weights": size.total})
        model = distzo2.from_pretrained(
            options.model,
            device=device,
            weights=options.weights,
            dtype=DTYPES.get(options.dtype),
            directory=directory,
            memory_budget=options.memory_budget,
            write_every=options.write_every,
        )
        try:
            yield model, device
        finally:
            distzo2.runtime_of(model).close()


def evaluate_file(options: Namespace) -> tuple[Score, str]:
    """Loss and accuracy on a JSONL file, and the objective's name."""
    check_device(options.device)
    tokenizer = load_tokenizer(options.model)
    limit = sequence_limit(options.model, options.max_length)
    examples = load_examples(options.eval, tokenizer, limit=limit, truncate=options.truncate)
    name = resolve_objective(options.objective, examples, options.eval)
    with loaded(options) as (model, device):
        objective = Objective(model, name, pad_id=tokenizer.pad_token_id or 0, device=device)
        return evaluate_examples(objective, examples, batch_size=options.batch_size), name


@torch.no_grad()
def generate_text(options: Namespace, on_text: Callable[[str], None]) -> str:
    """Continues a prompt; `on_text` gets the prompt's continuation piece by piece.

    Raises:
        DistZO2Error: the prompt has no tokens, or more than the model has positions.
    """
    check_device(options.device)
    tokenizer = load_tokenizer(options.model)
    limit = sequence_limit(options.model)
    inputs = tokenizer(options.prompt, return_tensors="pt")["input_ids"].long()
    if not inputs.numel():
        raise DistZO2Error("the prompt has no tokens")
    if limit is not None and inputs.shape[1] + options.max_new_tokens > limit:
        sizes = f"a prompt of {inputs.shape[1]} tokens and {options.max_new_tokens} new ones"
        raise DistZO2Error(f"{sizes}: the model has {limit} positions")
    with loaded(options) as (model, device):
        sampling = {"do_sample": False}
        if options.temperature > 0:
            torch.manual_seed(options.seed)
            sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
        streamer = _Streamer(tokenizer, on_text)
        inputs = inputs.to(device)
        tokens = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    return tokenizer.decode(tokens[0, inputs.shape[1] :], skip_special_tokens=True)


class _Streamer:
    """Hands text on as soon as its characters are whole; what transformers' `generate` calls a streamer."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None  # None: the prompt is still to come
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._on_text(text[self._shown :])
            self._shown = len(text)

    def end(self) -> None:
        text = self._tokenizer.decode(self._ids or [], skip_special_tokens=True)
        self._on_text(text[self._shown :])
