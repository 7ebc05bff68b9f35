"""`distzo2 finetune`: a checkpoint and a JSONL file, or a published task, go in, a run directory comes out.

A run is its base checkpoint and its journal. Everything else, from the batch of a step to its learning rate, is a
function of the options and the step's number, so a run that was interrupted continues as if it had not been. This
module is what comes before the first step: what can be refused is refused, the run directory is claimed, the model is
loaded. The steps are in loop.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.reading import ADAPTER_FILE, ADAPTER_WEIGHTS, digest_adapter
from distzo2.checkpoint.writing import CONFIG_FILE, DISK_SLACK_BYTES
from distzo2.datasets.draw import TaskReader, draw, loss_of
from distzo2.datasets.protocol import line_of
from distzo2.datasets.rows import find_task
from distzo2.errors import UsageError, blaming
from distzo2.files import write_whole
from distzo2.optim.selection import trained
from distzo2.optim.signal import REFERENCE
from distzo2.parallel.group import Mesh, current
from distzo2.peft.adapters import known_config, tokens_in_front
from distzo2.peft.merging import NO_MERGE, check_merges
from distzo2.peft.start import start_from_tokens
from distzo2.record.journal import Journal
from distzo2.record.weight_file import WeightFile
from distzo2.rewards.functions import FIGURES, Reward, absolute, digest, file_of
from distzo2.rewards.objective import RewardObjective, Writing, questions_digest
from distzo2.rewards.worker import open_reward, open_scores
from distzo2.run.directory import RunDirectory, read_record
from distzo2.run.inference import evaluate_file
from distzo2.run.launch import from_rank_0, launch_id, restarts, together
from distzo2.run.loop import TrainLoop
from distzo2.run.metrics import check_report, finite, peak_bytes
from distzo2.run.options import EvalOptions, FinetuneOptions, changed
from distzo2.run.preflight import (
    ModelSize,
    adapter_config,
    beside_prompt,
    check_disk,
    check_memory,
    check_output,
    freezes_base,
    load_model,
    placed,
    prepared,
    reading_of,
    widens,
)
from distzo2.streaming.offload import runtime_of
from distzo2.tasks.examples import examples_digest, load_examples
from distzo2.tasks.held_out import HeldOut, load_held_out, load_questions
from distzo2.tasks.kinds import forward_config, model_kind
from distzo2.tasks.objectives import Objective, resolve_objective
from distzo2.tasks.tokenize import load_tokenizer
from distzo2.text import MAX_BRIEF, dtype_name, gib

_PATHS = (  # absolute in run.json
    "model", "train", "eval", "data", "task_file", "trace", "branch_from", "weights_dir", "adapter",
)  # fmt: skip


_MADE_OF = {
    "train_sha256": "the training file",
    "examples_sha256": "the tokens of its lines",
    "config": "config.json",
    "reward_sha256": "the reward's file",
    "score_sha256": "the score's file",
}


def finetune(options: FinetuneOptions, log: Callable[[str], None] = lambda line: None) -> None:
    """Runs `distzo2 finetune` to the end; of a task, evaluates the checkpoint then.

    Raises:
        DistZO2Error: bad input, or the run stopped itself. The journal holds every step that was made.
        KeyboardInterrupt: the step in flight is dropped whole or in the journal whole.
    """
    _train(options, log)
    if options.task and options.save != "none":  # the model that was trained is no longer in memory
        _evaluate_task(options, log)


def _evaluate_task(options: FinetuneOptions, log: Callable[[str], None]) -> None:
    """Evaluates what a run made on the rows that the task draws for evaluation, and writes OUT/task.json."""
    run, mesh = RunDirectory(options.out), current()
    adapted = {"model": options.model, "adapter": str(run.adapter)}
    values = {"model": str(run.checkpoint)} if options.writes_model else adapted
    there = Path(values["model"])
    if mesh is not None or not (there.is_file() or (there / CONFIG_FILE).exists()):  # ranks may share no disk
        if mesh is None or mesh.rank == 0:
            given = " ".join(f"--{name} {value}" for name, value in values.items())
            log(f"to evaluate: distzo2 eval --task {options.task} --data {options.data} {given}")
        return
    shared = {f.name for f in fields(EvalOptions)} & vars(options).keys() - {"eval", "score", *values, "adapter"}
    shared -= {"store"} if options.writes_model else set()  # what was trained is written decoded
    values |= {name: getattr(options, name) for name in shared} | {"batch_size": options.eval_batch_size}
    score, objective = evaluate_file(EvalOptions(**values))
    figures = {"task": options.task, **score.figures(), "examples": score.num_examples, "objective": objective}
    write_whole(Path(options.out) / "task.json", (json.dumps(finite(figures)) + "\n").encode())
    log(f"task {options.task}: {score} ({score.num_examples} examples)")


def _train(options: FinetuneOptions, log: Callable[[str], None]) -> None:
    mesh, run = current(), RunDirectory(options.out)
    leads = mesh is None or mesh.rank == 0  # this process writes the run directory and prints
    log = log if leads else (lambda line: None)
    if options.protocol and not options.resume:
        log(line_of(asdict(options)))
    terms = from_rank_0("looking for a run to continue", lambda: _continues(options, run, log))
    parallel = options.parallel if mesh is None else str(mesh.shape)
    settled = {name: terms.pop(name) for name in ("resume", "compute_dtype", "lr")}
    options = replace(options, parallel=parallel, **settled)
    with ExitStack() as opened:
        own = opened.enter_context(tempfile.TemporaryDirectory(prefix="distzo2-"))  # of a rank that may not see --out
        start = run.adapter_start if leads else Path(own, "adapter_start")
        _finetune(options, log, mesh, run, terms, start, opened)


def _finetune(
    options: FinetuneOptions,
    log: Callable[[str], None],
    mesh: Mesh | None,
    run: RunDirectory,
    terms: dict[str, Any],
    start: Path,
    opened: ExitStack,
) -> None:
    """The run; `start` is where this rank has the adapter that it begins with, if it trains one, and `opened` closes
    the rewards at the end."""
    leads = mesh is None or mesh.rank == 0
    with together(mesh, "reading data and options"):
        # With --device cuda each rank of a machine has a GPU to itself.
        own_gpu = mesh is not None and options.device == "cuda"
        place = placed(options, f"cuda:{mesh.local_rank}" if own_gpu else options.device)
        device, size, compute_dtype = place
        check_output(trace=options.trace)
        if leads:
            check_report(options.report_to)
        kind, tokenizer = model_kind(options.model), load_tokenizer(options.model)
        source, config = _adapter(options, kind.name, mesh, start)
        kind = beside_prompt(kind, config)
        clock = datetime.fromisoformat(terms["clock"])
        reading = reading_of(options, kind) | {"clock": clock, "legacy": terms["legacy"]}
        rewarded = options.objective == "reward"
        if rewarded and kind.name not in ("causal", "encoder-decoder"):
            raise UsageError(f"--objective reward: {options.model}: {kind.model} generates no text")
        own = {"timeout": options.reward_timeout, "inline": options.reward_inline}
        reward = open_reward(options.reward, **own) if rewarded else None
        if reward is not None:
            opened.enter_context(closing(reward))
        rewards = open_scores(options.score, reward, **own) if options.eval or options.task else {}
        for each in rewards.values():
            opened.callback(getattr(each, "close", lambda: None))
        train, held_out, objective_name, data_sha256 = _data(options, tokenizer, reading, rewards)
        # Room is made for what the look at the signal computes in, and maybe the run after it.
        is_open = options.compute_dtype == "auto" and not (options.resume or options.no_signal or rewarded)
        widest = REFERENCE if is_open else compute_dtype
        copies = {"num_ranks": _ranks_here(), "num_copies": _copies_here(options.weights)}
        held = replace(size, total=2 * size.total) if options.anchor and not freezes_base(options) else size
        check_memory(held, device, options.weights, options.host_memory, compute_dtype=widest, **copies)
        made_of = {
            "train_sha256": data_sha256,
            "examples_sha256": questions_digest(train) if rewarded else examples_digest(train),
            "config": forward_config(options.model),
        }
        if reward is not None:
            made_of["reward_sha256"] = reward.sha256
        if rewards and (judges := _judges(options)):
            made_of["score_sha256"] = digest(judges[0])
    if mesh is not None:
        named = {_MADE_OF[name]: value for name, value in made_of.items()}
        mesh.exchange.agree("the data", named | {"the bytes of the model": size.total})
    settings = asdict(options)
    settings |= {name: str(Path(settings[name]).absolute()) for name in _PATHS if settings[name]}
    if rewarded:
        settings["reward"] = absolute(options.reward)
    for name in _judges(options):
        settings["score"] = absolute(name)
    loop = None
    try:
        with together(mesh, "claiming the run directory"):
            if leads:
                run.claim()
                if options.resume:
                    _take_over(options, log, run, settings, made_of)
                if run.resumes:
                    run.remove_leftovers()  # they take the room that this run's will
                _check_room(options, held, run)
                if not options.resume:  # if this process is killed before the journal is there, --resume begins again
                    run.update(options=settings, **made_of, **terms, status="starting", launch=launch_id())
        with together(mesh, "loading the model"):
            model = load_model(
                options,
                place,
                widest,
                weight_file=_weight_file(options, run, log),
                train=options.train_mode,
                prepare=lambda *held: _prepared(options, source, config, start, *held),
                widen=terms["widen"] and widens(options),
                keep_start=terms["keep_start"],
            )
        with closing(runtime_of(model)):
            if source is config and config is not None and config.is_prompt_learning:  # a new one
                with together(mesh, "starting the adapter"):
                    start_from_tokens(model, start, options.seed, mesh)
            if runtime_of(model).told:
                log(runtime_of(model).told)
            what = trained(runtime_of(model).params) or ("" if options.quiet else "training all weights")
            if what:
                log(f"{what}, lr {options.lr}, eps {options.eps:g}")
            pad_id, front = kind.padding(tokenizer), tokens_in_front(config)
            if rewarded:
                more = {"max_new_tokens": options.max_new_tokens, "stop": options.stop or ()}
                sampling = {"temperature": options.temperature, "top_k": options.top_k}
                objective = RewardObjective(model, reward, Writing(tokenizer, pad_id, **more, **sampling))
            else:
                objective = Objective(model, objective_name, pad_id=pad_id, device=device, in_front=front)
            loop = TrainLoop(options, log, run, model, objective, train, held_out, size)
            with closing(loop):
                with together(mesh, "starting the run"):
                    computed = runtime_of(model).compute_dtype if options.resume else loop.settle_compute_dtype()
                    if options.compute_dtype == "auto":
                        settings["compute_dtype"] = dtype_name(computed or "stored")
                    settings["lr"] = loop.settle_rate()
                    if leads and not options.resume:  # before there is a journal: from then on it is not "auto" again
                        run.update(options=settings, adapter=None if config is None else digest_adapter(start))
                    if not (options.resume or options.no_check or rewarded):
                        with blaming(f"{options.model}: the model fails on the first line"):
                            objective.check_causal(train[0], kind)
                    loop.start(settings, made_of["examples_sha256"])
                    if leads and options.resume:  # it may have another score now
                        run.update(score_sha256=made_of.get("score_sha256"))
                loop.run_to_end()
        memory = f"peak memory {gib(peak_bytes())}, weights {gib(size.total)}"
        log(f"{loop.optimizer.step_count} steps in {run.path}; {memory}")
    except BaseException as error:
        foreign = isinstance(error.__cause__, FileExistsError)  # another program made a journal meanwhile
        if loop is None or not loop.has_stepped:
            run.withdraw(with_journal=not foreign)
            if isinstance(error, KeyboardInterrupt) and not options.resume:
                raise KeyboardInterrupt("interrupted before the first step: nothing was written") from None
        raise
    finally:
        run.release()


def _data(
    options: FinetuneOptions, tokenizer: Any, reading: dict[str, Any], rewards: Mapping[str, Reward]
) -> tuple[list[Any], HeldOut, str, str]:
    """The examples to learn, those to judge by, the objective's name, and the SHA-256 of what is learned, as text."""
    more = {"max_new_tokens": options.max_new_tokens, "stop": options.stop or (), **reading}
    if options.objective == "reward":
        asked = {"max_new_tokens": options.max_new_tokens, **reading}
        train, held_out = load_questions(options.train, tokenizer, rewards=[options.reward], **asked), HeldOut()
        if options.eval:
            writing = Writing(tokenizer, reading["kind"].padding(tokenizer), options.max_new_tokens, more["stop"])
            names = {options.reward, *_judges(options)}
            questions = load_questions(options.eval, tokenizer, rewards=names, **asked)
            held_out = HeldOut(questions=questions, writing=writing, rewards=rewards)
        return train, held_out, "reward", hashlib.sha256(Path(options.train).read_bytes()).hexdigest()
    if options.task:
        task = find_task(options.task, options.task_file)
        reader = TaskReader(task, tokenizer, **more)
        drawn = draw(
            task,
            options.data,
            options.task_seed,
            num_train=options.num_train or task.num_train,
            num_dev=options.num_dev or task.num_dev,
            num_eval=options.num_eval or task.num_eval,  # for the end: what is wrong with them is reported now
        )
        loss, name = loss_of(task, options.objective)
        train = reader.learned(drawn.train, loss)
        return train, reader.held_out(drawn.dev, loss, rewards=rewards), resolve_objective(name, train), drawn.digest()
    train = load_examples(options.train, tokenizer, **reading)
    name = resolve_objective(options.objective, train, options.train)
    more |= {"rewards": rewards, "score": options.score}
    held_out = load_held_out(options.eval, tokenizer, **more) if options.eval else HeldOut()
    if held_out:
        resolve_objective(name, held_out.learned, options.eval)
    return train, held_out, name, hashlib.sha256(Path(options.train).read_bytes()).hexdigest()


