"""`distzo2 eval`, `signal` and `generate`: a checkpoint is evaluated, or continues a text; its weights stream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from distzo2.datasets.draw import TaskReader, draw, loss_of
from distzo2.datasets.rows import find_task
from distzo2.errors import DistZO2Error, RewardError, UsageError, blaming
from distzo2.optim.signal import ENOUGH, REFERENCE, TF32, Signal, computed_in, signal_of
from distzo2.peft.adapters import adapter, known_config, tokens_in_front
from distzo2.peft.start import start_from_tokens
from distzo2.rewards.functions import WORDS, Reward
from distzo2.rewards.objective import Writing
from distzo2.rewards.worker import open_scores
from distzo2.run.metrics import finite
from distzo2.run.options import EvalOptions, GenerateOptions, SignalOptions
from distzo2.run.preflight import (
    DTYPES,
    adapter_config,
    beside_prompt,
    check_disk,
    check_memory,
    freezes_base,
    load_model,
    placed,
    prepared,
    reading_of,
    widens,
)
from distzo2.streaming.offload import check_computes, runtime_of
from distzo2.tasks.batches import DataOrder
from distzo2.tasks.examples import load_examples, tokenize_for
from distzo2.tasks.held_out import HeldOut, load_held_out, load_questions, only_asks
from distzo2.tasks.kinds import ModelKind, model_kind
from distzo2.tasks.objectives import Objective, Score, resolve_objective
from distzo2.tasks.tokenize import load_tokenizer
from distzo2.text import dtype_name

BENT = 0.5  # of |L+ + L- - 2 L0| to |L+ - L-|, from which a difference is no slope any more
SAME_COST = 1.1  # times the least seconds: of settings within it, the one with the least error is named


@contextmanager
def loaded(
    options: EvalOptions | GenerateOptions | SignalOptions, config: Any = None
) -> Iterator[tuple[torch.nn.Module, torch.device]]:
    """The model of `options`, with the adapter whose `config` is given, after the checks of its device and of the room
    it needs. For `SignalOptions`, with what they train."""
    place = placed(options, options.device)
    perturbs = isinstance(options, SignalOptions)
    widest = REFERENCE if perturbs else place.compute_dtype
    check_memory(place.size, place.device, options.weights, options.host_memory, compute_dtype=widest)
    with tempfile.TemporaryDirectory(prefix="distzo2-", dir=options.weights_dir) as directory:
        start, more = Path(directory, "start"), {}
        prepare = lambda model, found: (model.requires_grad_(False), found)  # noqa: E731  (then no second copy is made)
        if perturbs:
            source, more = Path(options.adapter) if options.adapter else config, {"widen": widens(options)}
            prepare = partial(prepared, options, source, config, start, options.seed)
        elif config is not None:
            prepare = adapter(options.adapter, config=config)
        if options.weights == "disk":
            streamed = place.size.total if perturbs and not freezes_base(options) else place.size.made
            check_disk(directory, {"the file of streamed weights": streamed})
        model = load_model(options, place, widest, directory=directory, prepare=prepare, **more)
        with closing(runtime_of(model)):
            if perturbs and source is config and config is not None and config.is_prompt_learning:
                start_from_tokens(model, start, options.seed)
            yield model, place.device


def _kind(options: EvalOptions | GenerateOptions | SignalOptions) -> tuple[ModelKind, Any]:
    """The kind of the model, and the configuration of its adapter, if it has one."""
    kind = model_kind(options.model)
    if isinstance(options, SignalOptions):
        config = adapter_config(options, options.model, kind.name)
    else:
        config = None if options.adapter is None else known_config(Path(options.adapter), kind.name)
    return beside_prompt(kind, config), config


def evaluate_file(options: EvalOptions) -> tuple[Score, str]:
    """The score on a JSONL file or a published task, and the objective's name."""
    (kind, config), tokenizer = _kind(options), load_tokenizer(options.model)
    reading = {"max_new_tokens": options.max_new_tokens, "stop": options.stop or (), **reading_of(options, kind)}
    with ExitStack() as opened:
        rewards = open_scores(options.score, timeout=options.reward_timeout, inline=options.reward_inline)
        for each in rewards.values():
            opened.callback(getattr(each, "close", lambda: None))
        rewards = {figure: _failing(options.score, reward) for figure, reward in rewards.items()}
        held_out, name = _asked(options, tokenizer, reading, rewards)
        model, device = opened.enter_context(loaded(options, config))
        opened.enter_context(blaming(f"{options.model}: the model fails"))
        front = tokens_in_front(config)
        objective = Objective(model, name, pad_id=kind.padding(tokenizer), device=device, in_front=front)
        if held_out.learned:
            objective.check_causal(held_out.learned[0], kind)
        return held_out.score(objective, batch_size=options.batch_size), name


