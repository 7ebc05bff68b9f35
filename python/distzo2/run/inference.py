"""`distzo2 eval` and `distzo2 generate`: a checkpoint is evaluated, or continues a text; its weights stream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from transformers import TextStreamer

from distzo2.checkpoint.pretrained import from_pretrained
from distzo2.errors import DistZO2Error, blaming
from distzo2.run.options import EvalOptions, GenerateOptions
from distzo2.run.preflight import DTYPES, check_disk, check_memory, model_size, reading_of
from distzo2.streaming.offload import runtime_of, usable_device
from distzo2.tasks.examples import load_examples, tokenize_for
from distzo2.tasks.kinds import model_kind
from distzo2.tasks.objectives import Objective, Score, evaluate_examples, resolve_objective
from distzo2.tasks.tokenize import load_tokenizer


@contextmanager
def loaded(options: EvalOptions | GenerateOptions) -> Iterator[tuple[torch.nn.Module, torch.device]]:
    """The model of `options`, after the checks of its device and of the room it needs."""
    device = usable_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    size = model_size(options.model, DTYPES.get(options.dtype))
    check_memory(size, device, options.weights, options.host_memory)
    with tempfile.TemporaryDirectory(prefix="distzo2-", dir=options.weights_dir) as directory:
        if options.weights == "disk":
            check_disk(directory, {"the file of streamed weights": size.total})
        model = from_pretrained(
            options.model,
            device=device,
            weights=options.weights,
            dtype=DTYPES.get(options.dtype),
            directory=directory,
            memory_budget=options.memory_budget,
            host_memory=options.host_memory,
            write_every=options.write_every,
        )
        with closing(runtime_of(model)):
            yield model, device


def evaluate_file(options: EvalOptions) -> tuple[Score, str]:
    """Loss and accuracy on a JSONL file, and the objective's name."""
    kind, tokenizer = model_kind(options.model), load_tokenizer(options.model)
    examples = load_examples(options.eval, tokenizer, **reading_of(options, kind))
    name = resolve_objective(options.objective, examples, options.eval)
    with loaded(options) as (model, device), blaming(f"{options.model}: the model fails"):
        objective = Objective(model, name, pad_id=kind.padding(tokenizer), device=device)
        objective.check_causal(examples[0], kind)
        return evaluate_examples(objective, examples, batch_size=options.batch_size), name


@torch.no_grad()
def generate_text(options: GenerateOptions) -> None:
    """Continues a prompt, and prints the continuation word by word.

    Raises:
        DistZO2Error: the model generates no text, or the prompt has no tokens or more than the model has positions.
    """
    kind, tokenizer = model_kind(options.model), load_tokenizer(options.model)
    if kind.name not in ("causal", "encoder-decoder"):
        raise DistZO2Error(f"{options.model}: {kind.model} generates no text")
    with blaming(f"{options.model}: the tokenizer fails"):
        inputs = torch.tensor([tokenize_for(tokenizer, kind).prompt(options.prompt)])
    if not inputs.numel():
        raise DistZO2Error("the prompt has no tokens")
    longest = inputs.shape[1] + options.max_new_tokens
    if kind.name == "encoder-decoder":  # what it adds, it adds after a start of its own
        longest = max(inputs.shape[1], options.max_new_tokens + 1)
    if kind.positions is not None and longest > kind.positions:
        sizes = f"a prompt of {inputs.shape[1]} tokens and {options.max_new_tokens} new ones"
        raise DistZO2Error(f"{sizes}: the model has {kind.positions} positions")
    with loaded(options) as (model, device), blaming(f"{options.model}: the model fails"):
        sampling = {"do_sample": False}
        if options.temperature > 0:
            torch.manual_seed(options.seed)
            sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
        inputs = inputs.to(device)
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=kind.padding(tokenizer),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