def _judges(options: FinetuneOptions) -> list[str]:
    """The reward that --score names, if it names one besides the run's own."""
    return [] if options.score in (None, *FIGURES) else [options.score]


def _adapter(options: FinetuneOptions, kind: str, mesh: Mesh | None, start: Path) -> tuple[Any, Any]:
    """Where the run's adapter comes from (a directory, or the configuration of a new one) and its configuration; None
    where it trains none. A resumed run's is in `start` on every rank afterwards."""
    if options.adapts and (options.resume or options.branch_from):
        held = start if options.resume else RunDirectory(options.branch_from).adapter_start
        for name in (ADAPTER_FILE, ADAPTER_WEIGHTS) if mesh is not None else ():
            data = mesh.exchange.from_rank_0("the adapter", (held / name).read_bytes)
            if mesh.rank:
                start.mkdir(exist_ok=True)
                (start / name).write_bytes(data)
        held = held if mesh is None or mesh.rank == 0 else start
        return held, known_config(held, kind)
    config = adapter_config(options, options.model, kind)
    return Path(options.adapter) if options.adapter else config, config


def _prepared(
    options: FinetuneOptions, source: Any, config: Any, start: Path, model: torch.nn.Module, base: CheckpointMap
) -> tuple[torch.nn.Module, CheckpointMap]:
    """The model and its map with what the run trains; what cannot be merged at its end is refused."""
    if source is not None and options.merge and base.is_packed:
        raise UsageError(f"--merge: {NO_MERGE.format(base.formats)}")
    names = {id(p): name for name, p in model.named_parameters()}
    model, base = prepared(options, source, config, None if options.resume else start, options.seed, model, base)
    if source is not None and options.merge:
        check_merges(model, names)
    return model, base