def _failing(score: str | None, reward: Reward) -> Reward:
    """A reward whose failure ends the evaluation, and is not a figure."""

    def checked(*arguments: Any) -> Sequence[float]:
        try:
            return reward(*arguments)
        except RewardError as error:
            raise DistZO2Error(f"--score {score}: {error}") from error

    return checked


def _asked(
    options: EvalOptions, tokenizer: Any, reading: dict[str, Any], rewards: Mapping[str, Reward]
) -> tuple[HeldOut, str]:
    """What a model is asked, and the objective's name."""
    if not options.task and rewards and only_asks(options.eval):
        writing = Writing(tokenizer, reading["kind"].padding(tokenizer), reading["max_new_tokens"], reading.pop("stop"))
        questions = load_questions(options.eval, tokenizer, rewards=[options.score], **reading)
        return HeldOut(questions=questions, writing=writing, rewards=rewards), "reward"
    if not options.task:
        held_out = load_held_out(options.eval, tokenizer, rewards=rewards, score=options.score, **reading)
        return held_out, resolve_objective(options.objective, held_out.learned, options.eval)
    task = find_task(options.task, options.task_file)
    reader = TaskReader(task, tokenizer, **reading)
    num_eval = options.num_eval or task.num_eval
    drawn = draw(task, options.data, options.task_seed, num_train=options.shots, num_eval=num_eval)
    loss, name = loss_of(task, options.objective)
    rewards = rewards or (WORDS if task.generates else {})
    held_out = reader.held_out(drawn.eval, loss, shots=drawn.train, calibrate=options.calibrate, rewards=rewards)
    return held_out, resolve_objective(name, held_out.learned, f"task {task.name}")


def signals_of_file(options: SignalOptions) -> list[Signal]:
    """How much of a step on the first batch of a file is signal, in each dtype that the device computes in, or in the
    one that is named.

    Raises:
        UsageError: --eps is no list of positive numbers.
    """
    try:
        sizes = [float(size) for size in options.eps.split(",")]
        if not all(0 < size < float("inf") for size in sizes):
            raise ValueError
    except ValueError:
        raise UsageError(f"--eps {options.eps}: positive numbers with commas between were expected") from None
    (kind, config), tokenizer = _kind(options), load_tokenizer(options.model)
    examples = load_examples(options.train, tokenizer, **reading_of(options, kind))
    name = resolve_objective(options.objective, examples, options.train)
    with loaded(options, config) as (model, device), blaming(f"{options.model}: the model fails"):
        front = tokens_in_front(config)
        objective = Objective(model, name, pad_id=kind.padding(tokenizer), device=device, in_front=front)
        batch = DataOrder(len(examples), options.batch_size, options.seed).batch(0)
        closure = objective.closure(objective.batch([examples[i] for i in batch]))
        dtypes = [dtype for dtype in DTYPES.values() if _computes(device, dtype)]
        dtypes[1:1] = [TF32] if device.type == "cuda" else []
        dtypes = dtypes if options.compute_dtype == "auto" else [computed_in(runtime_of(model))]
        more = {"noise": options.noise, "seed": options.seed, "max_lanes": options.max_lanes}
        return signal_of(model, [closure], dtypes=dtypes, eps=sizes, probes=options.probes, **more)


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        check_computes(device, dtype)
    except DistZO2Error:
        return False
    return True