def _continues(options: FinetuneOptions, run: RunDirectory, log: Callable[[str], None]) -> dict[str, Any]:
    """Whether the run continues what is in --out ("resume"), as asked or because torchrun restarted these ranks; the
    time that its chat template sees ("clock"); whether it began before examples had a hash ("legacy"); whether small
    parts are stored in float32 ("widen"), as in its parent; whether the weights at the start are kept ("keep_start"),
    which steps of a parent may need; what it computes in, which was settled when it began."""
    restarted = restarts() > 0 and run.is_of_launch(launch_id())
    continues = run.check(options.resume or restarted)
    if continues and restarted:
        log(f"restart {restarts()}: continuing the run in {options.out}")
    before = run.record if continues else {}
    legacy = before.get("legacy", continues and "examples_sha256" not in before)
    compute_dtype = options.compute_dtype
    if continues and compute_dtype == "auto":
        compute_dtype = before["options"]["compute_dtype"]
    lr = before["options"]["lr"] if continues and options.lr == "auto" else options.lr
    clock = before.get("clock") or datetime.now().isoformat()
    parent = read_record(Path(options.branch_from)) if options.branch_from else {"widen": True}
    earlier = before if continues else parent
    widen, keep_start = earlier.get("widen", False), options.anchor > 0 or earlier.get("keep_start", False)
    settled = {"resume": continues, "compute_dtype": compute_dtype, "lr": lr}
    return settled | {"clock": clock, "legacy": legacy, "widen": widen, "keep_start": keep_start}


def _ranks_here() -> int:
    """Ranks of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if current() is not None else 1


def _copies_here(weights: str) -> int:
    """Copies of the streamed weights that this machine keeps at least."""
    mesh = current()
    return _ranks_here() if mesh is None or mesh.node is None or weights == "device" else 1


def _take_over(
    options: FinetuneOptions, log: Callable[[str], None], run: RunDirectory, settings: dict, made_of: dict
) -> None:
    """Checks what must hold before an earlier process's run continues."""
    for change in changed(run.record["options"], settings, str(run.path)):
        log(f"resume: {change}")
    if settings["score"] != run.record["options"].get("score"):  # which may change
        made_of = made_of | {"score_sha256": None}
    _compare(run, made_of, settings["train"] or f"{settings['data']} (task {settings['task']})")
    start = run.record.get("adapter")
    if start is not None and start != digest_adapter(run.adapter_start):
        raise UsageError(f"{run.adapter_start}: is not the adapter that the run began with")
    with Journal.open(run.journal) as journal:
        if journal.torn:
            log(journal.torn)
        num_steps = len(journal.entries)
    if num_steps > options.steps:
        advice = f"distzo2 replay {run.path} --to-step {options.steps} makes an earlier checkpoint again"
        raise UsageError(f"--steps {options.steps}: {run.path} has made {num_steps} already; {advice}")
    if options.save != "none":
        run.check_checkpoint()
    if (run.path / "snapshots").exists():
        log(f"{run.path / 'snapshots'}: snapshots of an earlier version are not read, and may be removed")