def table_of_signals(signals: Sequence[Signal]) -> list[str]:
    """The lines of `distzo2 signal`: a row for each dtype and eps, the cheapest setting with enough signal, and the
    largest eps that curvature does not bend."""
    lines = [f"{'compute':<9}{'eps':>8}{'correlation':>13}{'at least':>10}{'slope':>8}{'error':>8}{'|L+ - L-|':>11}"
             f"{'floor':>10}{'curvature':>11}{'seconds':>9}"]  # fmt: skip
    seconds = {s.dtype: min(other.seconds for other in signals if other.dtype == s.dtype) for s in signals}
    for s in signals:
        lines.append(
            f"{dtype_name(s.dtype):<9}{s.eps:>8g}{s.correlation:>13.3f}{s.least:>10.3f}{s.slope:>8.2f}{s.relative_error:>8.2f}"
            f"{s.difference:>11.1e}{s.floor:>10.1e}{s.curvature:>11.2f}{s.seconds:>9.1f}"
        )
    good = [s for s in signals if s.is_enough]
    straight = [s for s in good if s.curvature <= BENT]
    if not good:
        return [
            *lines,
            f"no setting has a correlation that is surely {ENOUGH} or more: a larger batch or --eps may have",
        ]
    some = straight or good
    least = min(seconds[s.dtype] for s in some)
    best = min((s for s in some if seconds[s.dtype] <= SAME_COST * least), key=lambda s: s.relative_error)
    how = "float32 --tf32" if best.dtype == TF32 else dtype_name(best.dtype)
    lines.append(f"cheapest with a correlation of surely {ENOUGH} or more: --compute-dtype {how} --eps {best.eps:g}")
    if straight:
        lines.append(f"largest eps before curvature bends the loss: {max(s.eps for s in straight):g}")
    return lines


def json_of_signals(signals: Sequence[Signal]) -> list[dict[str, Any]]:
    """A row for each dtype and eps; what is not a number is null."""
    return [finite(vars(s) | {"dtype": dtype_name(s.dtype), "differences": s.differences.tolist()}) for s in signals]


@torch.no_grad()
def generate_text(options: GenerateOptions) -> None:
    """Continues a prompt, and prints the continuation word by word.

    Raises:
        DistZO2Error: the model generates no text, or the prompt has no tokens or more than the model has positions.
    """
    (kind, config), tokenizer = _kind(options), load_tokenizer(options.model)
    if kind.name not in ("causal", "encoder-decoder"):
        raise DistZO2Error(f"{options.model}: {kind.model} generates no text")
    with blaming(f"{options.model}: the tokenizer fails"):
        inputs = torch.tensor([tokenize_for(tokenizer, kind).prompt(options.prompt)])
    if not inputs.numel():
        raise DistZO2Error("the prompt has no tokens: it is --prompt, or what standard input gives")
    longest = inputs.shape[1] + options.max_new_tokens
    if kind.name == "encoder-decoder":  # its decoder begins with a start token
        longest = max(inputs.shape[1], options.max_new_tokens + 1)
    if kind.positions is not None and longest > kind.positions:
        sizes = f"a prompt of {inputs.shape[1]} tokens and {options.max_new_tokens} new ones"
        raise DistZO2Error(f"{sizes}: the model has {kind.positions} positions")
    with loaded(options, config) as (model, device), blaming(f"{options.model}: the model fails"):
        sampling = {"do_sample": False}
        if options.temperature > 0:
            torch.manual_seed(options.seed)
            sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
        inputs = inputs.to(device)
        model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=kind.padding(tokenizer),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