def _compare(run: RunDirectory, made_of: dict[str, Any], train: str) -> None:
    """Raises UsageError unless a step that is repeated would learn the same. What an earlier version did not record is
    not compared; what is read of the training file decides, not its bytes, once that is recorded."""
    before = run.record
    differs = {key for key, value in made_of.items() if value is not None and before.get(key) not in (None, value)}
    if "examples_sha256" in differs or ("examples_sha256" not in before and "train_sha256" in differs):
        what = f"the training file is not the one that the run began with: {train}"
        if "train_sha256" not in differs:
            what = f"{train} becomes other tokens than when the run began: the tokenizer or its chat template changed"
        raise UsageError(f"{run.path}: {what}")
    for what in ("reward", "score"):
        if f"{what}_sha256" in differs:
            file = file_of(run.record["options"][what])
            raise UsageError(f"{run.path}: the {what} is not the one that the run began with: {file} changed")
    if "config" in differs:
        was, now = before["config"], made_of["config"]
        key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
        change = " and is ".join(fields.get(key, "absent")[:MAX_BRIEF] for fields in (was, now))
        raise UsageError(f"{run.path}: config.json of the model: {key} was {change}: start a new run for that")


def _weight_file(options: FinetuneOptions, run: RunDirectory, log: Callable[[str], None]) -> WeightFile | None:
    """Where the run keeps weights that survive a crash; None if it keeps none, and an earlier process kept none."""
    path, every = run.weight_file(options.weights_dir), options.snapshot_every
    if every is None:
        every = 100 if options.weights == "disk" else 0
    exists = from_rank_0("looking for a weight file", path.exists)  # machines may share no disk
    if not (every or options.snapshot_minutes or options.weights == "disk" or exists):
        return None
    return WeightFile(path, run.journal, every, options.snapshot_minutes, options.snapshot_pace, log)


def _check_room(options: FinetuneOptions, size: ModelSize, run: RunDirectory) -> None:
    """Raises DistZO2Error unless the weight files and the checkpoint fit on their disks. A checkpoint of fewer steps
    makes room for the new one, and so does a weight file."""
    weights: dict[str, int] = {}
    # Adapters and gains are small. What is frozen beside them stays in its own files, but for what is made at load.
    is_frozen = freezes_base(options)
    if run.weight_file(options.weights_dir).exists():
        pass
    elif options.weights == "disk":
        streamed = size.made if is_frozen else size.total
        weights = {"the file of streamed weights": streamed * _copies_here(options.weights)}
    elif (options.snapshot_every or options.snapshot_minutes) and not is_frozen:
        weights = {"the copies of the weights": size.total}
    needs: dict[str, int] = {}
    if options.writes_model and options.save != "none" and not run.has_checkpoint:
        needs["the checkpoint"] = size.decoded
    if options.save != "none":  # the writer of the checkpoint asks for it at the end
        needs["to spare"] = DISK_SLACK_BYTES
    if options.weights_dir:
        check_disk(options.weights_dir, weights)
        weights = {}
    check_disk(options.out, weights | needs)
